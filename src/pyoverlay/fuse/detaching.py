"""Renaming a directory of a lower where redirects may not be written: its tree is copied up first, data in threads, others served."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Protocol

import trio

from pyoverlay.core import copyup
from pyoverlay.core.detach import Detachment
from pyoverlay.core.inode import Directory, Inode
from pyoverlay.core.view import View
from pyoverlay.fuse.answers import INLINE_COPY
from pyoverlay.fuse.asking import Asking
from pyoverlay.fuse.loop import Turns


class UnderWay:
    """A copy-up whose data is on the way: what waits for it, and what its own request, by number, may cancel."""

    __slots__ = ("copy", "done", "request")

    def __init__(self, request: int) -> None:
        self.request = request
        self.done = trio.Event()
        self.copy: copyup.Copy | None = None


class InThread(Protocol):
    """Runs a call in a thread."""

    def __call__(self, call: Callable[..., object], *arguments: object) -> Awaitable[object]: ...


async def detach(
    view: View, directory: Directory, copying: dict[Inode, UnderWay], request: int, in_thread: InThread, asking: Asking
) -> None:
    """Raises what `core.detach` does; EINTR when the caller was killed. What was copied until then is gone."""
    turns = Turns()
    with Detachment(view, directory, view.policy.rename_copy_limit) as tree:
        while await asking.step(lambda: next(tree.survey(), tree) is None):
            await turns.take()
        for inode in tree.files:
            await _fill(tree, inode, copying, request, in_thread, asking)
            await turns.take()
        await in_thread(tree.put_on_disk)
        for inode in list(tree.copies):
            while (other := copying.get(inode)) is not None:
                await other.done.wait()
            await asking.step(partial(tree.publish, inode))
            await turns.take()
        for below in reversed(tree.directories):
            await asking.step(partial(tree.detach_one, below))
            if directory.lowers:  # after the last one the rename follows at once
                await turns.take()


async def _fill(
    tree: Detachment, inode: Inode, copying: dict[Inode, UnderWay], request: int, in_thread: InThread, asking: Asking
) -> None:
    while (other := copying.get(inode)) is not None:
        await other.done.wait()
    copy = await asking.step(partial(tree.prepare, inode))
    if copy is None:
        return
    this = copying[inode] = UnderWay(request)
    this.copy = copy
    try:
        remote = tree.view.remote_data(inode)
        if remote is not None:
            await asking.with_thread_of(remote, partial(copyup.fill, copy, False))
        elif copy.size <= INLINE_COPY:
            copyup.fill(copy, is_ordered=False)
        else:
            await in_thread(copyup.fill, copy, False)
    finally:
        del copying[inode]
        this.done.set()
    copy.park()
