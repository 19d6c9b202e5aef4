"""Threads that cannot be had, for which CPython has a RuntimeError, as for much else."""

from __future__ import annotations

import errno
import threading

import pytest
import trio

from pyoverlay.errors import Refusal
from pyoverlay.fuse import threads


def refuse(thread: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


@pytest.fixture
def none(monkeypatch: pytest.MonkeyPatch) -> None:
    """No thread can be started, and trio has none at rest."""
    monkeypatch.setattr(threading.Thread, "start", refuse)
    monkeypatch.setattr(trio.to_thread, "run_sync", _run_sync)


async def _run_sync(call: object, **how: object) -> None:
    threading.Thread().start()


@pytest.mark.usefixtures("none")
def test_one_that_cannot_be_started_is_told_apart() -> None:
    with pytest.raises(threads.NoThread) as caught:
        trio.run(threads.run, pytest.fail)
    assert caught.value.errno == errno.ENOMEM


def test_an_error_of_the_call_itself_comes_out_as_it_is() -> None:
    with pytest.raises(RuntimeError, match="can't start new thread"):
        trio.run(threads.run, refuse, threading.current_thread())


@pytest.mark.usefixtures("none")
def test_a_mount_for_which_there_is_none_is_refused() -> None:
    with pytest.raises(Refusal, match=r"/merged: no thread can be started .*; raise the limit of processes \(ulimit -u"):
        threads.require(b"/merged")
