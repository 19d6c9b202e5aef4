"""How the daemon tells its caller, through a pipe: one line of JSON, `{"ready": true}` or what was refused.

The pipe's end without a line is an answer too: the daemon is gone, and it was not asked to go. Daemons that were started together share
a socket that keeps messages apart; each says first who it is, `{"pid": N}`, and has its request's number, `"mount"`, in what it says.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from contextlib import suppress
from types import TracebackType

from pyoverlay.errors import DaemonFailed, PyoverlayError, Reported


class Report:
    """The daemon's end. It says one thing, once. fd: of the pipe; None where the caller reads stderr instead."""

    def __init__(self, fd: int | None) -> None:
        self._fd = fd
        self._is_said = False

    def ready(self) -> None:
        """The mount answers."""
        self._say({"ready": True})

    def refuse(self, error: PyoverlayError) -> None:
        """There will be no mount."""
        if self._fd is None and not self._is_said:
            sys.stderr.write(f"pyoverlay: {error}\n")
        self._say({"refused": str(error), "mount_status": error.mount_status, "exit_code": error.exit_code})

    def _say(self, message: dict[str, object]) -> None:
        self._is_said = True
        if self._fd is not None:
            fd, self._fd = self._fd, None
            with open(fd, "w", encoding="utf-8") as pipe:
                pipe.write(json.dumps(message))

    def uncaught(self, kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
        """A `sys.excepthook` for the time before the log is there: a bug is told to the caller in one line, too."""
        self.refuse(DaemonFailed(f"the daemon failed: {kind.__name__}: {error}"))
        sys.__excepthook__(kind, error, where)


class ForegroundReport(Report):
    """Stderr is the caller's own. Who runs a service may want to be told when it is ready: sd_notify(3), `Type=notify`."""

    def __init__(self) -> None:
        super().__init__(None)
        self._manager = _service_manager()

    def ready(self) -> None:
        super().ready()
        if self._manager is not None:
            with self._manager as manager, suppress(ConnectionError):  # nobody listens any more: the mount answers all the same
                manager.send(b"READY=1")


def _service_manager() -> socket.socket | None:
    """Connected to before there is a mount, for the path could lead through it."""
    address = os.environ.pop("NOTIFY_SOCKET", "")
    if not address:
        return None
    manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        manager.connect("\0" + address[1:] if address.startswith("@") else address)
    except OSError:
        manager.close()
        return None
    return manager


class NumberedReport(Report):
    """The same on a socket that others have too. number: of the request, from 0."""

    def __init__(self, fd: int, number: int) -> None:
        super().__init__(fd)
        self._number = number
        self._send({"pid": os.getpid()})

    def _say(self, message: dict[str, object]) -> None:
        self._is_said = True
        if self._fd is not None:
            self._send(message)
            os.close(self._fd)
            self._fd = None

    def _send(self, message: dict[str, object]) -> None:
        if self._fd is not None:
            os.write(self._fd, json.dumps({"mount": self._number, **message}).encode())


def check(text: str | bytes) -> None:
    """Return if the daemon has said that it is ready. Raises what it refused, or DaemonFailed where it said nothing."""
    if not text:
        raise DaemonFailed("the daemon ended before the mount answered; run the same with -f to see why")
    message = json.loads(text)
    if "refused" in message:
        raise Reported(message["refused"], exit_code=message["exit_code"], mount_status=message["mount_status"])


def close_all_but(*kept: int) -> None:
    """Close every descriptor above 2 that was inherited, but these: whoever started us may wait for their end."""
    low = 3
    for fd in (*sorted(kept), os.sysconf("SC_OPEN_MAX")):
        os.closerange(low, fd)
        low = fd + 1
