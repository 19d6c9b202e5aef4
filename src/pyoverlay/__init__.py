"""pyoverlay: an overlay file system in userspace.

Public names are loaded on first use, so that `import pyoverlay` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyoverlay.errors import DaemonFailed, OptionRefused, PyoverlayError, Refusal

__version__ = "0.1.0"

_HOMES = {
    "DaemonFailed": "pyoverlay.errors",
    "OptionRefused": "pyoverlay.errors",
    "PyoverlayError": "pyoverlay.errors",
    "Refusal": "pyoverlay.errors",
}

__all__ = ["DaemonFailed", "OptionRefused", "PyoverlayError", "Refusal", "__version__"]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
