"""What chattr(1) forbids. The kernel knows no such flags of a FUSE inode, so that it is the upper's file system that has to be asked, by a
call that it refuses for them: which is not always the call that a merged view is changed by.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from pyoverlay.testing import Overlay, OverlayFactory
from tests.posix.check import fails, opened
from tests.posix.system_calls import RENAME_EXCHANGE, renameat2

pytestmark = [pytest.mark.root, pytest.mark.wire]

FS_IOC_SETFLAGS, IMMUTABLE, APPEND, EXTENTS = 0x40086602, 0x10, 0x20, 0x80000  # <linux/fs.h>; ext4 has the last of each of its files


@contextmanager
def flagged(made: Overlay, name: str, flag: str, *, is_remounted: bool = False) -> Iterator[None]:
    subprocess.run(["chattr", f"+{flag}", made.merged / name], check=True)
    try:
        if is_remounted:
            made.remount()
        yield
        subprocess.run(["chattr", f"-{flag}", made.merged / name], check=True)
    finally:
        subprocess.run(["chattr", f"-{flag}", made.writable / name], check=True)


def write(made: Overlay, data: bytes, flags: int = 0) -> None:
    with opened(made.merged / "f", os.O_WRONLY | flags) as fd:
        assert os.write(fd, data) == len(data)


@pytest.mark.parametrize("is_remounted", [False, True])
@pytest.mark.parametrize("is_written", [False, True])
def test_a_file_that_may_only_be_appended_to_takes_what_is_appended(overlay: OverlayFactory, is_written: bool, is_remounted: bool) -> None:
    """A log. EPERM from a write that appends, and none from one that does not where the daemon had a descriptor that writes."""
    made = overlay({"f": b"old"})
    if is_written:
        write(made, b"OLD", os.O_TRUNC)
    old = (made.merged / "f").read_bytes()
    with flagged(made, "f", "a", is_remounted=is_remounted):
        for _ in range(2):
            write(made, b"+", os.O_APPEND)
        assert (made.merged / "f").read_bytes() == old + b"++"
        with fails(errno.EPERM):  # on ext4 open(2) refuses it
            write(made, b"new")
        with fails(errno.EPERM):
            os.truncate(made.merged / "f", 1)
        with fails(errno.EPERM):
            os.unlink(made.merged / "f")
        os.utime(made.merged / "f")
        write(made, b"+", os.O_APPEND)
        assert (made.writable / "f").read_bytes() == (made.merged / "f").read_bytes() == old + b"+++"
    write(made, b"new")
    assert (made.merged / "f").read_bytes() == b"new+++"


def test_a_file_that_was_written_and_became_immutable_is_not_written(overlay: OverlayFactory) -> None:
    """Nor by what was open before: ext4 asks at each write, and the daemon gives up the descriptor that it had for all of them."""
    made = overlay({"f": b"old"})
    with opened(made.merged / "f", os.O_WRONLY) as fd:
        os.pwrite(fd, b"OLD", 0)
        with flagged(made, "f", "i"):
            with fails(errno.EPERM):
                os.pwrite(fd, b"new", 0)
            with fails(errno.EPERM):
                write(made, b"new", os.O_APPEND)
            assert (made.writable / "f").read_bytes() == (made.merged / "f").read_bytes() == b"OLD"
        os.pwrite(fd, b"new", 0)
    assert (made.merged / "f").read_bytes() == b"new"


@pytest.mark.parametrize("flag", [APPEND, IMMUTABLE])
def test_what_was_written_before_a_flag_forbids_it_is_stored(overlay: OverlayFactory, flag: int) -> None:
    """What the page cache had was refused when its turn came, and lost. chattr(1) closes the file once more, which has it written."""
    made = overlay({"f": b"old" * 4096})
    with opened(made.merged / "f", os.O_RDWR) as fd, mmap.mmap(fd, 3 * 4096) as shared:
        os.pwrite(fd, b"one", 0)
        shared[8192:8195] = b"two"
        fcntl.ioctl(fd, FS_IOC_SETFLAGS, struct.pack("l", flag | EXTENTS))
        try:
            stored = (made.writable / "f").read_bytes()
            assert (stored[:3], stored[8192:8195]) == (b"one", b"two")
            assert (made.merged / "f").read_bytes() == stored
        finally:
            subprocess.run(["chattr", "-ai", made.writable / "f"], check=True)


def test_a_file_whose_data_were_not_copied_up_can_be_appended_to(overlay: OverlayFactory) -> None:
    """With metacopy=on chattr(1) copied no data, and afterwards the flag forbade it."""
    made = overlay({"f": b"old"}, options=("-o", "metacopy=on"))
    os.chmod(made.merged / "f", 0o600)
    with flagged(made, "f", "a"):
        write(made, b"+", os.O_APPEND)
        assert (made.writable / "f").read_bytes() == b"old+"


@pytest.mark.parametrize("is_remounted", [False, True])
def test_nothing_of_a_lower_goes_out_of_a_directory_that_may_only_be_added_to(overlay: OverlayFactory, is_remounted: bool) -> None:
    """A whiteout is something that is added."""
    made = overlay({"d": {"f": b"old", "g": b"old", "empty": {}}, "mine": b"mine"})
    d = made.merged / "d"
    with flagged(made, "d", "a", is_remounted=is_remounted):
        with fails(errno.EPERM):
            os.unlink(d / "f")
        with fails(errno.EPERM):
            os.rmdir(d / "empty")
        for old, new in ((d / "f", d / "g"), (d / "f", made.merged / "f"), (made.merged / "mine", d / "f")):
            with fails(errno.EPERM):
                os.rename(old, new)
        with fails(errno.EPERM):
            renameat2(made.merged / "mine", d / "f", RENAME_EXCHANGE)
        (d / "new").write_bytes(b"new")
        os.rename(made.merged / "mine", d / "mine")
        assert {name: (d / name).read_bytes() for name in ("f", "g", "new", "mine")} == {
            "f": b"old", "g": b"old", "new": b"new", "mine": b"mine",
        }  # fmt: skip
    os.unlink(d / "f")
    os.rmdir(d / "empty")
    assert sorted(os.listdir(d)) == ["g", "mine", "new"]
