"""What a live mount tells of itself, over a socket of its own beside its record (see `registry`).

Connecting is the question: the answer is one JSON object, and the end. Nothing is read from whoever asks, so nobody can hold the daemon
up; between questions the task sleeps in accept(2). The socket is made before the mount: no path is opened afterwards.
"""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Callable
from typing import Any

import trio

log = logging.getLogger(__name__)


async def answer(listener: socket.socket, status: Callable[[], dict[str, Any]]) -> None:
    """Tell `status()` to everybody who connects, until cancelled."""
    accepting = trio.socket.from_stdlib_socket(listener)
    while True:
        try:
            connection, _ = await accepting.accept()
        except OSError as error:  # no descriptor free: asking again at once would find none either
            log.warning("the mount cannot be asked for its counts any more: %s", error.strerror)
            return
        with connection:
            await _tell(connection, json.dumps(status()).encode())


async def _tell(connection: trio.socket.SocketType, content: bytes) -> None:
    """A few hundred bytes: they fit the socket's buffer, so that send(2) neither waits nor takes a part."""
    try:
        await connection.send(content)
    except OSError as error:
        log.debug("whoever asked for the counts has gone: %s", error.strerror)
