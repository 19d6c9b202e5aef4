"""The process that dies, as a program: `python -m tests.crash.victim` forks one for each line of its input.

A line is a JSON object: the directory of the layers, the case, the number of the call at which to strike, and how. The answer is a line
too: the signal that ended the process, 0 for none. The server starts no thread, so that forking is safe, and imports once for all.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import struct
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from pyoverlay.core.policy import Fsync, Policy
from pyoverlay.core.stack import open_view
from tests.crash.cases import ALL
from tests.unit.merged import POLICY, Faulty, Merged
from tests.unit.wired import WiredFaulty

_SHUTDOWN = 0x8004587D  # EXT4_IOC_SHUTDOWN and XFS_IOC_GOINGDOWN, of _IOR('X', 125, __u32)
_WITHOUT_FLUSHING_THE_LOG = 2

MOUNT = "mount"  # in the place of a case: opening the layers, which clears the work directory


def policy_of(fsync: Fsync) -> Policy:
    return Policy(POLICY.userxattr, privileged=POLICY.privileged, fsync=fsync)


class Deadly(Faulty):
    """Ends the process at call `at`."""

    def __init__(self, at: int, end: Callable[[], NoReturn]) -> None:
        super().__init__(at, AssertionError())
        self.end = end

    def strike(self) -> None:
        self.end()


class WiredDeadly(Deadly, WiredFaulty):
    """Wherever the extension makes the call, too."""


class Killed(Deadly):
    """The page cache survives the process, so that nothing need wait for the disk; the calls that would count all the same."""

    def sync_file_range(self, fd: int) -> None:
        """Not made."""

    def fdatasync(self, fd: int) -> None:
        """Not made."""

    def fsync(self, fd: int) -> None:
        """Not made."""


def kill() -> NoReturn:
    """SIGKILL: nothing runs after it, no `finally` and no `with`."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("still alive")


def cut_power(directory: Path, *, commit_first: bool) -> NoReturn:
    """The file system of `directory` stops as at a power cut: what is not in its log by now is lost. commit_first: an unrelated fsync puts
    the log on disk, with the names that were given up to now; data that nobody had written out is not in it.
    """
    if commit_first:
        other = os.open(directory / "other", os.O_CREAT | os.O_WRONLY, 0o600)
        os.write(other, b"x")
        os.fsync(other)
    shut_down(directory)
    kill()


def shut_down(directory: Path) -> None:
    """Stop the file system that a directory lies on, without writing out its log."""
    root = os.open(directory, os.O_RDONLY)
    try:
        fcntl.ioctl(root, _SHUTDOWN, struct.pack("I", _WITHOUT_FLUSHING_THE_LOG))
    finally:
        os.close(root)


def die(order: dict[str, Any]) -> None:
    """Do what the order says, in a child."""
    base = Path(order["base"])
    lowers = [os.fsencode(lower) for lower in order["lowers"]]
    case = ALL.get(order["case"])
    policy = policy_of(Fsync(order["fsync"]))
    if case is not None:
        policy = case.policy(policy)

    def end() -> NoReturn:
        cut_power(base, commit_first=order["how"] == "commit and cut")

    if order["wired"]:
        calls: Deadly = WiredDeadly(order["at"], kill if order["how"] == "kill" else end)
    else:
        calls = Killed(order["at"], kill) if order["how"] == "kill" else Deadly(order["at"], end)
    if case is None:
        open_view(lowers, os.fsencode(base / "upper"), os.fsencode(base / "work"), policy, calls)
    else:
        view = open_view(lowers, os.fsencode(base / "upper"), os.fsencode(base / "work"), policy)
        merged = Merged(view)
        case.prepare(merged)
        if order["how"] != "kill":
            view.sync()  # what was there before is on disk
        view.upper.calls = calls
        case.act(merged)
    if order["at"] > calls.count:
        calls.strike()
    raise AssertionError(f"call {order['at']} was made and nothing ended")


def serve() -> None:
    """Until the input ends."""
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            try:
                die(json.loads(line))
            except BaseException:  # noqa: BLE001 shown, and the child ends here whatever it was
                traceback.print_exc()
            finally:
                os._exit(1)
        _, status = os.waitpid(pid, 0)
        sys.stdout.write(f"{os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0}\n")
        sys.stdout.flush()


class Victims(AbstractContextManager["Victims"]):
    """The server, from the side of the tests."""

    def __init__(self) -> None:
        program, checkout = [sys.executable, "-m", "tests.crash.victim"], Path(__file__).parents[2]
        self._server = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=checkout)

    def die(
        self,
        base: Path,
        case: str,
        at: int,
        *,
        lowers: Sequence[Path],
        how: str = "kill",
        fsync: Fsync = Fsync.ORDERED,
        wired: bool = False,
    ) -> None:
        """A process does `case` on the layers in `base` and has ended at call `at` when this returns; 1 is the first. wired: the extension
        makes what it can.
        """
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        order = {"base": str(base), "case": case, "at": at, "lowers": [str(lower) for lower in lowers], "how": how, "fsync": fsync.value}
        order["wired"] = wired
        self._server.stdin.write(json.dumps(order) + "\n")
        self._server.stdin.flush()
        assert int(self._server.stdout.readline()) == signal.SIGKILL, "the process did not get as far; its traceback is above"

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.close()
        self._server.wait(30)
        self._server.stdout.close()


if __name__ == "__main__":
    serve()
