"""The one seam for what changes: every system call by which an upper or a work directory is changed, or put on disk, is made here.

Tests put another object in the place of `Calls`, which counts, fails with ENOSPC, or kills the process at call N: so that this tells
of all of them, no other module makes such a call (tests/unit/test_architecture.py). The extension alone writes data of open files of the
upper by itself, one pwrite(2) a request, and syncs them.
"""

from __future__ import annotations

import fcntl
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import NamedTuple

from pyoverlay.core import syscalls
from pyoverlay.core.syscalls import Stat


class Caller(NamedTuple):
    """Who asks: what is made belongs to them."""

    uid: int
    gid: int
    umask: int


class Order(IntEnum):
    """What of a file is on disk before it gets its name."""

    NOTHING = 0
    DATA = 1  # by sync_file_range(2)
    DATA_AND_SIZE = 2  # by fdatasync(2)
    ALL = 3  # by fsync(2)


class PlainFile(NamedTuple):
    """A regular file of a lower that is to be copied up under its one name, with nothing about it that a decision would be needed for.

    source_fd: open on it, or -1. dirfd, name: where it lies. temporary: a name in the work directory. new_dirfd, new: where it goes. size:
    bytes of data that are wanted, -1 for all. most: bytes, past which it is not to be done in one call. in_memory: reading never waits.
    may_share: FICLONE may work. uid, gid: the copy's owner, -1 for the file's own. is_nosuid: of a mount without set-user-id programs.
    obeys_modes: a directory's mode may forbid us to put something there. uuid: of the lower's file system, for the mark `origin`.
    """

    source_fd: int
    dirfd: int
    name: bytes
    work_fd: int
    temporary: bytes
    new_dirfd: int
    new: bytes
    size: int
    most: int
    in_memory: bool
    may_share: bool
    order: Order
    uid: int
    gid: int
    is_nosuid: bool
    obeys_modes: bool
    mark_prefix: bytes
    uuid: bytes


class Copied(NamedTuple):
    """A file that was copied up. fd: open for reading and writing. is_truncated: some data were not wanted. refuses_to_clone: the two file
    systems will not share blocks, whatever the file. times_error: the errno by which its directory did not keep its times, or 0.
    """

    fd: int
    ino: int
    is_truncated: bool
    refuses_to_clone: bool
    times_error: int


class Calls:
    """One method a system call, under its name. Each raises what the call does.

    `COMPOUND` names those that are several in one, which only a subclass may have, or may make by one call. Their system calls go by the
    same names, and are counted, fail and kill in the same way (`fuse/_calls.h`).
    """

    COMPOUND = frozenset({"as_caller", "make", "copy_up_file"})
    copies_up_files = False  # whether there is copy_up_file

    def open(self, name: bytes, flags: int, mode: int, dirfd: int) -> int:
        return os.open(name, flags | os.O_CLOEXEC, mode, dir_fd=dirfd)

    def mkdir(self, name: bytes, mode: int, dirfd: int) -> None:
        os.mkdir(name, mode, dir_fd=dirfd)

    def mknod(self, name: bytes, mode: int, rdev: int, dirfd: int) -> None:
        os.mknod(name, mode, rdev, dir_fd=dirfd)

    def symlink(self, target: bytes, name: bytes, dirfd: int) -> None:
        os.symlink(target, name, dir_fd=dirfd)

    def link(self, dirfd: int, name: bytes, new_dirfd: int, new: bytes) -> None:
        if name:
            syscalls.linkat(dirfd, name, new_dirfd, new)
        else:
            syscalls.linkat(syscalls.AT_FDCWD, proc_path(dirfd, b""), new_dirfd, new, syscalls.AT_SYMLINK_FOLLOW)

    def unlink(self, name: bytes, dirfd: int) -> None:
        os.unlink(name, dir_fd=dirfd)

    def rmdir(self, name: bytes, dirfd: int) -> None:
        os.rmdir(name, dir_fd=dirfd)

    def rename(self, dirfd: int, name: bytes, new_dirfd: int, new: bytes, flags: int = 0) -> None:
        if flags:
            syscalls.renameat2(dirfd, name, new_dirfd, new, flags)
        else:
            os.rename(name, new, src_dir_fd=dirfd, dst_dir_fd=new_dirfd)

    # An empty name is the object of an O_PATH descriptor: it is reached through /proc, which follows no symlink beyond it.

    def chmod(self, dirfd: int, name: bytes, mode: int) -> None:
        if name:
            syscalls.fchmodat(dirfd, name, mode)
        else:
            os.chmod(proc_path(dirfd, b""), mode)

    def let_us_in(self, dirfd: int, name: bytes, mode: int) -> None:
        """chmod, for this process itself: of the mode on disk, whatever the object shows (`overrides`)."""
        Calls.chmod(self, dirfd, name, mode)

    def chown(self, dirfd: int, name: bytes, uid: int, gid: int) -> None:
        if name:
            os.chown(name, uid, gid, dir_fd=dirfd, follow_symlinks=False)
        else:
            os.chown(proc_path(dirfd, b""), uid, gid)

    def utimens(self, dirfd: int, name: bytes, atime_ns: int | None, mtime_ns: int | None) -> None:
        syscalls.utimensat(dirfd, name, atime_ns, mtime_ns)

    def setxattr(self, dirfd: int, name: bytes, attribute: bytes, value: bytes, flags: int) -> None:
        os.setxattr(proc_path(dirfd, name), attribute, value, flags, follow_symlinks=not name)

    def removexattr(self, dirfd: int, name: bytes, attribute: bytes) -> None:
        os.removexattr(proc_path(dirfd, name), attribute, follow_symlinks=not name)

    def ftruncate(self, fd: int, size: int) -> None:
        os.ftruncate(fd, size)

    def pwrite(self, fd: int, data: bytes, offset: int) -> int:
        return os.pwrite(fd, data, offset)

    def fallocate(self, fd: int, mode: int, offset: int, length: int) -> None:
        syscalls.fallocate(fd, mode, offset, length)

    def copy_file_range(self, fd: int, new_fd: int, length: int, offset: int, new_offset: int) -> int:
        return os.copy_file_range(fd, new_fd, length, offset, new_offset)

    def ficlone(self, fd: int, source_fd: int) -> None:
        fcntl.ioctl(fd, syscalls.FICLONE, source_fd)

    def ioctl(self, fd: int, request: int, argument: bytes) -> None:
        fcntl.ioctl(fd, request, argument)

    # What is made for a caller.

    @contextmanager
    def as_caller(self, caller: Caller) -> Iterator[None]:
        """What is made inside belongs to the caller from its first moment, and the caller's umask applies unless a default ACL does.
        EINVAL: it is nobody that we can be.
        """
        own = os.geteuid(), os.getegid()
        old = os.umask(caller.umask)
        try:
            if caller[:2] == own:
                yield
                return
            is_dumpable = syscalls.is_dumpable()
            try:
                syscalls.setfsids(caller.uid, caller.gid)
                yield
            finally:
                syscalls.setfsids(*own)
                syscalls.set_dumpable(is_dumpable)  # a change of fsuid sets it to what the sysctl fs.suid_dumpable says (commit_creds)
        finally:
            os.umask(old)

    def make(
        self, dirfd: int, name: bytes, mode: int, caller: Caller, rdev: int = 0, target: bytes = b""
    ) -> tuple[int, Stat | None]:
        """A new object for the caller, of the type that is in the mode: (the descriptor of a regular file, open for both, else -1; its
        attributes, or None where they have to be asked for). EEXIST, and what the call raises.
        """
        with self.as_caller(caller):
            if stat.S_ISREG(mode):
                return self.open(name, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_NOFOLLOW, mode & 0o7777, dirfd), None
            if stat.S_ISDIR(mode):
                self.mkdir(name, mode & 0o7777, dirfd)
            elif stat.S_ISLNK(mode):
                self.symlink(target, name, dirfd)
            else:
                self.mknod(name, mode, rdev, dirfd)
        return -1, None

    # What changes nothing but says when it is on disk.

    def sync_file_range(self, fd: int) -> None:
        syscalls.sync_file_range(fd)

    def start_writeback(self, fd: int, offset: int, length: int) -> None:
        """sync_file_range(2) that only begins, so that the wait at the end is short."""
        syscalls.start_writeback(fd, offset, length)

    def fdatasync(self, fd: int) -> None:
        os.fdatasync(fd)

    def fsync(self, fd: int) -> None:
        os.fsync(fd)

    def syncfs(self, fd: int) -> None:
        syscalls.syncfs(fd)

    # Several in one.

    def copy_up_file(self, file: PlainFile) -> Copied | None:
        """A whole copy-up. None: nothing was done, and it takes single calls. After an error `temporary` may be there."""
        raise NotImplementedError


_XFS_SUPER_MAGIC = 0x58465342  # <linux/magic.h>


def sync_all(calls: Calls, root_fd: int, work_fd: int) -> None:
    """Put everything that an upper holds on disk. work_fd: a directory beside it that nobody else looks at."""
    calls.syncfs(root_fd)
    if syscalls.fstatfs_type(root_fd) == _XFS_SUPER_MAGIC:
        # What was written in place may be in the disk's cache yet: xfs has that flushed with its log alone, which may have had nothing
        # to write (seen on Linux 6.18). A new time gives it something.
        calls.utimens(work_fd, b"", None, time.time_ns())
        calls.syncfs(root_fd)


def proc_path(fd: int, name: bytes) -> bytes:
    """A path for the calls that take no directory descriptor."""
    return b"/proc/self/fd/%d/%s" % (fd, name) if name else b"/proc/self/fd/%d" % fd


def remove_tree(calls: Calls, dirfd: int, name: bytes) -> None:
    """Remove a name and all below it, never following a symlink."""
    try:
        calls.unlink(name, dirfd)
        return
    except IsADirectoryError:
        pass
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        fd = os.open(name, flags, dir_fd=dirfd)
    except PermissionError:  # an ordinary user's own directory may be closed to that user
        calls.let_us_in(dirfd, name, 0o700)
        fd = os.open(name, flags, dir_fd=dirfd)
    try:
        with os.scandir(fd) as entries:
            names = [os.fsencode(entry.name) for entry in entries]
        for below in names:
            remove_tree(calls, fd, below)
    finally:
        os.close(fd)
    calls.rmdir(name, dirfd)
