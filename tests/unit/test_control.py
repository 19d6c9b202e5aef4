"""What a mount tells of itself over its socket."""

from __future__ import annotations

import os
import resource
import socket
from pathlib import Path

import pytest
import trio
import trio.testing

from pyoverlay.daemon import control


@pytest.mark.trio
async def test_who_asks_while_no_descriptor_is_free_is_answered_later(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    listener.bind(str(tmp_path / "socket"))
    listener.listen()
    client = socket.socket(socket.AF_UNIX)
    client.connect(str(tmp_path / "socket"))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    async with trio.open_nursery() as nursery:
        resource.setrlimit(resource.RLIMIT_NOFILE, (_next_descriptor(), limits[1]))
        try:
            nursery.start_soon(control.answer, listener, lambda: {"requests": {}})
            await trio.sleep(10)  # of the mock clock: it has asked in vain meanwhile
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        asking = trio.socket.from_stdlib_socket(client)
        with asking:
            assert await asking.recv(100) == b'{"requests": {}}'
        nursery.cancel_scope.cancel()
    listener.close()


def _next_descriptor() -> int:
    """The number that the next descriptor would get."""
    free = os.open("/", os.O_PATH)
    os.close(free)
    return free
