"""chmod, chown, utimensat, truncate."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from tests.posix.check import (
    NOBODY,
    SOMEBODY,
    Step,
    add,
    as_user,
    check,
    fails,
    fifo,
    file,
    folder,
    mode_of,
    names_in,
    opened,
    symlink,
    times,
)
from tests.posix.system_calls import AT_SYMLINK_NOFOLLOW, UTIME_NOW, UTIME_OMIT, utimensat

SECOND = 10**9
# ext4 keeps seconds in 34 bits from 1901 on, so these stay apart from each other and from what 32 bits hold.
TIMES_NS = {
    "in_nanoseconds": 1_234_567_890 * SECOND + 123_456_789,
    "before_1970": -1_000_000 * SECOND + 987_654_321,
    "just_before_1970": -1,
    "at_1970": 0,
    "after_2038": (2**31 + 5) * SECOND + 1,
    "after_2106": (2**32 + 5) * SECOND + 999_999_999,
}


def _object(kind: str) -> Step:
    match kind:
        case "file":
            return file("x")
        case "folder":
            return folder("x", file("inside"))
        case "symlink":
            return symlink("x", "nowhere")
        case _:
            return fifo("x")


def _utime(when: int) -> Step:
    def claim(d: Path) -> None:
        os.utime(d / "x", ns=(when + 1 if when != -1 else when, when), follow_symlinks=False)
        status = os.lstat(d / "x")
        assert status.st_mtime_ns == when
        assert status.st_atime_ns == (when + 1 if when != -1 else when)

    return claim


def _kept(when: int) -> Step:
    def claim(d: Path) -> None:
        status = os.lstat(d / "x")
        assert (status.st_atime_ns, status.st_mtime_ns) == (when, when)

    return claim


def _utime_omit(d: Path) -> None:
    os.utime(d / "x", ns=(5 * SECOND + 5, 6 * SECOND + 6), follow_symlinks=False)
    utimensat(d / "x", (0, UTIME_OMIT), (70, 7), AT_SYMLINK_NOFOLLOW)
    status = os.lstat(d / "x")
    assert (status.st_atime_ns, status.st_mtime_ns) == (5 * SECOND + 5, 70 * SECOND + 7)
    utimensat(d / "x", (80, 8), (0, UTIME_OMIT), AT_SYMLINK_NOFOLLOW)
    status = os.lstat(d / "x")
    assert (status.st_atime_ns, status.st_mtime_ns) == (80 * SECOND + 8, 70 * SECOND + 7)
    utimensat(d / "x", (0, UTIME_OMIT), (0, UTIME_OMIT), AT_SYMLINK_NOFOLLOW)
    status = os.lstat(d / "x")
    assert (status.st_atime_ns, status.st_mtime_ns) == (80 * SECOND + 8, 70 * SECOND + 7)


def _utime_now(d: Path) -> None:
    """`touch stamp; echo > output` may not leave the output older: make(1) would build it again. The daemon's own clock is up to 4 ms ahead
    of the one that stamps what is written.
    """
    for number in range(20):
        utimensat(d / "x", (0, UTIME_NOW), (0, UTIME_NOW), AT_SYMLINK_NOFOLLOW)
        (d / f"made{number}").write_bytes(b"new")
        touched, made = os.lstat(d / "x"), os.stat(d / f"made{number}")
        assert touched.st_atime_ns == touched.st_mtime_ns <= touched.st_ctime_ns
        assert touched.st_mtime_ns <= made.st_mtime_ns
    utimensat(d / "x", (5, 5), (0, UTIME_NOW), AT_SYMLINK_NOFOLLOW)
    assert os.lstat(d / "x").st_atime_ns == 5 * SECOND + 5


def _chown(d: Path) -> None:
    os.lchown(d / "x", SOMEBODY, NOBODY)
    assert (os.lstat(d / "x").st_uid, os.lstat(d / "x").st_gid) == (SOMEBODY, NOBODY)
    os.lchown(d / "x", -1, SOMEBODY)
    assert (os.lstat(d / "x").st_uid, os.lstat(d / "x").st_gid) == (SOMEBODY, SOMEBODY)
    os.lchown(d / "x", NOBODY, -1)
    assert (os.lstat(d / "x").st_uid, os.lstat(d / "x").st_gid) == (NOBODY, SOMEBODY)
    os.lchown(d / "x", 2**32 - 2, 100_000)
    assert (os.lstat(d / "x").st_uid, os.lstat(d / "x").st_gid) == (2**32 - 2, 100_000)


def _chmod(d: Path) -> None:
    before = os.lstat(d / "x")
    for mode in (0, 0o644, 0o1777, 0o7777, 0o400):
        os.chmod(d / "x", mode)
        assert mode_of(d / "x") == mode
    after = os.lstat(d / "x")
    assert (after.st_mtime_ns, after.st_size, after.st_ino) == (before.st_mtime_ns, before.st_size, before.st_ino)
    assert after.st_ctime_ns >= before.st_ctime_ns


for _kind in ("file", "folder", "symlink", "fifo"):
    for _when, _ns in TIMES_NS.items():
        add(f"utimensat_of_a_{_kind}_{_when}", (_object(_kind),), _utime(_ns))
        add(f"times_of_a_{_kind}_{_when}_are_shown", (_object(_kind), times("x", _ns, _ns)), _kept(_ns))
    add(f"utime_omit_leaves_the_other_time_of_a_{_kind}", (_object(_kind),), _utime_omit)
    add(f"utime_now_of_a_{_kind}_is_not_ahead_of_what_is_written_next", (_object(_kind),), _utime_now)
    add(f"chown_of_a_{_kind}_sets_owner_and_group_apart", (_object(_kind),), _chown)
    if _kind != "symlink":
        add(f"chmod_of_a_{_kind}_sets_all_twelve_bits", (_object(_kind),), _chmod)


@check(file("f"), symlink("s", "f"))
def changes_through_a_symlink_reach_its_target(d: Path) -> None:
    before = os.lstat(d / "s")
    os.chmod(d / "s", 0o600)
    os.chown(d / "s", SOMEBODY, SOMEBODY)
    os.utime(d / "s", ns=(SECOND, SECOND))
    assert mode_of(d / "f") == 0o600
    assert os.stat(d / "f").st_uid == SOMEBODY
    assert os.stat(d / "f").st_mtime_ns == SECOND
    after = os.lstat(d / "s")
    assert (after.st_uid, after.st_mtime_ns, after.st_mode) == (before.st_uid, before.st_mtime_ns, before.st_mode)


@check(file("f"))
def utime_now_takes_the_present(d: Path) -> None:
    (d / "clock").touch()
    earlier = os.stat(d / "clock").st_mtime_ns
    os.utime(d / "f", ns=(SECOND, SECOND))
    utimensat(d / "f", (0, UTIME_NOW), (0, UTIME_NOW))
    status = os.stat(d / "f")
    (d / "clock2").touch()
    # The kernel stamps with a clock of a few milliseconds' grain, and a file system may take another for UTIME_NOW.
    grain = 20_000_000
    assert earlier - grain <= status.st_mtime_ns <= os.stat(d / "clock2").st_mtime_ns + grain
    assert status.st_atime_ns == status.st_mtime_ns


@check(file("f"))
def changes_by_descriptor_are_changes_of_the_file(d: Path) -> None:
    with opened(d / "f", os.O_RDONLY) as fd:
        os.fchmod(fd, 0o640)
        os.fchown(fd, SOMEBODY, NOBODY)
        os.utime(fd, ns=(3 * SECOND, 4 * SECOND))
        assert os.fstat(fd).st_mode & 0o7777 == 0o640
    status = os.stat(d / "f")
    assert (mode_of(d / "f"), status.st_uid, status.st_gid, status.st_mtime_ns) == (0o640, SOMEBODY, NOBODY, 4 * SECOND)


@check(file("f", uid=SOMEBODY), file("mine", uid=NOBODY, gid=NOBODY), file("writable", mode=0o666))
def only_the_owner_changes_mode_owner_and_times(d: Path) -> None:
    def change() -> None:
        with fails(errno.EPERM):
            os.chmod("f", 0o777)
        with fails(errno.EPERM):
            os.chown("f", NOBODY, -1)
        with fails(errno.EPERM):
            os.chown("mine", SOMEBODY, -1)
        with fails(errno.EPERM):
            os.chown("mine", -1, SOMEBODY)
        with fails(errno.EPERM):
            os.utime("writable", ns=(SECOND, SECOND))
        with fails(errno.EACCES):
            os.utime("f")
        os.utime("writable")
        os.chmod("mine", 0o600)
        os.chown("mine", NOBODY, NOBODY)
        os.utime("mine", ns=(SECOND, SECOND))

    as_user(d, change)
    assert mode_of(d / "f") == 0o644
    assert (mode_of(d / "mine"), os.stat(d / "mine").st_mtime_ns) == (0o600, SECOND)


@check(file("f", uid=NOBODY, gid=NOBODY))
def the_owner_may_give_the_file_to_a_group_of_theirs(d: Path) -> None:
    as_user(d, lambda: os.chown("f", -1, SOMEBODY), groups=(SOMEBODY,))
    assert os.stat(d / "f").st_gid == SOMEBODY


@check(folder("d2"), file("f"))
def attributes_of_what_is_missing_are_enoent(d: Path) -> None:
    with fails(errno.ENOENT):
        os.chmod(d / "new", 0)
    with fails(errno.ENOENT):
        os.chown(d / "new", 0, 0)
    with fails(errno.ENOENT):
        os.utime(d / "new")
    with fails(errno.ENOENT):
        os.truncate(d / "new", 0)
    with fails(errno.ENOTDIR):
        os.chmod(d / "f" / "new", 0)


@check(file("f", b"0123456789"))
def truncate_shortens_and_lengthens(d: Path) -> None:
    os.truncate(d / "f", 4)
    assert (d / "f").read_bytes() == b"0123"
    os.truncate(d / "f", 8)
    assert (d / "f").read_bytes() == b"0123\0\0\0\0"
    with opened(d / "f", os.O_RDWR) as fd:
        os.ftruncate(fd, 2)
        assert os.pread(fd, 10, 0) == b"01"
        os.ftruncate(fd, 0)
        assert os.fstat(fd).st_size == 0
    assert (d / "f").read_bytes() == b""


@check(file("f", b"0123456789"))
def truncate_to_the_same_size_keeps_the_content(d: Path) -> None:
    os.truncate(d / "f", 10)
    assert (d / "f").read_bytes() == b"0123456789"


@check(file("f", b"0123456789"), times("f", SECOND, SECOND), file("empty", b""), times("empty", SECOND, SECOND))
def truncate_to_the_same_size_moves_the_mtime(d: Path) -> None:
    os.truncate(d / "f", 10)
    os.truncate(d / "empty", 0)
    assert SECOND not in (os.stat(d / "f").st_mtime_ns, os.stat(d / "empty").st_mtime_ns)
    os.utime(d / "f", ns=(SECOND, SECOND))
    os.truncate(d / "f", 10)
    assert os.stat(d / "f").st_mtime_ns != SECOND


@check(file("f", b"0123456789"))
def truncate_moves_the_mtime(d: Path) -> None:
    os.utime(d / "f", ns=(SECOND, SECOND))
    os.truncate(d / "f", 4)
    assert os.stat(d / "f").st_mtime_ns != SECOND


@check(file("f", b"old"), folder("sub"), fifo("p"), file("closed", mode=0o444))
def truncate_refuses_what_is_no_writable_file(d: Path) -> None:
    with fails(errno.EISDIR):
        os.truncate(d / "sub", 0)
    with fails(errno.EINVAL):
        os.truncate(d / "p", 0)
    with fails(errno.EINVAL):
        os.truncate(d / "f", -1)
    with opened(d / "f", os.O_RDONLY) as fd, fails(errno.EINVAL):
        os.ftruncate(fd, 0)

    def as_nobody() -> None:
        with fails(errno.EACCES):
            os.truncate("closed", 0)

    as_user(d, as_nobody)
    assert (d / "f").read_bytes() == b"old"


@check(file("f", b"old"))
def truncate_past_four_gib_stays_sparse(d: Path) -> None:
    os.truncate(d / "f", 5 << 30)
    status = os.stat(d / "f")
    assert status.st_size == 5 << 30
    assert status.st_blocks * 512 < 1 << 20
    with opened(d / "f", os.O_RDONLY) as fd:
        assert os.pread(fd, 4, 0) == b"old\0"
        assert os.pread(fd, 8, (5 << 30) - 4) == b"\0\0\0\0"


@check(file("f", b"old", uid=NOBODY))
def a_file_the_owner_cannot_write_can_be_truncated_by_a_descriptor_opened_before(d: Path) -> None:
    def change() -> None:
        with opened("f", os.O_RDWR) as fd:
            os.fchmod(fd, 0o400)
            os.write(fd, b"new")
            os.ftruncate(fd, 2)
            assert os.fstat(fd).st_size == 2
        with fails(errno.EACCES):
            os.open("f", os.O_WRONLY)

    as_user(d, change)
    assert (d / "f").read_bytes() == b"ne"
    assert names_in(d) == ["f"]
