"""Layers: the only module that hands a file name to the kernel.

A layer is a descriptor of its root, taken before anything is mounted, and everything in it is reached from there by relative steps that
follow no symlink. Where the process may (CAP_SYS_ADMIN), the descriptor is of a detached clone of the layer's mount: read-only and without
atime for a lower, so that nothing this process does can change it; without submounts, so that what they cover shows, as the kernel's own
overlay does it (clone_private_mount). `Layer` has no method that writes; `Upper`, in a module of its own, adds those.
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
from pyoverlay.core.calls import proc_path
from pyoverlay.core.policy import OVERFLOW, Whiteouts
from pyoverlay.core.reads import PlainReads, Reads
from pyoverlay.core.syscalls import Stat

log = logging.getLogger(__name__)

_OPEN_DIR = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_RESOLVE = syscalls.RESOLVE_BENEATH | syscalls.RESOLVE_NO_SYMLINKS | syscalls.RESOLVE_NO_MAGICLINKS
_PATH_MAX = 4096
CAPABILITY = b"security.capability"  # file capabilities, capabilities(7)
# Magic numbers of <linux/magic.h> and of the file systems' own sources.
_MEMORY = frozenset((0x01021994, 0x858458F6))  # tmpfs, ramfs
# What answers from this machine's disks and memory: ext, xfs, btrfs, f2fs, bcachefs, zfs, jfs, reiserfs, nilfs; the kernel's overlay, taken
# for that of a container; squashfs, erofs, cramfs, romfs, iso9660, udf, fat, exfat, ntfs3.
_LOCAL = _MEMORY | frozenset((
    0xEF53, 0x58465342, 0x9123683E, 0xF2F52010, 0xCA451A4E, 0x2FC12FC1, 0x3153464A, 0x52654973, 0x3434, 0x794C7630,
    0x73717368, 0xE0F5E1E2, 0x28CD3D45, 0x7275, 0x9660, 0x15013346, 0x4D44, 0x2011BAB0, 0x7366746E,
))  # fmt: skip


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
    `before_close` is told of each object before its number is free for another file. `closers`: descriptors whose closing may take its
    time, and who sees to it.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.before_close: Callable[[Held], None] | None = None
        self.closers: dict[int, Callable[[int], None]] = {}
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
            fd, held.fd = held.fd, -1
            del self._held[held]
            self.close_fd(fd)

    def close_fd(self, fd: int) -> None:
        """Close a descriptor of a layer, which need not be in the cache. Where close(2) fails it is closed all the same, and nobody is
        left whom the error would help: what had to be durable was synced.
        """
        try:
            (self.closers.pop(fd, os.close) if self.closers else os.close)(fd)
        except OSError as error:
            log.warning("a file of a layer was closed with an error: %s", error.strerror)

    def dup(self, fd: int) -> int:
        """A duplicate for `close_fd`."""
        copy = os.dup(fd)
        if fd in self.closers:
            self.closers[copy] = self.closers[fd]
        return copy

    @contextmanager
    def closed_on_failure(self, fd: int) -> Iterator[None]:
        """A descriptor that is not to be had after all."""
        is_kept = False
        try:
            yield
            is_kept = True
        finally:
            if not is_kept:
                self.close_fd(fd)

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

    def __init__(self, names: dict[bytes, int], whiteouts: frozenset[bytes], hides_all: bool) -> None:
        self.names = names  # with their formats, in the order of the disk: attributes are then read in about the order they lie in
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


def is_local(fd: int) -> bool:
    """Does the file system answer from this machine, so that a disk is the worst that there is to wait for?"""
    return syscalls.fstatfs_type(fd) in _LOCAL


class Layer:
    """One directory tree, read only by type: there is no method here that changes anything.

    root_fd: descriptor of its root; owned. index: its place, 0 for the upper, then the lowers from the top. fs: which file system it
    lies on, a small number. is_clone: root_fd is of a detached clone of the mount. is_memory: nothing on it ever waits for a disk.
    is_local: a disk is the worst that it waits for. is_remote: it may not answer (`remote`).
    is_nosuid, is_nodev: its mount gives set-id bits and capabilities, or device nodes, no effect.
    """

    is_remote = False

    def __init__(self, root_fd: int, index: int, fs: int, *, is_clone: bool, mark_prefix: bytes, cache: DescriptorCache) -> None:
        self.root_fd = root_fd
        self.index = index
        self.fs = fs
        self.is_clone = is_clone
        kind = syscalls.fstatfs_type(root_fd)
        self.is_memory, self.is_local = kind in _MEMORY, kind in _LOCAL
        flags = os.fstatvfs(root_fd).f_flag
        self.is_nosuid, self.is_nodev = bool(flags & os.ST_NOSUID), bool(flags & os.ST_NODEV)
        self.mark_prefix = mark_prefix
        self.cache = cache
        self.reads: Reads = PlainReads()
        self.override: bytes | None = None  # the attribute that has owner and mode, see `overrides`
        self._resolve = _RESOLVE if is_clone else _RESOLVE | syscalls.RESOLVE_NO_XDEV
        self._noatime = os.O_NOATIME  # reading leaves no trace, where we may say so: for the owner and CAP_FOWNER (open(2))

    def close(self) -> None:
        os.close(self.root_fd)

    # -- one name in one directory

    def stat(self, dirfd: int, name: bytes) -> Stat | None:
        """lstat of a name; None where there is none."""
        st = self.reads.lstat(dirfd, name)
        if st is None or self.override is None:
            return st
        return overrides.shown(st, self.override, proc_path(dirfd, name), follow_symlinks=False)

    def stat_all(self, dirfd: int, names: list[bytes]) -> Sequence[Stat | None]:
        """stat of each, in one call; None also for what only `stat` can tell of."""
        return self.reads.lstat_all(dirfd, names) if self.override is None else [None] * len(names)

    def fstat(self, fd: int) -> Stat:
        """fstat of a descriptor in this layer."""
        st = self.reads.fstat(fd)
        return st if self.override is None else overrides.shown(st, self.override, proc_path(fd, b""), follow_symlinks=True)

    def readlink(self, dirfd: int, name: bytes) -> bytes:
        """Target of a symlink; the empty name is the symlink that dirfd was opened on."""
        return self.reads.readlink(dirfd, name)

    def open_read(self, dirfd: int, name: bytes) -> int:
        """Descriptor of a regular file. ESTALE where it is no longer one: a fifo or a device in a layer is never opened."""
        try:
            return self.reads.open_regular(dirfd, name, os.O_RDONLY | self._noatime)
        except PermissionError as error:
            if error.errno != errno.EPERM or not self._noatime:  # EPERM is that of O_NOATIME, open(2)
                raise
            return self.reads.open_regular(dirfd, name, os.O_RDONLY)

    def knows_owner(self, dirfd: int, name: bytes, st: Stat) -> bool:
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
        return self.reads.getxattr(dirfd, name, attribute)

    def getxattr(self, dirfd: int, name: bytes, attribute: bytes) -> bytes | None:
        """As read_xattr, or None: there is none, or this kind of file or file system has no such thing."""
        return self.reads.find_xattr(dirfd, name, attribute)

    def listxattr(self, dirfd: int, name: bytes) -> list[bytes]:
        return self.reads.listxattr(dirfd, name)

    def statx(self, dirfd: int, name: bytes) -> syscalls.Statx:
        """statx(2) of a name; empty: of dirfd itself."""
        return syscalls.statx(dirfd, name)

    def statvfs(self, fd: int) -> os.statvfs_result:
        """statvfs(3) of the layer's file system, by any descriptor in it."""
        return os.statvfs(fd)

    def handle(self, dirfd: int, name: bytes) -> syscalls.FileHandle:
        """name_to_handle_at(2) of a name; empty: of dirfd itself."""
        return syscalls.name_to_handle_at(dirfd, name)

    def stat_by_handle(self, mount_fd: int, handle: syscalls.FileHandle) -> Stat | None:
        """What a file handle names on this layer's file system. None: it is gone (ESTALE), or we may not ask (CAP_DAC_READ_SEARCH)."""
        try:
            fd = syscalls.open_by_handle_at(mount_fd, handle, os.O_PATH)
        except OSError:
            return None
        try:
            return os.fstat(fd)
        finally:
            os.close(fd)

    def verity(self, fd: int) -> tuple[int, bytes] | None:
        """(algorithm, digest) of an open file; None where it has no fs-verity."""
        return syscalls.measure_verity(fd)

    def getmark(self, dirfd: int, name: bytes, mark: bytes) -> bytes | None:
        """One of the overlay's own marks, in this mount's spelling."""
        return self.getxattr(dirfd, name, self.mark_prefix + mark)

    def getmark_of(self, fd: int, mark: bytes) -> bytes | None:
        """The same of an open file, without the way there."""
        return self.reads.find_xattr_of(fd, self.mark_prefix + mark)

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
            return self.open_covered(self.dirfd(directory.parent), directory.name)

    def open_covered(self, dirfd: int, name: bytes) -> int:
        """O_PATH descriptor of a mount that may not be looked behind: the attributes are those of what is mounted, and it shows empty."""
        return os.open(name, _OPEN_DIR, dir_fd=dirfd)

    def scan(self, dirfd: int) -> dict[bytes, int]:
        """The names in a directory and their formats, see `Reads`."""
        try:
            return self.reads.scan(dirfd, self._noatime)
        except PermissionError as error:
            if error.errno != errno.EPERM or not self._noatime:  # EPERM is that of O_NOATIME, open(2)
                raise
            return self.reads.scan(dirfd, 0)


class Lower(Layer):
    """A lower: a Layer, and what a lower may spell differently from the upper."""

    def __init__(
        self, root_fd: int, index: int, fs: int, *, is_clone: bool, mark_prefix: bytes, cache: DescriptorCache, whiteouts: Whiteouts
    ) -> None:
        super().__init__(root_fd, index, fs, is_clone=is_clone, mark_prefix=mark_prefix, cache=cache)
        self.root = LowerDir(self, None, b"")
        self._reads_aufs = whiteouts is not Whiteouts.KERNEL

    def is_whiteout(self, directory: LowerDir, name: bytes, st: Stat) -> bool:
        if not marks.may_be_whiteout_file(st):
            return marks.is_whiteout_device(st)
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
        found = self.scan(dirfd)
        whiteouts: list[bytes] = []
        hides_all = False
        for name in self._possible_whiteouts(directory, found):
            st = self.stat(dirfd, name)
            if st is not None and not self.is_whiteout(directory, name, st):
                continue
            del found[name]
            if st is None:
                continue
            if name == marks.AUFS_OPAQUE and stat.S_ISREG(st.st_mode):
                hides_all = True
            elif self._reads_aufs and name.startswith(marks.AUFS_PREFIX) and stat.S_ISREG(st.st_mode):
                whiteouts.append(name[len(marks.AUFS_PREFIX) :])
            else:
                whiteouts.append(name)
        return Names(found, frozenset(whiteouts), hides_all)

    def _possible_whiteouts(self, directory: LowerDir, found: dict[bytes, int]) -> list[bytes]:
        """Those that are not plainly something else: no stat for the many that are."""
        formats = set(found.values())
        if stat.S_IFREG in formats and self._has_xattr_whiteouts(directory):
            return [name for name, form in found.items() if form in (0, stat.S_IFREG)]
        if self._reads_aufs:
            return [name for name, form in found.items() if not form or (form == stat.S_IFREG and name.startswith(marks.AUFS_PREFIX))]
        return [name for name, form in found.items() if not form] if 0 in formats else []


_NOTHING = Names({}, frozenset(), False)


def next_with(name: bytes, lowers: Sequence[LowerDir], index: int) -> int:
    """The first of these directories, from a place on, that has a name or has not been read yet; their number where none is left or one
    that has been read hides the name in the rest. A hundred layers of which one has the name cost less than one call of `shows` each.
    """
    for at in range(index, len(lowers)):
        contents = lowers[at].contents
        if contents is None or name in contents.names:
            return at
        if contents.hides_all or name in contents.whiteouts:
            break
    return len(lowers)


class Place(NamedTuple):
    """Where an object's metadata lies: a name in an open directory; the empty name is the object of dirfd itself, also a directory: to be
    reached as "." it would have to be open to its owner.
    """

    layer: Layer
    dirfd: int
    name: bytes


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


@contextmanager
def closed_on_failure(fd: int) -> Iterator[None]:
    """A descriptor that is not to be had after all."""
    try:
        yield
    except OSError:
        os.close(fd)
        raise
