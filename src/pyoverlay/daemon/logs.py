"""Where the daemon's log goes: stderr in the foreground, else a file or syslog; opened before the mount, then never by path again.

Tracebacks are written without source lines: reading them would lead through our own mount, if it holds our code, in a thread that
is to answer it.
"""

from __future__ import annotations

import linecache
import logging
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Any

from pyoverlay.errors import Refusal

_SYSLOG = "/dev/log"
_FACILITY_DAEMON = 3 << 3
_SEVERITIES = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6), (0, 7))

log = logging.getLogger("pyoverlay")


class SyslogHandler(logging.Handler):
    """Datagrams to the local syslog (RFC 3164 lines). Connected once: what it loses while syslogd restarts is lost."""

    def __init__(self) -> None:
        super().__init__()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            self._socket.connect(_SYSLOG)
        except OSError:
            self._socket.close()
            raise
        self._socket.setblocking(False)

    def emit(self, record: logging.LogRecord) -> None:
        severity = next(code for level, code in _SEVERITIES if record.levelno >= level)
        line = f"<{_FACILITY_DAEMON | severity}>pyoverlay[{record.process}]: {self.format(record)}"
        try:
            self._socket.send(line.encode(errors="replace"))
        except OSError:  # syslogd is gone or full: logging must not end what it describes
            self._socket_failed = True


def set_up(*, foreground: bool, file: str | None, level: int) -> None:
    """Send the log where it shall go. Raises Refusal for a file that cannot be opened."""
    handler = _chosen(foreground, file)
    if not isinstance(handler, SyslogHandler):
        # UTC: local time may read /etc/localtime when it pleases.
        formatter = logging.Formatter("%(asctime)s.%(msecs)03dZ pyoverlay[%(process)d] %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S")
        formatter.converter = _gmtime()
        handler.setFormatter(formatter)
    logging.raiseExceptions = False  # a full disk under the log file is no reason to print tracebacks
    logging.getLogger().addHandler(handler)
    logging.getLogger().setLevel(level)


def _gmtime() -> Callable[..., Any]:
    import time

    return time.gmtime


def _chosen(foreground: bool, file: str | None) -> logging.Handler:
    if file is not None:
        try:
            return logging.FileHandler(file)
        except OSError as error:
            raise Refusal(file, "the log file cannot be written", error.errno) from error
    if foreground:
        return logging.StreamHandler()
    try:
        return SyslogHandler()
    except (FileNotFoundError, ConnectionRefusedError):  # no syslog on this machine
        return logging.NullHandler()


def stay_off_source_files() -> None:
    """From here on a traceback names files and lines without reading them, and what Python would print itself goes to the log."""
    linecache.clearcache()
    for name, replacement in (("updatecache", _no_lines), ("checkcache", _nothing), ("lazycache", _not_found)):
        setattr(linecache, name, replacement)
    sys.excepthook = _log_uncaught
    sys.unraisablehook = _log_unraisable
    threading.excepthook = _log_in_thread
    try:
        raise RuntimeError
    except RuntimeError:
        traceback.format_exc()  # whatever the first traceback imports, it imports now


def _no_lines(filename: str, module_globals: Any = None) -> list[str]:
    return []


def _nothing(filename: str | None = None) -> None:
    return None


def _not_found(filename: str, module_globals: Any) -> bool:
    return False


def _log_uncaught(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
    log.critical("the daemon ends by an unexpected error", exc_info=(kind, error, where))


def _log_unraisable(found: sys.UnraisableHookArgs) -> None:
    error = found.exc_value or found.exc_type()
    log.error("%s in %r", found.err_msg or "exception ignored", found.object, exc_info=(found.exc_type, error, found.exc_traceback))


def _log_in_thread(found: threading.ExceptHookArgs) -> None:
    error = found.exc_value or found.exc_type()
    log.error("a thread ended by an unexpected error", exc_info=(found.exc_type, error, found.exc_traceback))
