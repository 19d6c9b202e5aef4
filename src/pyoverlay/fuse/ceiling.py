"""A ceiling on the inodes that the kernel remembers, and so on the memory that remembering them takes here.

The kernel may believe what it is told for ever, so it forgets when the machine is short of memory, and else never. Past the ceiling those
that it has known longest are given back: FUSE_NOTIFY_PRUNE asks the kernel to forget what nobody uses (protocol 7.45, Linux 6.18). An
older one can only be told to drop their names (FUSE_NOTIFY_INVAL_ENTRY), which ends the same way, but unmounts whatever is mounted on one
of them (d_invalidate), as container engines mount their resolv.conf; so it is told that only where the user has asked. FORGETs answer.
"""

from __future__ import annotations

import errno
import logging
import queue
import threading
import time
from itertools import islice
from typing import NamedTuple

from pyoverlay.core.inode import Directory, Inode
from pyoverlay.core.view import View
from pyoverlay.fuse.binding import Forgetting

log = logging.getLogger(__name__)

_LEAST_BATCH = 1024
_PAUSE = 0.1  # s between two batches: what is in use is not forgotten, however often one asks


class _Known(NamedTuple):
    ino: int
    parent: int
    name: bytes
    is_directory: bool


class Ceiling:
    """Has the kernel forget inodes of `view` past `limit`, from a thread of its own: a notification waits for requests in flight.

    drops_names: on an older kernel too.
    """

    def __init__(self, view: View, wire: Forgetting, limit: int, *, drops_names: bool = False) -> None:
        self._view = view
        self._wire = wire
        self._batch = max(_LEAST_BATCH, limit // 8)
        self._is_busy = False
        self._next = 0.0
        self._batches: queue.SimpleQueue[list[_Known]] = queue.SimpleQueue()
        self._can_prune = True
        self._drops_names = drops_names
        view.inode_limit = limit
        view.when_crowded = self.lower
        # Before the first request: a thread started while a file is made for a caller would keep that caller's ids.
        threading.Thread(target=self._serve, name="ceiling", daemon=True).start()

    def lower(self) -> None:
        """Have a batch of the oldest forgotten, unless one is under way. On the thread that serves."""
        if self._is_busy or time.monotonic() < self._next:
            return
        self._is_busy = True
        oldest = list(islice(self._view.table.by_ino.values(), 1, 1 + self._batch))  # the first is the root
        self._view.table.renew(oldest)  # what is in use, and stays, is not asked for again at once
        self._batches.put([_described(inode) for inode in oldest if inode.nlookup and inode.parent is not None and not _is_needed(inode)])

    def _serve(self) -> None:
        while True:
            batch = self._batches.get()
            try:
                self._notify(batch)
            except OSError as error:
                if error.errno == errno.ENOTCONN:
                    return  # unmounted
                log.warning("inodes past the limit are kept: %s", error.strerror)
            if not (self._can_prune or self._drops_names):
                return  # and stay busy: there is nothing to ask for
            self._next = time.monotonic() + _PAUSE
            self._is_busy = False

    def _notify(self, batch: list[_Known]) -> None:
        if self._can_prune:
            try:
                self._wire.notify_prune([known.ino for known in batch])
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self._can_prune = False
            else:
                return
        if not self._drops_names:
            log.info("this kernel cannot be asked to forget single inodes: it remembers more than %d", self._view.inode_limit)
            return
        for known in batch:
            if known.is_directory:
                continue  # what is mounted on it or below it would go with the name
            try:
                self._wire.notify_inval_entry(known.parent, known.name)
            except FileNotFoundError:  # gone meanwhile
                continue


def _described(inode: Inode) -> _Known:
    assert inode.parent is not None
    return _Known(inode.ino, inode.parent.ino, inode.name, isinstance(inode, Directory))


def _is_needed(inode: Inode) -> bool:
    """A directory is kept for what is known below it."""
    return isinstance(inode, Directory) and inode.dependants > 0
