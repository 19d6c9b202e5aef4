"""What a live mount tells of itself, over a socket of its own beside its record (see `registry`).

Connecting is the question: the answer is one JSON object, and the end. Nothing is read from whoever asks, so nobody can hold the daemon
up; between questions the task sleeps in accept(2). The socket is made before the mount: no path is opened afterwards.
"""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import trio

from pyoverlay.registry import SOCKET_SUFFIX, Record

log = logging.getLogger(__name__)

_PAUSE = 1  # s


def listen(directory: int, record: Record) -> socket.socket:
    """The listening socket of a mount, mode 0600, in the open directory of the records. OSError as bind(2) raises it."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    old = os.umask(0o177)
    try:
        # Through the descriptor: an address holds 107 bytes, and a runtime directory may be longer than that.
        listener.bind(f"/proc/self/fd/{directory}/{record.id}{SOCKET_SUFFIX}")
        listener.listen()
    except OSError:
        listener.close()
        raise
    finally:
        os.umask(old)
    return listener


def remove(directory: int, record: Record) -> None:
    """Take a mount's socket out; nothing happens if it is gone."""
    with suppress(FileNotFoundError):
        os.unlink(record.id + SOCKET_SUFFIX, dir_fd=directory)


async def answer(listener: socket.socket, status: Callable[[], dict[str, Any]]) -> None:
    """Tell `status()` to everybody who connects, until cancelled."""
    accepting = trio.socket.from_stdlib_socket(listener)
    while True:
        try:
            connection, _ = await accepting.accept()
        except OSError as error:  # no descriptor free: asking again at once would find none either
            log.warning("the mount cannot be asked for its counts now: %s", error.strerror)
            await trio.sleep(_PAUSE)  # nobody tells when one is free
            continue
        with connection:
            await _tell(connection, json.dumps(status()).encode())


async def _tell(connection: trio.socket.SocketType, content: bytes) -> None:
    """A few hundred bytes: they fit the socket's buffer, so that send(2) neither waits nor takes a part."""
    try:
        await connection.send(content)
    except OSError as error:
        log.debug("whoever asked for the counts has gone: %s", error.strerror)
