"""Copy-up: a lower's object appears in the upper, whole and with all that belongs to it, the first time somebody changes it."""

from __future__ import annotations

import errno
import mmap
import os
import socket
import stat
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from pyoverlay.testing import Device, Directory, Entry, Fifo, File, Socket, Symlink, snapshot
from pyoverlay.testing.trees import MTIME_NS
from tests.integration.looks import Here, layers, mark, shape
from tests.posix.check import fails, opened
from tests.posix.system_calls import (
    ACL_ACCESS,
    ACL_DEFAULT,
    ACL_GROUP_OBJ,
    ACL_MASK,
    ACL_OTHER,
    ACL_USER,
    ACL_USER_OBJ,
    CAP_NET_RAW,
    acl,
    capability,
    data_extents,
)

NAMED = acl((ACL_USER_OBJ, 6), (ACL_USER, 4, 1234), (ACL_GROUP_OBJ, 4), (ACL_MASK, 4), (ACL_OTHER, 0))
INHERITED = acl((ACL_USER_OBJ, 7), (ACL_USER, 5, 1234), (ACL_GROUP_OBJ, 5), (ACL_MASK, 5), (ACL_OTHER, 0))

# Everything that a copy must keep, on one file. Times with nanoseconds, one of them before 1970.
RICH = File(
    b"content",
    mode=0o4750,
    uid=1001,
    gid=1002,
    mtime_ns=-1_234_567_891,
    atime_ns=1_600_000_000_123_456_789,
    xattrs={"user.x": b"\0binary", "trusted.y": b"t", "security.z": b"s", "security.capability": capability(CAP_NET_RAW)},
)


def entry(path: Path) -> Entry:
    """What `snapshot` says of one object, apart from its links and from the overlay's own marks."""
    found = snapshot(path)[b"."]
    xattrs = tuple((name, value) for name, value in found.xattrs if not name.startswith("trusted.overlay."))
    return replace(found, xattrs=xattrs, nlink=0, first_name=b"")


FIRST_WRITES: dict[str, tuple[Callable[[Path], object], bytes]] = {
    "write": (lambda path: _write(path, b"NEW"), b"NEWtent"),
    "append": (lambda path: _append(path), b"contentNEW"),
    "truncate": (lambda path: os.truncate(path, 3), b"con"),
    "extend": (lambda path: os.truncate(path, 9), b"content\0\0"),
    "o_trunc": (lambda path: path.write_bytes(b""), b""),
    "map": (lambda path: _write_by_map(path), b"NEWtent"),
}


def _write(path: Path, data: bytes) -> None:
    with opened(path, os.O_WRONLY) as fd:
        os.write(fd, data)


def _append(path: Path) -> None:
    with opened(path, os.O_WRONLY | os.O_APPEND) as fd:
        os.write(fd, b"NEW")


def _write_by_map(path: Path) -> None:
    with opened(path, os.O_RDWR) as fd, mmap.mmap(fd, 7) as memory:
        memory[:3] = b"NEW"
        memory.flush()


@layers({name: {"f": RICH, "stays": b"unchanged"} for name in FIRST_WRITES})
@pytest.mark.parametrize("way", FIRST_WRITES)
@pytest.mark.root
def test_first_write_copies_the_file_up_with_all_it_has(here: Here, way: str) -> None:
    act, expected = FIRST_WRITES[way]
    act(here.merged / way / "f")
    assert shape(here.merged / way) == {"f": expected, "stays": b"unchanged"}
    assert shape(here.upper / way) == {"f": expected}
    below, above, seen = (os.lstat(layer / way / "f") for layer in (here.lower, here.upper, here.merged))
    assert (above.st_mode, above.st_uid, above.st_gid) == (below.st_mode, below.st_uid, below.st_gid)
    assert (above.st_mtime_ns, above.st_size) == (seen.st_mtime_ns, seen.st_size)
    kept = dict(entry(here.lower / way / "f").xattrs)
    copied = dict(entry(here.upper / way / "f").xattrs)
    del kept["security.capability"]  # a write takes the file capability away, from root's files too
    if way == "map":  # a write by a map does not on ext4; the daemon's own write does, which errs on the safe side
        copied.pop("security.capability", None)
    assert copied == kept


METADATA_CHANGES: dict[str, tuple[Callable[[Path], object], dict[str, object]]] = {
    "chmod": (lambda path: os.chmod(path, 0o640), {"mode": 0o640}),
    "utime": (lambda path: os.utime(path, ns=(7, 8)), {"mtime_ns": 8}),
    "link": (lambda path: os.link(path, path.with_name("linked")), {}),
    "rename": (lambda path: os.rename(path, path.with_name("renamed")), {}),
}


@layers({name: {"f": RICH} for name in METADATA_CHANGES})
@pytest.mark.parametrize("way", METADATA_CHANGES)
@pytest.mark.root
def test_first_metadata_change_keeps_everything_else(here: Here, way: str) -> None:
    act, changed = METADATA_CHANGES[way]
    act(here.merged / way / "f")
    name = "renamed" if way == "rename" else "f"
    expected = replace(entry(here.lower / way / "f"), **changed)  # type: ignore[arg-type]
    assert entry(here.merged / way / name) == expected
    assert entry(here.upper / way / name) == expected


@layers({"f": RICH})
@pytest.mark.root
def test_a_copy_up_keeps_the_atime(here: Here) -> None:
    os.setxattr(here.merged / "f", "user.new", b"value")
    assert os.lstat(here.upper / "f").st_atime_ns == RICH.atime_ns
    assert os.lstat(here.merged / "f").st_atime_ns == RICH.atime_ns


@layers({"d": Directory({"f": b"x"}, mode=0o2751, uid=5, gid=6, mtime_ns=123_456_789, xattrs={"user.d": b"1", ACL_DEFAULT: INHERITED})})
@pytest.mark.root
def test_a_directory_copies_up_with_all_it_has_when_something_in_it_changes(here: Here) -> None:
    os.chmod(here.merged / "d" / "f", 0o600)
    assert shape(here.upper) == {"d": {"f": b"x"}}
    assert entry(here.upper / "d") == entry(here.lower / "d")
    assert entry(here.merged / "d") == entry(here.lower / "d")


@layers({"a": {"b": {"c": {"f": b"x"}}}})
def test_the_mtime_of_no_directory_moves_when_something_in_it_copies_up(here: Here) -> None:
    before = {path: os.lstat(here.merged / path).st_mtime_ns for path in ("", "a", "a/b", "a/b/c")}
    for change in (lambda: os.chmod(here.merged / "a/b/c/f", 0o600), lambda: (here.merged / "a/b/c/f").write_bytes(b"new")):
        change()
        for path, mtime in before.items():
            assert os.lstat(here.merged / path).st_mtime_ns == mtime == MTIME_NS, path
            assert os.lstat(here.upper / path).st_mtime_ns == mtime, path


@layers({"f": File(b"x", mode=0o640, xattrs={ACL_ACCESS: NAMED})})
@pytest.mark.root
def test_an_acl_is_copied_up(here: Here) -> None:
    _append(here.merged / "f")
    assert os.getxattr(here.upper / "f", ACL_ACCESS) == NAMED
    assert os.getxattr(here.merged / "f", ACL_ACCESS) == NAMED


@layers({"d": Directory({"f": File(b"x", mode=0o640)}, xattrs={ACL_DEFAULT: INHERITED})})
@pytest.mark.root
def test_a_copy_does_not_take_the_default_acl_of_its_directory(here: Here) -> None:
    _append(here.merged / "d" / "f")
    assert entry(here.upper / "d" / "f").xattrs == ()
    assert stat.S_IMODE(os.lstat(here.upper / "d" / "f").st_mode) == 0o640


@layers({"s": Symlink("target", uid=7, gid=8, mtime_ns=987_654_321, xattrs={"trusted.s": b"1"})})
@pytest.mark.root
def test_a_symlink_copies_up_with_owner_times_and_attributes(here: Here) -> None:
    os.lchown(here.merged / "s", 9, -1)
    for layer in (here.upper, here.merged):
        st = os.lstat(layer / "s")
        assert os.readlink(layer / "s") == "target"
        assert (st.st_uid, st.st_gid, st.st_mtime_ns) == (9, 8, 987_654_321)
        assert os.getxattr(layer / "s", "trusted.s", follow_symlinks=False) == b"1"


@layers(
    {
        "fifo": Fifo(mode=0o620, uid=7, mtime_ns=1_000_000_007),
        "socket": Socket(mode=0o711, uid=7, mtime_ns=1_000_000_007),
        "null": Device("c", 1, 3, mode=0o666, uid=7, mtime_ns=1_000_000_007),
        "disk": Device("b", 259, 300, mode=0o660, uid=7, mtime_ns=1_000_000_007),
    }
)
@pytest.mark.root
def test_special_files_copy_up_as_what_they_are(here: Here) -> None:
    for name in ("fifo", "socket", "null", "disk"):
        os.chown(here.merged / name, -1, 55)
        below, above = os.lstat(here.lower / name), os.lstat(here.upper / name)
        assert (above.st_mode, above.st_rdev, above.st_uid) == (below.st_mode, below.st_rdev, below.st_uid), name
        assert (above.st_gid, above.st_mtime_ns) == (55, 1_000_000_007), name


@layers({"fifo": Fifo(), "null": Device("c", 1, 3, mode=0o666)})
@pytest.mark.root
def test_writing_to_a_fifo_or_device_copies_nothing_up(here: Here) -> None:
    with opened(here.merged / "fifo", os.O_RDWR | os.O_NONBLOCK) as fd:
        os.write(fd, b"x")
        assert os.read(fd, 1) == b"x"
    with opened(here.merged / "null", os.O_WRONLY) as fd:
        os.write(fd, b"x")
    assert not here.upper.exists() or shape(here.upper) == {}


def _opens(path: Path, flags: int) -> None:
    os.close(os.open(path, flags))


READERS: dict[str, Callable[[Path], object]] = {
    "read": lambda d: (d / "f").read_bytes(),
    "stat": lambda d: os.stat(d / "f"),
    "readlink": lambda d: os.readlink(d / "s"),
    "list": lambda d: os.listdir(d / "sub"),
    "getxattr": lambda d: os.listxattr(d / "f"),
    "access": lambda d: os.access(d / "f", os.W_OK),
    "o_path": lambda d: _opens(d / "f", os.O_PATH),
    "map": lambda d: _read_by_map(d / "f"),
    "denied": lambda d: _is_denied(d / "f"),
}


def _read_by_map(path: Path) -> None:
    with opened(path, os.O_RDONLY) as fd, mmap.mmap(fd, 0, mmap.MAP_PRIVATE) as memory:
        memory[:1] = b"y"


def _is_denied(path: Path) -> None:
    from tests.posix.check import as_user

    def change() -> None:
        with fails(errno.EACCES):
            os.open(path.name, os.O_WRONLY)
        with fails(errno.EACCES):
            os.truncate(path.name, 0)
        with fails(errno.EPERM):
            os.chmod(path.name, 0)
        with fails(errno.EPERM):
            os.chown(path.name, 1, 1)

    as_user(path.parent, change)


@layers({name: {"f": b"content", "s": Symlink("f"), "sub": {"g": b""}} for name in READERS})
@pytest.mark.parametrize("way", [pytest.param(way, marks=[pytest.mark.root] if way == "denied" else []) for way in READERS])
def test_reading_and_refused_changes_copy_nothing_up(here: Here, way: str) -> None:
    READERS[way](here.merged / way)
    assert not (here.upper / way).exists()


@layers({"f": File(b"start", size=64 << 20)})
def test_a_sparse_file_stays_sparse(here: Here) -> None:
    _append(here.merged / "f")
    st = os.lstat(here.upper / "f")
    assert st.st_size == (64 << 20) + 3
    assert st.st_blocks * 512 <= 64 << 10
    assert data_extents(here.upper / "f")[0][0] == 0
    assert data_extents(here.upper / "f")[1][0] == 64 << 20
    with opened(here.merged / "f", os.O_RDONLY) as fd:
        assert os.pread(fd, 6, 0) == b"start\0"
        assert os.pread(fd, 10, (64 << 20) - 1) == b"\0NEW"


@layers({"f": File(b"", size=1 << 28)})
def test_a_file_that_is_one_hole_is_copied_in_no_time_and_no_space(here: Here) -> None:
    os.chmod(here.merged / "f", 0o600)
    st = os.lstat(here.upper / "f")
    assert (st.st_size, st.st_blocks) == (1 << 28, 0)


@layers({"f": bytes(range(256)) * 20_000})
def test_a_large_file_is_copied_to_the_last_byte(here: Here) -> None:
    with opened(here.merged / "f", os.O_RDWR) as fd:
        os.pwrite(fd, b"!", 2_500_000)
    expected = bytearray(bytes(range(256)) * 20_000)
    expected[2_500_000] = ord("!")
    assert (here.merged / "f").read_bytes() == expected
    assert shape(here.upper) == {"f": bytes(expected)}


@layers({"f": b"old old"})
def test_a_descriptor_and_a_map_made_before_the_copy_up_see_what_is_written_after(here: Here) -> None:
    with opened(here.merged / "f", os.O_RDONLY) as fd:
        with mmap.mmap(fd, 7, mmap.MAP_SHARED, mmap.PROT_READ) as memory:
            assert memory[:] == b"old old"
            assert os.pread(fd, 7, 0) == b"old old"
            _write(here.merged / "f", b"new")
            assert os.pread(fd, 7, 0) == b"new old"
            assert memory[:] == b"new old"
            _append(here.merged / "f")
            assert os.fstat(fd).st_size == 10
            assert os.pread(fd, 20, 0) == b"new oldNEW"


@layers({"f": b"old"})
def test_locks_hold_across_the_copy_up(here: Here) -> None:
    import fcntl

    with opened(here.merged / "f", os.O_RDONLY) as before:
        fcntl.flock(before, fcntl.LOCK_EX)
        _write(here.merged / "f", b"new")
        with opened(here.merged / "f", os.O_RDWR) as after, fails(errno.EAGAIN):
            fcntl.flock(after, fcntl.LOCK_EX | fcntl.LOCK_NB)


@layers({"f": b"old", "sub": {"g": b"old"}, "s": Symlink("f")})
@pytest.mark.root  # sets what only root may
def test_numbers_do_not_change_with_a_copy_up(alone: Here) -> None:
    names = ("", "f", "sub", "sub/g", "s")
    before = {name: os.lstat(alone.merged / name) for name in names}
    _write(alone.merged / "f", b"new")
    os.chmod(alone.merged / "sub" / "g", 0o600)
    os.lchown(alone.merged / "s", 5, 5)
    after = {name: os.lstat(alone.merged / name) for name in names}
    assert shape(alone.upper) == {"f": b"new", "sub": {"g": b"old"}, "s": "-> f"}
    for name in names:
        assert (after[name].st_ino, after[name].st_dev) == (before[name].st_ino, before[name].st_dev), name
    alone.remount()
    for name in names:
        assert os.lstat(alone.merged / name).st_ino == before[name].st_ino, f"{name} after a remount"


@layers({"f": b"x"})
def test_a_second_change_does_not_copy_again(here: Here) -> None:
    _write(here.merged / "f", b"y")
    number = os.lstat(here.upper / "f").st_ino
    os.chmod(here.merged / "f", 0o600)
    _append(here.merged / "f")
    assert os.lstat(here.upper / "f").st_ino == number
    assert shape(here.upper) == {"f": b"yNEW"}


@layers({"f": File(b"x", xattrs={"trusted.overlay.origin": b"", "user.kept": b"1"})})
@pytest.mark.root
def test_marks_of_a_lower_are_not_copied_as_they_are(here: Here) -> None:
    os.chmod(here.merged / "f", 0o600)
    assert os.getxattr(here.upper / "f", "user.kept") == b"1"
    assert mark(here.upper / "f", "trusted.overlay.origin") != b""
    assert [name for name in os.listxattr(here.merged / "f") if "overlay" in name] == []


@layers({"f": b"x"})
def test_copy_up_while_a_unix_socket_holds_the_directory(here: Here) -> None:
    """A program's socket beside the file: binding makes a name in the upper, and the file still copies up beside it."""
    with opened(here.merged, os.O_PATH) as fd, socket.socket(socket.AF_UNIX) as server:
        server.bind(f"/proc/self/fd/{fd}/listening")
        _write(here.merged / "f", b"y")
    assert shape(here.upper) == {"f": b"y", "listening": "s"}


@layers({"old": File(b"x", mtime_ns=MTIME_NS)})
def test_the_times_of_a_written_file_are_now_and_of_the_rest_are_kept(here: Here) -> None:
    before = time.time_ns() - 20_000_000
    _write(here.merged / "old", b"y")
    st = os.lstat(here.merged / "old")
    assert st.st_mtime_ns > before
    assert st.st_ctime_ns > before
    assert os.lstat(here.merged).st_mtime_ns == MTIME_NS
