"""A copy-up that takes as long as the test wants: its lower is another mount of ours, whose daemon is stopped meanwhile."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pyoverlay.testing import Overlay, make_tree, snapshot
from tests.integration.looks import litter
from tests.integration.test_process_life import wait_until
from tests.posix.check import fails, opened

pytestmark = pytest.mark.root

SIZE = 4 << 20
BLOCK = 4096
WRITERS = 200

# Each thread writes one block of the file in its place, then all is told by one line. A thread that waits says so first.
WRITE = f"""
import os, sys, threading
fd = os.open(sys.argv[1], os.O_RDWR)
def write(number):
    try:
        os.pwrite(fd, bytes([number % 251]) * {BLOCK}, number * {BLOCK})
    except OSError as error:
        print(error, flush=True)
threads = [threading.Thread(target=write, args=[number]) for number in range({WRITERS})]
[thread.start() for thread in threads]
print("started", flush=True)
[thread.join() for thread in threads]
print("written", flush=True)
"""


class Held:
    """`overlay`, over `near`, an ordinary lower, and a slow one below it. `stop` and `go`: whether that answers."""

    def __init__(self, directory: Path) -> None:
        for name in ("far", "far-merged", "near", "upper", "merged"):
            (directory / name).mkdir()
        make_tree(directory / "far", {"held": b"\xff" * SIZE, "small": "small"})
        make_tree(directory / "near", {"other": "other", "directory": {"inside": "inside"}, "gone": "gone"})
        self.slow = Overlay((directory / "far",), None, directory / "far-merged")  # else reading would make its attributes stale
        self.slow.mount()
        self.overlay = Overlay((directory / "near", directory / "far-merged"), directory / "upper", directory / "merged")
        self.overlay.mount()
        (self.daemon,) = self.slow.daemons()
        # Nothing but data is asked of the slow one from here on: its names and attributes are known to the kernel, the file is open.
        os.listdir(self.overlay.merged)
        with opened(self.overlay.merged / "held", os.O_RDONLY) as fd:
            assert os.pread(fd, 1, 0) == b"\xff"
            with fails(errno.ENODATA):
                os.getxattr(fd, "security.capability")
        assert not any((directory / "far-merged" / name).exists() for name in ("new", "made", "other", "gone", "directory"))
        assert (self.overlay.merged / "directory" / "inside").exists()

    def stop(self) -> None:
        os.kill(self.daemon, signal.SIGSTOP)

    def go(self) -> None:
        os.kill(self.daemon, signal.SIGCONT)

    def writers(self) -> subprocess.Popen[str]:
        """Started, and waiting for the copy-up."""
        clients = subprocess.Popen([sys.executable, "-c", WRITE, str(self.overlay.merged / "held")], stdout=subprocess.PIPE, text=True)
        assert clients.stdout is not None
        assert clients.stdout.readline() == "started\n"
        return clients


@pytest.fixture
def held(tmp_path: Path) -> Iterator[Held]:
    made = Held(tmp_path)
    try:
        yield made
        assert litter(made.overlay) == []
    finally:
        made.go()
        made.overlay.close()
        made.slow.close()


def test_two_hundred_writes_that_wait_for_a_copy_up_stop_nothing_else(held: Held) -> None:
    merged = held.overlay.merged
    held.stop()
    with held.writers() as clients:
        assert (merged / "other").read_text() == "other"
        (merged / "other").write_text("changed")
        (merged / "new").write_text("new")
        os.rename(merged / "new", merged / "directory" / "new")
        os.unlink(merged / "gone")
        os.mkdir(merged / "made")
        os.chmod(merged / "directory", 0o700)
        assert sorted(os.listdir(merged)) == ["directory", "held", "made", "other", "small"]
        with opened(merged / "other", os.O_RDONLY) as fd:
            os.fsync(fd)
        held.go()
        assert clients.stdout is not None
        assert clients.stdout.readline() == "written\n"
    assert clients.returncode == 0
    content = (merged / "held").read_bytes()
    assert content == b"".join(bytes([number % 251]) * BLOCK for number in range(WRITERS)) + b"\xff" * (SIZE - WRITERS * BLOCK)


def test_what_waits_for_a_copy_up_takes_no_more_memory_than_its_data(held: Held) -> None:
    """A request that waits keeps its own data, and no buffer of the size of the biggest request."""
    (daemon,) = held.overlay.daemons()
    before = resident(daemon)
    held.stop()
    with held.writers() as clients:
        (held.overlay.merged / "new").write_text("answered, and so all that came before it has been read")
        assert resident(daemon) < before + (64 << 20)
        held.go()
        assert clients.stdout is not None
        assert clients.stdout.readline() == "written\n"


def resident(pid: int) -> int:
    """Bytes."""
    return int(Path(f"/proc/{pid}/status").read_text().split("VmRSS:")[1].split()[0]) << 10


def test_a_killed_writer_leaves_no_copy(held: Held) -> None:
    merged = held.overlay.merged
    before = snapshot(held.overlay.writable).keys()
    held.stop()
    clients = held.writers()
    clients.kill()
    held.go()
    clients.communicate()
    assert (merged / "small").read_text() == "small"
    assert (merged / "held").read_bytes()[WRITERS * BLOCK :] == b"\xff" * (SIZE - WRITERS * BLOCK)
    assert snapshot(held.overlay.writable).keys() - before <= {b"held"}


# What another program does to the file meanwhile: none of these needs the file's lock in the kernel, which write(2) and fsync(2) hold.
MEANWHILE = {
    "chmod": "os.chmod('held', 0o751)",
    "chown": "os.chown('held', 11, 22)",
    "utime": "os.utime('held', ns=(5, 7))",
    "setxattr": "os.setxattr('held', 'user.meanwhile', b'set')",
    "link": "os.link('held', 'directory/linked')",
    "truncate": f"os.truncate('held', {SIZE} + 100)",
    "rename": "os.rename('held', 'directory/renamed')",
}
WAITS = ("request_wait_answer", "fuse_set_nowrite")  # for us, and a truncation for the writes before it


def is_waiting(pid: int) -> bool:
    return any(where in Path(f"/proc/{pid}/stack").read_text() for where in WAITS)


def meanwhile(held: Held, act: str) -> subprocess.Popen[str]:
    """Another process does it; it has begun, and waits."""
    client = subprocess.Popen([sys.executable, "-c", f"import os; {act}"], cwd=held.overlay.merged, text=True)
    wait_until(lambda: is_waiting(client.pid) or client.poll() is not None)
    assert client.poll() is None, f"{act} has not waited for the copy-up"
    return client


# A page of a shared map is on its way to the daemon, which has to copy the file up for it. In a process of its own: to close the file,
# as a child that inherits it does, is to wait for that.
MAP = f"""
import ctypes, mmap, os, sys
fd = os.open("held", os.O_RDWR)
pages = mmap.mmap(fd, {SIZE})
pages[{BLOCK}:{BLOCK + 6}] = b"mapped"
ctypes.CDLL(None).sync_file_range(fd, ctypes.c_int64(0), ctypes.c_int64(0), 2)  # begin to write
print("begun", flush=True)
sys.stdin.readline()
"""


@contextmanager
def dirty_map(held: Held) -> Iterator[None]:
    program = [sys.executable, "-c", MAP]
    with subprocess.Popen(program, cwd=held.overlay.merged, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == "begun\n"
        yield
        client.communicate("\n", timeout=20)


@pytest.mark.wire  # without it the kernel tells of an open for writing, and that copies up
@pytest.mark.parametrize("act", MEANWHILE)
def test_a_change_of_a_file_whose_data_is_on_the_way_is_not_lost(held: Held, act: str) -> None:
    merged = held.overlay.merged
    held.stop()
    with dirty_map(held):
        client = meanwhile(held, MEANWHILE[act])
        held.go()
        assert client.wait(20) == 0
    held.overlay.remount()
    file = merged / ("directory/renamed" if act == "rename" else "held")
    st, content = os.stat(file), file.read_bytes()
    assert content[:SIZE] == b"\xff" * BLOCK + b"mapped" + b"\xff" * (SIZE - BLOCK - 6)
    assert content[SIZE:] == (bytes(100) if act == "truncate" else b"")
    assert (st.st_mode & 0o777 == 0o751) == (act == "chmod")
    assert ((st.st_uid, st.st_gid) == (11, 22)) == (act == "chown")
    assert st.st_nlink == (2 if act == "link" else 1)
    assert (merged / "held").exists() == (act != "rename")
    assert os.listxattr(file) == (["user.meanwhile"] if act == "setxattr" else [])
    if act == "link":
        assert os.path.samefile(merged / "held", merged / "directory/linked")
