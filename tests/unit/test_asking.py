"""Asking daemons what they have to tell: who answers, who hangs, who is not there."""

from __future__ import annotations

import os
import select
import socket
import stat
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from pyoverlay import registry
from pyoverlay.daemon import control
from pyoverlay.registry import Record
from pyoverlay.report.asking import ask
from tests.unit.test_registry import of_this_process, written


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    # Longer than the 107 bytes that a socket's address holds.
    long = tmp_path / ("x" * 120)
    long.mkdir()
    monkeypatch.setenv("PYOVERLAY_RUNTIME_DIR", str(long / "run"))
    return long / "run"


@pytest.fixture
def listeners(directory: Path) -> Iterator[list[tuple[Record, socket.socket]]]:
    """Two records, and the sockets on which their daemons would answer."""
    with ExitStack() as opened:
        made = []
        for _ in range(2):
            new = written(of_this_process())
            fd = registry.open_directory()
            opened.callback(os.close, fd)
            opened.callback(control.remove, fd, new)
            made.append((new, opened.enter_context(control.listen(fd, new))))
        yield made
    assert {file.suffix for file in directory.iterdir()} == {".json"}


def say(listener: socket.socket, content: bytes) -> threading.Thread:
    def answer() -> None:
        select.select([listener], [], [])
        connection, _ = listener.accept()
        with connection:
            connection.send(content)

    thread = threading.Thread(target=answer)
    thread.start()
    return thread


def test_an_answer_is_passed_on(listeners: list[tuple[Record, socket.socket]]) -> None:
    record, listener = listeners[0]
    daemon = say(listener, b'{"requests": {"lookup": 2}}')
    assert ask([record], 10) == {record.id: {"requests": {"lookup": 2}}}
    daemon.join()


def test_who_says_nothing_is_left_out_and_holds_up_nobody_s_answer(listeners: list[tuple[Record, socket.socket]]) -> None:
    (silent, _), (talks, listener) = listeners
    daemon = say(listener, b"{}")
    assert ask([silent, talks], 2) == {talks.id: {}}
    daemon.join()


def test_a_daemon_whose_queue_is_full_is_left_out(listeners: list[tuple[Record, socket.socket]]) -> None:
    record, listener = listeners[0]
    listener.listen(0)
    assert ask([record], 0.01) == {}  # takes the only place, and gives it back; the queue keeps it all the same
    assert ask([record], 10) == {}


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"[" * 100_000])
def test_an_end_without_an_answer_is_an_empty_one(listeners: list[tuple[Record, socket.socket]], content: bytes) -> None:
    record, listener = listeners[0]
    daemon = say(listener, content)
    assert ask([record], 10) == {record.id: {}}
    daemon.join()


def test_a_socket_that_nobody_listens_on_is_an_empty_answer(listeners: list[tuple[Record, socket.socket]]) -> None:
    record, listener = listeners[0]
    listener.close()
    assert ask([record], 10) == {record.id: {}}


def test_a_mount_without_a_socket_has_nobody_to_ask(directory: Path) -> None:
    record = written(of_this_process())
    assert ask([record], 10) == {record.id: {}}


def test_a_socket_is_for_its_owner_alone(listeners: list[tuple[Record, socket.socket]], directory: Path) -> None:
    assert stat.S_IMODE((directory / f"{listeners[0][0].id}.sock").stat().st_mode) == 0o600
