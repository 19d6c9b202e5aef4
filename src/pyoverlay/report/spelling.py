"""How an upper's marks are spelled, `trusted.overlay.*` or `user.overlay.*`, where nobody has said so."""

from __future__ import annotations

import errno

from pyoverlay.core import marks
from pyoverlay.core.layer import Layer
from pyoverlay.errors import Refusal


def require_trusted(layer: Layer, dirfd: int, name: bytes, path: bytes) -> None:
    """Raises Refusal for a directory that has the other marks, and none of these: what is made of it would be wrong. path: for people."""
    names = layer.listxattr(dirfd, name)
    if any(name.startswith(marks.USER) for name in names) and not any(name.startswith(marks.TRUSTED) for name in names):
        raise Refusal(path, "its marks are user.overlay.* attributes, of a mount made with userxattr", errno.EINVAL, "say --userxattr")
