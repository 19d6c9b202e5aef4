"""One member of a tar archive as a value, and the constants of the format that reading and writing share.

POSIX.1-2017, pax, "ustar Interchange Format" and "pax Extended Header"; GNU tar's manual, "Basic Tar Format" and "Storing Sparse Files".
Names are bytes, as on disk.

    offset  0     100   108   116   124   136   148    156   157    257    263     265    297    329       337       345     500
            name  mode  uid   gid   size  mtime chksum type  linkname magic version uname  gname  devmajor  devminor  prefix
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import Enum

BLOCK = 512
HEADER = struct.Struct("100s8s8s8s12s12s8s1s100s6s2s32s32s8s8s155s12x")
XATTR_PREFIX = b"SCHILY.xattr."


class Kind(Enum):
    """What a member is, by its type flag."""

    FILE = b"0"
    LINK = b"1"
    SYMLINK = b"2"
    CHARACTER_DEVICE = b"3"
    BLOCK_DEVICE = b"4"
    DIRECTORY = b"5"
    FIFO = b"6"

    @property
    def is_device(self) -> bool:
        return self in (Kind.CHARACTER_DEVICE, Kind.BLOCK_DEVICE)


@dataclass(frozen=True, slots=True)
class Member:
    """A member without its content.

    name: path from the root of the layer, without a slash at either end. mode: permission bits. mtime_ns: since 1970. size: of a file, in
    bytes, holes included. target: of a symlink, or of a hard link the name it is one to. device: (major, minor).
    xattrs: in the archive's order. extents: (offset, length) of the data of a sparse file, None where all of it is data.
    """

    name: bytes
    kind: Kind
    mode: int = 0o644
    uid: int = 0
    gid: int = 0
    mtime_ns: int = 0
    size: int = 0
    target: bytes = b""
    device: tuple[int, int] = (0, 0)
    xattrs: tuple[tuple[bytes, bytes], ...] = ()
    extents: tuple[tuple[int, int], ...] | None = None


def checksum(header: bytes) -> int:
    """The sum of a header's bytes, those of the checksum itself taken as blanks."""
    return sum(header) - sum(header[148:156]) + 8 * ord(" ")


def padding(size: int) -> int:
    """Bytes from the end of `size` bytes to the next whole block."""
    return -size % BLOCK
