"""Where the daemon's log goes: stderr in the foreground, else a file or syslog; opened before the mount, then never by path again.

Tracebacks are written without source lines: reading them would lead through our own mount, if it holds our code, in a thread that
is to answer it. Syslog and the journal are read by more people than the tree is: what an exception says, which may be a name out of the
tree, goes there at debug level alone.
"""

from __future__ import annotations

import errno
import json
import linecache
import logging
import os
import select
import socket
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from enum import Enum
from types import TracebackType
from typing import Any

from pyoverlay.errors import Refusal

_SYSLOG = "/dev/log"
_FACILITY_DAEMON = 3 << 3
_SEVERITIES = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6), (0, 7))

log = logging.getLogger("pyoverlay")


class Format(Enum):
    """`--log-format`."""

    TEXT = "text"
    JSON = "json"  # one object a line: time, level, pid, logger, message, and exception if there is one


class TextFormatter(logging.Formatter):
    """A line for people. is_shared: syslog's or the journal's, which know the time and the process, and who reads them is not known."""

    def __init__(self, *, is_shared: bool) -> None:
        super().__init__("%(message)s" if is_shared else "%(asctime)s.%(msecs)03dZ pyoverlay[%(process)d] %(levelname)s %(message)s")
        self.datefmt = "%Y-%m-%dT%H:%M:%S"
        self.converter = time.gmtime  # local time may read /etc/localtime when it pleases
        self._is_shared = is_shared

    def formatException(self, ei: Any) -> str:  # noqa: N802 - logging's name
        return _discreet(ei) if self._is_shared and not _is_debugging() else super().formatException(ei)


class JsonFormatter(TextFormatter):
    """The same for programs."""

    def format(self, record: logging.LogRecord) -> str:
        document = {
            "time": f"{self.formatTime(record, self.datefmt)}.{int(record.msecs):03}Z",
            "level": record.levelname.lower(),
            "pid": record.process,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            document["exception"] = self.formatException(record.exc_info)
        return json.dumps(document)


def _discreet(ei: Any) -> str:
    """Where it happened and of which kind it is, without what it says."""
    kind, _, where = ei
    return "".join(["Traceback (most recent call last):\n", *traceback.format_tb(where), kind.__qualname__])


class JournalFormatter(logging.Formatter):
    """Lines on a stderr that the journal reads: each begins with its severity, sd-daemon(3)."""

    def __init__(self, inner: logging.Formatter) -> None:
        super().__init__()
        self._inner = inner

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(f"<{_severity(record)}>{line}" for line in self._inner.format(record).splitlines())


class DescriptorHandler(logging.Handler):
    """Lines to stderr or a file. Whoever reads them may stop: a terminal by Ctrl-S, a pager, a journal that hangs. Nobody in the mount
    waits for that: lines for which there is no room are lost, and the next one says how many.
    """

    def __init__(self, fd: int) -> None:
        super().__init__()
        self.fd = fd
        self._lost = 0
        self._room = select.poll()
        self._room.register(fd, select.POLLOUT)

    def emit(self, record: logging.LogRecord) -> None:
        records = [record]
        if self._lost:
            message = "%d lines of the log could not be written"
            records.insert(0, log.makeRecord(log.name, logging.WARNING, __file__, 0, message, (self._lost,), None))
        try:
            self._write("".join(f"{self.format(each)}\n" for each in records).encode(errors="backslashreplace"))
        except OSError:
            self._lost += 1
        else:
            self._lost = 0

    def _write(self, data: bytes) -> None:
        """A pipe that has room has room for a page."""
        while data:
            if not self._room.poll(0):
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
            data = data[os.write(self.fd, data[: select.PIPE_BUF]) :]


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
        line = f"<{_FACILITY_DAEMON | _severity(record)}>pyoverlay[{record.process}]: {self.format(record)}"
        try:
            self._socket.send(line.encode(errors="replace"))
        except OSError:  # syslogd is gone or full: logging must not end what it describes
            self.handleError(record)


def _severity(record: logging.LogRecord) -> int:
    return next(code for level, code in _SEVERITIES if record.levelno >= level)


def set_up(*, foreground: bool, file: str | None, level: int, form: Format = Format.TEXT) -> None:
    """Send the log where it shall go. Raises Refusal for a file that cannot be opened."""
    handler = _chosen(foreground, file)
    is_journal = foreground and file is None and _is_journal(sys.stderr.fileno(), os.environ)
    kind = JsonFormatter if form is Format.JSON else TextFormatter
    formatter = kind(is_shared=is_journal or isinstance(handler, SyslogHandler))
    handler.setFormatter(JournalFormatter(formatter) if is_journal else formatter)
    logging.raiseExceptions = False  # a full disk under the log file is no reason to print tracebacks
    logging.getLogger().addHandler(handler)
    logging.getLogger().setLevel(level)


def _chosen(foreground: bool, file: str | None) -> logging.Handler:
    if file is not None:
        try:
            # Its owner's alone: at debug level names of files are in it.
            # O_NONBLOCK: a fifo that nobody reads is refused.
            fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise Refusal(file, "the log file cannot be written", error.errno) from error
        return DescriptorHandler(fd)
    if foreground:
        return DescriptorHandler(sys.stderr.fileno())
    try:
        return SyslogHandler()
    except (FileNotFoundError, ConnectionRefusedError):  # no syslog on this machine
        return logging.NullHandler()


def _is_journal(fd: int, environment: Mapping[str, str]) -> bool:
    """Whether the journal reads what is written to `fd`: $JOURNAL_STREAM names it by device and inode, systemd.exec(5)."""
    status = os.fstat(fd)
    return environment.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


# ── while it runs ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class Level:
    """The level of the log, which a signal moves to debug and back."""

    def __init__(self) -> None:
        self._quiet = logging.getLogger().level

    def switch(self) -> None:
        """To debug; if it is debug, to what it was when the mount was made, or to info if that was debug."""
        level = logging.DEBUG if not _is_debugging() else logging.INFO if self._quiet == logging.DEBUG else self._quiet
        logging.getLogger().setLevel(level)
        say("the log's level is now %s", logging.getLevelName(level).lower())


def say(message: str, *arguments: object) -> None:
    """Log what somebody asked for, whatever the level."""
    log.handle(log.makeRecord(log.name, logging.INFO, __file__, 0, message, arguments, None))


def _is_debugging() -> bool:
    return logging.getLogger().level <= logging.DEBUG


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
