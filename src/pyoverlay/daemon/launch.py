"""The caller's side of a mount: hand the request to a daemon of its own process, and wait until it answers or refuses.

The daemon is a fresh interpreter, not a fork of the command line's: an idle mount then holds nothing that only parsing needed. This
module imports neither trio nor pyfuse3.
"""

from __future__ import annotations

import os
import select
import signal
import sys
from dataclasses import replace

from pyoverlay.daemon import report
from pyoverlay.daemon.options import Options
from pyoverlay.daemon.request import Request
from pyoverlay.errors import DaemonFailed, PyoverlayError, printable

# Seconds that a daemon may take to end once it refuses or is told to end.
_LAST_WORDS = 5.0

# -P: a `trio.py` in the directory that somebody mounts from is not ours to import.
_DAEMON = ["-P", "-m", "pyoverlay.daemon"]


def mount(request: Request, wait: float) -> int:
    """Start the daemon in the background; the pid of it when the mount answers.

    wait: seconds it may take. Raises PyoverlayError with the daemon's own reason, DaemonFailed if it gave none.
    """
    said, end = os.pipe()
    try:
        pid = _spawn(absolute(request), end)
    finally:
        os.close(end)
    with open(said, encoding="utf-8") as pipe:
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
    pidfd = os.pidfd_open(pid)
    select.select([pidfd], [], [], _LAST_WORDS)
    os.close(pidfd)


def mount_in_foreground(request: Request) -> None:
    """Become the daemon; does not return."""
    fd = absolute(request).to_memory()
    os.set_inheritable(fd, True)
    os.execv(sys.executable, [sys.executable, *_DAEMON, str(fd)])


def absolute(request: Request) -> Request:
    """The request with paths that hold in the daemon's directory, which is another one. Symlinks and `..` are left to the kernel."""
    here = os.getcwdb()
    options = request.options
    return replace(
        request,
        merged=os.path.join(here, request.merged),
        options=_absolute(options, here),
        log_file=None if request.log_file is None else os.path.join(os.fsdecode(here), request.log_file),
    )


def _absolute(options: Options, here: bytes) -> Options:
    return replace(
        options,
        lowers=tuple(os.path.join(here, lower) for lower in options.lowers),
        upper=None if options.upper is None else os.path.join(here, options.upper),
        work=None if options.work is None else os.path.join(here, options.work),
    )


def _spawn(request: Request, end: int) -> int:
    fd = request.to_memory()
    for inherited in (fd, end):
        os.set_inheritable(inherited, True)
    try:
        return os.posix_spawn(
            sys.executable,
            [sys.executable, *_DAEMON, str(fd), str(end)],
            os.environ,
            file_actions=[(os.POSIX_SPAWN_OPEN, number, "/dev/null", os.O_RDWR, 0) for number in range(3)],
            setsid=True,
            setsigmask=[],
            setsigdef=[signal.SIGHUP, signal.SIGINT, signal.SIGTERM],
        )
    except OSError as error:
        raise DaemonFailed(f"{sys.executable}: the daemon cannot be started ({error.strerror})") from error
    finally:
        os.close(fd)
