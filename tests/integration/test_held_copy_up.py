"""A copy-up that takes as long as the test wants: its lower is another mount of ours, whose daemon is stopped meanwhile."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyoverlay.testing import Overlay, make_tree, snapshot
from tests.integration.looks import litter
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
