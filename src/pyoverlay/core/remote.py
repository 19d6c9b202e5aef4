"""Lowers whose server may take its time, or never answer: what lies on NFS, SMB, FUSE and everything else that is not known to be local.

A call that such a server can hold up must not be made where others wait behind it. Whether the kernel has the answer cannot be told
beforehand: openat2(RESOLVE_CACHED) may find the name and the stat after it ask the server all the same, for attributes have a validity of
their own, as have permissions; and close(2) asks too (FLUSH). So on behalf of a request none is made. Its answer is looked for among those
that were given for the request (`Replies`), and where it is missing `MustAsk` is raised, which passes through the core as an error of the
lower would at that place. Who handles the request has the question asked by a thread, and begins anew. So the core stays synchronous; what
fails leaves things as they were, whatever it fails with; and the second run is told what the first was.

    begin, meet stat(d, "a")    -> MustAsk, asked by a thread
    begin, told stat(d, "a"), meet listxattr(d, "a")    -> MustAsk, asked by a thread
    begin, told both: done

Outside of a request, while mounting and in the command line, everything is asked at once.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Hashable, Sequence
from contextvars import ContextVar
from typing import Any, TypeVar

from pyoverlay.core import syscalls
from pyoverlay.core.layer import Lower
from pyoverlay.core.syscalls import Stat

log = logging.getLogger(__name__)

_ELSEWHERE = b"/"  # in the path to what no names alone lead to

T = TypeVar("T")


class MustAsk(Exception):
    """A lower has to be asked something that may take for ever. question: None where nobody could have it asked."""

    def __init__(self, question: Question | None) -> None:
        super().__init__()
        self.question = question


class Replies:
    """What lowers said on behalf of one request. May be told from several threads; read, and closed, by the one that handles it."""

    def __init__(self) -> None:
        self._told: dict[Hashable, Any] = {}
        self._lock = threading.Lock()
        self._is_closed = False

    def __contains__(self, key: Hashable) -> bool:
        return key in self._told

    def __getitem__(self, key: Hashable) -> Any:
        return self._told[key]

    def tell(self, key: Hashable, value: Any) -> None:
        with self._lock:
            if not self._is_closed:
                self._told[key] = value
                return
        if isinstance(value, _Opened):
            close_unheard(value.fd)  # too late: nobody waits any more

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
        for value in self._told.values():
            if isinstance(value, _Opened):
                value.close()


class NoReplies(Replies):
    """Of a request that nothing can be asked for: it has to be handled elsewhere."""


replies: ContextVar[Replies | None] = ContextVar("replies", default=None)
"""Those of the request being handled. None: there is no request, and every question is asked at once."""


class _Opened:
    """A descriptor that a reply consists of; who is told gets a duplicate. is_file: closing it asks the server."""

    __slots__ = ("fd", "is_file", "layer")

    def __init__(self, layer: RemoteLower, fd: int, *, is_file: bool) -> None:
        self.layer = layer
        self.fd = fd
        self.is_file = is_file

    def close(self) -> None:
        if self.is_file:
            self.layer.close_later(self.fd)
        else:
            os.close(self.fd)


def close_unheard(fd: int) -> None:
    """close(2), at which a server may fail (FLUSH): who read has what was read, and the descriptor is gone all the same."""
    try:
        os.close(fd)
    except OSError as error:
        log.debug("the server of a lower failed while a file was closed: %s", error.strerror)


class Errand:
    """A call for a thread, which may be left alone with it: it has duplicates of the descriptors that it uses, and closes them."""

    def __init__(self, layer: RemoteLower, call: Callable[..., Any], *fds: int) -> None:
        self.layer = layer
        self._call = call
        self._fds: list[list[int]] = [[]]
        try:
            for fd in fds:
                self._fds[0].append(os.dup(fd))
        except OSError:
            self.drop()
            raise

    def run(self) -> Any:
        """Make the call, in the thread's own context."""
        replies.set(None)
        fds = self._fds.pop()
        try:
            return self._call(*fds)
        finally:
            for fd in fds:
                close_unheard(fd)

    def drop(self) -> None:
        """Nobody will make it, if no thread has begun to."""
        while self._fds:
            for fd in self._fds.pop():
                self.layer.close_later(fd)


class Round:
    """Errands to one layer, made by one thread, one after the other."""

    def __init__(self, errands: Sequence[Errand]) -> None:
        self.layer = errands[0].layer
        self._errands = errands

    def run(self) -> None:
        """Make the calls, in the thread's own context."""
        for errand in self._errands:
            errand.run()

    def drop(self) -> None:
        """As of each."""
        for errand in self._errands:
            errand.drop()


class Question(Errand):
    """A call of a layer whose answer is missing. key: by which it is told."""

    def __init__(
        self, layer: RemoteLower, key: Hashable, call: Callable[..., Any], fd: int, arguments: tuple[Any, ...], told: Replies
    ) -> None:
        def ask(own_fd: int) -> None:
            try:
                value: Any = call(layer, own_fd, *arguments)
            except OSError as error:
                value = error
            told.tell(key, value)

        super().__init__(layer, ask, fd)
        self.key = key


class RemoteLower(Lower):
    """A Lower that may not answer. close_later: closes descriptors of files, which asks the server too, where that holds nobody up."""

    is_remote = True

    def __init__(self, root_fd: int, index: int, fs: int, **rest: Any) -> None:
        super().__init__(root_fd, index, fs, **rest)
        self.close_later: Callable[[int], None] = os.close
        # A number is given to another file once it is closed, and what was closed may be opened again, from nearer or further up, while a
        # request goes on. So the replies know what a descriptor is of by the path to it, which a lower does not change.
        self._paths: dict[int, tuple[bytes, ...]] = {root_fd: ()}

    def _ask(self, call: Callable[..., T], fd: int, *arguments: Any) -> T:
        """The answer to a call, by a descriptor and by arguments that can be compared."""
        told = replies.get()
        if told is None:
            return call(self, fd, *arguments)
        if type(told) is NoReplies:
            raise MustAsk(None)
        key = (self.index, call.__name__, self._paths[fd], *arguments)
        if key not in told:
            raise MustAsk(Question(self, key, call, fd, arguments, told))
        value = told[key]
        if isinstance(value, OSError):
            raise value
        found: T = value
        return found

    def _open(self, call: Callable[..., int], fd: int, names: tuple[bytes, ...], *arguments: Hashable) -> int:
        path = (*self._paths.get(fd, ()), *names)  # a thread's own duplicate is of no path, nor is anything asked by what it opens
        if replies.get() is None:
            opened = call(self, fd, *arguments)
        else:
            opened = os.dup(self._ask(self._opening(call), fd, *arguments).fd)
        self._paths[opened] = path
        return opened

    def _opening(self, call: Callable[..., int]) -> Callable[..., _Opened]:
        def opened(layer: RemoteLower, fd: int, *arguments: Hashable) -> _Opened:
            return _Opened(layer, call(layer, fd, *arguments), is_file=call is Lower.open_read)

        opened.__name__ = call.__name__
        return opened

    # -- the calls, each as of any layer

    def stat(self, dirfd: int, name: bytes) -> Stat | None:
        return self._ask(Lower.stat, dirfd, name)

    def stat_all(self, dirfd: int, names: list[bytes]) -> Sequence[Stat | None]:
        return [None] * len(names)  # one at a time, since one may be told and another not

    def fstat(self, fd: int) -> Stat:
        return self._ask(Lower.fstat, fd)

    def readlink(self, dirfd: int, name: bytes) -> bytes:
        return self._ask(Lower.readlink, dirfd, name)

    def knows_owner(self, dirfd: int, name: bytes, st: Stat) -> bool:
        return self._ask(Lower.knows_owner, dirfd, name, st)

    def read_xattr(self, dirfd: int, name: bytes, attribute: bytes) -> bytes:
        return self._ask(Lower.read_xattr, dirfd, name, attribute)

    def getxattr(self, dirfd: int, name: bytes, attribute: bytes) -> bytes | None:
        return self._ask(Lower.getxattr, dirfd, name, attribute)

    def listxattr(self, dirfd: int, name: bytes) -> list[bytes]:
        return self._ask(Lower.listxattr, dirfd, name)

    def getmark_of(self, fd: int, mark: bytes) -> bytes | None:
        return self._ask(Lower.getmark_of, fd, mark)

    def scan(self, dirfd: int) -> dict[bytes, int]:
        return dict(self._ask(Lower.scan, dirfd))  # whose caller changes it

    def statx(self, dirfd: int, name: bytes) -> syscalls.Statx:
        return self._ask(Lower.statx, dirfd, name)

    def statvfs(self, fd: int) -> os.statvfs_result:
        return self._ask(Lower.statvfs, fd)

    def handle(self, dirfd: int, name: bytes) -> syscalls.FileHandle:
        return self._ask(Lower.handle, dirfd, name)

    def stat_by_handle(self, mount_fd: int, handle: syscalls.FileHandle) -> Stat | None:
        self._paths.setdefault(mount_fd, (_ELSEWHERE,))  # it stays open for as long as the layer
        return self._ask(Lower.stat_by_handle, mount_fd, handle)

    def verity(self, fd: int) -> tuple[int, bytes] | None:
        return self._ask(Lower.verity, fd)

    def open_dir(self, dirfd: int, name: bytes) -> int:
        return self._open(Lower.open_dir, dirfd, (name,), name)

    def open_descendant(self, start: int, names: Sequence[bytes]) -> int:
        return self._open(Lower.open_descendant, start, tuple(names), tuple(names))

    def open_covered(self, dirfd: int, name: bytes) -> int:
        return self._open(Lower.open_covered, dirfd, (_ELSEWHERE, name), name)

    def open_read(self, dirfd: int, name: bytes) -> int:
        fd = self._open(Lower.open_read, dirfd, (name,), name)
        self.cache.closers[fd] = self._close_later
        return fd

    def _close_later(self, fd: int) -> None:
        self.close_later(fd)
