"""The upper: the one layer that is changed, each time through its `Calls`, and the work directory that makes each change one step."""

from __future__ import annotations

import errno
import itertools
import logging
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager

from pyoverlay.core import marks, syscalls
from pyoverlay.core.calls import Calls, Order, remove_tree, sync_all
from pyoverlay.core.layer import DescriptorCache, Layer, tolerated
from pyoverlay.core.policy import Fsync
from pyoverlay.core.reads import reopen_regular
from pyoverlay.core.syscalls import Stat

log = logging.getLogger(__name__)

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
        self.obeys_modes = os.geteuid() != 0
        self._temporary = itertools.count(1)
        self.takes_devices = True
        self.reads_aufs = False  # `.wh.NAME` is a whiteout: an image's layer that an engine stored, mounted as an upper
        self.doubts_owners = False  # an id that shows as the overflow id may be unmapped
        self.squash: tuple[int | None, int | None] = (None, None)  # the owner that everything has in the view, if it is one
        self._cannot_clone_from: set[int] = set()  # layers, by index
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
        if self.fsync is Fsync.VOLATILE:
            return
        sync_all(self.calls, self.root_fd, self.work_fd)

    @property
    def order(self) -> Order:
        """What of a copy-up's data has to be on disk before its name."""
        if self.is_memory or self.fsync is Fsync.VOLATILE:
            return Order.NOTHING
        if self.fsync is Fsync.STRICT:
            return Order.ALL
        return Order.DATA if self.keeps_order else Order.DATA_AND_SIZE

    def may_clone_from(self, layer: Layer) -> bool:
        """Has FICLONE not been refused for files of this layer? Two file systems either share blocks or do not."""
        return layer.index not in self._cannot_clone_from

    def cannot_clone_from(self, layer: Layer) -> None:
        """It has been."""
        self._cannot_clone_from.add(layer.index)

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
            return self.reads.open_regular(dirfd, name, os.O_RDWR)
        except PermissionError:
            with self._open_to_owner(dirfd, name):
                return self.reads.open_regular(dirfd, name, os.O_RDWR)

    def open_append(self, dirfd: int, name: bytes) -> int:
        """Descriptor of a regular file of the upper that writes at its end alone. Without a name `dirfd` is what is kept of it."""
        flags = os.O_WRONLY | os.O_APPEND
        return self.reads.open_regular(dirfd, name, flags) if name else reopen_regular(dirfd, flags)

    def open_pinned(self, pin: int, flags: int) -> int:
        """Descriptor of a file that has no name any more, through the O_PATH descriptor kept for it; as `open_read`."""
        try:
            return reopen_regular(pin, flags)
        except PermissionError:
            with self._open_to_owner(pin, b""):
                return reopen_regular(pin, flags)

    def read_xattr(self, dirfd: int, name: bytes, attribute: bytes) -> bytes:
        """As of any layer. `user.` attributes, and with them an ordinary user's marks, cannot be read where the mode refuses reading."""
        try:
            return super().read_xattr(dirfd, name, attribute)
        except PermissionError:
            with self._open_to_owner(dirfd, name):
                return super().read_xattr(dirfd, name, attribute)

    def getxattr(self, dirfd: int, name: bytes, attribute: bytes) -> bytes | None:
        """As of any layer; as `read_xattr` where the mode refuses it."""
        try:
            return super().getxattr(dirfd, name, attribute)
        except PermissionError:
            with self._open_to_owner(dirfd, name):
                return super().getxattr(dirfd, name, attribute)

    def getmark_of(self, fd: int, mark: bytes) -> bytes | None:
        """As of any layer; as `read_xattr` where the mode refuses it."""
        try:
            return super().getmark_of(fd, mark)
        except PermissionError:
            with self._open_to_owner(fd, b""):
                return super().getmark_of(fd, mark)

    def scan(self, dirfd: int) -> dict[bytes, int]:
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

    def is_append_only(self, dirfd: int) -> bool:
        """May entries be put into a directory, and none be taken out (chattr +a)?"""
        return bool(syscalls.statx(dirfd).attributes & syscalls.STATX_ATTR_APPEND)

    # -- building things out of sight

    def temporary(self) -> bytes:
        """A name in the work directory that nobody has, spelled as the kernel spells its own (ovl_tempname), which clears them too."""
        return b"#%x" % next(self._temporary)

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

    def is_whiteout(self, dirfd: int, name: bytes, st: Stat, *, has_xattr_whiteouts: bool) -> bool:
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
        if not self.reads_aufs:
            return False
        directory = self.open_dir(dirfd, name)  # a symlink in its place would lead a path through it elsewhere
        try:
            st = self.stat(directory, marks.AUFS_OPAQUE)
        finally:
            os.close(directory)
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

    def set_origin(self, dirfd: int, name: bytes, origin: marks.Origin, *, is_indexed: bool = False) -> None:
        """Where it came from. Not worth failing for: without it an inode number changes at the next mount (ovl_set_origin). But it is what
        an index knows its entries by.
        """
        try:
            self.set_mark(dirfd, name, marks.ORIGIN, marks.encode_origin(origin))
        except OSError as error:
            # user.* on a symlink or a device; or the file's own attributes take all the room that it has for them
            if is_indexed or error.errno not in (errno.EOPNOTSUPP, errno.EPERM, errno.ENOSPC):
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
