"""What two uppers hold after the same operations: what `find` over both must show the same."""

from __future__ import annotations

import os
from pathlib import Path

from pyoverlay.testing import Entry, snapshot

_OPAQUE, _REDIRECT, _ORIGIN = "trusted.overlay.opaque", "trusted.overlay.redirect", "trusted.overlay.origin"

Objects = dict[bytes, tuple[object, ...]]


def disk_difference(kernel: Path, ours: Path) -> str:
    """A line for each path where the uppers differ; empty if nothing does."""
    theirs, own = snapshot(kernel), snapshot(ours)
    found = _compared(_marks(theirs), _marks(own), theirs.keys() | own.keys())
    # What only one side has is a copy of a lower that nothing was written to: the kernel copies up at open(O_WRONLY), we at the write.
    both = theirs.keys() & own.keys()
    alone = (theirs.keys() | own.keys()) - both
    found += [f"{os.fsdecode(path)}: in one upper alone" for path in sorted(alone) if not _is_a_copy((theirs | own)[path])]
    found += _compared(_contents(theirs), _contents(own), both)
    return "\n".join(found)


def _compared(kernel: Objects, ours: Objects, paths: set[bytes]) -> list[str]:
    return [
        f"{os.fsdecode(path)}: kernel {kernel.get(path)}, ours {ours.get(path)}"
        for path in sorted(paths)
        if kernel.get(path) != ours.get(path)
    ]


def _is_a_copy(entry: Entry) -> bool:
    return any(name == _ORIGIN for name, _ in entry.xattrs)


def _marks(upper: dict[bytes, Entry]) -> Objects:
    """Path to (what it is, opaque, redirect) of whiteouts and marked directories.

    Redirects to where the directory is are left out: the kernel sets them before it asks the upper whether the target of a rename is
    empty.
    """
    found: Objects = {}
    for path, entry in upper.items():
        xattrs = dict(entry.xattrs)
        opaque, redirect = xattrs.get(_OPAQUE), xattrs.get(_REDIRECT)
        if redirect in (os.path.basename(path), b"/" + path):
            redirect = None
        if is_whiteout_entry(entry):
            found[path] = ("whiteout",)
        elif entry.kind == "d" and path != b"." and (opaque or redirect):
            found[path] = ("directory", opaque, redirect)
    return found


def is_whiteout_entry(entry: Entry) -> bool:
    """Is it the character device 0, 0?"""
    return entry.kind == "c" and entry.rdev == 0


def _contents(upper: dict[bytes, Entry]) -> Objects:
    """Path to all that a program could see of an object, but its times and its number of links."""
    return {
        path: (entry.kind, entry.mode, entry.uid, entry.gid, entry.rdev, entry.target, entry.digest, _own_xattrs(entry))
        for path, entry in upper.items()
        if not is_whiteout_entry(entry)
    }


def _own_xattrs(entry: Entry) -> tuple[tuple[str, bytes], ...]:
    return tuple((name, value) for name, value in entry.xattrs if not name.startswith("trusted.overlay."))
