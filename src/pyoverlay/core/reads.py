"""The system calls by which a layer is read, one method each: what `Calls` is for those that change one, but that others may be quicker.

`Reads` makes them with the os module, whose stat_result holds 19 objects of which three are looked at, and which raises for each name that
is not there. Whoever has better ones puts them into `Layer.reads`: what is done with the answers is the same.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence
from typing import Protocol

from pyoverlay.core.calls import proc_path
from pyoverlay.core.syscalls import Stat

_NOT_THERE = (errno.ENODATA, errno.EOPNOTSUPP)


class Reads(Protocol):
    """The calls. Each raises what the system call does, but for what it says it returns instead."""

    def lstat(self, dirfd: int, name: bytes, /) -> Stat | None:
        """None: there is no such name, or it is too long for this file system, and so not there (ovl_lookup_single)."""

    def lstat_all(self, dirfd: int, names: list[bytes], /) -> Sequence[Stat | None]:
        """lstat of each. None also for one of which it fails, without saying so."""

    def fstat(self, fd: int, /) -> Stat: ...

    def readlink(self, dirfd: int, name: bytes, /) -> bytes: ...

    def open_regular(self, dirfd: int, name: bytes, flags: int, /) -> int:
        """Descriptor of a regular file, no symlink followed. ESTALE: it is something else, and that is not opened: what it is, is looked at
        by O_PATH, behind which it stays what it is. Opened and closed again, a fifo would have let its writer go, a tape been rewound.
        """

    def getxattr(self, dirfd: int, name: bytes, attribute: bytes, /) -> bytes:
        """Of a name, a symlink's own; empty: of dirfd itself, which may be an O_PATH descriptor."""

    def find_xattr(self, dirfd: int, name: bytes, attribute: bytes, /) -> bytes | None:
        """The same; None: there is none, or this kind of file or file system has no such thing."""

    def find_xattr_of(self, fd: int, attribute: bytes, /) -> bytes | None:
        """The same of an open file."""

    def listxattr(self, dirfd: int, name: bytes, /) -> list[bytes]:
        """Of a name, as getxattr; empty where there is no such thing."""

    def scan(self, dirfd: int, flags: int, /) -> dict[bytes, int]:
        """What a directory holds, opened with these flags more, but for "." and "..", in the order of the disk: names, each with S_IFREG,
        S_IFDIR or S_IFLNK; 0: it is something else, or the file system does not say.
        """


def reopen_regular(pin: int, flags: int) -> int:
    """Descriptor of the regular file that an O_PATH descriptor is of. ESTALE, and nothing is opened, where it is of something else."""
    if not stat.S_ISREG(os.fstat(pin).st_mode):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
    return os.open(proc_path(pin, b""), flags | os.O_CLOEXEC)


class PlainReads:
    """Reads by the os module."""

    def lstat(self, dirfd: int, name: bytes, /) -> Stat | None:
        try:
            return os.stat(name, dir_fd=dirfd, follow_symlinks=False)
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                return None
            raise

    def lstat_all(self, dirfd: int, names: list[bytes], /) -> Sequence[Stat | None]:
        found: list[Stat | None] = []
        for name in names:
            try:
                found.append(self.lstat(dirfd, name))
            except OSError:
                found.append(None)
        return found

    def fstat(self, fd: int, /) -> Stat:
        return os.fstat(fd)

    def readlink(self, dirfd: int, name: bytes, /) -> bytes:
        return os.readlink(name, dir_fd=dirfd)

    def open_regular(self, dirfd: int, name: bytes, flags: int, /) -> int:
        pin = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dirfd)
        try:
            return reopen_regular(pin, flags)
        finally:
            os.close(pin)

    def getxattr(self, dirfd: int, name: bytes, attribute: bytes, /) -> bytes:
        return os.getxattr(proc_path(dirfd, name), attribute, follow_symlinks=not name)

    def find_xattr(self, dirfd: int, name: bytes, attribute: bytes, /) -> bytes | None:
        try:
            return self.getxattr(dirfd, name, attribute)
        except OSError as error:
            if error.errno in _NOT_THERE:
                return None
            raise

    def find_xattr_of(self, fd: int, attribute: bytes, /) -> bytes | None:
        try:
            return os.getxattr(fd, attribute)
        except OSError as error:
            if error.errno in _NOT_THERE:
                return None
            raise

    def listxattr(self, dirfd: int, name: bytes, /) -> list[bytes]:
        try:
            return [os.fsencode(attribute) for attribute in os.listxattr(proc_path(dirfd, name), follow_symlinks=not name)]
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP:
                return []
            raise

    def scan(self, dirfd: int, flags: int, /) -> dict[bytes, int]:
        fd = os.open(b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | flags, dir_fd=dirfd)
        try:
            with os.scandir(fd) as entries:
                return {os.fsencode(entry.name): _format(entry) for entry in entries}
        finally:
            os.close(fd)


def _format(entry: os.DirEntry[str]) -> int:
    if entry.is_symlink():
        return stat.S_IFLNK
    if entry.is_dir(follow_symlinks=False):
        return stat.S_IFDIR
    return stat.S_IFREG if entry.is_file(follow_symlinks=False) else 0
