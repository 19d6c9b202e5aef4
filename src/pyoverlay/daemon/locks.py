"""One mount an upper: flock(2) on the directories themselves, which the kernel lets go of with the process, however it ends."""

from __future__ import annotations

import fcntl
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from pyoverlay import mountinfo, registry
from pyoverlay.errors import printable

# How long a predecessor may take to leave: after a plain umount its daemon still syncs the upper.
PATIENCE = 5.0


class InUse(Exception):
    """Somebody else holds the lock; `str()` says who, as far as it can be known. remedy: what makes the holder let go."""

    def __init__(self, holder: str, remedy: str) -> None:
        self.remedy = remedy
        super().__init__(holder)


def lock(fd: int, patience: float = PATIENCE) -> None:
    """Lock an open directory for as long as `fd` is open. Raises InUse.

    A holder that is the daemon of a live mount is not waited for; one that is about to leave is, `patience` seconds. Main thread only.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        pid = _holder(fd)
        if _is_serving(pid):
            raise _in_use(pid) from None
        _wait(fd, patience)


def _wait(fd: int, patience: float) -> None:
    try:
        with _alarm(patience):
            fcntl.flock(fd, fcntl.LOCK_EX)
    except TimeoutError:
        raise _in_use(_holder(fd)) from None


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the body after so many seconds, out of a blocking system call too."""

    def expire(number: int, frame: FrameType | None) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _holder(fd: int) -> int | None:
    """The process that has the lock, by /proc/locks; None where it is of another pid namespace."""
    status = os.fstat(fd)
    file = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    with open("/proc/locks", encoding="ascii") as lines:
        for line in lines:
            fields = line.split()
            if fields[1] == "FLOCK" and fields[5] == file and int(fields[4]) > 0:
                return int(fields[4])
    return None


def _is_serving(pid: int | None) -> bool:
    """Its mount is in the list of mounts: it will not leave by itself."""
    record = _record(pid)
    if record is None:
        return False
    return any(mount.device == record.device for mount in mountinfo.mounts())


def _record(pid: int | None) -> registry.Record | None:
    return next((record for record in registry.records() if record.pid == pid and record.is_alive), None)


def _in_use(pid: int | None) -> InUse:
    record = _record(pid)
    if record is None:
        return InUse(f"already used by process {pid}" if pid is not None else "already used by another mount", "unmount that first")
    mount = f"the mount at {printable(record.merged)} (pid {pid})"
    if _is_serving(pid):
        return InUse(f"already used by {mount}", "unmount that first")
    return InUse(f"still used by {mount}, which was detached and serves its last users", f"end these, or kill {pid}")
