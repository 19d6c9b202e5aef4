"""The caller's side of a mount: hand the request to a daemon of its own process, and wait until it answers or refuses.

The daemon is a fresh interpreter, not a fork of the command line's: an idle mount then holds nothing that only parsing needed. This
module imports neither trio nor pyfuse3.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from pyoverlay.daemon import report
from pyoverlay.daemon.request import Request, to_memory
from pyoverlay.errors import DaemonFailed, PyoverlayError, Refusal, printable

# Seconds that a daemon may take to end once it refuses or is told to end.
_LAST_WORDS = 5.0

# A refusal names paths, of 4 KiB each at the most.
_LONGEST_MESSAGE = 1 << 16

# -P: a `trio.py` in the directory that somebody mounts from is not ours to import.
_DAEMON = ["-P", "-m", "pyoverlay.daemon"]


def mount(request: Request, wait: float) -> int:
    """Start the daemon in the background; the pid of it when the mount answers.

    wait: seconds it may take. Raises PyoverlayError with the daemon's own reason, DaemonFailed if it gave none.
    """
    said, end = os.pipe()
    with open(said, encoding="utf-8") as pipe:
        try:
            pid = _spawn([absolute(request)], end)
        finally:
            os.close(end)
        try:
            if not select.select([pipe], [], [], wait)[0]:
                os.kill(pid, signal.SIGTERM)  # it unmounts what it may have mounted by now
                raise DaemonFailed(f"{printable(request.merged)}: the mount did not answer within {wait:g} s; given up")
            report.check(pipe.read())
        except PyoverlayError:
            _wait_for_end(pid)
            raise
    return pid


def _wait_for_end(pid: int) -> None:
    """Return when the daemon, which will not mount, has let go of everything."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    select.select([pidfd], [], [], _LAST_WORDS)
    os.close(pidfd)
    with suppress(ChildProcessError):  # one of several is the starter's child
        os.waitpid(pid, os.WNOHANG)  # a program that mounts from Python would keep it as a zombie


@dataclass(slots=True)
class _Daemon:
    """One of several: who it is, and what it has said of its mount."""

    pid: int | None = None
    said: bytes | None = None


def mount_each(requests: Sequence[Request], wait: float) -> list[PyoverlayError | None]:
    """Mount all, each by a daemon of its own; why not, one by one, None where the mount answers.

    One process imports everything and forks the daemons, which then share that. wait: seconds that they may take together.
    """
    daemons = [_Daemon() for _ in requests]
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        with theirs:
            starter = _spawn([absolute(request) for request in requests], theirs.fileno(), "--each")
        is_in_time = _hear(ours, daemons, wait)
    if not is_in_time:
        os.kill(starter, signal.SIGTERM)  # whom it has forked and we have not heard of fails to tell us, and takes back what it began
    os.waitpid(starter, 0)
    return [_outcome(request, daemon, None if is_in_time else wait) for request, daemon in zip(requests, daemons, strict=True)]


def _hear(ours: socket.socket, daemons: list[_Daemon], wait: float) -> bool:
    """Keep what the daemons say, until all have said how it went or are gone; False where that takes longer."""
    deadline = time.monotonic() + wait
    while any(daemon.said is None for daemon in daemons):
        if not select.select([ours], [], [], max(0.0, deadline - time.monotonic()))[0]:
            return False
        message = ours.recv(_LONGEST_MESSAGE)
        if not message:
            break
        known = json.loads(message)
        daemon = daemons[known["mount"]]
        if "pid" in known:
            daemon.pid = known["pid"]
        else:
            daemon.said = message
    return True


def _outcome(request: Request, daemon: _Daemon, waited: float | None) -> PyoverlayError | None:
    """waited: so long, in vain, for those that have said nothing."""
    try:
        if daemon.said is None and waited is not None:
            if daemon.pid is not None:
                with suppress(ProcessLookupError):
                    os.kill(daemon.pid, signal.SIGTERM)
            raise DaemonFailed(f"{printable(request.merged)}: the mount did not answer within {waited:g} s; given up")
        report.check(daemon.said or b"")
    except PyoverlayError as error:
        if daemon.pid is not None:
            _wait_for_end(daemon.pid)
        return error
    return None


def mount_in_foreground(request: Request) -> None:
    """Become the daemon; does not return."""
    _open_standard_streams()
    fd = to_memory([absolute(request)])
    os.set_inheritable(fd, True)
    os.execv(sys.executable, [sys.executable, *_DAEMON, str(fd)])


def _open_standard_streams() -> None:
    """What the caller has closed of these (`2>&-`) is /dev/null from here on: else the next file opened would be taken for it."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(fd, True)
    os.close(fd)


def absolute(request: Request) -> Request:
    """The request with paths that hold in the daemon's directory, which is another one. Symlinks and `..` are left to the kernel."""
    options = request.options
    return replace(
        request,
        merged=from_here(request.merged),
        options=replace(
            options,
            lowers=tuple(map(from_here, options.lowers)),
            data_lowers=tuple(map(from_here, options.data_lowers)),
            upper=None if options.upper is None else from_here(options.upper),
            work=None if options.work is None else from_here(options.work),
        ),
        log_file=None if request.log_file is None else os.fsdecode(from_here(os.fsencode(request.log_file))),
    )


def from_here(path: bytes) -> bytes:
    """The path below the current directory, if it is not absolute anyway. Raises Refusal where that directory was removed."""
    if path.startswith(b"/"):
        return path
    try:
        return os.path.join(os.getcwdb(), path)
    except FileNotFoundError as error:
        raise Refusal(path, "the current directory was removed", errno.ENOENT, "change to one that is there") from error


def _spawn(requests: Sequence[Request], end: int, *how: str) -> int:
    """The pid of a new process with the requests and our caller's end of a pipe or socket."""
    fd = to_memory(requests)
    # Inheritable, and none of 0 to 2, which are its own: a caller without them (`>&-`) has got such numbers.
    given, told = (fcntl.fcntl(inherited, fcntl.F_DUPFD, 3) for inherited in (fd, end))
    try:
        return os.posix_spawn(
            sys.executable,
            [sys.executable, *_DAEMON, *how, str(given), str(told)],
            os.environ,
            file_actions=[(os.POSIX_SPAWN_OPEN, number, "/dev/null", os.O_RDWR, 0) for number in range(3)],
            setsid=True,
            setsigmask=[],
            # SIGCHLD: what is ignored here is nobody's to wait for, and then fusermount3 cannot be heard of.
            setsigdef=[signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGCHLD],
        )
    except OSError as error:
        raise DaemonFailed(f"{sys.executable}: the daemon cannot be started ({error.strerror})") from error
    finally:
        for number in (fd, given, told):
            os.close(number)
