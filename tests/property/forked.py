"""Mounts made by one process that forks a daemon for each: a tenth of the time that an interpreter takes to start and to import.

Run as a program with the number of a socket, this file is that process: each message brings the two descriptors that
`python -m pyoverlay.daemon` is given by number, and is answered with the pid of a fork that becomes that daemon.
"""

from __future__ import annotations

import array
import logging
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from pyoverlay.daemon import __main__ as daemon
from pyoverlay.daemon import report
from pyoverlay.daemon.options import Options
from pyoverlay.daemon.request import Request, to_memory
from pyoverlay.testing import Overlay
from pyoverlay.testing.mounts import COMMAND_SECONDS, DAEMON_EXIT_SECONDS, wait_for_end


@dataclass(slots=True)
class Forker:
    """The process that forks, seen from here."""

    connection: socket.socket
    process: subprocess.Popen[bytes]

    def start(self, request: Request) -> int:
        """A daemon for this request, which mounts; its pid when the mount answers. Raises what `pyoverlay mount` does."""
        said, end = os.pipe()
        descriptors = [to_memory([request]), end]
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
        self.connection.sendmsg([b"mount"], rights)
        for fd in descriptors:
            os.close(fd)
        pid = int(self.connection.recv(32))
        with open(said, encoding="utf-8") as pipe:
            assert select.select([pipe], [], [], COMMAND_SECONDS)[0], f"the daemon, pid {pid}, did not answer"
            report.check(pipe.read())
        return pid


@contextmanager
def forker() -> Iterator[Forker]:
    """A Forker that has ended afterwards."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        with theirs:
            process = subprocess.Popen([sys.executable, "-P", __file__, str(theirs.fileno())], pass_fds=[theirs.fileno()])
        yield Forker(ours, process)
    assert process.wait(DAEMON_EXIT_SECONDS) == 0


@dataclass(slots=True)
class ForkedOverlay(Overlay):
    """An Overlay whose daemons a Forker makes; it ends by umount(2) alone."""

    forker: Forker | None = None
    _pid: int | None = field(default=None, init=False)

    def mount(self) -> None:
        assert self.forker is not None
        self.work.mkdir(exist_ok=True)
        lowers = tuple(map(os.fsencode, self.lowers))
        options = Options(lowers=lowers, upper=os.fsencode(self.writable), work=os.fsencode(self.work), index=True)
        self._pid = self.forker.start(Request(options, os.fsencode(self.merged), log_file=str(self.log), log_level=logging.ERROR))

    @property
    def log(self) -> Path:
        """What the daemons had to say of errors: nothing, where each answer is right."""
        return self.merged.with_name("log")

    def umount(self) -> None:
        subprocess.run(["umount", "--", str(self.merged)], check=True, timeout=COMMAND_SECONDS)
        daemons = self.daemons()
        assert wait_for_end(daemons, DAEMON_EXIT_SECONDS) == [], f"the daemon, pid {daemons}, outlived its mount"
        self._pid = None

    def daemons(self) -> list[int]:
        return [] if self._pid is None else [self._pid]


def serve(connection: socket.socket) -> None:
    """Fork until the other side hangs up."""
    from pyoverlay.daemon import logs, mounting  # noqa: F401 - what a daemon imports late, it finds there

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody here waits for the daemons
    while True:
        _, descriptors, _, _ = socket.recv_fds(connection, 16, 2)
        if not descriptors:
            return
        pid = os.fork()
        if pid == 0:
            _become_daemon(descriptors)
        for fd in descriptors:
            os.close(fd)
        connection.send(str(pid).encode())


def _become_daemon(descriptors: list[int]) -> NoReturn:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    sys.argv = [sys.argv[0], *map(str, descriptors)]
    status = daemon.main()
    logging.shutdown()
    os._exit(status)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
