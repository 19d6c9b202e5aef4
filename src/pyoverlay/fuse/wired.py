"""The handlers of a mount whose requests come through the extension: what pyfuse3 alone cannot serve, and what then need not be asked at
all.

No OPEN and no OPENDIR: both are answered ENOSYS once, and the kernel never asks again; it takes every file as open and tells us so by
node number. Data: the extension reads and writes by itself between descriptors that are registered here. HANDLE_KILLPRIV_V2: the kernel
leaves it to us to take suid, sgid and file capabilities away, and says with each request whether the caller's writing must.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import logging
import os
import struct
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, TypeVar

import trio

from pyoverlay.core import attributes
from pyoverlay.core.inode import Directory, Inode
from pyoverlay.core.layer import Held
from pyoverlay.core.objects import failure
from pyoverlay.core.policy import Fsync, Override
from pyoverlay.core.remote import Errand, RemoteLower, replies
from pyoverlay.core.syscalls import Stat
from pyoverlay.core.view import View
from pyoverlay.fuse import direct, opcodes, threads
from pyoverlay.fuse.answers import Answers, NotAtOnce, Shown
from pyoverlay.fuse.asking import Header, Told
from pyoverlay.fuse.binding import Wire, pyfuse3
from pyoverlay.fuse.ceiling import Ceiling
from pyoverlay.fuse.operations import Operations

log = logging.getLogger(__name__)

_WRITE_FLAGS = struct.Struct("<20xI8xI")  # struct fuse_write_in: its own, then those of the open file
_WRITE_CACHE, _WRITE_KILL_SUIDGID = 1 << 0, 1 << 2
_SETATTR_VALID = struct.Struct("<I")  # struct fuse_setattr_in
_SETATTR_KILL_SUIDGID = 1 << 11

_GETFLAGS, _SETFLAGS = 0x80086601, 0x40086602  # FS_IOC_*, <linux/fs.h>; the argument is an int all the same
_FSGETXATTR, _FSSETXATTR = 0x801C581F, 0x401C5820
_READING, _WRITING = {_GETFLAGS: 4, _FSGETXATTR: 28}, {_SETFLAGS: 4, _FSSETXATTR: 28}

_ASKED_BY_KERNEL = frozenset((b"security.capability", b"system.posix_acl_access", b"system.posix_acl_default"))

_FOR_ANYTHING, _FOR_A_DISK, _FOR_NOTHING = 0, 1, 2  # LANE_WAITS_* of _lane.h

_INLINE_BYTES = 64 << 20  # files past this: calls that walk or change their extents go to a thread


T = TypeVar("T")
Method = TypeVar("Method", bound=Callable[..., Awaitable[Any]])


def extra(method: Method) -> Method:
    """A method for an opcode that pyfuse3 lacks; begun anew after each question to a remote lower, like any handler."""

    @functools.wraps(method)
    async def answer(self: WiredOperations, *arguments: Any) -> Any:
        return await self._until_told(method, arguments)

    return answer  # type: ignore[return-value] # the same signature, by functools.wraps


class WiredAnswers(Answers):
    """Answers, of which the extension `wire` is told what it may answer by itself."""

    def __init__(self, view: View, wire: Wire) -> None:
        super().__init__(view)
        self._wire = wire
        self._shows_what_is = view.policy.override is Override.NONE  # owners and modes are those on disk
        view.read_by(wire)
        view.after_open = self._register
        view.before_drop = self._drop
        view.cache.before_close = self._unregister
        if view.root.in_upper:  # its descriptor is the layer's own, and none that appears
            wire.lane(view.root.ino, view.upper_fd(view.root), -1, self._links(view.root))

    # -- the data lanes

    def _register(self, inode: Inode) -> None:
        """From now on the extension moves this file's data. What it writes is not seen here, so the upper counts as dirty from the
        start.
        """
        if inode.is_writable:
            self.view.upper.is_dirty = True
        # Whether a write takes set-user-id away is not for the mode on disk to say, where another is shown.
        write_fd = inode.fd if inode.is_writable and self._shows_what_is else -1
        remote = self.view.remote_data(inode) if self.view.remotes else None
        if remote is not None:  # not even its attributes are for the receiver to ask for
            self._wire.lane(inode.ino, inode.fd, write_fd, -1, _FOR_ANYTHING, remote.index)
        else:
            self._wire.lane(inode.ino, inode.fd, write_fd, self._links(inode), self._waits(inode))

    def _waits(self, inode: Inode) -> int:
        """For `lane`: what a read may have to wait for."""
        layer = self.view.data_layer(inode)
        if layer is None:
            return _FOR_ANYTHING
        return _FOR_NOTHING if layer.is_memory else _FOR_A_DISK if layer.is_local else _FOR_ANYTHING

    def _links(self, inode: Inode) -> int:
        """For `lane`. With writeback a file of no size may have data that are not here yet: `shown` knows what to say of its blocks."""
        is_plain = self._shows_what_is and self.owners is None and not (self.shows_writeback and inode.is_regular)
        links = self.view.links_by_stat(inode) if is_plain else None
        return -1 if links is None else links

    def _unregister(self, held: Held) -> None:
        if isinstance(held, Inode):
            self._wire.lane(held.ino, -1, -1)

    def read(self, ino: int) -> None:
        """A descriptor for the file, from which the extension then reads."""
        self.view.data_fd(self.view.inode(ino))

    def write(self, ino: int) -> None:
        """The same to write to."""
        try:
            self.view.data_fd(self._copied_up(ino, attributes_only=False), write=True)
        except PermissionError:
            raise NotAtOnce from None  # who appends may yet be allowed to

    def goes_to_lane(self, ino: int) -> bool:
        inode = self.view.inode(ino)
        if inode.in_upper or not inode.is_regular:
            return False  # what the lane can change of it, it has changed already
        self.copy_up(inode, attributes_only=True)
        return inode.is_writable and self._links(inode) >= 0

    # -- what is known not to be there
    #
    # With POSIX_ACL the kernel asks for the ACL of each inode that somebody but its owner uses, or that is changed; most have none. Once
    # that is known the extension says so.

    def _drop(self, inode: Inode) -> None:
        self._wire.no_xattr(inode.ino, False)

    def getxattr(self, ino: int, name: bytes) -> bytes:
        inode = self.view.inode(ino)
        if name in _ASKED_BY_KERNEL and (inode.is_regular or isinstance(inode, Directory)) and not self._may_have(inode, name):
            raise failure(errno.ENODATA)
        return super().getxattr(ino, name)

    def _may_have(self, inode: Inode, name: bytes) -> bool:
        """One list tells of this attribute and of those that will be asked for next."""
        names = self.view.listxattr(inode)
        if not _ASKED_BY_KERNEL & frozenset(names):
            self._wire.no_xattr(inode.ino, True, not names)
        return name in names

    def listxattr(self, ino: int, uid: int) -> list[bytes]:
        names = super().listxattr(ino, uid)
        if not names and not uid:
            self._wire.no_xattr(ino, True, True)
        return names

    def setxattr(self, ino: int, name: bytes, value: bytes, flags: int, uid: int, gid: int) -> None:
        self._wire.no_xattr(ino, False)
        super().setxattr(ino, name, value, flags, uid, gid)

    def _made(self, parent: Directory, inode: Inode, st: Stat) -> Shown:
        """A new object has no ACL, unless its directory gives it one."""
        if not self.view.has_default_acl(parent):
            self._wire.no_xattr(inode.ino, True)
        return self._looked_up(inode, st)


class WiredOperations(Operations):
    """Operations, with the extension `wire` in effect. direct: what the receiver calls by itself, by opcode."""

    def __init__(self, view: View, wire: Wire) -> None:
        answers = WiredAnswers(view, wire)
        self._wire = wire
        self._token: trio.lowlevel.TrioToken | None = None
        self._stale: set[int] = set()  # nodes of which the kernel has pages that are to be dropped
        super().__init__(view, answers)
        self.direct = {
            **direct.functions(answers),
            direct.READ: direct.at_once(answers, "read", answers.read),
            direct.WRITE: direct.at_once(answers, "write", answers.write),
        }

    def requests(self) -> dict[str, int]:
        """Every request that was received, also those that the extension answered by itself."""
        counts, _ = self._wire.counts()
        found: Counter[str] = Counter()
        for opcode, count in counts.items():
            found[opcodes.REQUESTS.get(opcode, f"opcode {opcode}")] += count
        return {name: count for name, count in found.items() if count}

    # -- pages that could not be written
    #
    # write(2) fails by itself, and the kernel forgets what it had put into the page. What a map has dirtied, or with writeback a write, is
    # in the page cache and clean once it was sent, whatever we answered: everybody would go on to read what the disk never had.

    def init(self) -> None:
        self._token = trio.lowlevel.current_trio_token()

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        is_page = bool(self._write_flags()[0] & _WRITE_CACHE)
        try:
            return await super().write(fh, off, buf)
        except pyfuse3.FUSEError:
            if is_page:
                self.page_failed(fh)
            raise

    def page_failed(self, ino: int) -> None:
        if self._token is not None and ino not in self._stale:
            self._stale.add(ino)
            with suppress(trio.RunFinishedError):  # the mount is gone, and the pages with it
                self._token.run_sync_soon(trio.lowlevel.spawn_system_task, self._drop_pages, ino)

    async def _drop_pages(self, ino: int) -> None:
        self._stale.discard(ino)  # what fails from here on is told anew
        try:
            await self._write_back(ino)
        except OSError as error:
            log.info("what could not be written of inode %d stays in the page cache: %s", ino, error.strerror)

    # -- interrupted copy-ups

    def _header(self) -> Header:
        return self._wire.request()

    def _asked(self) -> Header:
        """The header of the request being handled, which the extension knows until the first await."""
        told = replies.get()
        return told.header if isinstance(told, Told) and told.header is not None else self._wire.request()

    def _request(self) -> int:
        return self._asked()[1]

    def interrupt(self, unique: int) -> None:
        """Its caller was killed: what it copies up is given up. Others who wait for the same copy-up begin anew. 0: the mount is gone."""
        if not unique:
            self.asking.give_up()
        self.asking.interrupt(unique)
        for under_way in self._copying.values():
            if under_way.request == unique and under_way.copy is not None:
                under_way.copy.is_cancelled = True

    # -- what is never asked again

    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        if self.view.policy.fsync is Fsync.STRICT:
            return await super().open(inode, flags, ctx)  # closing has to sync: the kernel tells of it where it was told of opening
        raise pyfuse3.FUSEError(errno.ENOSYS)

    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:
        raise pyfuse3.FUSEError(errno.ENOSYS)

    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: pyfuse3.RequestContext
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        """MKNOD does the same, and no RELEASE follows it: one request for a new file instead of two."""
        raise pyfuse3.FUSEError(errno.ENOSYS)

    # -- writing takes privileges away

    def _write_flags(self) -> tuple[int, int]:
        flags, open_flags = _WRITE_FLAGS.unpack_from(self._asked()[6])
        return flags, open_flags

    def _write_drops_privileges(self) -> bool:
        return bool(self._write_flags()[0] & _WRITE_KILL_SUIDGID)

    def _write_appends(self) -> bool:
        return bool(self._write_flags()[1] & os.O_APPEND)

    def _setattr_drops_privileges(self) -> bool:
        return bool(_SETATTR_VALID.unpack_from(self._asked()[6])[0] & _SETATTR_KILL_SUIDGID)

    def _drop_privileges(self, ino: int) -> None:
        attributes.drop_privileges_of(self.view, self.view.inode(ino))

    # -- what pyfuse3 has no handler for

    @extra
    async def fallocate(self, ino: int, mode: int, offset: int, length: int) -> None:
        """All modes the upper's file system supports."""
        uid = self._asked()[3]
        inode = await self._copied_up(ino, attributes_only=False)
        fd = self.view.data_fd(inode, write=True)
        self.view.upper.is_dirty = True
        await self._long(inode, lambda: self.view.upper.calls.fallocate(fd, mode, offset, length))
        if uid:
            self._drop_privileges(ino)

    @extra
    async def lseek(self, ino: int, offset: int, whence: int) -> int:
        """SEEK_DATA and SEEK_HOLE. What a shared map has dirtied is written back first: the kernel asks us without doing so
        (fuse_lseek).
        """
        inode = self.view.inode(ino)
        await self._write_back(ino)
        fd = self.view.data_fd(inode)
        if (remote := self.view.remote_data(inode)) is not None:
            found: int = await self.asking.send(Errand(remote, lambda own_fd: os.lseek(own_fd, offset, whence), fd))
            return found
        return await self._long(inode, lambda: os.lseek(fd, offset, whence))

    async def _write_back(self, ino: int) -> None:
        def notify() -> None:
            try:
                self._wire.notify_inval_inode(ino, 0, 0)
            except OSError as error:
                if error.errno != errno.ENOENT:
                    raise

        self._hold(1)
        try:
            await threads.run(notify)  # never on the loop: it waits for requests that are served there
        finally:
            self._hold(-1)

    @extra
    async def copy_file_range(self, ino_in: int, off_in: int, ino_out: int, off_out: int, length: int, flags: int) -> int:
        """Reflinked where the file system can."""
        uid = self._asked()[3]
        target = await self._copied_up(ino_out, attributes_only=False)
        try:
            return self.answers.copy_file_range(ino_in, off_in, ino_out, off_out, length, flags, uid)
        except NotAtOnce:
            return await self._copy_in_thread(self.view.inode(ino_in), off_in, target, off_out, length, uid)

    async def _copy_in_thread(self, source: Inode, offset: int, target: Inode, offset_out: int, length: int, uid: int) -> int:
        fd_out = self.view.data_fd(target, write=True)
        remote = self.view.remote_data(source)
        fd = self.view.cache.dup(self.view.data_fd(source))  # until a thread is free it may be copied up, and its descriptor closed
        self.view.upper.is_dirty = True
        calls = self.view.upper.calls
        try:
            copied = await self._pinned(target, lambda: calls.copy_file_range(fd, fd_out, length, offset, offset_out), remote)
        finally:
            self.view.cache.close_fd(fd)
        if uid:
            self._drop_privileges(target.ino)
        return copied

    @extra
    async def tmpfile(self, parent: int, mode: int, flags: int, ctx: opcodes.Caller) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        """O_TMPFILE."""
        entry = self._entry(self.answers.tmpfile(parent, mode, self._caller(ctx)))
        return pyfuse3.FileInfo(fh=entry.st_ino, keep_cache=True), entry

    @extra
    async def ioctl(self, ino: int, cmd: int, arg: bytes, out_size: int, ctx: opcodes.Caller) -> bytes:
        """chattr and lsattr: FS_IOC_GETFLAGS, SETFLAGS, FSGETXATTR, FSSETXATTR. The kernel has checked who may."""
        if cmd in _READING:
            return await self._flags(self.view.inode(ino), cmd)
        if cmd not in _WRITING or len(arg) < _WRITING[cmd]:
            raise failure(errno.ENOTTY)
        # Data too, and what a map has dirtied: of an immutable file neither could be written any more.
        try:
            inode = await self._copied_up(ino, attributes_only=False)
        except PermissionError:
            inode = await self._copied_up(ino)  # it is one already
        if inode.is_regular:
            await self._write_back(ino)
        self.view.upper.is_dirty = True
        calls = self.view.upper.calls
        self._with_descriptor(inode, lambda fd: calls.ioctl(fd, cmd, arg[: _WRITING[cmd]]))
        self.view.stop_writing(inode)  # it may be immutable now
        if isinstance(inode, Directory):
            inode.is_append_only = None
        return b""

    async def _flags(self, inode: Inode, cmd: int) -> bytes:
        """What an ioctl that reads says."""
        def call(fd: int) -> bytes:
            return fcntl.ioctl(fd, cmd, bytes(_READING[cmd]))

        place = self.view.place(inode)
        if not isinstance(place.layer, RemoteLower):
            return self._with_descriptor(inode, call)
        if inode.is_regular:
            fd = self.view.own_fd(inode)
            try:
                found: bytes = await self.asking.send(Errand(place.layer, call, fd))
            finally:
                self.view.cache.close_fd(fd)
            return found
        if not isinstance(inode, Directory):
            raise failure(errno.ENOTTY)
        return await self.asking.send(Errand(place.layer, functools.partial(_call_in_directory, call), place.dirfd))

    def _with_descriptor(self, inode: Inode, call: Callable[[int], T]) -> T:
        """A call on the object's own descriptor, one that reads."""
        if inode.is_regular:
            fd = self.view.own_fd(inode)
            try:
                return call(fd)
            finally:
                self.view.cache.close_fd(fd)
        if not isinstance(inode, Directory):
            raise failure(errno.ENOTTY)
        return _call_in_directory(call, self.view.place(inode).dirfd)

    @extra
    async def statx(self, ino: int, mask: int, flags: int) -> opcodes.Statx:
        """stat, and the time of birth."""
        inode = self.view.inode(ino)
        place = self.view.place(inode)
        found = place.layer.statx(place.dirfd, place.name)
        return opcodes.Statx(self._entry(self.answers.getattr(ino)), found.btime_ns)

    async def _long(self, inode: Inode, call: Callable[[], T]) -> T:
        """At once, or in a thread where the file is so big that it may take seconds."""
        if self.view.stat(inode).st_size <= _INLINE_BYTES:
            return call()
        return await self._pinned(inode, call)

    async def _pinned(self, inode: Inode, call: Callable[[], T], remote: RemoteLower | None = None) -> T:
        """In a thread, of a remote layer's if that has a part in it, while the inode's descriptor keeps its number."""
        inode.pins += 1
        try:
            return await (self._in_thread(call) if remote is None else self.asking.with_thread_of(remote, call))
        finally:
            inode.pins -= 1

    async def _in_thread(self, call: Callable[..., T], *arguments: object) -> T:
        self._hold(1)
        try:
            return await super()._in_thread(call, *arguments)
        finally:
            self._hold(-1)

    def _hold(self, change: int) -> None:
        self._wire.hold(change)


def _call_in_directory(call: Callable[[int], T], dirfd: int) -> T:
    """A call on a descriptor of a directory that reads."""
    fd = os.open(b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=dirfd)
    try:
        return call(fd)
    finally:
        os.close(fd)


def operations_for(view: View, wire: Wire | None, *, writeback: bool = False) -> Operations:
    """The handlers for a mount with or without the extension.

    writeback: small writes gather in the page cache, which then decides about size and mtime, and a write that fails is heard of at
    fsync or close at the earliest.
    """
    operations = Operations(view) if wire is None else WiredOperations(view, wire)
    operations.enable_writeback_cache = operations.answers.shows_writeback = writeback
    return operations


def limit_inodes(view: View, wire: Wire | None, inodes: int, *, drops_names: bool = False) -> None:
    """Past so many inodes have the kernel asked to forget, where the extension can ask; drops_names: see Ceiling. Starts a thread, which
    keeps the privileges that this one has now.
    """
    if wire is not None:
        Ceiling(view, wire, inodes, drops_names=drops_names)
