"""An overlay as the upper of another: the kernel's, and our own. Both refuse the device 0/0, so whiteouts are marked files there."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyoverlay.testing import Overlay, OverlayFactory, Tree, make_tree
from tests.integration.looks import shape

pytestmark = pytest.mark.root

LOWER: Tree = {"f": b"f", "g": b"g", "d": {"1": b"1", "e": {"2": b"2"}}, "replaced": b"old", "empty": {}}


@pytest.fixture(params=["kernel", "ours"])
def outer(request: pytest.FixtureRequest, tmp_path: Path, overlay: OverlayFactory) -> Iterator[Path]:
    """A directory in the merged view of another overlay."""
    if request.param == "ours":
        yield overlay({}).merged
        return
    for name in ("lower", "upper", "work", "merged"):
        (tmp_path / name).mkdir()
    options = ",".join(f"{name}dir={tmp_path / name}" for name in ("lower", "upper", "work"))
    subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, tmp_path / "merged"], check=True)
    yield tmp_path / "merged"
    subprocess.run(["umount", tmp_path / "merged"], check=True)


@pytest.fixture
def inner(outer: Path, tmp_path: Path) -> Iterator[Overlay]:
    """An overlay whose upper and work directory lie there."""
    lower, merged, upper = tmp_path / "inner-lower", tmp_path / "inner-merged", outer / "upper"
    for directory in (lower, merged, upper):
        directory.mkdir()
    make_tree(lower, LOWER)
    inner = Overlay((lower,), upper, merged)
    inner.mount()
    try:
        yield inner
    finally:
        inner.close()


def test_what_is_removed_and_renamed_stays_so_over_a_remount(inner: Overlay) -> None:
    m = inner.merged
    os.unlink(m / "f")
    os.rename(m / "g", m / "h")
    os.rename(m / "h", m / "replaced")
    os.rename(m / "d", m / "dd")
    os.unlink(m / "dd/1")
    os.rmdir(m / "empty")
    os.mkdir(m / "empty")
    (m / "g").write_bytes(b"new g")
    expected = {"dd": {"e": {"2": b"2"}}, "empty": {}, "g": b"new g", "replaced": b"g"}
    assert shape(m) == expected
    inner.remount()
    assert shape(m) == expected


def test_a_whiteout_is_an_empty_marked_file_in_a_marked_directory(inner: Overlay) -> None:
    os.unlink(inner.merged / "f")
    hidden = inner.writable / "f"
    assert hidden.is_file()
    assert hidden.read_bytes() == b""
    assert os.getxattr(hidden, "trusted.overlay.whiteout") == b"y"
    assert os.getxattr(inner.writable, "trusted.overlay.opaque") == b"x"
    assert sorted(os.listdir(inner.merged)) == ["d", "empty", "g", "replaced"]
    (inner.merged / "f").write_bytes(b"")
    assert (inner.merged / "f").read_bytes() == b""
    assert "f" in os.listdir(inner.merged)
