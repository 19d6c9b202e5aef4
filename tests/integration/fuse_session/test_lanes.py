"""Data that moves in C: READ and WRITE between registered descriptors, and attributes known to be absent."""

import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.wire, pytest.mark.root]


@pytest.fixture
def mounted(session: Callable[..., Any]) -> Any:
    return session(flags=["NO_OPEN_SUPPORT", "HANDLE_KILLPRIV_V2"], lanes=True)


def _reads(mounted: Any) -> int:
    """By the receiver, or by a thread if the page was not in the cache at that moment."""
    lanes = mounted.lanes()
    return int(lanes["reads"] + lanes["queued_reads"])


def _writes(mounted: Any) -> int:
    """By the receiver, or by a thread if the write before was slow."""
    lanes = mounted.lanes()
    return int(lanes["writes"] + lanes["queued_writes"])


def uncached(path: Path) -> None:
    """Empty the kernel's cache of the mount's file, so that the next read asks."""
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def test_read_and_write_of_a_registered_node_never_reach_python(mounted: Any) -> None:
    data = os.urandom(3_000_001)
    path = mounted.mountpoint / "file"
    path.write_bytes(data)
    uncached(path)
    assert path.read_bytes() == data
    assert (mounted.root / "file").read_bytes() == data
    assert _writes(mounted) == mounted.opcodes()[16] == 3
    assert _reads(mounted) == mounted.opcodes()[15]
    assert not {"read", "write"} & {name for name, _ in mounted.tell("handles")}


def test_a_node_whose_lane_is_cleared_goes_back_to_python(mounted: Any) -> None:
    path = mounted.mountpoint / "file"
    path.write_bytes(b"by the lane")
    mounted.tell("lane", path.stat().st_ino, -1, -1)
    path.write_bytes(b"by python")
    uncached(path)
    assert path.read_bytes() == b"by python"
    assert {name for name, _ in mounted.tell("handles")} >= {"read", "write"}
    assert _writes(mounted) == 1


def test_what_is_not_in_the_page_cache_is_read_by_a_thread(mounted: Any) -> None:
    data = os.urandom(1 << 20)
    path = mounted.mountpoint / "file"
    path.write_bytes(data)
    uncached(path)
    uncached(mounted.root / "file")
    assert path.read_bytes() == data
    assert mounted.lanes()["queued_reads"] >= 1


def test_reads_end_at_the_end_of_the_file(mounted: Any) -> None:
    for size in (0, 1, 4095, 4096, 4097, 131071, 131073):
        path = mounted.mountpoint / f"file{size}"
        path.write_bytes(b"x" * size)
        uncached(path)
        with path.open("rb", buffering=0) as f:
            assert f.read(200_000) == b"x" * size
            assert f.read(1) == b""


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Path]:
    """A root that has room for 64 KiB."""
    root = tmp_path / "0" / "root"
    root.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", root], check=True)
    yield root
    subprocess.run(["umount", "-l", root], check=True)


def test_a_full_file_system_is_told_by_the_write_itself(full: Path, session: Callable[..., Any]) -> None:
    mounted = session(flags=["HANDLE_KILLPRIV_V2"], lanes=True)
    assert mounted.root == full
    fd = os.open(mounted.mountpoint / "file", os.O_CREAT | os.O_RDWR)
    try:
        assert os.write(fd, bytes(100_000)) == 65536
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            os.write(fd, b"more")
        assert os.fstat(fd).st_size == 65536
    finally:
        os.close(fd)
    assert _writes(mounted) == 2


def test_a_write_that_takes_suid_away_is_pythons(mounted: Any) -> None:
    plain, suid = mounted.mountpoint / "plain", mounted.mountpoint / "suid"
    for path, mode in ((plain, 0o666), (suid, 0o4777)):
        path.write_bytes(b"old")
        path.chmod(mode)
    writes = _writes(mounted)
    _write_as_nobody(plain)
    assert _writes(mounted) == writes + 1
    _write_as_nobody(suid)
    assert _writes(mounted) == writes + 1
    assert ["write", True] in mounted.tell("handles")


def _write_as_nobody(path: Path) -> None:
    """By a relative name: nobody may not pass through the directories above."""
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--no-new-privs"]
    subprocess.run(
        [*nobody, "dd", "if=/dev/zero", f"of={path.name}", "bs=3", "count=1", "conv=notrunc", "status=none"], cwd=path.parent, check=True
    )


def test_absent_attributes_are_answered_without_python(mounted: Any) -> None:
    path = mounted.mountpoint / "file"
    path.write_bytes(b"")
    for name in ("security.capability", "system.posix_acl_access"):
        with pytest.raises(OSError, match=os.strerror(errno.ENODATA)):
            os.getxattr(path, name)
    answered = mounted.lanes()["xattrs"]
    assert answered >= 2
    with pytest.raises(OSError, match=os.strerror(errno.ENODATA)):
        os.getxattr(path, "user.other")
    assert mounted.lanes()["xattrs"] == answered


def test_written_tells_once(mounted: Any) -> None:
    path = mounted.mountpoint / "file"
    path.touch()
    assert mounted.tell("written") is False
    path.write_bytes(b"x")
    ino = path.stat().st_ino
    assert [mounted.tell("written", ino), mounted.tell("written", ino)] == [True, False]
    assert [mounted.tell("written"), mounted.tell("written")] == [True, False]


def test_a_thousand_nodes_come_and_go(mounted: Any) -> None:
    """The table grows, and its deletions leave every other node in its place."""
    paths = [mounted.mountpoint / str(i) for i in range(1000)]
    for path in paths:
        path.write_bytes(path.name.encode())
    inos = [path.stat().st_ino for path in paths]
    assert mounted.lanes()["nodes"] == 1000
    for ino in inos[::2]:
        mounted.tell("lane", ino, -1, -1)
    assert mounted.lanes()["nodes"] == 1000  # still known to have no attributes
    before = _reads(mounted)
    for path in paths:
        uncached(path)
        assert path.read_bytes() == path.name.encode()
    assert _reads(mounted) == before + 500


def test_a_stream_of_lane_reads_leaves_the_loop_its_turns(mounted: Any) -> None:
    path = mounted.mountpoint / "file"
    path.write_bytes(bytes(1 << 16))
    code = f"""
import mmap, os
fd, page = os.open({str(path)!r}, os.O_RDONLY | os.O_DIRECT), mmap.mmap(-1, 4096)
print(flush=True)
while True: os.preadv(fd, [page], 0)
"""
    reader = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        assert reader.stdout is not None
        reader.stdout.readline()
        for _ in range(20):
            mounted.tell("waiting")
        first = _reads(mounted)
        while _reads(mounted) < first + 2000:
            pass
    finally:
        reader.kill()
        reader.wait()
        if reader.stdout is not None:
            reader.stdout.close()


def test_nothing_of_a_session_outlives_its_mount(mounted: Any) -> None:
    (mounted.mountpoint / "file").write_bytes(b"x")
    assert mounted.end() == 0
    assert mounted.log.read_text() == ""
