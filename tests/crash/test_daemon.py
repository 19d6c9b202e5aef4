"""Real mounts over file systems that fill up or lose their power."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pyoverlay.core.stack import keeps_order
from pyoverlay.testing import Connection, File, Overlay, make_tree, snapshot
from pyoverlay.testing.mounts import end
from tests.crash.images import Image, mounted_image
from tests.crash.victim import shut_down
from tests.integration.looks import litter
from tests.posix.check import fails, opened

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("own_mounts")]

FILES = {f"file{number}": random.Random(number).randbytes(1 + 1777 * number) for number in range(40)}
BIG = "big"
FILES[BIG] = random.Random(BIG).randbytes(24 << 20)


@contextmanager
def mounted(image: Image, directory: Path, *options: str) -> Iterator[Overlay]:
    """An overlay of a lower in `directory` and an upper in the image."""
    for place in (directory / "lower", directory / "merged", image.point / "upper"):
        place.mkdir()
    make_tree(directory / "lower", {name: File(content) for name, content in FILES.items()})
    overlay = Overlay((directory / "lower",), image.point / "upper", directory / "merged", options)
    overlay.mount()
    try:
        yield overlay
    finally:
        overlay.close()


def cut_power(overlay: Overlay, image: Image) -> None:
    """The file system below stops, and with it the machine: the daemon is gone, nothing is told to anybody."""
    shut_down(image.point)
    daemons, mount = overlay.daemons(), overlay.mounted()
    assert mount is not None
    Connection.of(mount).detach()
    end(daemons)
    image.remount()


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_with_strict_what_was_closed_survives_a_power_cut(tmp_path: Path, kind: str) -> None:
    """close(2) reaches the daemon only if files are opened with a message, which other mounts go without."""
    with mounted_image(kind, tmp_path) as image, mounted(image, tmp_path, "-o", "fsync=strict") as overlay:
        (overlay.merged / "new").write_bytes(b"written and closed")
        with (overlay.merged / "file3").open("r+b") as file:
            file.write(b"changed")
        cut_power(overlay, image)
        overlay.mount()
        assert (overlay.merged / "new").read_bytes() == b"written and closed"
        assert (overlay.merged / "file3").read_bytes() == b"changed" + FILES["file3"][7:]


@pytest.mark.parametrize("options", [(), ("-o", "writeback")], ids=["write-through", "writeback"])
def test_what_a_real_fsync_confirmed_survives_a_power_cut(tmp_path: Path, options: tuple[str, ...]) -> None:
    with mounted_image("ext4", tmp_path) as image, mounted(image, tmp_path, *options) as overlay:
        with (overlay.merged / "new").open("wb") as new, (overlay.merged / "file3").open("r+b") as changed:
            new.write(b"written and synced")
            changed.write(b"changed")
            for file in (new, changed):
                file.flush()
                os.fsync(file.fileno())
        os.unlink(overlay.merged / "file4")
        with opened(overlay.merged, os.O_RDONLY | os.O_DIRECTORY) as directory:
            os.fsync(directory)
        cut_power(overlay, image)
        overlay.mount()
        assert (overlay.merged / "new").read_bytes() == b"written and synced"
        assert (overlay.merged / "file3").read_bytes() == b"changed" + FILES["file3"][7:]
        assert not (overlay.merged / "file4").exists()


@pytest.mark.parametrize("options", [(), ("-o", "writeback")], ids=["write-through", "writeback"])
def test_what_was_there_when_umount_returned_survives_a_power_cut(tmp_path: Path, options: tuple[str, ...]) -> None:
    with mounted_image("ext4", tmp_path) as image, mounted(image, tmp_path, *options) as overlay:
        (overlay.merged / "new").write_bytes(b"written, and never synced")
        (overlay.merged / "file3").chmod(0o600)
        os.rename(overlay.merged / "file5", overlay.merged / "renamed")
        # With writeback the mtime of what was just made is the kernel's, from its coarse clock, and the upper's a moment later.
        os.utime(overlay.merged / "new", ns=(1, 2))
        before = snapshot(overlay.merged)
        overlay.umount()
        shut_down(image.point)
        image.remount()
        overlay.mount()
        assert snapshot(overlay.merged) == before


@pytest.mark.parametrize(("kind", "arguments", "keeps"), [("ext4", [], True), ("ext4", ["-O", "^has_journal"], False), ("xfs", [], True)])
def test_whether_a_file_system_keeps_a_rename_behind_data_is_found_out(
    tmp_path: Path, kind: str, arguments: list[str], keeps: bool
) -> None:
    """Asking statfs would not do: ext2, ext3, ext4 with a journal and ext4 without answer the same."""
    with mounted_image(kind, tmp_path, arguments=arguments) as image, opened(image.point, os.O_RDONLY) as fd:
        assert keeps_order(fd) == keeps


def test_with_ordered_no_copy_is_torn_by_a_power_cut(tmp_path: Path) -> None:
    """Forty copy-ups by a real mount, while others' fsyncs put their names on disk one after the other."""
    with mounted_image("ext4", tmp_path) as image, mounted(image, tmp_path) as overlay:
        with opened(image.point / "other", os.O_CREAT | os.O_RDWR) as other:
            for number, name in enumerate(FILES):
                (overlay.merged / name).chmod(0o600)
                os.pwrite(other, b"x", number)
                if number % 3 == 0:
                    os.fsync(other)
        cut_power(overlay, image)
        copied = [path for path in overlay.writable.iterdir() if path.name in FILES]
        assert len(copied) >= 37  # the last fsync was the fortieth's
        assert [path.name for path in copied if path.read_bytes() != FILES[path.name]] == []


def test_a_disk_that_fills_up_in_the_middle_of_a_copy_up(tmp_path: Path) -> None:
    """The call that wanted it fails; the view is as before, nothing is left; with room again the same call works."""
    with mounted_image("ext4", tmp_path) as image, mounted(image, tmp_path) as overlay:
        free = os.statvfs(image.point).f_bavail * os.statvfs(image.point).f_bsize
        with opened(image.point / "filler", os.O_CREAT | os.O_WRONLY) as filler:
            os.posix_fallocate(filler, 0, free - (8 << 20))
        (daemon,) = overlay.daemons()
        before, descriptors = snapshot(overlay.merged), len(os.listdir(f"/proc/{daemon}/fd"))
        with opened(overlay.merged / BIG, os.O_RDWR) as fd:
            with fails(errno.ENOSPC):
                os.pwrite(fd, b"new", 0)
            with fails(errno.ENOSPC):
                os.fchmod(fd, 0o600)
        assert snapshot(overlay.merged) == before
        assert snapshot(overlay.writable).keys() == {b"."}
        assert litter(overlay) == []
        assert len(os.listdir(f"/proc/{daemon}/fd")) == descriptors
        os.unlink(image.point / "filler")
        with opened(overlay.merged / BIG, os.O_RDWR) as fd:
            os.pwrite(fd, b"new", 0)
        assert (overlay.merged / BIG).read_bytes() == b"new" + FILES[BIG][3:]
