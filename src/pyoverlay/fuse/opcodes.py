"""The operations that the kernel asks for and pyfuse3 has no handler for.

The extension turns each of them into pyfuse3's `read(fh=0, ...)`; here it is decoded, given to a method of the operations object, and what
that returns is encoded as the body of the reply. pyfuse3 runs it as one of its own handlers: an answer made without suspending goes out at
once, one that suspends holds up nobody.

A method that the operations object lacks is not asked for: the kernel then gets libfuse's ENOSYS, and does without or by itself.
Layouts: <linux/fuse.h>, protocol 7.31 to 7.45.
"""

import errno
import functools
import logging
import struct
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple, Protocol

from pyoverlay.fuse.binding import Requests, pyfuse3
from pyoverlay.fuse.capabilities import Wanted, init_reply

log = logging.getLogger(__name__)


class Opcode(IntEnum):
    """Those that this module answers; the numbers of <linux/fuse.h>."""

    IOCTL = 39
    FALLOCATE = 43
    LSEEK = 46
    COPY_FILE_RANGE = 47
    SYNCFS = 50
    TMPFILE = 51
    STATX = 52
    COPY_FILE_RANGE_64 = 53


# What each opcode of <linux/fuse.h> asks for, by one name for the versions of a request: RENAME2 is a rename, READDIRPLUS a readdir.
REQUESTS = {
    1: "lookup", 2: "forget", 3: "getattr", 4: "setattr", 5: "readlink", 6: "symlink", 8: "mknod", 9: "mkdir", 10: "unlink",
    11: "rmdir", 12: "rename", 13: "link", 14: "open", 15: "read", 16: "write", 17: "statfs", 18: "release", 20: "fsync",
    21: "setxattr", 22: "getxattr", 23: "listxattr", 24: "removexattr", 25: "flush", 26: "init", 27: "opendir", 28: "readdir",
    29: "releasedir", 30: "fsyncdir", 31: "getlk", 32: "setlk", 33: "setlkw", 34: "access", 35: "create", 36: "interrupt", 37: "bmap",
    38: "destroy", 39: "ioctl", 40: "poll", 41: "notify_reply", 42: "forget", 43: "fallocate", 44: "readdir",
    45: "rename", 46: "lseek", 47: "copy_file_range", 50: "syncfs", 51: "tmpfile", 52: "statx", 53: "copy_file_range",
}  # fmt: skip


class Caller(NamedTuple):
    """Who asks. pyfuse3's RequestContext has the same fields, but only pyfuse3 can make one."""

    uid: int
    gid: int
    pid: int
    umask: int


@dataclass(frozen=True, slots=True)
class Statx:
    """The answer to statx(2): what stat says, and what it cannot say."""

    entry: pyfuse3.EntryAttributes
    btime_ns: int | None = None
    attributes: int = 0
    attributes_mask: int = 0


class ExtraOperations(Protocol):
    """Methods that an operations object may have besides pyfuse3's. Each may raise OSError or FUSEError for its caller.

    `ino` is the node. Offsets and lengths are bytes, as the kernel passes them: already checked against the file's limits, not its size.
    """

    async def fallocate(self, ino: int, mode: int, offset: int, length: int) -> None: ...

    async def lseek(self, ino: int, offset: int, whence: int) -> int:
        """SEEK_DATA or SEEK_HOLE; the kernel does the others. ENXIO past the last of them."""

    async def copy_file_range(self, ino_in: int, off_in: int, ino_out: int, off_out: int, length: int, flags: int) -> int:
        """The bytes copied, which may be fewer."""

    async def tmpfile(self, parent: int, mode: int, flags: int, ctx: Caller) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]: ...

    async def ioctl(self, ino: int, cmd: int, arg: bytes, out_size: int, ctx: Caller) -> bytes:
        """At most `out_size` bytes. ENOTTY for an unknown `cmd`."""

    async def statx(self, ino: int, mask: int, flags: int) -> Statx: ...

    async def syncfs(self, ino: int) -> None: ...

    direct: Mapping[int, Callable[..., Any]]
    """Plain functions that the receiver calls for requests of these opcodes, before pyfuse3 sees them: direct.py."""

    def page_failed(self, ino: int) -> None:
        """A page of this node that a map had dirtied could not be written. Called on any thread, and may not wait."""

    def interrupt(self, unique: int) -> None:
        """The caller of the request `unique` was killed; its handler may now fail with EINTR. Requests that are done may be named."""


class _Extra(NamedTuple):
    """One request: its header, and the body still to be decoded."""

    node: int
    uid: int
    gid: int
    pid: int
    body: bytes

    def caller(self, umask: int = 0) -> Caller:
        return Caller(self.uid, self.gid, self.pid, umask)


_FALLOCATE = struct.Struct("<8xQQI4x")
_LSEEK = struct.Struct("<8xqI4x")
_OFFSET = struct.Struct("<Q")
_COPY = struct.Struct("<8xQQ8xQQQ")
_COPIED = struct.Struct("<I4x")
_COPIED_64 = struct.Struct("<Q")
_CREATE = struct.Struct("<4I")
_IOCTL = struct.Struct("<12xI8xII")
_IOCTL_OUT = struct.Struct("<iIII")
_STATX = struct.Struct("<16xII")
_ENTRY = struct.Struct("<4Q2I")
_ATTR = struct.Struct("<6Q10I")
_OPEN_OUT = struct.Struct("<QIi")
_STATX_OUT = struct.Struct("<QI4x16x")
_STATX_BODY = struct.Struct("<IIQIIIH2xQQQQ" + "qI4x" * 4 + "4I112x")

_STATX_BASIC_STATS, _STATX_BTIME = 0x7FF, 0x800
_FOPEN_DIRECT_IO, _FOPEN_KEEP_CACHE, _FOPEN_NONSEEKABLE = 1, 2, 4


async def _fallocate(operations: Any, request: _Extra) -> bytes:
    offset, length, mode = _FALLOCATE.unpack_from(request.body)
    await operations.fallocate(request.node, mode, offset, length)
    return b""


async def _lseek(operations: Any, request: _Extra) -> bytes:
    offset, whence = _LSEEK.unpack_from(request.body)
    return _OFFSET.pack(await operations.lseek(request.node, offset, whence))


async def _copied(operations: Any, request: _Extra) -> int:
    off_in, ino_out, off_out, length, flags = _unpack_copy(request.body)
    copied: int = await operations.copy_file_range(request.node, off_in, ino_out, off_out, length, flags)
    return copied


def _unpack_copy(body: bytes) -> tuple[int, ...]:
    off_in, ino_out, off_out, length, flags = _COPY.unpack_from(body)
    return off_in, ino_out, off_out, length, flags


async def _copy_file_range(operations: Any, request: _Extra) -> bytes:
    return _COPIED.pack(await _copied(operations, request))  # the kernel keeps the length of this one below 4 GiB


async def _copy_file_range_64(operations: Any, request: _Extra) -> bytes:
    return _COPIED_64.pack(await _copied(operations, request))


async def _tmpfile(operations: Any, request: _Extra) -> bytes:
    flags, mode, umask, _ = _CREATE.unpack_from(request.body)
    info, entry = await operations.tmpfile(request.node, mode, flags, request.caller(umask))
    return pack_entry(entry) + pack_open(info)


async def _ioctl(operations: Any, request: _Extra) -> bytes:
    cmd, in_size, out_size = _IOCTL.unpack_from(request.body)
    argument = request.body[_IOCTL.size : _IOCTL.size + in_size]
    result = await operations.ioctl(request.node, cmd, argument, out_size, request.caller())
    if len(result) > out_size:
        raise ValueError(f"ioctl {cmd:#x} returned {len(result)} bytes where the caller has room for {out_size}")
    return _IOCTL_OUT.pack(0, 0, 0, 0) + bytes(result)


async def _syncfs(operations: Any, request: _Extra) -> bytes:
    await operations.syncfs(request.node)
    return b""


async def _statx(operations: Any, request: _Extra) -> bytes:
    flags, mask = _STATX.unpack_from(request.body)
    return pack_statx(await operations.statx(request.node, mask, flags))


_ANSWERS: dict[int, tuple[str, Callable[[Any, _Extra], Awaitable[bytes]]]] = {
    Opcode.IOCTL: ("ioctl", _ioctl),
    Opcode.FALLOCATE: ("fallocate", _fallocate),
    Opcode.LSEEK: ("lseek", _lseek),
    Opcode.COPY_FILE_RANGE: ("copy_file_range", _copy_file_range),
    Opcode.COPY_FILE_RANGE_64: ("copy_file_range", _copy_file_range_64),
    Opcode.SYNCFS: ("syncfs", _syncfs),
    Opcode.TMPFILE: ("tmpfile", _tmpfile),
    Opcode.STATX: ("statx", _statx),
}


def opcodes_of(operations: object) -> frozenset[Opcode]:
    """The opcodes that `operations` has a method for."""
    return frozenset(Opcode(opcode) for opcode, (method, _) in _ANSWERS.items() if hasattr(operations, method))


def attach(operations: pyfuse3.Operations, wire: Requests, wanted: Wanted) -> None:
    """Serve the extra opcodes of `operations`, and ask for `wanted` in INIT, in the session that `pyfuse3.init` begins next.

    `operations.read` is replaced on the object: a read of handle 0 is one of these opcodes. Every other handle that pyfuse3 passes to a
    handler is the node's number, whatever open returned.
    """
    plain_read = operations.read

    def read(fh: int, off: int, size: int) -> Awaitable[bytes]:
        return plain_read(fh, off, size) if fh else _answer(operations, wire)

    setattr(operations, "read", read)  # noqa: B010  (an assignment to a method is a type error)
    interrupt = functools.partial(_interrupt, operations) if hasattr(operations, "interrupt") else None
    on_init = functools.partial(init_reply, wanted=wanted)
    plain, failed_page = getattr(operations, "direct", {}), getattr(operations, "page_failed", None)
    wire.serve(on_init, interrupt, opcodes_of(operations), plain, failed_page)


async def _answer(operations: object, wire: Requests) -> bytes:
    """The body of the reply to the current request. FUSEError carries the errno; nothing else is raised but what ends the session."""
    number, _, node, uid, gid, pid, body = wire.whole_request()
    if number not in _ANSWERS:
        raise pyfuse3.FUSEError(errno.EINVAL)  # a READ of no node at all: no kernel sends it
    opcode = Opcode(number)
    try:
        return await _ANSWERS[opcode][1](operations, _Extra(node, uid, gid, pid, body))
    except pyfuse3.FUSEError:
        raise
    except OSError as error:
        raise pyfuse3.FUSEError(error.errno or errno.EIO) from error
    except struct.error:
        raise pyfuse3.FUSEError(errno.EINVAL) from None
    except Exception:  # a bug costs its caller one EIO, never the mount
        log.exception("%s of inode %d failed", opcode.name, node)
        raise pyfuse3.FUSEError(errno.EIO) from None


def _interrupt(operations: Any, unique: int) -> None:
    try:
        operations.interrupt(unique)
    except Exception:  # the extension calls this, and has nobody to raise to
        log.exception("INTERRUPT of request %d failed", unique)


def pack_entry(entry: pyfuse3.EntryAttributes) -> bytes:
    """`struct fuse_entry_out`."""
    entry_sec, entry_nsec = _seconds(entry.entry_timeout)
    attr_sec, attr_nsec = _seconds(entry.attr_timeout)
    return _ENTRY.pack(entry.st_ino, entry.generation, entry_sec, attr_sec, entry_nsec, attr_nsec) + _pack_attr(entry)


def pack_open(info: pyfuse3.FileInfo) -> bytes:
    """`struct fuse_open_out`."""
    flags = (
        (_FOPEN_DIRECT_IO if info.direct_io else 0)
        | (_FOPEN_KEEP_CACHE if info.keep_cache else 0)
        | (_FOPEN_NONSEEKABLE if info.nonseekable else 0)
    )
    return _OPEN_OUT.pack(info.fh, flags, 0)


def pack_statx(answer: Statx) -> bytes:
    """`struct fuse_statx_out`. The kernel fills in its own device numbers."""
    entry = answer.entry
    mask = _STATX_BASIC_STATS | (_STATX_BTIME if answer.btime_ns is not None else 0)
    times = (entry.st_atime_ns, answer.btime_ns or 0, entry.st_ctime_ns, entry.st_mtime_ns)
    return _STATX_OUT.pack(*_seconds(entry.attr_timeout)) + _STATX_BODY.pack(
        *(mask, entry.st_blksize, answer.attributes, entry.st_nlink, entry.st_uid, entry.st_gid, entry.st_mode),
        *(entry.st_ino, entry.st_size, entry.st_blocks, answer.attributes_mask),
        *(part for time_ns in times for part in divmod(time_ns, 10**9)),
        *(_major(entry.st_rdev), _minor(entry.st_rdev), 0, 0),
    )


def _pack_attr(entry: pyfuse3.EntryAttributes) -> bytes:
    """`struct fuse_attr`. Times before 1970 travel as two's complement."""
    times = [divmod(ns, 10**9) for ns in (entry.st_atime_ns, entry.st_mtime_ns, entry.st_ctime_ns)]
    return _ATTR.pack(
        *(entry.st_ino, entry.st_size, entry.st_blocks),
        *(seconds & (1 << 64) - 1 for seconds, _ in times),
        *(nanoseconds for _, nanoseconds in times),
        *(entry.st_mode, entry.st_nlink, entry.st_uid, entry.st_gid, entry.st_rdev & 0xFFFFFFFF, entry.st_blksize, 0),
    )


def _seconds(timeout: float) -> tuple[int, int]:
    """Whole seconds, at most what the field holds, and nanoseconds."""
    if timeout >= float(1 << 63):
        return (1 << 64) - 1, 0
    whole = int(timeout)
    return whole, min(int((timeout - whole) * 1e9), 999_999_999)


def _major(device: int) -> int:
    return (device >> 8 & 0xFFF) | (device >> 32 & ~0xFFF)


def _minor(device: int) -> int:
    return (device & 0xFF) | (device >> 12 & ~0xFF & 0xFFFFFFFF)
