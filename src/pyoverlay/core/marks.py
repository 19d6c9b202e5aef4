"""What an overlay writes on disk, bytes to meaning and back. No I/O.

The format is the kernel's: Documentation/filesystems/overlayfs.rst and the table ovl_xattr_table in fs/overlayfs/util.c.

    whiteout   a character device 0/0; or an empty regular file with the mark `whiteout`, in a directory whose `opaque` is "x"
    opaque     "y": the directory hides what lies below it; "x": it may hold whiteouts of the second kind
    redirect   where in the layers below a directory's other half lies: "/path/from/the/root", or one name in the same parent
    origin     the file handle of the lower object that this one was copied up from (struct ovl_fb)
    impure     "y": the directory has entries with an origin, so that their inode numbers are not the upper's own
    metacopy   the file's data still lies in a lower
    nlink      on a copy in the index: how many names show, "U+1" to the links of the copy, "L-1" to those of the lower file
    upper      on the index: the file handle of the upper that it belongs to
    uuid       on the upper's root: 16 bytes that tell this overlay from all others
"""

from __future__ import annotations

import errno
import stat
import struct
import sys
from typing import NamedTuple

from pyoverlay.core.syscalls import FileHandle, Stat

TRUSTED = b"trusted.overlay."
USER = b"user.overlay."

AUFS_PREFIX = b".wh."
AUFS_OPAQUE = b".wh..wh..opq"

NLINK, UPPER, UUID = b"nlink", b"upper", b"uuid"
OPAQUE, REDIRECT, ORIGIN, IMPURE, METACOPY, WHITEOUT = b"opaque", b"redirect", b"origin", b"impure", b"metacopy", b"whiteout"

_ESCAPE = b"overlay."

_METACOPY_HEADER = struct.Struct("BBBB")  # struct ovl_metacopy: version, len, flags, digest_algo
_FB_HEADER = struct.Struct("BBBBB16s")  # struct ovl_fb: version, magic, len, flags, type, uuid
_FB_MAGIC = 0xFB
_BIG_ENDIAN, _ANY_ENDIAN, _PATH_UPPER = 1, 2, 4  # OVL_FH_FLAG_*
_FB_CPU_ENDIAN = _BIG_ENDIAN if sys.byteorder == "big" else 0


def may_be_whiteout(st: Stat) -> bool:
    """Could this be a whiteout, of whatever kind? Of most objects it takes one look to know that they are not."""
    form = stat.S_IFMT(st.st_mode)
    return not st.st_size if form == stat.S_IFREG else form == stat.S_IFCHR


def is_whiteout_device(st: Stat) -> bool:
    """Is this the kernel's whiteout, the character device 0/0?"""
    return stat.S_ISCHR(st.st_mode) and st.st_rdev == 0


def may_be_whiteout_file(st: Stat) -> bool:
    """Could this be a whiteout of the second kind? Only its `whiteout` mark can tell."""
    return st.st_size == 0 and stat.S_ISREG(st.st_mode)


class Origin(NamedTuple):
    """A lower object by its file handle. is_upper: the handle is of an upper directory (an index entry's), not of a lower object."""

    uuid: bytes
    handle: FileHandle
    is_upper: bool = False


def encode_origin(origin: Origin) -> bytes:
    """struct ovl_fb of fs/overlayfs/overlayfs.h, as ovl_encode_real_fh writes it."""
    length = _FB_HEADER.size + len(origin.handle.data)
    flags = _FB_CPU_ENDIAN | (_PATH_UPPER if origin.is_upper else 0)
    return _FB_HEADER.pack(0, _FB_MAGIC, length, flags, origin.handle.type, origin.uuid) + origin.handle.data


def decode_origin(value: bytes) -> Origin | None:
    """None where there is nothing to follow: empty (origin unknown), another byte order, a later version, or not an ovl_fb at all.

    The kernel ignores all of these but the last, which it logs (ovl_check_fb_len, ovl_get_fh).
    """
    if len(value) < _FB_HEADER.size:
        return None
    version, magic, length, flags, kind, uuid = _FB_HEADER.unpack_from(value)
    if version or magic != _FB_MAGIC or length != len(value) or flags & ~(_BIG_ENDIAN | _ANY_ENDIAN | _PATH_UPPER):
        return None
    if not flags & _ANY_ENDIAN and flags & _BIG_ENDIAN != _FB_CPU_ENDIAN:
        return None
    return Origin(uuid, FileHandle(kind, value[_FB_HEADER.size : length]), bool(flags & _PATH_UPPER))


class Nlink(NamedTuple):
    """What the mark `nlink` adds to the links of the lower file, if of_lower, else to those of the copy."""

    difference: int
    of_lower: bool


def encode_nlink(difference: int, *, of_lower: bool = False) -> bytes:
    """As ovl_set_nlink_common writes it."""
    return b"%s%+d" % (b"L" if of_lower else b"U", difference)


def decode_nlink(value: bytes) -> Nlink | None:
    """None: malformed, and passed over (ovl_get_nlink)."""
    if len(value) > 12 or value[:1] not in (b"L", b"U") or value[1:2] not in (b"+", b"-") or not value[2:].isdigit():
        return None
    return Nlink(int(value[1:]), value.startswith(b"L"))


def may_be_metacopy(st: Stat) -> bool:
    """Could the data lie elsewhere? What is here is then a hole. Only the `metacopy` mark can tell, and a file that escapes this
    question is asked when it is opened.
    """
    return st.st_blocks * 512 < st.st_size and stat.S_ISREG(st.st_mode)


def check_metacopy(value: bytes) -> None:
    """EIO if this is no metacopy mark: it is empty or a struct ovl_metacopy (ovl_check_metacopy_xattr)."""
    if 0 < len(value) < _METACOPY_HEADER.size:
        raise OSError(errno.EIO, "invalid metacopy mark")


class Digest(NamedTuple):
    """An fs-verity digest: the number of its algorithm (FS_VERITY_HASH_ALG_*) and its bytes."""

    algorithm: int
    value: bytes


def encode_metacopy(digest: Digest | None) -> bytes:
    """struct ovl_metacopy of fs/overlayfs/overlayfs.h; empty without a digest, as the kernel writes it."""
    if digest is None:
        return b""
    return _METACOPY_HEADER.pack(0, _METACOPY_HEADER.size + len(digest.value), 0, digest.algorithm) + digest.value


def decode_metacopy(value: bytes) -> Digest | None:
    """The digest that a metacopy mark demands; None: it demands none. EIO: malformed, or of a later version."""
    if not value:
        return None
    check_metacopy(value)
    version, length, _, algorithm = _METACOPY_HEADER.unpack_from(value)
    if version or length != len(value):
        raise OSError(errno.EIO, "invalid metacopy mark")
    return Digest(algorithm, value[_METACOPY_HEADER.size :]) if algorithm else None


def check_redirect(value: bytes) -> bytes:
    """The redirect, if it is one: "/a/b" without empty, "." or ".." components, or a single name.

    EINVAL else, as ovl_get_redirect_xattr answers; the kernel does not look for "." and "..", which its lookup then does not find.
    """
    components = value[1:].split(b"/") if value.startswith(b"/") else [value]
    if any(component in (b"", b".", b"..") or b"/" in component or b"\0" in component for component in components):
        raise OSError(errno.EINVAL, "invalid redirect")
    return value


def escape_xattr(name: bytes, prefix: bytes) -> bytes:
    """A caller's own xattr as it is stored: one level deeper, where it would be taken for a mark (fs/overlayfs/xattrs.c)."""
    return prefix + _ESCAPE + name[len(prefix) :] if name.startswith(prefix) else name


def unescape_xattr(name: bytes, prefix: bytes) -> bytes | None:
    """A stored xattr as a caller sees it; None: it is a mark, which nobody sees."""
    if not name.startswith(prefix):
        return name
    rest = name[len(prefix) :]
    return prefix + rest[len(_ESCAPE) :] if rest.startswith(_ESCAPE) else None
