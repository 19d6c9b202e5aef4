"""Owner and mode in an extended attribute, for an upper whose files cannot be given them: a user's, or one on a network file system.

The attribute is `UID:GID:MODE`, decimal, decimal, octal, of a regular file or a directory; a type may follow after another colon. It is
containers/storage's (pkg/idtools, ContainersOverrideXattr: `user.containers.override_stat`, which force_mask makes it write into its
layers) and fuse-overlayfs's (`security.fuseoverlayfs.override_stat`). What bears none is what it says by itself, and so is everything that
is neither file nor directory: `user.*` is not for those. POSIX ACLs are not there: on disk they would go with another owner and mode.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from pyoverlay.core.calls import Caller, Calls, proc_path
from pyoverlay.core.syscalls import Stat

_REST = ("st_atime_ns", "st_mtime_ns", "st_ctime_ns", "st_blksize", "st_blocks", "st_rdev")


class Override(NamedTuple):
    """What an object shows in place of its own. mode: permission bits."""

    uid: int
    gid: int
    mode: int

    @classmethod
    def of(cls, st: Stat) -> Override:
        return cls(st.st_uid, st.st_gid, stat.S_IMODE(st.st_mode))


def decode(value: bytes) -> Override:
    """EINVAL: it is none."""
    try:
        uid, gid, mode = value.split(b":")[:3]
        found = Override(int(uid), int(gid), int(mode, 8))
    except ValueError:
        found = Override(-1, -1, -1)
    if min(found) < 0 or max(found.uid, found.gid) >= 1 << 32 or found.mode > 0o7777:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    return found


def encode(override: Override) -> bytes:
    """The attribute's value."""
    return b"%d:%d:%o" % override


def is_private(name: bytes) -> bool:
    """Is this attribute nobody's but the overlay's? Whoever could write it would choose who owns a file, and set-user-id."""
    return name.startswith((b"user.containers.override_", b"security.fuseoverlayfs.", b"user.fuseoverlayfs.", b"system.posix_acl_"))


def shown(st: Stat, attribute: bytes, path: bytes | int, *, follow_symlinks: bool) -> Stat:
    """`st` with what the attribute of the same object says. EINVAL: that is malformed."""
    if not stat.S_ISREG(st.st_mode) and not stat.S_ISDIR(st.st_mode):
        return st
    try:
        value = os.getxattr(path, attribute, follow_symlinks=follow_symlinks)
    except OSError as error:
        if error.errno in (errno.ENODATA, errno.EOPNOTSUPP):
            return st
        raise
    override = decode(value)
    mode = stat.S_IFMT(st.st_mode) | override.mode
    by_index = (mode, st.st_ino, st.st_dev, st.st_nlink, override.uid, override.gid, st.st_size, 0, 0, 0)
    return os.stat_result(by_index, {name: getattr(st, name) for name in _REST})


class OverridingCalls(Calls):
    """Calls that keep owners and modes in the attribute. On disk what they make is the process's own, and nobody else may touch it.

    An object and its attribute are two calls: who makes something does so out of sight (`change`).
    """

    def __init__(self, attribute: bytes) -> None:
        self._attribute = attribute
        self._maker: Caller | None = None

    @contextmanager
    def as_caller(self, caller: Caller) -> Iterator[None]:
        """What is made inside belongs to the caller, or its group to a directory that passes it on."""
        self._maker = caller
        try:
            yield
        finally:
            self._maker = None

    def open(self, name: bytes, flags: int, mode: int, dirfd: int) -> int:
        makes = bool(flags & os.O_CREAT) or flags & os.O_TMPFILE == os.O_TMPFILE
        fd = super().open(name, flags, 0o600 if makes else mode, dirfd)
        if makes and self._maker is not None:
            try:
                self._write(fd, b"", self._inherited(dirfd, mode, is_directory=False))
            except OSError:
                os.close(fd)
                raise
        return fd

    def mkdir(self, name: bytes, mode: int, dirfd: int) -> None:
        super().mkdir(name, 0o700, dirfd)
        if self._maker is not None:
            self._write(dirfd, name, self._inherited(dirfd, mode, is_directory=True))

    def mknod(self, name: bytes, mode: int, rdev: int, dirfd: int) -> None:
        if self._maker is None:
            super().mknod(name, mode, rdev, dirfd)
            return
        wanted = self._inherited(dirfd, mode, is_directory=False)
        super().mknod(name, stat.S_IFMT(mode) | (0o600 if stat.S_ISREG(mode) else wanted.mode), rdev, dirfd)
        if stat.S_ISREG(mode):
            self._write(dirfd, name, wanted)
        else:
            self.chown(dirfd, name, wanted.uid, wanted.gid)

    def symlink(self, target: bytes, name: bytes, dirfd: int) -> None:
        super().symlink(target, name, dirfd)
        if self._maker is not None:
            wanted = self._inherited(dirfd, 0, is_directory=False)
            self.chown(dirfd, name, wanted.uid, wanted.gid)

    def chmod(self, dirfd: int, name: bytes, mode: int) -> None:
        st = self._stat(dirfd, name)
        if self._can_bear_it(st):
            self._write(dirfd, name, Override.of(st)._replace(mode=mode & 0o7777))
        else:
            super().chmod(dirfd, name, mode)

    def chown(self, dirfd: int, name: bytes, uid: int, gid: int) -> None:
        """As chown(2), set-user-id and set-group-id of an executable go. What can bear no attribute stays whose it is if it must."""
        st = self._stat(dirfd, name)
        if self._can_bear_it(st):
            old = Override.of(st)
            gone = stat.S_ISUID | (stat.S_ISGID if old.mode & stat.S_IXGRP else 0)
            mode = old.mode & ~gone if stat.S_ISREG(st.st_mode) else old.mode
            self._write(dirfd, name, Override(old.uid if uid == -1 else uid, old.gid if gid == -1 else gid, mode))
        else:
            try:
                super().chown(dirfd, name, uid, gid)
            except OSError as error:
                if error.errno not in (errno.EPERM, errno.EINVAL):  # no privilege, or no such id in this user namespace
                    raise

    def _stat(self, dirfd: int, name: bytes) -> Stat:
        st = os.stat(name, dir_fd=dirfd, follow_symlinks=False) if name else os.fstat(dirfd)
        return shown(st, self._attribute, proc_path(dirfd, name), follow_symlinks=not name)

    def _can_bear_it(self, st: Stat) -> bool:
        return stat.S_ISREG(st.st_mode) or stat.S_ISDIR(st.st_mode)

    def _inherited(self, dirfd: int, mode: int, *, is_directory: bool) -> Override:
        """For something new in a directory: its group is the directory's if that is set-group-id."""
        assert self._maker is not None
        uid, gid, umask = self._maker
        above = self._stat(dirfd, b"")
        mode = mode & 0o7777 & ~umask
        if above.st_mode & stat.S_ISGID:
            gid = above.st_gid
            mode |= stat.S_ISGID if is_directory else 0
        return Override(uid, gid, mode)

    def _write(self, dirfd: int, name: bytes, override: Override) -> None:
        self.setxattr(dirfd, name, self._attribute, encode(override), 0)
