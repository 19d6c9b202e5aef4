"""Layers: the only module that hands a file name to the kernel.

A layer is a descriptor of its root, taken before anything is mounted, and everything in it is reached from there by relative steps that
follow no symlink. Where the process may (CAP_SYS_ADMIN), the descriptor is of a detached clone of the layer's mount: read-only and without
atime for a lower, so that nothing this process does can change it; without submounts, so that what they cover shows, as the kernel's own
overlay does it (clone_private_mount). `Layer` has no method that writes. `Upper` adds those, and makes each through its `Calls`.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from pyoverlay.core import marks, overrides, syscalls
from pyoverlay.core.calls import Calls, proc_path, remove_tree
from pyoverlay.core.policy import OVERFLOW, Fsync, Whiteouts

log = logging.getLogger(__name__)

_OPEN_DIR = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_RESOLVE = syscalls.RESOLVE_BENEATH | syscalls.RESOLVE_NO_SYMLINKS | syscalls.RESOLVE_NO_MAGICLINKS
_PATH_MAX = 4096
CAPABILITY = b"security.capability"  # file capabilities, capabilities(7)
_MEMORY_FILESYSTEMS = (0x01021994, 0x858458F6)  # TMPFS_MAGIC, RAMFS_MAGIC of <linux/magic.h>


class Held:
    """An object whose descriptor is cached: closed when there are too many, and opened again when it is needed."""

    __slots__ = ("fd", "is_recent", "pins")

    def __init__(self) -> None:
        self.fd = -1
        self.is_recent = False
        self.pins = 0  # users that keep the number across an await


class DescriptorCache:
    """The open descriptors of Held objects, at most about `limit` of them.

    Opening one never closes another: a caller may hold two numbers at once. `trim` does, and is called between operations.
    `before_close` is told of each object before its number is free for another file.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.before_close: Callable[[Held], None] | None = None
        self._held: dict[Held, None] = {}

    def __len__(self) -> int:
        return len(self._held)

    def put(self, held: Held, fd: int) -> int:
        held.fd = fd
        held.is_recent = True
        self._held[held] = None
        return fd

    def close(self, held: Held) -> None:
        if held.fd >= 0:
            if self.before_close is not None:
                self.before_close(held)
            os.close(held.fd)
            held.fd = -1
            del self._held[held]

    def trim(self) -> None:
        """Close what was used least recently (second chance) until the limit holds."""
        for _ in range(2 * len(self._held)):
            if len(self._held) <= self.limit:
                return
            held = next(iter(self._held))
            if held.is_recent or held.pins:
                held.is_recent = False
                del self._held[held]
                self._held[held] = None
            else:
                self.close(held)

    def close_all(self) -> None:
        for held in list(self._held):
            self.close(held)


class Names:
    """What one directory of a lower holds: its names, and which names it hides in the layers below."""

    __slots__ = ("hides_all", "names", "whiteouts")

    def __init__(self, names: dict[bytes, None], whiteouts: frozenset[bytes], hides_all: bool) -> None:
        self.names = names  # in the order of the disk: attributes are then read in about the order they lie in
        self.whiteouts = whiteouts
        self.hides_all = hides_all  # an aufs `.wh..wh..opq`; the kernel's mark is not looked for here


class LowerDir(Held):
    """A directory of a lower. Its place never changes while we are mounted, so it is known by that: parent and name.

    is_masked: it is our own upper or work directory, seen through a lower that contains it; it shows empty.
    """

    __slots__ = ("contents", "has_xattr_whiteouts", "is_masked", "layer", "name", "parent")

    def __init__(self, layer: Lower, parent: LowerDir | None, name: bytes, is_masked: bool = False) -> None:
        super().__init__()
        self.layer = layer
        self.parent = parent
        self.name = name
        self.is_masked = is_masked
        self.contents: Names | None = None
        self.has_xattr_whiteouts: bool | None = None


def open_below(fd: int, names: Sequence[bytes], resolve: int) -> int:
    """O_PATH descriptor of the directory reached from `fd` by these names, however deep: a path longer than PATH_MAX is walked in
    pieces.
    """
    here, piece, length = fd, list[bytes](), 0
    try:
        for name in itertools.chain(names, (None,)):
            if name is not None and length + len(name) + 1 < _PATH_MAX:
                piece.append(name)
                length += len(name) + 1
                continue
            below = syscalls.openat2(here, b"/".join(piece), _OPEN_DIR, resolve)
            if here != fd:
                os.close(here)
            here, piece = below, [name] if name is not None else []
            length = sum(len(name) + 1 for name in piece)
    except OSError:
        if here != fd:
            os.close(here)
        raise
    return here


class Layer:
    """One directory tree, read only by type: there is no method here that changes anything.

    root_fd: descriptor of its root; owned. index: its place, 0 for the upper, then the lowers from the top. fs: which file system it
    lies on, a small number. is_clone: root_fd is of a detached clone of the mount. is_memory: nothing on it ever waits for a disk.
    is_nosuid, is_nodev: its mount gives set-id bits and capabilities, or device nodes, no effect.
    """

    def __init__(self, root_fd: int, index: int, fs: int, *, is_clone: bool, mark_prefix: bytes, cache: DescriptorCache) -> None:
        self.root_fd = root_fd
        self.index = index
        self.fs = fs
        self.is_clone = is_clone
        self.is_memory = syscalls.fstatfs_type(root_fd) in _MEMORY_FILESYSTEMS
        flags = os.fstatvfs(root_fd).f_flag
        self.is_nosuid, self.is_nodev = bool(flags & os.ST_NOSUID), bool(flags & os.ST_NODEV)
        self.mark_prefix = mark_prefix
        self.cache = cache
        self.override: bytes | None = None  # the attribute that has owner and mode, see `overrides`
        self._resolve = _RESOLVE if is_clone else _RESOLVE | syscalls.RESOLVE_NO_XDEV
        self._noatime = os.O_NOATIME

    def close(self) -> None:
        os.close(self.root_fd)

    # -- one name in one directory

    def stat(self, dirfd: int, name: bytes) -> os.stat_result | None:
        """lstat of a name; None where there is none. A name too long for this file system is not there (ovl_lookup_single)."""
        try:
            st = os.stat(name, dir_fd=dirfd, follow_symlinks=False)
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                return None
            raise
        return st if self.override is None else overrides.shown(st, self.override, proc_path(dirfd, name), follow_symlinks=False)

    def fstat(self, fd: int) -> os.stat_result:
        """fstat of a descriptor in this layer."""
        st = os.fstat(fd)
        return st if self.override is None else overrides.shown(st, self.override, proc_path(fd, b""), follow_symlinks=True)

    def readlink(self, dirfd: int, name: bytes) -> bytes:
        """Target of a symlink; the empty name is the symlink that dirfd was opened on."""
        return os.readlink(name, dir_fd=dirfd)

    def open_read(self, dirfd: int, name: bytes) -> int:
        """Descriptor of a regular file. ESTALE where it is no longer one: a fifo or a device in a layer is never opened."""
        fd = self._open_noatime(dirfd, name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        return _require_regular(fd)

    def _open_noatime(self, dirfd: int, name: bytes, flags: int) -> int:
        """Reading leaves no trace, where we may say so: O_NOATIME is for the owner and for CAP_FOWNER (open(2))."""
        try:
            return os.open(name, flags | self._noatime, dir_fd=dirfd)
        except PermissionError:
            if not self._noatime:
                raise
            return os.open(name, flags, dir_fd=dirfd)

    def knows_owner(self, dirfd: int, name: bytes, st: os.stat_result) -> bool:
        """Is the overflow id, if an object shows it, surely its owner's or group's? For a user namespace in which this id is somebody's.

        The kernel does not say. But it does not let our capabilities count for an object whose owner or group it cannot map
        (capable_wrt_inode_uidgid), so that a right which only they can give is there or not; where the mode gives it, nothing is known.
        To whom a symlink belongs does not matter.
        """
        if OVERFLOW not in (st.st_uid, st.st_gid) or stat.S_ISLNK(st.st_mode):
            return True
        given = stat.S_IWGRP | stat.S_IWOTH | (stat.S_IWUSR if st.st_uid == os.geteuid() else 0)
        if st.st_mode & given:
            return False
        try:
            syscalls.faccessat2(dirfd, name, os.W_OK)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            return error.errno == errno.EROFS  # the right is there, on a layer that is mounted read-only
        return True

    def read_xattr(self, dirfd: int, name: bytes, attribute: bytes) -> bytes:
        """getxattr(2) of a name; empty: of dirfd itself."""
        return os.getxattr(proc_path(dirfd, name), attribute, follow_symlinks=not name)

    def getxattr(self, dirfd: int, name: bytes, attribute: bytes) -> bytes | None:
        """As read_xattr, or None: there is none, or this kind of file or file system has no such thing."""
        try:
            return self.read_xattr(dirfd, name, attribute)
        except OSError as error:
            if error.errno in (errno.ENODATA, errno.EOPNOTSUPP):
                return None
            raise

    def listxattr(self, dirfd: int, name: bytes) -> list[bytes]:
        try:
            return [os.fsencode(attribute) for attribute in os.listxattr(proc_path(dirfd, name), follow_symlinks=not name)]
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP:
                return []
            raise

    def getmark(self, dirfd: int, name: bytes, mark: bytes) -> bytes | None:
        """One of the overlay's own marks, in this mount's spelling."""
        return self.getxattr(dirfd, name, self.mark_prefix + mark)

    def getmark_of(self, fd: int, mark: bytes) -> bytes | None:
        """The same of an open file, without the way through /proc, which takes three times as long."""
        try:
            return os.getxattr(fd, self.mark_prefix + mark)
        except OSError as error:
            if error.errno in (errno.ENODATA, errno.EOPNOTSUPP):
                return None
            raise

    def listmarks(self, dirfd: int, name: bytes) -> frozenset[bytes]:
        """Which marks a name bears. One system call where most names bear none."""
        prefix = self.mark_prefix
        found = self.listxattr(dirfd, name)
        return frozenset(attribute[len(prefix) :] for attribute in found if attribute.startswith(prefix)) if found else frozenset()

    # -- directories

    def open_dir(self, dirfd: int, name: bytes) -> int:
        """O_PATH descriptor of a directory. EXDEV: it is a mount point, in a layer that is no clone."""
        if self.is_clone:
            return os.open(name, _OPEN_DIR, dir_fd=dirfd)
        return syscalls.openat2(dirfd, name, _OPEN_DIR, self._resolve)

    def open_descendant(self, start: int, names: Sequence[bytes]) -> int:
        """O_PATH descriptor of a directory some steps below an open one."""
        return self.open_dir(start, names[0]) if len(names) == 1 else open_below(start, names, self._resolve)

    def dirfd(self, directory: LowerDir) -> int:
        """Descriptor of a directory of this layer, from the cache or opened anew from the nearest open ancestor."""
        if directory.fd >= 0:
            directory.is_recent = True
            return directory.fd
        names: list[bytes] = []
        above: LowerDir = directory
        while above.parent is not None and above.fd < 0:
            names.append(above.name)
            above = above.parent
        if not names:
            return self.root_fd
        start = above.fd if above.fd >= 0 else self.root_fd
        return self.cache.put(directory, self._open_own(directory, start, names[::-1]))

    def _open_own(self, directory: LowerDir, start: int, names: Sequence[bytes]) -> int:
        try:
            return self.open_descendant(start, names)
        except OSError as error:
            if error.errno != errno.EXDEV or not directory.is_masked or directory.parent is None:
                raise
            # A mount that may not be looked behind: the attributes are those of what is mounted, and it shows empty.
            return os.open(directory.name, _OPEN_DIR, dir_fd=self.dirfd(directory.parent))

    def scan(self, dirfd: int) -> list[os.DirEntry[str]]:
        """The entries of a directory, without "." and ".."."""
        fd = self._open_noatime(dirfd, b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with os.scandir(fd) as entries:
                return list(entries)
        finally:
            os.close(fd)


class Lower(Layer):
    """A lower: a Layer, and what a lower may spell differently from the upper."""

    def __init__(
        self, root_fd: int, index: int, fs: int, *, is_clone: bool, mark_prefix: bytes, cache: DescriptorCache, whiteouts: Whiteouts
    ) -> None:
        super().__init__(root_fd, index, fs, is_clone=is_clone, mark_prefix=mark_prefix, cache=cache)
        self.root = LowerDir(self, None, b"")
        self._reads_aufs = whiteouts is not Whiteouts.KERNEL

    def is_whiteout(self, directory: LowerDir, name: bytes, st: os.stat_result) -> bool:
        if marks.is_whiteout_device(st):
            return True
        if not marks.may_be_whiteout_file(st):
            return False
        if self._reads_aufs and name.startswith(marks.AUFS_PREFIX):
            return True
        return self._has_xattr_whiteouts(directory) and self.getmark(self.dirfd(directory), name, marks.WHITEOUT) is not None

    def _has_xattr_whiteouts(self, directory: LowerDir) -> bool:
        if directory.has_xattr_whiteouts is None:
            directory.has_xattr_whiteouts = self.getmark(self.dirfd(directory), b".", marks.OPAQUE) == b"x"
        return directory.has_xattr_whiteouts

    def shows(self, directory: LowerDir, name: bytes) -> tuple[bool, bool]:
        """Of one name: (is it there, is what the layers below have under it hidden by this directory's whiteouts)."""
        try:
            contents = self.contents(directory)
        except PermissionError:
            return self._shows_unlisted(directory, name)
        is_there = name in contents.names
        return is_there, contents.hides_all or (not is_there and name in contents.whiteouts)

    def _shows_unlisted(self, directory: LowerDir, name: bytes) -> tuple[bool, bool]:
        """As shows, of a directory that an ordinary user may search and not list."""
        dirfd = self.dirfd(directory)
        st = self.stat(dirfd, name)
        if st is not None:
            is_whiteout = self.is_whiteout(directory, name, st)
            return not is_whiteout, is_whiteout or self._is_aufs(directory, marks.AUFS_OPAQUE)
        return False, self._is_aufs(directory, marks.AUFS_PREFIX + name) or self._is_aufs(directory, marks.AUFS_OPAQUE)

    def _is_aufs(self, directory: LowerDir, name: bytes) -> bool:
        st = self.stat(self.dirfd(directory), name) if self._reads_aufs else None
        return st is not None and self.is_whiteout(directory, name, st)

    def contents(self, directory: LowerDir) -> Names:
        """As `read`, but kept: a lower does not change."""
        if directory.contents is None:
            directory.contents = self.read(directory)
        return directory.contents

    def read(self, directory: LowerDir) -> Names:
        """The names of a directory, whiteouts apart."""
        if directory.is_masked:
            return _NOTHING
        dirfd = self.dirfd(directory)
        names: list[bytes] = []
        whiteouts: list[bytes] = []
        hides_all = False
        for entry in self.scan(dirfd):
            name = os.fsencode(entry.name)
            if self._cannot_be_whiteout(directory, entry, name):
                names.append(name)
                continue
            st = self.stat(dirfd, name)
            if st is None:
                continue
            if not self.is_whiteout(directory, name, st):
                names.append(name)
            elif name == marks.AUFS_OPAQUE and stat.S_ISREG(st.st_mode):
                hides_all = True
            elif self._reads_aufs and name.startswith(marks.AUFS_PREFIX) and stat.S_ISREG(st.st_mode):
                whiteouts.append(name[len(marks.AUFS_PREFIX) :])
            else:
                whiteouts.append(name)
        return Names(dict.fromkeys(names), frozenset(whiteouts), hides_all)

    def _cannot_be_whiteout(self, directory: LowerDir, entry: os.DirEntry[str], name: bytes) -> bool:
        """By its type alone: no stat for the many entries that are plainly something else."""
        if entry.is_dir(follow_symlinks=False) or entry.is_symlink():
            return True
        if not entry.is_file(follow_symlinks=False):
            return False
        return not (self._reads_aufs and name.startswith(marks.AUFS_PREFIX)) and not self._has_xattr_whiteouts(directory)


_NOTHING = Names({}, frozenset(), False)


class Place(NamedTuple):
    """Where an object's metadata lies: a name in an open directory; the empty name is the object of dirfd itself, also a directory: to be
    reached as "." it would have to be open to its owner.
    """

    layer: Layer
    dirfd: int
    name: bytes


class Upper(Layer):
    """The upper: a Layer that can also be changed, with the work directory that makes each change one step.

    work_fd: the directory for things half made, on the same mount, so that one rename publishes them. is_dirty: something was changed since
    the last sync.
    """

    def __init__(
        self, root_fd: int, work_fd: int, fs: int, *, is_clone: bool, mark_prefix: bytes, cache: DescriptorCache, fsync: Fsync, calls: Calls
    ) -> None:
        super().__init__(root_fd, 0, fs, is_clone=is_clone, mark_prefix=mark_prefix, cache=cache)
        self.work_fd = work_fd
        self.fsync = fsync
        self.calls = calls
        self.is_dirty = False
        self.keeps_order = False  # its journal keeps a rename behind the extents written before it
        self._noatime = 0  # what lies in the upper belongs to the merged view: its atime moves as on any file system
        self._ids = (os.geteuid(), os.getegid())
        self.obeys_modes = os.geteuid() != 0
        self._temporary = itertools.count(1)
        self.takes_devices = True
        self.reads_aufs = False  # `.wh.NAME` is a whiteout: an image's layer that an engine stored, mounted as an upper
        self.doubts_owners = False  # an id that shows as the overflow id may be unmapped
        self.squash: tuple[int | None, int | None] = (None, None)  # the owner that everything has in the view, if it is one
        self._spare: bytes | None = None
        self._litter: list[bytes] = []  # what could not be discarded

    def close(self) -> None:
        left, self._litter = self._litter, []
        for name in (*left, *([self._spare] if self._spare is not None else [])):
            self.discard(name)
        super().close()
        os.close(self.work_fd)

    def sync(self) -> None:
        """Everything on disk, unless the mount is volatile."""
        self.is_dirty = False
        if self.fsync is not Fsync.VOLATILE:
            self.calls.syncfs(self.root_fd)

    def open_read(self, dirfd: int, name: bytes) -> int:
        """As of any layer. What the mode refuses its owner is opened all the same: the kernel has let the caller open it, before a chmod
        or while making it so (git's objects are made with mode 0444), and our descriptor has been closed since for want of room.
        """
        try:
            return super().open_read(dirfd, name)
        except PermissionError:
            with self._open_to_owner(dirfd, name):
                return super().open_read(dirfd, name)

    def open_write(self, dirfd: int, name: bytes) -> int:
        """Read-write descriptor of a regular file of the upper; as `open_read` where the mode refuses it."""
        try:
            return self._open_write(dirfd, name)
        except PermissionError:
            with self._open_to_owner(dirfd, name):
                return self._open_write(dirfd, name)

    def _open_write(self, dirfd: int, name: bytes) -> int:
        return _require_regular(os.open(name, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=dirfd))

    def open_pinned(self, pin: int, flags: int) -> int:
        """Descriptor of a file that has no name any more, through the O_PATH descriptor kept for it; as `open_read`."""
        try:
            return os.open(proc_path(pin, b""), flags | os.O_CLOEXEC)
        except PermissionError:
            with self._open_to_owner(pin, b""):
                return os.open(proc_path(pin, b""), flags | os.O_CLOEXEC)

    def read_xattr(self, dirfd: int, name: bytes, attribute: bytes) -> bytes:
        """As of any layer. `user.` attributes, and with them an ordinary user's marks, cannot be read where the mode refuses reading."""
        try:
            return super().read_xattr(dirfd, name, attribute)
        except PermissionError:
            with self._open_to_owner(dirfd, name):
                return super().read_xattr(dirfd, name, attribute)

    def getmark_of(self, fd: int, mark: bytes) -> bytes | None:
        """As of any layer; as `read_xattr` where the mode refuses it."""
        try:
            return super().getmark_of(fd, mark)
        except PermissionError:
            with self._open_to_owner(fd, b""):
                return super().getmark_of(fd, mark)

    def scan(self, dirfd: int) -> list[os.DirEntry[str]]:
        """As of any layer, of a directory closed to its owner too: rmdir(2), which asks whether it is empty, needs no right to read it."""
        try:
            return super().scan(dirfd)
        except PermissionError:
            with self._open_to_owner(dirfd, b""):
                return super().scan(dirfd)

    def move(self, dirfd: int, name: bytes, new_dirfd: int, new: bytes, flags: int = 0) -> None:
        """rename of a directory to or from the work directory. Its parent is written into it (vfs_rename), which its mode may deny to a
        daemon that is its owner and no more.
        """
        try:
            self.calls.rename(dirfd, name, new_dirfd, new, flags)
        except PermissionError as error:
            if error.errno != errno.EACCES:
                raise
            moved = self.pin(dirfd, name)
            try:
                with self._open_to_owner(moved, b""):
                    self.calls.rename(dirfd, name, new_dirfd, new, flags)
            finally:
                os.close(moved)

    @contextmanager
    def _open_to_owner(self, dirfd: int, name: bytes) -> Iterator[None]:
        """Inside, the owner may do everything: for a daemon that is this owner and no more. EPERM, EACCES: it is somebody else's."""
        st = os.stat(name, dir_fd=dirfd, follow_symlinks=False) if name else os.fstat(dirfd)
        mode = stat.S_IMODE(st.st_mode)
        self.calls.let_us_in(dirfd, name, mode | stat.S_IRUSR | stat.S_IWUSR | (stat.S_IXUSR if stat.S_ISDIR(st.st_mode) else 0))
        try:
            yield
        finally:
            self.calls.let_us_in(dirfd, name, mode)

    @contextmanager
    def as_writable(self, dirfd: int) -> Iterator[None]:
        """Inside, a directory may be changed whatever its mode: what a copy-up does there is none of the things that a mode forbids."""
        mode = stat.S_IMODE(os.fstat(dirfd).st_mode) if self.obeys_modes else 0o300
        if mode & 0o300 == 0o300:
            yield
            return
        self.calls.chmod(dirfd, b"", mode | 0o300)
        try:
            yield
        finally:
            self.calls.chmod(dirfd, b"", mode)

    def pin(self, dirfd: int, name: bytes) -> int:
        """O_PATH descriptor: its inode number cannot be given to another file while this is open."""
        return os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dirfd)

    # -- building things out of sight

    def temporary(self) -> bytes:
        """A name in the work directory that nobody has, spelled as the kernel spells its own (ovl_tempname), which clears them too."""
        return b"#%x" % next(self._temporary)

    @contextmanager
    def as_caller(self, uid: int, gid: int, umask: int) -> Iterator[None]:
        """What is made inside belongs to the caller from its first moment, and the caller's umask applies unless a default ACL does."""
        if isinstance(self.calls, overrides.OverridingCalls):
            with self.calls.made_for(uid, gid, umask):
                yield
            return
        old = os.umask(umask)
        try:
            if (uid, gid) == self._ids:
                yield
                return
            try:
                syscalls.setfsids(uid, gid)
                yield
            finally:
                syscalls.setfsids(*self._ids)
        finally:
            os.umask(old)

    # -- marks and whiteouts

    def set_mark(self, dirfd: int, name: bytes, mark: bytes, value: bytes) -> None:
        self.is_dirty = True
        try:
            self.calls.setxattr(dirfd, name, self.mark_prefix + mark, value, 0)
        except PermissionError as error:
            if error.errno != errno.EACCES:  # EPERM: this kind of object takes no such mark
                raise
            with self._open_to_owner(dirfd, name):
                self.calls.setxattr(dirfd, name, self.mark_prefix + mark, value, 0)

    def is_whiteout(self, dirfd: int, name: bytes, st: os.stat_result, *, has_xattr_whiteouts: bool) -> bool:
        if marks.is_whiteout_device(st):
            return True
        if not marks.may_be_whiteout_file(st):
            return False
        if self.reads_aufs and name.startswith(marks.AUFS_PREFIX):
            return True
        return has_xattr_whiteouts and self.getmark(dirfd, name, marks.WHITEOUT) is not None

    def has_aufs_whiteout(self, dirfd: int, name: bytes) -> bool:
        """Does `.wh.NAME` hide this name?"""
        if not self.reads_aufs:
            return False
        st = self.stat(dirfd, marks.AUFS_PREFIX + name)
        return st is not None and marks.may_be_whiteout_file(st)

    def is_aufs_opaque(self, dirfd: int, name: bytes) -> bool:
        """Does a directory hide all below it by `.wh..wh..opq` in it?"""
        st = self.stat(dirfd, name + b"/" + marks.AUFS_OPAQUE) if self.reads_aufs else None
        return st is not None and marks.may_be_whiteout_file(st)

    def whiteout(self) -> bytes:
        """The name, in the work directory, of a whiteout ready to be renamed to its place."""
        name = self.temporary()
        self.link_whiteout(self.work_fd, name)
        return name

    def link_whiteout(self, dirfd: int, name: bytes) -> None:
        """Put a whiteout where the upper has nothing: one call, once there is one to link."""
        self.is_dirty = True
        if self._spare is not None:
            try:
                self.calls.link(self.work_fd, self._spare, dirfd, name)
                return
            except OSError as error:
                if error.errno not in (errno.EMLINK, errno.ENOENT):  # ext4 allows 65,000 links
                    raise
            self.discard(self._spare)
            self._spare = None
        self.calls.link(self.work_fd, self._make_spare(), dirfd, name)

    def _make_spare(self) -> bytes:
        """The whiteout that all others are links of."""
        spare = self.temporary()
        if self.takes_devices:
            try:
                self.calls.mknod(spare, stat.S_IFCHR, 0, self.work_fd)
            except PermissionError:
                # The upper is itself an overlay: the kernel's and ours both refuse the device 0/0 to everybody.
                log.warning("the upper's file system refuses whiteout devices: whiteouts are marked files, in directories marked opaque=x")
                self.takes_devices = False
        if not self.takes_devices:
            os.close(self.calls.open(spare, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600, self.work_fd))
            self.set_mark(self.work_fd, spare, marks.WHITEOUT, b"y")
        self._spare = spare
        return spare

    def can_make_devices(self) -> bool:
        """Is a whiteout a device here? Found out by making the first one."""
        if self._spare is None:
            self._make_spare()
        return self.takes_devices

    def set_origin(self, dirfd: int, name: bytes, origin: marks.Origin) -> None:
        """Where it came from. Not worth failing for: without it an inode number changes at the next mount (ovl_set_origin)."""
        try:
            self.set_mark(dirfd, name, marks.ORIGIN, marks.encode_origin(origin))
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EPERM):  # user.* on a symlink or a device
                raise

    def discard_at(self, dirfd: int, name: bytes) -> None:
        """As discard, of a name in the index."""
        with tolerated("an entry of the index stays until the next mount"):
            remove_tree(self.calls, dirfd, name)

    def discard(self, name: bytes) -> None:
        """Remove what there is under a name of the work directory, a directory with all it holds. What made it litter is done or has its
        own error to tell, so this raises nothing: what cannot be removed now is tried again with later ones, and by the next mount.
        """
        self._litter.append(name)
        for litter in {name, self._litter[0]}:
            if self._is_removed(litter):
                self._litter.remove(litter)

    def _is_removed(self, name: bytes) -> bool:
        try:
            remove_tree(self.calls, self.work_fd, name)
        except FileNotFoundError:
            return True
        except OSError as error:
            log.warning("something stays in the work directory for now: %s", error.strerror)
            return False
        return True


@contextmanager
def tolerated(consequence: str) -> Iterator[None]:
    """What fails inside is not worth failing for; the log says what follows from it."""
    try:
        yield
    except FileNotFoundError:
        return
    except OSError as error:
        log.warning("%s: %s", consequence, error.strerror)


def readable_dir(dirfd: int) -> int:
    """A descriptor that reads, for the calls that refuse O_PATH."""
    return os.open(b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=dirfd)


def _require_regular(fd: int) -> int:
    with closed_on_failure(fd):
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
    return fd


@contextmanager
def closed_on_failure(fd: int) -> Iterator[None]:
    """A descriptor that is not to be had after all."""
    try:
        yield
    except OSError:
        os.close(fd)
        raise
