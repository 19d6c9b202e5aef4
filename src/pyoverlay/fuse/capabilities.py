"""What the kernel and we agree on in INIT: pure functions on the bytes of the request and of the reply.

libfuse has answered already, for the capabilities that pyfuse3 can ask for; `init_reply` changes that answer. The rule is that libfuse goes
on to parse every later message, so a flag that changes the layout of a message it parses, or needs a feature of libfuse, is never set
here. `max_write` is never more than libfuse's for the same reason: it has laid out its buffers by it.

    request   in_header (40 bytes)    major minor max_readahead flags flags2 ...
    reply     out_header (16 bytes)   major minor max_readahead flags max_background congestion_threshold max_write time_gran
                                      max_pages map_alignment flags2 ...

Layout and flags: <linux/fuse.h>, `struct fuse_init_in`, `struct fuse_init_out`, protocol 7.23 to 7.45.
"""

import struct
from dataclasses import dataclass
from enum import IntFlag

_REQUEST = struct.Struct("<40x4I")
_REQUEST_FLAGS2 = struct.Struct("<56xI")
_REPLY_ERROR = struct.Struct("<4xi8x")
_REPLY = struct.Struct("<16x4I2H2I2HI")
_PAGE = 4096
_MOST_WRITE = 1 << 20
"""Bytes of a WRITE, a READ or a listing. Where fs.fuse.max_pages_limit is raised a later libfuse asks for up to 256 MiB, and each buffer
has to hold one."""


class InitFlag(IntFlag):
    """The flags that this module sets or clears; bits from 32 up travel in `flags2`."""

    ATOMIC_O_TRUNC = 1 << 3
    DONT_MASK = 1 << 6
    READDIRPLUS_AUTO = 1 << 14
    ASYNC_DIO = 1 << 15
    WRITEBACK_CACHE = 1 << 16
    NO_OPEN_SUPPORT = 1 << 17
    PARALLEL_DIROPS = 1 << 18
    HANDLE_KILLPRIV = 1 << 19
    POSIX_ACL = 1 << 20
    MAX_PAGES = 1 << 22
    CACHE_SYMLINKS = 1 << 23
    NO_OPENDIR_SUPPORT = 1 << 24
    HANDLE_KILLPRIV_V2 = 1 << 28
    SETXATTR_EXT = 1 << 29
    INIT_EXT = 1 << 30
    SECURITY_CTX = 1 << 32
    CREATE_SUPP_GROUP = 1 << 34
    DIRECT_IO_ALLOW_MMAP = 1 << 36
    PASSTHROUGH = 1 << 37
    OVER_IO_URING = 1 << 41


_NEVER = (
    InitFlag.SETXATTR_EXT  # a longer setxattr header
    | InitFlag.SECURITY_CTX  # extensions after the body of create, mkdir, mknod, symlink
    | InitFlag.CREATE_SUPP_GROUP  # the same
    | InitFlag.READDIRPLUS_AUTO  # READDIR besides READDIRPLUS, for which pyfuse3 has no handler
    | InitFlag.OVER_IO_URING  # requests that do not come from the device
    | InitFlag.PASSTHROUGH  # needs max_stack_depth and backing ids in every open
)

DEFAULT = (
    InitFlag.DONT_MASK
    | InitFlag.ASYNC_DIO
    | InitFlag.NO_OPEN_SUPPORT
    | InitFlag.PARALLEL_DIROPS
    | InitFlag.POSIX_ACL
    | InitFlag.MAX_PAGES
    | InitFlag.CACHE_SYMLINKS
    | InitFlag.NO_OPENDIR_SUPPORT
    | InitFlag.HANDLE_KILLPRIV_V2
    | InitFlag.DIRECT_IO_ALLOW_MMAP
)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to ask for. A flag that the kernel does not offer stays off; what is not named stays as libfuse answered."""

    on: InitFlag = DEFAULT
    off: InitFlag = InitFlag(0)
    max_background: int = 65535
    """Requests the kernel sends without waiting for a reply: readahead, write-back, asynchronous direct I/O. At libfuse's 12, a dozen
    writes that wait for one copy-up stop every other file."""


def offered(request: bytes) -> InitFlag:
    """The flags that the kernel offers in an INIT `request`; none if it is too short to hold any."""
    if len(request) < _REQUEST.size:
        return InitFlag(0)
    flags = _REQUEST.unpack_from(request)[3]
    if flags & InitFlag.INIT_EXT and len(request) >= _REQUEST_FLAGS2.size:
        flags |= _REQUEST_FLAGS2.unpack_from(request)[0] << 32
    return InitFlag(flags)


def agreed(reply: bytes) -> InitFlag:
    """The flags that an INIT `reply` turns on; none if it is an error or too short."""
    if len(reply) < _REPLY.size or _REPLY_ERROR.unpack_from(reply)[0] != 0:
        return InitFlag(0)
    fields = _REPLY.unpack_from(reply)
    flags = fields[3]
    if flags & InitFlag.INIT_EXT:
        flags |= fields[10] << 32
    return InitFlag(flags)


def init_reply(request: bytes, reply: bytes, wanted: Wanted) -> bytes:
    """The reply to send to the kernel instead of libfuse's; the same one if it is an error or of a protocol before 7.23."""
    if len(reply) < _REPLY.size or _REPLY_ERROR.unpack_from(reply)[0] != 0 or len(request) < _REQUEST.size:
        return reply
    major, minor, readahead, _, _, _, max_write, time_gran, pages, alignment, _ = _REPLY.unpack_from(reply)
    max_write = min(max_write, _MOST_WRITE)
    flags = _decide(offered(request), agreed(reply), wanted)
    if flags & InitFlag.MAX_PAGES:
        pages = -(-max_write // _PAGE)
    background, congestion = wanted.max_background, wanted.max_background * 3 // 4
    changed = bytearray(reply)
    _REPLY.pack_into(
        changed,
        0,
        *(major, minor, readahead, flags & 0xFFFFFFFF, background, congestion),
        *(max_write, time_gran, pages, alignment, flags >> 32),
    )
    changed[: _REPLY_ERROR.size] = reply[: _REPLY_ERROR.size]  # pad bytes are packed as zeros
    return bytes(changed)


def _decide(offer: InitFlag, flags: InitFlag, wanted: Wanted) -> InitFlag:
    flags = (flags | wanted.on) & offer & ~wanted.off & ~_NEVER
    if flags & InitFlag.NO_OPEN_SUPPORT:
        flags &= ~InitFlag.ATOMIC_O_TRUNC  # else O_TRUNC would travel in an OPEN that is never sent
    if flags & InitFlag.HANDLE_KILLPRIV_V2:
        flags &= ~InitFlag.HANDLE_KILLPRIV
    if flags >> 32 and not offer & InitFlag.INIT_EXT:
        flags &= InitFlag(0xFFFFFFFF)
    return flags | (offer & InitFlag.INIT_EXT)
