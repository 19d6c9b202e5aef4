"""Threads for what may take its time, where the system may have none to give: past a user's RLIMIT_NPROC, past a container's pids.max."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import trio

from pyoverlay.errors import Refusal

T = TypeVar("T")


class NoThread(OSError):
    """None can be started, and nothing has been done. As an errno ENOMEM: EAGAIN would tell a reader of a file to wait for more."""

    def __init__(self) -> None:
        super().__init__(errno.ENOMEM, os.strerror(errno.ENOMEM))


async def run(call: Callable[..., T], *arguments: object, **how: Any) -> T:
    """trio.to_thread.run_sync. NoThread."""
    is_begun = False

    def begin() -> T:
        nonlocal is_begun
        is_begun = True
        return call(*arguments)

    try:
        result: T = await trio.to_thread.run_sync(begin, **how)
    except RuntimeError as error:
        if is_begun:
            raise
        raise NoThread from error
    return result


def require(path: bytes) -> None:
    """Refusal, about that mount point, where no thread can be started: without any nobody could ask whether the mount answers."""
    thread = threading.Thread(target=lambda: None)
    try:
        thread.start()
    except RuntimeError as error:
        remedy = "raise the limit of processes (ulimit -u; pids.max of a container)"
        raise Refusal(path, "no thread can be started for the daemon", errno.EAGAIN, remedy) from error
    thread.join()
