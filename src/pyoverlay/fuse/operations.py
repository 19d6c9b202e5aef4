"""pyfuse3's handlers. A handler awaits a copy-up where one is due, asks `Answers` once, and translates what it gets.

Handlers run straight through on the loop: two can interleave only at an await, and the only awaits are for a copy-up's data, an fsync,
and a read that is not in the page cache. What is true before such an await is looked up again after it.

A file handle is the node id: descriptors belong to inodes, not to opens. So an open costs nothing, copy-up happens at the first write
and not at the open for writing, and a descriptor opened before a copy-up reads what is written after it.

Without the extension every request comes here. With it only what has to wait, or what is too rare to be worth its own way.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import stat
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol, TypeVar

from pyoverlay.core import attributes, copyup
from pyoverlay.core.calls import Caller
from pyoverlay.core.inode import Inode
from pyoverlay.core.policy import Fsync
from pyoverlay.core.remote import Errand, MustAsk
from pyoverlay.core.syscalls import Stat
from pyoverlay.core.view import View
from pyoverlay.fuse import detaching, threads
from pyoverlay.fuse.answers import SELF_AND_ABOVE, Answers, NotAtOnce, Shown
from pyoverlay.fuse.asking import Asking, Header
from pyoverlay.fuse.binding import pyfuse3
from pyoverlay.fuse.detaching import UnderWay

log = logging.getLogger(__name__)

FOREVER = 1e9  # seconds that the kernel may believe an answer: this mount is the only writer
_PAGE = 4096  # or a multiple of it


class Requester(Protocol):
    """Who asks: pyfuse3's RequestContext, or what the extension says of an operation that pyfuse3 does not know."""

    @property
    def uid(self) -> int: ...
    @property
    def gid(self) -> int: ...
    @property
    def umask(self) -> int: ...


def blocks(st: Stat) -> int:
    """Delayed allocation, or data that only the page cache has yet: with 0 blocks `tar -S` would take the file for one hole."""
    return max(st.st_blocks, 1) if st.st_size and stat.S_ISREG(st.st_mode) else st.st_blocks


def _read_all(fd: int, offset: int, size: int, flags: int = 0) -> bytearray:
    """So many bytes, or up to the end of the file, by preadv2(2) with `flags`.

    The kernel takes a short answer for that end. A read may also be short of a page that cannot be read, or with RWF_NOWAIT of one that is
    not cached; then the next one says so.
    """
    data = bytearray(size)
    filled = 0
    while filled < size:
        got = os.preadv(fd, [memoryview(data)[filled:]], offset + filled, flags)
        filled += got
        if not got or (offset + filled) % _PAGE:
            break
    return data if filled == size else data[:filled]


T = TypeVar("T")
Method = TypeVar("Method", bound=Callable[..., Awaitable[Any]])


def handler(method: Method) -> Method:
    """An OSError becomes its errno. Any other exception is our bug: EIO for this request, one log entry, and the mount goes on.

    With plain pyfuse3 it would end the session.
    """

    @functools.wraps(method)
    async def answer(self: Operations, *arguments: Any) -> Any:
        self.answered[method.__name__] += 1
        try:
            return await self._until_told(method, arguments)
        except OSError as error:
            log.debug("%s of %s: %s", method.__name__, arguments[0], error.strerror)
            raise pyfuse3.FUSEError(error.errno or errno.EIO) from None
        except pyfuse3.FUSEError:
            raise
        except Exception:  # a bug costs its caller one EIO, never the mount
            log.exception("%s failed", method.__name__)
            raise pyfuse3.FUSEError(errno.EIO) from None
        finally:
            self.view.trim()

    return answer  # type: ignore[return-value] # the same signature, by functools.wraps


class Operations(pyfuse3.Operations):
    """The handlers of one mount. Names and signatures are pyfuse3's."""

    supports_dot_lookup = False
    enable_writeback_cache = False
    enable_acl = True

    def __init__(self, view: View, answers: Answers | None = None) -> None:
        super().__init__()
        self.view = view
        self.answered: Counter[str] = Counter()  # by handler
        self.answers = answers or Answers(view)
        self._copying: dict[Inode, UnderWay] = {}  # copy-ups whose data is on the way
        self.answers.copying = self._copying
        self.asking = Asking(view.remotes, self._hold)
        self._nothing = pyfuse3.EntryAttributes()
        self._nothing.st_ino = 0
        self._nothing.entry_timeout = FOREVER

    def requests(self) -> dict[str, int]:
        """How often each kind of request came. Where the extension is not loaded: those that have a handler of their own."""
        return dict(self.answered)

    # -- lowers that may not answer

    async def _until_told(self, method: Callable[..., Awaitable[Any]], arguments: tuple[Any, ...]) -> Any:
        """What a handler returns, of which questions to remote lowers may make several calls: each begins anew."""
        if not self.view.remotes:
            return await method(self, *arguments)
        return await self.asking.until_told(self._header(), lambda: method(self, *arguments))

    def _header(self) -> Header | None:
        """The header of the request being handled, where it is known."""
        return None

    def _hold(self, change: int) -> None:
        """So many more calls, or fewer, are under way in threads."""

    # -- translation

    def _entry(self, shown: Shown) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino, st, entry.st_nlink, *others = shown
        entry.st_uid, entry.st_gid, entry.st_blocks = others or (st.st_uid, st.st_gid, blocks(st))
        entry.entry_timeout = FOREVER
        entry.attr_timeout = FOREVER
        entry.st_mode = st.st_mode
        entry.st_rdev = st.st_rdev
        entry.st_size = st.st_size
        entry.st_blksize = st.st_blksize
        entry.st_atime_ns = st.st_atime_ns
        entry.st_mtime_ns = st.st_mtime_ns
        entry.st_ctime_ns = st.st_ctime_ns
        return entry

    def _caller(self, ctx: Requester) -> Caller:
        return self.answers.caller(ctx.uid, ctx.gid, ctx.umask)

    # -- copy-up

    async def _copy_up(self, inode: Inode, size: int | None = None, request: int | None = None, *, attributes_only: bool = False) -> bool:
        """As much of the object in the upper as a change needs. Who meets a copy-up under way waits for it. size: no more of the data is
        wanted; returns whether the file is thereby truncated. attributes_only: none is wanted.
        """
        request = self._request() if request is None else request
        copyup.consult(self.view, inode)
        while (other := self._copying.get(inode)) is not None:
            await other.done.wait()
        try:
            return self.answers.copy_up(inode, size, attributes_only=attributes_only)
        except NotAtOnce:
            return await self._copy_up_in_thread(inode, size, request, attributes_only=attributes_only)

    async def _copy_up_in_thread(self, inode: Inode, size: int | None, request: int, *, attributes_only: bool) -> bool:
        this = self._copying[inode] = UnderWay(request)
        try:
            with copyup.prepare(self.view, inode, size, attributes_only=attributes_only) as this.copy:
                await self._fill(this.copy)
                copyup.publish(self.view, this.copy)
                return this.copy.is_truncation
        finally:
            del self._copying[inode]
            this.done.set()

    async def _fill(self, copy: copyup.Copy) -> None:
        remote = self.view.remote_data(copy.inode)
        if remote is None:
            await self._in_thread(copyup.fill, copy)
        elif copy.completes:
            await self.asking.with_thread_of(remote, lambda: copyup.fill(copy))  # into the upper's own file: not to be left alone with
        else:
            twin = copy.twin()
            try:
                await self.asking.send(Errand(remote, twin.fill_by, copy.fd, copy.source_fd))
            finally:
                twin.is_cancelled = True

    def _request(self) -> int:
        """The number of the request being handled, where it is known; to be asked before the first await."""
        return 0

    def _write_drops_privileges(self) -> bool:
        """Must this WRITE take suid, sgid and capabilities away? The kernel does it by itself, with a SETATTR, unless told that we do."""
        return False

    def _setattr_drops_privileges(self) -> bool:
        """The same for a SETATTR that truncates."""
        return False

    def _write_appends(self) -> bool:
        """Is this WRITE by a descriptor that can only append?"""
        return False

    async def _in_thread(self, call: Callable[..., T], *arguments: object) -> T:
        try:
            return await threads.run(call, *arguments)
        except threads.NoThread:
            return call(*arguments)  # everybody waits for it, and nobody gets an error

    async def _copied_up(self, ino: int, *, attributes_only: bool = True) -> Inode:
        inode = self.view.inode(ino)
        await self._copy_up(inode, attributes_only=attributes_only)
        return inode

    # -- look-up and attributes

    @handler
    async def lookup(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        shown = self.answers.lookup(parent_inode, name)
        return self._entry(shown) if shown is not None else self._nothing

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        for ino, nlookup in inode_list:
            self.answers.forget(ino, nlookup)

    @handler
    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        return self._entry(self.answers.getattr(inode))

    @handler
    async def setattr(
        self, inode: int, attr: pyfuse3.EntryAttributes, fields: pyfuse3.SetattrFields, fh: int | None, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        uid, gid = self.answers.owner(attr.st_uid if fields.update_uid else None, attr.st_gid if fields.update_gid else None)
        wanted = attributes.Wanted(
            mode=attr.st_mode if fields.update_mode else None,
            uid=uid,
            gid=gid,
            size=attr.st_size if fields.update_size else None,
            atime_ns=attr.st_atime_ns if fields.update_atime else None,
            mtime_ns=attr.st_mtime_ns if fields.update_mtime else None,
        )
        drops_privileges = self._setattr_drops_privileges()
        if await self._copy_up(self.view.inode(inode), wanted.size, attributes_only=wanted.size is None):
            wanted.size = None
        return self._entry(self.answers.setattr(inode, wanted, drops_privileges=drops_privileges))

    @handler
    async def readlink(self, inode: int, ctx: pyfuse3.RequestContext) -> bytes:
        return self.answers.readlink(inode)

    @handler
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        real = self.view.statfs()
        data = pyfuse3.StatvfsData()
        for field in ("f_bsize", "f_frsize", "f_blocks", "f_bfree", "f_bavail", "f_files", "f_ffree", "f_favail", "f_namemax"):
            setattr(data, field, getattr(real, field))
        return data

    @handler
    async def access(self, inode: int, mode: int, ctx: pyfuse3.RequestContext) -> bool:
        return True  # the kernel has checked: default_permissions

    # -- extended attributes

    @handler
    async def getxattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> bytes:
        return self.answers.getxattr(inode, name)

    @handler
    async def listxattr(self, inode: int, ctx: pyfuse3.RequestContext) -> list[bytes]:
        return self.answers.listxattr(inode, ctx.uid)

    @handler
    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: pyfuse3.RequestContext) -> None:
        await self._copied_up(inode)
        self.answers.setxattr(inode, name, value, 0, ctx.uid, ctx.gid)

    @handler
    async def removexattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        if self.answers.lacks_acl(inode, name):
            return
        await self._copied_up(inode)
        self.answers.removexattr(inode, name)

    # -- names

    @handler
    async def mknod(self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        return self._entry(self.answers.mknod(parent_inode, name, mode, rdev, self._caller(ctx)))

    @handler
    async def mkdir(self, parent_inode: int, name: bytes, mode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        return self._entry(self.answers.mkdir(parent_inode, name, mode, self._caller(ctx)))

    @handler
    async def symlink(self, parent_inode: int, name: bytes, target: bytes, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        return self._entry(self.answers.symlink(parent_inode, name, target, self._caller(ctx)))

    @handler
    async def link(self, inode: int, new_parent_inode: int, new_name: bytes, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        await self._copied_up(inode)
        return self._entry(self.answers.link(inode, new_parent_inode, new_name))

    @handler
    async def unlink(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        request = self._request()
        while missing := self.answers.to_copy_up_for_unlink(parent_inode, name):
            await self._copy_up(missing[0], request=request, attributes_only=True)
        self.answers.unlink(parent_inode, name)

    @handler
    async def rmdir(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        self.answers.rmdir(parent_inode, name)

    @handler
    async def rename(
        self, parent_inode_old: int, name_old: bytes, parent_inode_new: int, name_new: bytes, flags: int, ctx: pyfuse3.RequestContext
    ) -> None:
        sides = (parent_inode_old, name_old, parent_inode_new, name_new, flags)
        request = self._request()
        while missing := self.answers.to_copy_up_for_rename(*sides):
            await self._copy_up(missing[0], request=request, attributes_only=True)
        while merged := self.answers.to_detach_for_rename(*sides):
            await detaching.detach(self.view, merged[0], self._copying, request, self._in_thread, self.asking)
        self.answers.rename(*sides)

    # -- files

    @handler
    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        known = self.view.inode(inode)
        if flags & os.O_TRUNC:
            if not await self._copy_up(known, 0):
                attributes.setattr(self.view, known, attributes.Wanted(size=0))
            if ctx.uid:
                attributes.drop_privileges_of(self.view, known)  # the kernel sends no SETATTR for this one
        else:
            self.view.data_fd(known)
        return pyfuse3.FileInfo(fh=inode, keep_cache=True)

    @handler
    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: pyfuse3.RequestContext
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        entry = self._entry(self.answers.create(parent_inode, name, mode, self._caller(ctx)))
        return pyfuse3.FileInfo(fh=entry.st_ino, keep_cache=True), entry

    @handler
    async def read(self, fh: int, off: int, size: int) -> bytearray:
        inode = self.view.inode(fh)
        fd = self.view.data_fd(inode)
        if (remote := self.view.remote_data(inode)) is not None:
            found: bytearray = await self.asking.send(Errand(remote, lambda own_fd: _read_all(own_fd, off, size), fd))
            return found
        try:
            return _read_all(fd, off, size, os.RWF_NOWAIT)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EOPNOTSUPP):
                raise
            if self.view.is_memory(inode):
                return _read_all(fd, off, size)  # tmpfs knows no RWF_NOWAIT and never waits
            return await self._read_from_disk(inode, fd, off, size)

    async def _read_from_disk(self, inode: Inode, fd: int, off: int, size: int) -> bytearray:
        """In a thread: one cold page or one slow server must not stop everybody."""
        inode.pins += 1
        try:
            return await self._in_thread(_read_all, fd, off, size)
        finally:
            inode.pins -= 1

    @handler
    async def write(self, fh: int, off: int, buf: bytes) -> int:
        inode = self.view.inode(fh)
        drops_privileges, appends = self._write_drops_privileges(), self._write_appends()
        try:
            if not inode.is_writable:
                await self._copy_up(inode)
            written = attributes.write(self.view, inode, buf, off)
        except PermissionError:
            if not appends:
                raise
            written = attributes.append(self.view, inode, buf, off)
        if drops_privileges:
            attributes.drop_privileges_of(self.view, inode)
        return written

    @handler
    async def flush(self, fh: int) -> None:
        if self.view.policy.fsync is not Fsync.STRICT:
            raise pyfuse3.FUSEError(errno.ENOSYS)  # and the kernel never asks again
        await self._sync(fh, datasync=False)

    async def release(self, fh: int) -> None:
        """Descriptors belong to inodes."""

    @handler
    async def fsync(self, fh: int, datasync: bool) -> None:
        await self._sync(fh, datasync=datasync)

    async def _sync(self, ino: int, *, datasync: bool) -> None:
        """Durable when it returns."""
        fd = self.answers.data_to_sync(ino)
        if fd is None:
            return
        try:
            calls = self.view.upper.calls
            await self._in_thread(calls.fdatasync if datasync else calls.fsync, fd)
        finally:
            os.close(fd)

    # -- directories

    @handler
    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:
        self.view.directory(inode)
        return inode

    @handler
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        while questions := self.answers.unanswered(fh, start_id):
            await self.asking.ask_all(questions)
        is_begun = False
        try:
            for offset, name, inode, st in self.answers.walk(fh, start_id):
                is_counted = name not in SELF_AND_ABOVE
                if not pyfuse3.readdir_reply(token, name, self._entry(self.answers.shown(inode, st)), offset):
                    if is_counted:
                        self.view.release(inode)
                    return
                inode.nlookup += is_counted
                is_begun = True
        except (MustAsk, OSError):  # what is told by then is counted, and the next request meets it again
            if not is_begun:
                raise

    async def releasedir(self, fh: int) -> None:
        """Nothing was opened."""

    @handler
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        await self._sync(fh, datasync=datasync)


