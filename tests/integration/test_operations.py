"""What the list of checks in tests/posix cannot say: read-only mounts, atimes of lowers, statfs, several users, an end in use."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from pyoverlay.testing import Directory, File, OverlayFactory, Symlink
from tests.integration.looks import Here, layers, shape
from tests.posix.check import NOBODY, SOMEBODY, as_user, fails, opened
from tests.posix.system_calls import RENAME_EXCHANGE, renameat2


def test_a_mount_without_an_upper_refuses_every_change_with_erofs(overlay: OverlayFactory) -> None:
    view = overlay({"f": b"f", "d": {"g": b"g"}, "s": Symlink("f")}, {"low": b"low"}, read_only=True).merged
    changes: dict[str, Callable[[], object]] = {
        "write": lambda: os.open(view / "f", os.O_WRONLY),
        "truncating": lambda: os.open(view / "f", os.O_RDONLY | os.O_TRUNC),
        "create": lambda: os.open(view / "new", os.O_WRONLY | os.O_CREAT),
        "mkdir": lambda: os.mkdir(view / "new"),
        "symlink": lambda: os.symlink("x", view / "new"),
        "mkfifo": lambda: os.mkfifo(view / "new"),
        "link": lambda: os.link(view / "f", view / "new"),
        "unlink": lambda: os.unlink(view / "f"),
        "rmdir": lambda: os.rmdir(view / "d"),
        "rename": lambda: os.rename(view / "f", view / "new"),
        "exchange": lambda: renameat2(view / "f", view / "low", RENAME_EXCHANGE),
        "truncate": lambda: os.truncate(view / "f", 0),
        "chmod": lambda: os.chmod(view / "f", 0),
        "chown": lambda: os.lchown(view / "s", 1, 1),
        "utime": lambda: os.utime(view / "d"),
        "setxattr": lambda: os.setxattr(view / "f", "user.x", b""),
        "removexattr": lambda: os.removexattr(view / "f", "user.x"),
    }
    for change in changes.values():
        with fails(errno.EROFS):
            change()
    assert shape(view) == {"f": b"f", "d": {"g": b"g"}, "s": "-> f", "low": b"low"}
    assert os.statvfs(view).f_flag & os.ST_RDONLY


def test_one_lower_and_no_upper_is_enough(overlay: OverlayFactory) -> None:
    made = overlay({"f": b"f"}, read_only=True)
    assert shape(made.merged) == {"f": b"f"}


@layers({"f": b"content", "d": {"g": b"g"}, "s": Symlink("f"), "sd": Symlink("d")})
@pytest.mark.root  # a redirect is followed with trusted.* marks alone
def test_reading_moves_no_atime_of_a_lower(here: Here) -> None:
    """The fixture compares every atime below; here is everything that would move one."""
    assert (here.merged / "f").read_bytes() == b"content"
    assert os.readlink(here.merged / "s") == "f"
    assert (here.merged / "s").read_bytes() == b"content"
    assert os.listdir(here.merged / "sd") == ["g"]
    subprocess.run(["cp", "-a", here.merged / "d", here.merged / "copy"], check=True)
    with opened(here.merged / "f", os.O_RDWR) as fd:
        os.write(fd, b"C")
    os.rename(here.merged / "d", here.merged / "e")
    here.assert_lowers_untouched()


@layers({"f": b"f"})
def test_statfs_is_that_of_the_upper(here: Here) -> None:
    of_view, of_upper = os.statvfs(here.merged), os.statvfs(here.overlay.writable)
    assert (of_view.f_bsize, of_view.f_blocks, of_view.f_files, of_view.f_namemax) == (
        of_upper.f_bsize,
        of_upper.f_blocks,
        of_upper.f_files,
        of_upper.f_namemax,
    )


@layers({"home": Directory({"own": File(b"own", uid=NOBODY, mode=0o600)}, uid=NOBODY), "secret": File(b"s", mode=0o600)})
@pytest.mark.root
def test_an_ordinary_user_works_in_the_view_as_on_any_file_system(here: Here) -> None:
    def work() -> None:
        Path("home/own").write_bytes(b"changed")
        Path("home/new").write_bytes(b"new")
        os.mkdir("home/sub")
        os.rename("home/own", "home/sub/own")
        os.symlink("sub/own", "home/link")
        assert Path("home/link").read_bytes() == b"changed"
        with fails(errno.EACCES):
            Path("secret").read_bytes()
        with fails(errno.EACCES):
            Path("new").touch()

    def intrude() -> None:
        with fails(errno.EACCES):
            Path("home/sub/own").read_bytes()
        with fails(errno.EACCES):
            os.unlink("home/new")

    as_user(here.merged, work)
    as_user(here.merged, intrude, uid=SOMEBODY)
    for path in ("home/new", "home/sub", "home/sub/own", "home/link"):
        assert os.lstat(here.upper / path).st_uid == os.lstat(here.merged / path).st_uid == NOBODY, path
    assert os.lstat(here.upper / "home").st_uid == NOBODY


@layers({"home": Directory({"f": File(b"f", uid=0, mode=0o666)}, uid=NOBODY)})
@pytest.mark.root
def test_a_copy_up_caused_by_a_user_keeps_the_owner_of_the_file(here: Here) -> None:
    as_user(here.merged, lambda: Path("home/f").write_bytes(b"by nobody"))
    st = os.lstat(here.upper / "home" / "f")
    assert (st.st_uid, st.st_gid, stat.S_IMODE(st.st_mode)) == (0, 0, 0o666)


@layers({"program": File(Path("/usr/bin/id").read_bytes(), mode=0o4755, uid=SOMEBODY)})
@pytest.mark.root
def test_a_setuid_program_of_a_lower_runs_as_its_owner(here: Here) -> None:
    def run() -> None:
        shown = subprocess.run(["./program", "-u"], capture_output=True, check=True, text=True).stdout
        assert shown == f"{SOMEBODY}\n"

    as_user(here.merged, run)


@layers({"f": b"f", "d": {"g": b"g"}})
def test_what_was_written_is_there_after_a_remount(alone: Here) -> None:
    (alone.merged / "f").write_bytes(b"changed")
    (alone.merged / "d" / "new").write_bytes(b"n" * 300_000)
    os.unlink(alone.merged / "d" / "g")
    os.mkdir(alone.merged / "e")
    os.utime(alone.merged / "e", ns=(5, 6))
    expected = shape(alone.merged)
    alone.remount()
    assert shape(alone.merged) == expected == {"f": b"changed", "d": {"new": b"n" * 300_000}, "e": {}}
    assert os.lstat(alone.merged / "e").st_mtime_ns == 6


@layers({"f": b"f"}, upper={})
def test_nothing_but_the_change_is_ever_in_the_upper(here: Here) -> None:
    for act in (
        lambda: (here.merged / "f").read_bytes(),
        lambda: os.close(os.open(here.merged / "f", os.O_RDWR)),
        lambda: os.utime(here.merged / "f", ns=(1, 2)),
        lambda: os.rename(here.merged / "f", here.merged / "g"),
        lambda: os.unlink(here.merged / "g"),
        lambda: os.mkdir(here.merged / "g"),
        lambda: os.rmdir(here.merged / "g"),
        lambda: (here.merged / "f").write_bytes(b"again"),
        lambda: os.unlink(here.merged / "f"),
    ):
        act()
        assert set(shape(here.upper)) <= {"f", "g"}
    assert shape(here.upper) == {"f": "whiteout"}


@layers({"f": b"f", "d": {"g": b"g"}}, upper={})
def test_opening_for_writing_without_writing_is_no_change_to_be_seen(here: Here) -> None:
    before = os.lstat(here.merged / "f")
    os.close(os.open(here.merged / "f", os.O_RDWR | os.O_APPEND))
    after = os.lstat(here.merged / "f")
    assert (after.st_mtime_ns, after.st_size, after.st_ino) == (before.st_mtime_ns, before.st_size, before.st_ino)
