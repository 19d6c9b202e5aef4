"""The layers of a mount of the kernel's own overlay, from what mountinfo shows of its options (ovl_show_options, fs/overlayfs/params.c)."""

from __future__ import annotations

import re
from dataclasses import dataclass

from pyoverlay.core.policy import Policy, RedirectDir, Whiteouts
from pyoverlay.errors import Refusal
from pyoverlay.mountinfo import Mount

_LAYER = re.compile(rb"((?:[^\\:]|\\.)+)(::?|\Z)", re.DOTALL)
_ESCAPE = re.compile(rb"\\(.)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class KernelLayers:
    """Paths as they were given to mount(2); upper and work None of a read-only mount."""

    lowers: tuple[bytes, ...]
    data_lowers: tuple[bytes, ...]
    upper: bytes | None
    work: bytes | None
    policy: Policy


def layers(path: bytes, mount: Mount) -> KernelLayers:
    """The layers of the overlay at `path`. Raises Refusal where they were named relative to a directory that nobody knows any more."""
    lowers, data_lowers = _lowers(mount)
    upper, work = mount.option(b"upperdir"), mount.option(b"workdir")
    found = KernelLayers(lowers, data_lowers, upper, work, _policy(mount))
    if not lowers or not all(layer.startswith(b"/") for layer in (*lowers, *data_lowers, upper or b"/", work or b"/")):
        remedy = "name its upper, and the layers below with --lower"
        raise Refusal(path, "a mount of the kernel's overlay that does not say where all its layers are", remedy=remedy)
    return found


def _lowers(mount: Mount) -> tuple[tuple[bytes, ...], tuple[bytes, ...]]:
    """Those that show, and the data-only ones; from `lowerdir=A:B::C`, or of mounts by fsconfig(2) from `lowerdir+=`, `datadir+=`."""
    joined = mount.option(b"lowerdir")
    if joined is None:
        return mount.values(b"lowerdir+"), mount.values(b"datadir+")
    found: tuple[list[bytes], list[bytes]] = ([], [])
    is_data = False
    for layer, separator in _LAYER.findall(joined):
        found[is_data].append(_ESCAPE.sub(rb"\1", layer))
        is_data = is_data or separator == b"::"
    return tuple(found[0]), tuple(found[1])


def _policy(mount: Mount) -> Policy:
    names = mount.options.split(b",")
    follows = mount.option(b"redirect_dir") != b"nofollow"
    return Policy(
        userxattr=b"userxattr" in names,
        redirect_dir=RedirectDir.FOLLOW if follows else RedirectDir.NOFOLLOW,
        metacopy=True,
        whiteouts=Whiteouts.KERNEL,
    )
