"""Images and layers in tests: unpacked by `pyoverlay import`, mounted, and their trees compared."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from pyoverlay.testing import Entry, Overlay, make_tree, snapshot
from pyoverlay.testing.mounts import command


def imported(*arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(command("import", *arguments), check=False, capture_output=True, text=True, timeout=60)
    if check:
        assert result.returncode == 0, result.stderr
    return result


@contextmanager
def mounted(lowers: str, place: Path) -> Iterator[Overlay]:
    """A mount of lowers as `pyoverlay import` prints them, with an empty upper in `place`, which is made if it is missing."""
    place.mkdir(exist_ok=True)
    make_tree(place, {"upper": {}, "merged": {}})
    overlay = Overlay(tuple(map(Path, lowers.strip().split(":"))), place / "upper", place / "merged")
    overlay.mount()
    try:
        yield overlay
    finally:
        overlay.close()


def comparable(tree: Path) -> dict[bytes, Entry]:
    """Without what a layer does not carry: the root's own attributes, sockets, and links to names of a lower."""
    found = snapshot(tree)
    del found[b"."]
    return {path: replace(entry, nlink=0) for path, entry in found.items() if entry.kind != "s"}
