"""A copy-up on a file system that can share data between files copies none."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyoverlay.testing import Overlay

pytestmark = pytest.mark.root

SIZE = 64 << 20


@pytest.fixture
def xfs(tmp_path: Path) -> Iterator[Path]:
    """An empty xfs of its own."""
    image, there = tmp_path / "image", tmp_path / "xfs"
    with image.open("wb") as file:
        file.truncate(512 << 20)
    there.mkdir()
    subprocess.run(["mkfs.xfs", "-q", image], check=True)
    subprocess.run(["mount", "-o", "loop", image, there], check=True)
    yield there
    subprocess.run(["umount", there], check=True)


def used(directory: Path) -> int:
    """Bytes in use on a file system."""
    subprocess.run(["sync", "-f", directory], check=True)
    st = os.statvfs(directory)
    return (st.f_blocks - st.f_bfree) * st.f_frsize


def test_copy_up_on_xfs_shares_the_data(xfs: Path) -> None:
    lower, upper, merged = (xfs / name for name in ("lower", "upper", "merged"))
    for directory in (lower, upper, merged):
        directory.mkdir()
    data = os.urandom(1 << 20)
    with (lower / "f").open("wb") as file:
        for _ in range(SIZE >> 20):
            file.write(data)
    overlay = Overlay((lower,), upper, merged)
    overlay.mount()
    try:
        before = used(xfs)
        with (merged / "f").open("r+b") as file:
            file.write(b"changed")
        assert used(xfs) - before < SIZE // 8
        assert (upper / "f").stat().st_size == SIZE
        assert (merged / "f").read_bytes() == b"changed" + data[7:] + data * ((SIZE >> 20) - 1)
        assert (lower / "f").read_bytes()[:7] == data[:7]
    finally:
        overlay.close()
