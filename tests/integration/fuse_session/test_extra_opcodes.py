"""What pyfuse3 has no handler for, through system calls on a real mount."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

FS_IOC_GETFLAGS, FS_IOC_GETVERSION = 0x80086601, 0x80087601
INTERRUPT, WRITE = 36, 16

pytestmark = [pytest.mark.wire, pytest.mark.root]


@pytest.fixture
def mounted(session: Callable[..., Any]) -> Any:
    return session(flags=["NO_OPEN_SUPPORT", "NO_OPENDIR_SUPPORT", "HANDLE_KILLPRIV_V2"])


@pytest.fixture
def file(mounted: Any) -> Path:
    path: Path = mounted.mountpoint / "file"
    path.write_bytes(b"0123456789")
    return path


def test_fallocate_makes_the_file_longer(mounted: Any, file: Path) -> None:
    with file.open("r+b") as f:
        os.posix_fallocate(f.fileno(), 0, 100_000)
    assert (mounted.root / "file").stat().st_blocks * 512 >= 100_000
    assert (mounted.root / "file").stat().st_size == 100_000


def test_a_bug_in_a_handler_is_one_eio_and_the_mount_goes_on(mounted: Any, file: Path) -> None:
    with file.open("r+b") as f, pytest.raises(OSError, match=os.strerror(errno.EIO)):
        os.posix_fallocate(f.fileno(), 13, 1)
    assert file.read_bytes() == b"0123456789"
    assert mounted.log.read_text().count("RuntimeError: a bug in a handler") == 1


def test_seek_finds_data_and_holes_by_a_handler_that_suspends(mounted: Any, file: Path) -> None:
    with (mounted.root / "file").open("r+b") as backing:
        backing.truncate(0)
        backing.seek(1 << 20)
        backing.write(b"data")
    with file.open("rb") as f:
        assert os.lseek(f.fileno(), 0, os.SEEK_DATA) == 1 << 20
        assert os.lseek(f.fileno(), 0, os.SEEK_HOLE) == 0
        with pytest.raises(OSError, match=os.strerror(errno.ENXIO)):
            os.lseek(f.fileno(), 1 << 30, os.SEEK_DATA)


def test_copy_file_range_copies_in_the_layer_below(mounted: Any, file: Path) -> None:
    (mounted.mountpoint / "to").touch()
    with file.open("rb") as source, (mounted.mountpoint / "to").open("r+b") as to:
        assert os.copy_file_range(source.fileno(), to.fileno(), 6, 2, 1) == 6
    assert (mounted.mountpoint / "to").read_bytes() == b"\x00234567"
    assert {47, 53} & mounted.opcodes().keys()
    assert 15 not in mounted.opcodes() or mounted.opcodes()[15] == 1  # the READ of the comparison; the copy needed none


def test_a_nameless_file_is_written_and_then_named(mounted: Any) -> None:
    fd = os.open(mounted.mountpoint, os.O_TMPFILE | os.O_RDWR, 0o640)
    try:
        os.write(fd, b"nameless")
        assert os.listdir(mounted.mountpoint) == []
        os.link(f"/proc/self/fd/{fd}", mounted.mountpoint / "named", src_dir_fd=0, follow_symlinks=True)
    finally:
        os.close(fd)
    assert (mounted.mountpoint / "named").read_bytes() == b"nameless"
    assert (mounted.root / "named").stat().st_mode & 0o777 == 0o640


def test_inode_flags_are_answered_and_an_unknown_ioctl_is_enotty(file: Path) -> None:
    with file.open("rb") as f:
        assert fcntl.ioctl(f, FS_IOC_GETFLAGS, bytes(8))[:4] == b"\x10\0\0\0"
        with pytest.raises(OSError, match=os.strerror(errno.ENOTTY)):
            fcntl.ioctl(f, FS_IOC_GETVERSION, bytes(8))


def test_isatty_needs_no_python(mounted: Any, file: Path) -> None:
    before = mounted.lanes()["isattys"]
    fd = os.open(file, os.O_RDONLY)
    assert not os.isatty(fd)
    os.close(fd)
    assert mounted.lanes()["isattys"] == before + 1


def test_statx_tells_the_time_of_birth(file: Path) -> None:
    shown = subprocess.run(["stat", "--cached=never", "-c", "%W %s", file], check=True, capture_output=True, text=True).stdout
    assert shown == "1 10\n"


def test_a_killed_caller_interrupts_its_request(mounted: Any, file: Path) -> None:
    mounted.tell("pause", [file.stat().st_ino])
    writer = subprocess.Popen([sys.executable, "-c", f"import os; os.pwrite(os.open({str(file)!r}, os.O_RDWR), b'x', 0)"])
    _until(lambda: mounted.tell("waiting") == 1)
    writer.send_signal(signal.SIGKILL)
    _until(lambda: mounted.tell("interrupted") != [])
    assert mounted.tell("interrupted") == mounted.tell("uniques")
    mounted.tell("resume")
    assert writer.wait() == -signal.SIGKILL


def test_python_sees_the_node_for_every_handle(mounted: Any, file: Path) -> None:
    """CREATE answered handle 12345, and open answers none at all."""
    with (mounted.mountpoint / "new").open("xb+") as f:
        f.write(b"x" * 10)
        f.flush()
        f.truncate(5)
        os.fsync(f.fileno())
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert os.pread(f.fileno(), 10, 0) == b"x" * 5
    with file.open("r+b") as f:
        f.write(b"y")
    os.listdir(mounted.mountpoint)
    _until(lambda: ["release", True] in mounted.tell("handles"))  # RELEASE is sent after close(2) returns
    assert mounted.tell("handles") == [[name, True] for name in ("fsync", "read", "readdir", "release", "setattr", "write")]


def _until(happened: Callable[[], bool]) -> None:
    """Asks the file system again and again: the answer travels by its pipe, so each question gives it time to get on."""
    for _ in range(20_000):
        if happened():
            return
    pytest.fail("it never happened")


def test_hundreds_of_writes_that_wait_stop_nothing_else(session: Callable[..., Any]) -> None:
    mounted = session(flags=["NO_OPEN_SUPPORT"], max_tasks=1000)
    names = [mounted.mountpoint / f"slow{i}" for i in range(300)]
    for name in names:
        name.touch()
    mounted.tell("pause", [name.stat().st_ino for name in names])
    writers = [threading.Thread(target=name.write_bytes, args=(b"late",)) for name in names]
    for writer in writers:
        writer.start()
    _until(lambda: mounted.tell("waiting") == len(names))
    (mounted.mountpoint / "other").write_bytes(b"at once")
    assert (mounted.mountpoint / "other").read_bytes() == b"at once"
    assert len(os.listdir(mounted.mountpoint)) == len(names) + 1
    assert mounted.tell("waiting") == len(names)
    mounted.tell("resume")
    for writer in writers:
        writer.join()
    assert {name.read_bytes() for name in names} == {b"late"}
    _until(lambda: mounted.tell("tasks") < 20)  # pyfuse3 ends the tasks it started
