"""Asking the daemons of live mounts what they have to tell, all at once: one that hangs must not hold up the answers of the others.

No path of a mount is touched: a mount whose daemon hangs would not let go of whoever does.
"""

from __future__ import annotations

import json
import select
import socket
import time
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from typing import Any

from pyoverlay import registry

PATIENCE = 1.0
"""Seconds that daemons have to answer. One that serves takes a millisecond, under any load one turn of its loop."""

_LONGEST = 1 << 20  # bytes of an answer: another user's daemon may say anything
_NOBODY: dict[str, Any] = {}


def ask(records: Iterable[registry.Record], seconds: float = PATIENCE) -> dict[str, dict[str, Any]]:
    """What each daemon tells of its mount, by the record's id.

    An empty answer is that of a daemon that has no socket to ask at. A daemon that took the question and said nothing in time is left out.
    """
    answers: dict[str, dict[str, Any]] = {}
    with ExitStack() as opened:
        waiting: dict[int, tuple[str, socket.socket, bytearray]] = {}
        for record in records:
            connection = opened.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK))
            try:
                if _connect(connection, record):
                    waiting[connection.fileno()] = (record.id, connection, bytearray())
                else:
                    answers[record.id] = _NOBODY
            except BlockingIOError:  # as many as can wait do so already: nobody will be told anything
                continue
        _collect(waiting, answers, time.monotonic() + seconds)
    return answers


def _connect(connection: socket.socket, record: registry.Record) -> bool:
    """Whether there is a socket to ask at."""
    for path in registry.readable_directories():
        # Through a descriptor: an address holds 107 bytes.
        with suppress(FileNotFoundError, ConnectionRefusedError, PermissionError), registry.opened(path) as directory:
            connection.connect(f"/proc/self/fd/{directory}/{record.id}{registry.SOCKET_SUFFIX}")
            return True
    return False


def _collect(waiting: dict[int, tuple[str, socket.socket, bytearray]], answers: dict[str, dict[str, Any]], deadline: float) -> None:
    poll = select.poll()
    for fd in waiting:
        poll.register(fd, select.POLLIN)
    while waiting and (left := deadline - time.monotonic()) > 0:
        for fd, _ in poll.poll(left * 1000):
            name, connection, content = waiting[fd]
            try:
                part = connection.recv(1 << 16)
            except ConnectionError:  # it ended meanwhile
                part = b""
            content += part
            if not part or len(content) > _LONGEST:
                poll.unregister(fd)
                del waiting[fd]
                answers[name] = _parsed(bytes(content))


def _parsed(content: bytes) -> dict[str, Any]:
    try:
        told = json.loads(content)
    except (ValueError, RecursionError):  # it ended in the middle of a sentence; lists in lists in lists
        return _NOBODY
    return told if isinstance(told, dict) else _NOBODY
