"""The objects of the merged view: which one bears which number, where it lies, what it says of itself. Nothing here changes a layer."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from functools import cached_property

from pyoverlay.core import marks
from pyoverlay.core.index import Index
from pyoverlay.core.inode import ROOT_INO, Directory, Inode, InodeTable
from pyoverlay.core.layer import DescriptorCache, Layer, Lower, Place
from pyoverlay.core.merge import Merge
from pyoverlay.core.metacopy import DataFiles
from pyoverlay.core.origins import Origins
from pyoverlay.core.overrides import is_private
from pyoverlay.core.owners import ACLS, Owners
from pyoverlay.core.policy import Policy, Uuid
from pyoverlay.core.reads import Reads
from pyoverlay.core.remote import MustAsk, RemoteLower
from pyoverlay.core.syscalls import Stat
from pyoverlay.core.upper import Upper


def failure(code: int) -> OSError:
    """An OSError of that errno."""
    return OSError(code, os.strerror(code))


class Objects:
    """The layers and what was found in them.

    lowers: from the top. data_layers: those below them, of which nothing shows but the data of metacopy files. upper: None in a read-only
    mount. masked: (st_dev, st_ino) of the directories that show empty inside a lower: our own upper and work directory. The layers and the
    cache are owned: `close` closes them.
    """

    def __init__(
        self,
        lowers: tuple[Lower, ...],
        upper: Upper | None,
        policy: Policy,
        cache: DescriptorCache,
        masked: frozenset[tuple[int, int]],
        data_layers: tuple[Lower, ...] = (),
    ) -> None:
        self.lowers = lowers
        self.data_files = DataFiles(data_layers, policy.verity)
        self.policy = policy
        self.owners = Owners(policy)
        self.cache = cache
        self.pin_limit = cache.limit // 2
        self.table = InodeTable()
        # Told of each descriptor of an inode that appears or starts to write, and when the links change that such an inode shows.
        self.after_open: Callable[[Inode], None] | None = None
        self.inode_limit = 0
        self.when_crowded: Callable[[], None] | None = None  # told between operations, while there are more inodes than that
        self.before_drop: Callable[[Inode], None] | None = None  # told of each inode that goes: its number may then be another's
        self._upper = upper
        self._reported: set[bytes] = set()
        self.index: Index | None = None
        self.remotes = tuple(lower for lower in (*lowers, *data_layers) if isinstance(lower, RemoteLower))
        roots = tuple(lower.root for lower in lowers)
        follows = policy.redirect_dir.is_followed and not policy.userxattr
        self._merge = Merge(roots, has_data_layers=bool(data_layers), follows=follows, masked=masked)
        self.name_max = max(os.statvfs(layer.root_fd).f_namemax for layer in (*lowers, *([upper] if upper is not None else [])))
        self.root = Directory(ROOT_INO, roots)
        self.root.in_upper = upper is not None
        self.root.has_xattr_whiteouts = upper is not None and upper.getmark(upper.root_fd, b".", marks.OPAQUE) == b"x"
        self.root.nlookup = 1
        self.table.add(self.root)
        self.origins = Origins(lowers, with_uuid=policy.uuid is not Uuid.OFF)  # opens something, so nothing after it may fail

    @cached_property
    def upper(self) -> Upper:
        """The upper. EROFS without one: every change begins by asking for it."""
        if self._upper is None:
            raise failure(errno.EROFS)
        return self._upper

    @property
    def is_dirty(self) -> bool:
        """Something was changed since the last sync."""
        return self._upper is not None and self._upper.is_dirty

    def sync(self) -> None:
        """Make all changes durable. Raises what syncfs(2) raises, which includes the first write error since the last sync."""
        if self._upper is not None:
            self._upper.sync()

    def close(self) -> None:
        """Let go of every layer, so that their file systems can be unmounted."""
        for inode in self.table.by_ino.values():
            self.table.unpin(inode)
            if inode.kept_name:
                self.upper.discard(inode.kept_name)
        self.cache.close_all()
        if self.index is not None:
            self.index.close()
        self.origins.close()
        self.data_files.close()
        for layer in (*self.lowers, *([self._upper] if self._upper is not None else [])):
            layer.close()

    def read_by(self, reads: Reads) -> None:
        """Have every layer read by these calls, but for remote ones: a call that a server does not answer must not hold up Python."""
        for layer in (*self.lowers, *self.data_files.layers, *([self._upper] if self._upper is not None else [])):
            if not layer.is_remote:
                layer.reads = reads

    def trim(self) -> None:
        """Close what the descriptor limit does not allow. Between operations only."""
        if len(self.cache) > self.cache.limit:
            self.cache.trim()
        if self.when_crowded is not None and len(self.table) > self.inode_limit:
            self.when_crowded()

    # -- identity

    def inode(self, ino: int) -> Inode:
        """The inode that the kernel calls by this number. ESTALE: it has forgotten it itself."""
        inode = self.table.by_ino.get(ino)
        if inode is None:
            raise failure(errno.ESTALE)
        return inode

    def directory(self, ino: int) -> Directory:
        inode = self.inode(ino)
        if not isinstance(inode, Directory):
            raise failure(errno.ENOTDIR)
        return inode

    def forget(self, ino: int, nlookup: int) -> None:
        """The kernel drops this many references."""
        inode = self.table.by_ino.get(ino)
        if inode is not None:
            inode.nlookup -= nlookup
            self.release(inode)

    def release(self, inode: Inode) -> None:
        """Drop an inode that nobody needs any more, and then the directories that were kept for it.

        A copied-up file of which the lower has more names stays, if it is not in the index: they must lead to the copy for as long as we
        are mounted.
        """
        while inode.nlookup <= 0 and inode.ino != ROOT_INO and inode.ino in self.table.by_ino:
            if isinstance(inode, Directory) and inode.dependants:
                return
            if inode.in_upper and inode.lower_links > 0 and not inode.index_name:
                return
            above, others = inode.parent, list(inode.links) if inode.links else []
            if self.before_drop is not None:
                self.before_drop(inode)
            self.table.unpin(inode)
            self.cache.close(inode)
            if isinstance(inode, Directory):
                for lower in inode.lowers:
                    self.cache.close(lower)
            if inode.kept_name:
                self.upper.discard(inode.kept_name)
            self.table.remove(inode)
            for parent, _ in others:
                self.release(parent)
            if above is None:
                return
            inode = above

    # -- descriptors

    def upper_fd(self, directory: Directory) -> int:
        """O_PATH descriptor of a directory's upper half."""
        if directory.fd >= 0:
            directory.is_recent = True
            return directory.fd
        if directory.pin >= 0:
            return directory.pin
        upper = self.upper
        names: list[bytes] = []
        above = directory
        while above.parent is not None and above.fd < 0:
            names.append(above.name)
            above = above.parent
        if not names:
            if above is not self.root:
                raise failure(errno.ESTALE)
            return upper.root_fd
        start = above.fd if above.fd >= 0 else upper.root_fd
        fd = self.cache.put(directory, upper.open_descendant(start, names[::-1]))
        self.links_changed(directory)
        return fd

    def links_changed(self, inode: Inode) -> None:
        """Say so to who answers for the inode by its descriptor."""
        if inode.fd >= 0 and self.after_open is not None:
            self.after_open(inode)

    def lower_place(self, inode: Inode) -> Place:
        """Where the lower object lies, the top one of a directory."""
        directory = inode.lowers[0] if isinstance(inode, Directory) else inode.lower_dir
        if directory is None:
            raise failure(errno.ESTALE)
        name = b"" if isinstance(inode, Directory) else inode.lower_name
        return Place(directory.layer, directory.layer.dirfd(directory), name)

    def place(self, inode: Inode) -> Place:
        """Where the object's attributes lie now."""
        if not inode.in_upper:
            return self.lower_place(inode)
        if isinstance(inode, Directory):
            return Place(self.upper, self.upper_fd(inode), b"")
        if inode.parent is None:
            return self._place_without_name(inode)
        return Place(self.upper, self.upper_fd(inode.parent), inode.name)

    def _place_without_name(self, inode: Inode) -> Place:
        if inode.kept_name:
            return Place(self.upper, self.upper.work_fd, inode.kept_name)
        if inode.index_name and self.index is not None:
            return Place(self.upper, self.index.fd, inode.index_name)
        return Place(self.upper, inode.pin, b"")

    def can_pin(self) -> bool:
        """May another inode hold a descriptor until FORGET?"""
        return self.table.pinned < self.pin_limit

    def data_layer(self, inode: Inode) -> Layer | None:
        """The layer in which a regular file's data lie; None: they have yet to be found."""
        if inode.metacopy is not None:
            return None if inode.metacopy.directory is None else inode.metacopy.directory.layer
        if inode.in_upper:
            return self.upper
        return None if inode.lower_dir is None else inode.lower_dir.layer

    def is_memory(self, inode: Inode) -> bool:
        """Do the object's data lie in memory, so that reading them never waits?"""
        layer = self.data_layer(inode)
        return layer is not None and layer.is_memory

    def remote_data(self, inode: Inode) -> RemoteLower | None:
        """The lower that has to be asked for a regular file's data, if it may not answer; where they have yet to be found, a likely one."""
        layer = self.data_layer(inode)
        if layer is None and inode.metacopy is not None:
            return next((each for each in self.data_files.layers if isinstance(each, RemoteLower)), None)
        return layer if isinstance(layer, RemoteLower) else None

    def data_fd(self, inode: Inode, *, write: bool = False) -> int:
        """Descriptor of a regular file's data, of its upper copy if there is one. EROFS for writing if there is none, or not the data.

        EACCES: for writing, of what belongs to nobody (`owners`). EPERM: it is a metacopy, and such are not followed; EIO: its data are not
        there, or not those whose digest it demands.
        """
        if inode.fd >= 0 and (inode.is_writable or not write):
            inode.is_recent = True
            return inode.fd
        if not inode.is_regular:
            raise failure(errno.EISDIR if isinstance(inode, Directory) else errno.EINVAL)
        if write and not inode.in_upper:
            raise failure(errno.EROFS)
        fd = self._open_own(inode, write=write) if inode.metacopy is None else -1
        if fd >= 0:
            return self.set_data_fd(inode, fd, is_writable=write)
        if write or inode.metacopy is None:
            raise failure(errno.EROFS)
        return self.set_data_fd(inode, self.data_files.open(inode.metacopy), is_writable=False)

    def has_upper_data(self, inode: Inode) -> bool:
        """Is all of the object in the upper, its data too, so that they may be changed?"""
        if inode.in_upper and inode.is_regular and inode.metacopy is None and not inode.is_writable:
            fd = self._open_own(inode, write=True)
            if fd >= 0:
                self.set_data_fd(inode, fd, is_writable=True)
        return inode.in_upper and inode.metacopy is None

    def _open_own(self, inode: Inode, *, write: bool) -> int:
        """Descriptor of a regular file where its attributes are; -1: it turned out to be a metacopy, and is noted as one."""
        layer, dirfd, name = self.place(inode)
        if not write:
            fd = layer.open_read(dirfd, name) if name else self.upper.open_pinned(dirfd, os.O_RDONLY)
        else:
            self.require_owner(inode, errno.EACCES)
            fd = self.upper.open_write(dirfd, name) if name else self.upper.open_pinned(dirfd, os.O_RDWR)
        try:
            mark = layer.getmark_of(fd, marks.METACOPY)
            if mark is None:
                return fd
            if inode.parent is None:
                raise failure(errno.EIO)
            parents = inode.parent.lowers
            if inode.lower_dir is not None and not inode.in_upper:
                parents = tuple(lower for lower in parents if lower.layer.index > layer.index)
            known_as = inode.name if inode.in_upper else inode.lower_name
            inode.metacopy = self._merge.data(Place(layer, dirfd, name), mark, parents, known_as)
        except (OSError, MustAsk):
            self.cache.close_fd(fd)
            raise
        self.cache.close_fd(fd)
        return -1

    def own_fd(self, inode: Inode) -> int:
        """A descriptor, for `cache.close_fd`, of a regular file itself, wherever its data are. It reads: an immutable file refuses more."""
        if inode.metacopy is None and inode.fd >= 0:
            return self.cache.dup(inode.fd)
        layer, dirfd, name = self.place(inode)
        return layer.open_read(dirfd, name) if name else self.upper.open_pinned(dirfd, os.O_RDONLY)

    def set_data_fd(self, inode: Inode, fd: int, *, is_writable: bool) -> int:
        """Keep this as the inode's descriptor, under the number it has if it has one: a reader in a thread goes on with the new file."""
        inode.is_writable = is_writable
        if inode.fd in self.cache.closers:
            self.cache.close(inode)  # who reads from a remote one has a duplicate
        if inode.fd < 0:
            self.cache.put(inode, fd)
        else:
            os.dup2(fd, inode.fd, inheritable=False)
            os.close(fd)
        if self.after_open is not None:
            self.after_open(inode)
        return inode.fd

    def stop_writing(self, inode: Inode) -> None:
        """After a change that may forbid it: the descriptor that writes is given up, and who writes next has the upper asked for one."""
        if inode.fd >= 0 and inode.is_writable:
            self.set_data_fd(inode, self._open_own(inode, write=False), is_writable=False)

    # -- attributes

    def stat(self, inode: Inode) -> Stat:
        """What the real object says; `nlink` and `blocks` say what differs."""
        if inode.in_upper:
            fd = inode.fd if inode.fd >= 0 and inode.metacopy is None else inode.pin
            if fd >= 0:
                return self.upper.fstat(fd)
        layer, dirfd, name = self.place(inode)
        st = layer.stat(dirfd, name) if name not in (b"", b".") else layer.fstat(dirfd)  # "." needs the right to search it
        if st is None:
            raise failure(errno.ESTALE)
        return st

    def require_owner(self, inode: Inode, code: int = errno.EOVERFLOW) -> None:
        """Fail with that errno, before anything is changed, for an object whose owner or group has no counterpart in the view."""
        if self.owners.are_mapped and not self.owners.are_known(self.stat(inode)):
            raise failure(code)

    def nlink(self, inode: Inode, st: Stat) -> int:
        """A directory with several halves has one link, as the kernel's overlay says too: the true count would cost a scan, and
        `find` trusts 1.
        """
        if isinstance(inode, Directory):
            if inode.is_orphan:
                return 0
            return st.st_nlink if len(inode.lowers) + inode.in_upper == 1 else 1
        if not inode.in_upper:
            return inode.lower_links
        return st.st_nlink + inode.lower_links - bool(inode.kept_name) - bool(inode.index_name)

    def links_by_stat(self, inode: Inode) -> int | None:
        """The same for who has a stat of the object and nothing else: so many links, 0: as many as it says, None: more has to be known."""
        if isinstance(inode, Directory):
            return None if inode.is_orphan else 0 if len(inode.lowers) + inode.in_upper == 1 else 1
        if inode.metacopy is not None:
            return None  # its descriptor is another object's
        if inode.in_upper:
            return None if inode.lower_links or inode.kept_name or inode.index_name else 0
        return inode.lower_links or None

    def blocks(self, inode: Inode, st: Stat) -> int:
        """Blocks of 512 bytes: those of the data."""
        return st.st_blocks if inode.metacopy is None else self.data_files.blocks(inode.metacopy, st)

    def readlink(self, inode: Inode) -> bytes:
        layer, dirfd, name = self.place(inode)
        return layer.readlink(dirfd, name)

    def getxattr(self, inode: Inode, name: bytes) -> bytes:
        """A caller's extended attribute; its own names in our spelling are kept one level deeper. ENODATA where there is none,
        EOPNOTSUPP.
        """
        layer, dirfd, at = self.place(inode)
        if layer.override is not None and is_private(name):
            raise failure(errno.ENODATA)
        value = layer.read_xattr(dirfd, at, marks.escape_xattr(name, layer.mark_prefix))
        return self.owners.shown_acl(value) if name in ACLS else value

    def listxattr(self, inode: Inode) -> list[bytes]:
        """The names of an object's attributes, all but the marks."""
        layer, dirfd, at = self.place(inode)
        names = (marks.unescape_xattr(name, layer.mark_prefix) for name in layer.listxattr(dirfd, at))
        return [name for name in names if name is not None and not (layer.override is not None and is_private(name))]

    def has_default_acl(self, directory: Directory) -> bool:
        """Do new entries of a directory inherit an ACL? Asked of the disk once."""
        if directory.has_default_acl is None:
            layer, dirfd, at = self.place(directory)
            directory.has_default_acl = layer.getxattr(dirfd, at, b"system.posix_acl_default") is not None
        return directory.has_default_acl

    def statfs(self) -> os.statvfs_result:
        """The upper's; of a read-only mount the top lower's."""
        layer = self._upper or self.lowers[0]
        return layer.statvfs(layer.root_fd)
