"""The system calls that Python lacks, for tests: typed, and raising OSError as `os` does.

The tests must not borrow the product's own wrappers: a wrong constant there would then be right here too.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_libc = ctypes.CDLL(None, use_errno=True)

AT_FDCWD = -100
AT_SYMLINK_NOFOLLOW = 0x100
AT_SYMLINK_FOLLOW = 0x400
AT_EMPTY_PATH = 0x1000

RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2
RENAME_WHITEOUT = 4

UTIME_NOW = (1 << 30) - 1
UTIME_OMIT = (1 << 30) - 2

IN_MODIFY = 0x2
IN_ATTRIB = 0x4
IN_OPEN = 0x20
IN_MOVED_FROM = 0x40
IN_MOVED_TO = 0x80
IN_CREATE = 0x100
IN_DELETE = 0x200
IN_NONBLOCK = 0o4000

MS_REMOUNT, MS_BIND = 1 << 5, 1 << 12
MNT_DETACH = 2
_MS_REC, _MS_PRIVATE = 1 << 14, 1 << 18
_CLONE_FS = 0x200
_CLONE_NEWNS = 0x20000

StrPath = str | bytes | os.PathLike[str]


class _Timespec(ctypes.Structure):
    _fields_ = [("tv_sec", ctypes.c_long), ("tv_nsec", ctypes.c_long)]


class _Dirent(ctypes.Structure):
    _fields_ = [
        ("d_ino", ctypes.c_uint64),
        ("d_off", ctypes.c_int64),
        ("d_reclen", ctypes.c_ushort),
        ("d_type", ctypes.c_ubyte),
        ("d_name", ctypes.c_char * 256),
    ]


_libc.opendir.restype = ctypes.c_void_p
_libc.opendir.argtypes = [ctypes.c_char_p]
_libc.readdir.restype = ctypes.POINTER(_Dirent)
_libc.readdir.argtypes = [ctypes.c_void_p]
_libc.telldir.restype = ctypes.c_long
_libc.telldir.argtypes = [ctypes.c_void_p]
_libc.seekdir.restype = None
_libc.seekdir.argtypes = [ctypes.c_void_p, ctypes.c_long]
_libc.rewinddir.restype = None
_libc.rewinddir.argtypes = [ctypes.c_void_p]
_libc.closedir.argtypes = [ctypes.c_void_p]
_libc.getxattr.restype = ctypes.c_ssize_t
_libc.listxattr.restype = ctypes.c_ssize_t
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_libc.mount.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p]


def _checked(result: int, path: StrPath | None = None) -> int:
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), None if path is None else os.fspath(path))
    return result


def renameat2(source: StrPath, target: StrPath, flags: int) -> None:
    _checked(_libc.renameat2(AT_FDCWD, os.fsencode(source), AT_FDCWD, os.fsencode(target), flags), source)


def utimensat(path: StrPath, atime: tuple[int, int], mtime: tuple[int, int], flags: int = 0) -> None:
    """Times as (seconds, nanoseconds), so that UTIME_NOW and UTIME_OMIT can be said."""
    times = (_Timespec * 2)(_Timespec(*atime), _Timespec(*mtime))
    _checked(_libc.utimensat(AT_FDCWD, os.fsencode(path), times, flags), path)


def linkat_fd(fd: int, target: StrPath) -> None:
    """Give the file behind `fd` another name, by way of its magic link."""
    source = f"/proc/self/fd/{fd}".encode()
    _checked(_libc.linkat(AT_FDCWD, source, AT_FDCWD, os.fsencode(target), AT_SYMLINK_FOLLOW), target)


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    _checked(_libc.fallocate(fd, mode, offset, length))


def syncfs(fd: int) -> None:
    _checked(_libc.syncfs(fd))


def getxattr_into(path: StrPath, name: str, size: int) -> int:
    """Length of the value as getxattr(2) tells it for a buffer of `size` bytes (0 asks for the length)."""
    buffer = ctypes.create_string_buffer(size) if size else None
    return _checked(_libc.getxattr(os.fsencode(path), name.encode(), buffer, ctypes.c_size_t(size)), path)


def listxattr_into(path: StrPath, size: int) -> int:
    buffer = ctypes.create_string_buffer(size) if size else None
    return _checked(_libc.listxattr(os.fsencode(path), buffer, ctypes.c_size_t(size)), path)


def mount(source: str, target: StrPath, kind: str, flags: int = 0, data: str = "") -> None:
    _checked(_libc.mount(source.encode(), os.fsencode(target), kind.encode(), flags, data.encode()), target)


def remount(target: StrPath) -> None:
    """Mount again what is mounted, with its default flags: the kernel drops all names of it that are not in use (shrink_dcache_sb), and
    with them the inodes and their pages.
    """
    mount("none", target, "none", MS_REMOUNT)


def umount(target: StrPath, flags: int = 0) -> None:
    _checked(_libc.umount2(os.fsencode(target), flags), target)


@contextmanager
def private_mounts() -> Iterator[None]:
    """A mount namespace of this thread's own. What is mounted in it ends with its umount(2): a namespace that somebody makes meanwhile, as
    each container does, holds a copy of every mount of the one it comes from.
    """
    before = os.open("/proc/thread-self/ns/mnt", os.O_RDONLY)
    directory = os.getcwd()
    try:
        _checked(_libc.unshare(_CLONE_NEWNS))
        try:
            mount("none", "/", "none", _MS_REC | _MS_PRIVATE)
            yield
        finally:
            _checked(_libc.unshare(_CLONE_FS))  # a thread that is still ending shares our root directory, and setns(2) refuses that
            _checked(_libc.setns(before, _CLONE_NEWNS))
            os.chdir(directory)
    finally:
        os.close(before)


class DirectoryStream:
    """opendir(3) with telldir and seekdir. Entries come as (name, d_ino, d_type), without "." and ".."."""

    def __init__(self, path: StrPath) -> None:
        self._dir: int | None = _libc.opendir(os.fsencode(path))
        if self._dir is None:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), os.fspath(path))

    def __enter__(self) -> DirectoryStream:
        return self

    def __exit__(self, *_: object) -> None:
        _libc.closedir(self._dir)
        self._dir = None

    def __iter__(self) -> Iterator[tuple[str, int, int]]:
        while (entry := self.read()) is not None:
            yield entry

    def read(self) -> tuple[str, int, int] | None:
        while True:
            ctypes.set_errno(0)
            entry = _libc.readdir(self._dir)
            if not entry:
                if number := ctypes.get_errno():
                    raise OSError(number, os.strerror(number))
                return None
            name = os.fsdecode(entry.contents.d_name)
            if name not in (".", ".."):
                return name, entry.contents.d_ino, entry.contents.d_type

    def names(self) -> list[str]:
        return [name for name, _, _ in self]

    def tell(self) -> int:
        place: int = _libc.telldir(self._dir)
        return place

    def seek(self, place: int) -> None:
        _libc.seekdir(self._dir, place)

    def rewind(self) -> None:
        _libc.rewinddir(self._dir)


class Inotify:
    """One inotify instance with one watch; `events` returns what has come so far as (mask, name), and never waits."""

    def __init__(self, path: StrPath, mask: int) -> None:
        self._fd = _checked(_libc.inotify_init1(IN_NONBLOCK | os.O_CLOEXEC))
        _checked(_libc.inotify_add_watch(self._fd, os.fsencode(path), mask), path)

    def __enter__(self) -> Inotify:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def events(self) -> list[tuple[int, str]]:
        try:
            data = os.read(self._fd, 65536)
        except BlockingIOError:
            return []
        found = []
        while data:
            _, mask, _, length = struct.unpack_from("iIII", data)
            found.append((mask, os.fsdecode(data[16 : 16 + length].rstrip(b"\0"))))
            data = data[16 + length :]
        return found


def aligned_buffer(size: int) -> Any:
    """Page-aligned memory, which O_DIRECT asks for."""
    import mmap

    return mmap.mmap(-1, size)


ACL_ACCESS = "system.posix_acl_access"
ACL_DEFAULT = "system.posix_acl_default"
ACL_USER_OBJ, ACL_USER, ACL_GROUP_OBJ, ACL_GROUP, ACL_MASK, ACL_OTHER = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20
_NO_ID = 0xFFFFFFFF


def acl(*entries: tuple[int, int] | tuple[int, int, int]) -> bytes:
    """An ACL as its xattr holds it: version 2, then tag, permissions and id of each entry (linux/posix_acl_xattr.h)."""
    packed = struct.pack("<I", 2)
    for entry in entries:
        tag, permissions = entry[0], entry[1]
        packed += struct.pack("<HHI", tag, permissions, entry[2] if len(entry) == 3 else _NO_ID)
    return packed


def capability(permitted: int, *, is_effective: bool = True) -> bytes:
    """A file capability, revision 2, as `security.capability` holds it (linux/capability.h)."""
    return struct.pack("<IIIII", 0x02000000 | int(is_effective), permitted & 0xFFFFFFFF, 0, permitted >> 32, 0)


CAP_NET_RAW = 1 << 13


def data_extents(path: Path) -> list[tuple[int, int]]:
    """The (start, end) of each stretch of data, by SEEK_DATA and SEEK_HOLE."""
    extents: list[tuple[int, int]] = []
    with open(path, "rb") as file:
        end = 0
        while True:
            try:
                start = os.lseek(file.fileno(), end, os.SEEK_DATA)
            except OSError:
                return extents
            end = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            extents.append((start, end))
