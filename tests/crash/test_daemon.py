"""Real mounts over file systems that fill up or lose their power."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

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
