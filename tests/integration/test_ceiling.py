"""Memory has a ceiling: past `-o inodes=N` the kernel is asked to forget."""

from __future__ import annotations

import errno
import json
import os
import queue
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from pyoverlay.core.policy import Policy
from pyoverlay.core.stack import open_view
from pyoverlay.core.view import View
from pyoverlay.fuse.ceiling import Ceiling
from pyoverlay.testing import Overlay, OverlayFactory, Tree
from pyoverlay.testing.mounts import command
from tests.posix.check import opened

TREE: Tree = {
    f"d{directory}": {f"f{number}": f"{directory} {number}" for number in range(500)} | {f"e{number}": {} for number in range(100)}
    for directory in range(10)
}
LIMIT = 1000
BATCH = 1024


def known(overlay: Overlay) -> int:
    """How many inodes the daemon knows."""
    told = json.loads(subprocess.run(command("ps", "--json"), check=True, capture_output=True, text=True, timeout=30).stdout)
    (mine,) = [mount for mount in told["mounts"] if mount["merged"] == str(overlay.merged)]
    inodes: int = mine["inodes"]
    return inodes


@pytest.mark.root
@pytest.mark.wire
def test_past_the_limit_of_inodes_the_kernel_is_asked_to_forget(overlay: OverlayFactory) -> None:
    made = overlay(TREE, options=["-o", f"inodes={LIMIT}"])
    held = made.merged / "d0" / "f0"
    with opened(held, os.O_RDONLY) as fd:
        number = os.fstat(fd).st_ino
        for directory in TREE:
            for name in os.listdir(made.merged / directory):
                os.stat(made.merged / directory / name)
        # A notification is a matter of the daemon's own thread: requests go on meanwhile, and are when the next one is begun.
        assert any(known(made) <= LIMIT + BATCH for _ in range(100) if [os.statvfs(made.merged) for _ in range(100)])
        assert os.pread(fd, 10, 0) == b"0 0"
        assert os.stat(held).st_ino == number == os.fstat(fd).st_ino
    assert {(made.merged / directory / "f499").read_text() for directory in TREE} == {f"{directory} 499" for directory in range(10)}
    os.rename(made.merged / "d0", made.merged / "renamed")
    assert (made.merged / "renamed" / "f5").read_text() == "0 5"


class OldKernel:
    """The extension over a kernel before 7.45, which knows no FUSE_NOTIFY_PRUNE."""

    def __init__(self) -> None:
        self.dropped: queue.SimpleQueue[tuple[int, bytes]] = queue.SimpleQueue()

    def notify_prune(self, nodes: Sequence[int], /) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    def notify_inval_entry(self, parent: int, name: bytes, /) -> None:
        self.dropped.put((parent, name))
        if name == b"last":
            raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))  # which ends the thread


@pytest.fixture
def view(tmp_path: Path) -> View:
    for name in ("first", "second", "last"):
        (tmp_path / name).touch()
    (tmp_path / "directory").mkdir()
    return open_view([os.fsencode(tmp_path)], None, None, Policy(userxattr=True, privileged=False))


def look_up(view: View) -> None:
    for name in (b"first", b"directory", b"second", b"last"):
        found = view.lookup(view.root, name)
        assert found is not None
        found[0].nlookup += 1


def test_an_older_kernel_is_told_to_drop_the_names_of_files(view: View) -> None:
    """A directory's name stays: what is mounted below would go with it."""
    kernel = OldKernel()
    Ceiling(view, kernel, 2, drops_names=True)
    look_up(view)
    view.trim()
    assert [kernel.dropped.get(timeout=10) for _ in range(3)] == [(1, b"first"), (1, b"second"), (1, b"last")]
    view.close()


def test_an_older_kernel_drops_no_name_that_the_user_did_not_ask_for(view: View) -> None:
    """What is mounted on a file, as an engine's resolv.conf, would go with its name."""
    kernel, others = OldKernel(), set(threading.enumerate())
    Ceiling(view, kernel, 2)
    look_up(view)
    (thread,) = set(threading.enumerate()) - others
    view.trim()
    thread.join(10)
    assert not thread.is_alive()
    assert kernel.dropped.empty()
    view.close()
