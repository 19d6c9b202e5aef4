"""The merged view: which object a name stands for, what a directory lists, what an object says of itself.

Nothing here changes a layer. A name is looked for in the upper, then in the lowers from the top. The first object found is the one,
unless it is a
directory: then directories of that name further down are merged with it, until something hides them: a whiteout, an opaque mark, an
object that is no directory. It is ovl_lookup of fs/overlayfs/namei.c, step for step.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property

from pyoverlay.core import marks
from pyoverlay.core.index import Index
from pyoverlay.core.inode import ROOT_INO, UPPER, Data, Directory, Inode, InodeTable, Key, Listing, key_of
from pyoverlay.core.layer import DescriptorCache, Layer, Lower, LowerDir, Place, next_with
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

log = logging.getLogger(__name__)

_NAME_MAX = 255  # bytes, <linux/limits.h>
_MAX_REPORTED = 1000  # paths whose refusal was logged: each is logged once


def failure(code: int) -> OSError:
    """An OSError of that errno."""
    return OSError(code, os.strerror(code))


class View:
    """The layers as one tree.

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
        self.origins = Origins(lowers, with_uuid=policy.uuid is not Uuid.OFF)
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

    # -- lookup

    def lookup(self, parent: Directory, name: bytes) -> tuple[Inode, Stat] | None:
        """The object that a name stands for, with its attributes; None: there is none. ENAMETOOLONG: no layer could hold that name.

        EPERM, EIO, EINVAL, ESTALE: its marks are refused.
        """
        if len(name) > self.name_max:
            raise failure(errno.ENAMETOOLONG)
        if parent.listing is not None and name not in parent.listing:
            return None
        if parent.in_upper:
            upper, dirfd = self.upper, self.upper_fd(parent)
            st = upper.stat(dirfd, name)
            if st is not None:
                return self._shown_by_upper(parent, name, st)
            if upper.reads_aufs and upper.has_aufs_whiteout(dirfd, name):
                return None
        return self.lookup_lower(parent, name)

    def lookup_all(self, parent: Directory, names: list[bytes]) -> Iterator[tuple[Inode, Stat] | OSError | None]:
        """lookup of each, as they are taken; what it raises takes the answer's place. Where it is known which layer shows a name, all that
        one shows are one call for their attributes: a listing of thousands is made of these.
        """
        for name, (index, st) in zip(names, self._stats(parent, names), strict=True):
            try:
                if st is None:
                    found = self.lookup(parent, name)
                elif parent.in_upper:
                    found = self._shown_by_upper(parent, name, st)
                else:
                    found = self._shown_by_lower(parent, name, index, st)
            except OSError as error:
                yield error
            else:
                yield found

    def _stats(self, parent: Directory, names: list[bytes]) -> Iterable[tuple[int, Stat | None]]:
        """Of each name the place, among parent.lowers, of the one that shows it, and what that says of it; None: `lookup` has to find out.

        With an upper above them nobody has noted which names it has.
        """
        lowers = parent.lowers
        if parent.in_upper:
            stats = self.upper.stat_all(self.upper_fd(parent), names) if not lowers else [None] * len(names)
            return zip(itertools.repeat(0), stats, strict=False)
        places = [next_with(name, lowers, 0) for name in names] if len(lowers) > 1 else [0] * len(names)
        answers = {place: iter(self._stats_of(parent, place, names, places)) for place in set(places)}
        return [(place, next(answers[place])) for place in places]

    def _stats_of(self, parent: Directory, place: int, names: list[bytes], places: list[int]) -> Iterable[Stat | None]:
        """The same of those that are at one place."""
        last = len(parent.lowers) - 1
        if place > last or parent.lowers[place].is_masked or (place < last and parent.lowers[place].contents is None):
            return itertools.repeat(None)
        directory = parent.lowers[place]
        shown = [name for name, its in zip(names, places, strict=True) if its == place] if last else names
        return directory.layer.stat_all(directory.layer.dirfd(directory), shown)

    def _shown_by_upper(self, parent: Directory, name: bytes, st: Stat) -> tuple[Inode, Stat] | None:
        """The object that the upper has under a name; None: it is a whiteout."""
        if stat.S_ISDIR(st.st_mode):
            return self._upper_directory(parent, name, st), st
        if marks.may_be_whiteout(st):
            is_whiteout = self.upper.is_whiteout(self.upper_fd(parent), name, st, has_xattr_whiteouts=parent.has_xattr_whiteouts)
            if is_whiteout:
                return None
        return self._upper_file(parent, name, st), st

    def _shown_by_lower(self, parent: Directory, name: bytes, index: int, st: Stat) -> tuple[Inode, Stat] | None:
        """The same of a lower of a directory, by its place among parent.lowers."""
        directory = parent.lowers[index]
        if stat.S_ISDIR(st.st_mode):
            return self._lower_directory(parent, name, index, st), st
        if marks.may_be_whiteout(st) and directory.layer.is_whiteout(directory, name, st):
            return None
        inode = self._lower_file(parent, name, directory, st)
        return inode, (self.stat(inode) if inode.in_upper else st)

    def report(self, parent: Directory, name: bytes, error: OSError) -> None:
        """Log, once for each path, that what a name stands for is refused."""
        components = [name]
        here: Directory | None = parent
        while here is not None and here.parent is not None:
            components.append(here.name)
            here = here.parent
        path = b"/" + b"/".join(reversed(components))
        if path not in self._reported and len(self._reported) < _MAX_REPORTED:
            self._reported.add(path)
            log.warning("%a in the merged view: %s", os.fsdecode(path), error.strerror)

    def lookup_lower(self, parent: Directory, name: bytes) -> tuple[Inode, Stat] | None:
        """As lookup, as if the upper had nothing of that name."""
        found = self.find_lower(parent, name)
        return self._shown_by_lower(parent, name, *found) if found is not None else None

    def find_lower(self, parent: Directory, name: bytes) -> tuple[int, Stat] | None:
        """The first lower of a directory that shows a name, by its place among parent.lowers; None where none does or one hides it."""
        lowers = parent.lowers
        last, index = len(lowers) - 1, -1
        while (index := next_with(name, lowers, index + 1)) <= last:
            directory = lowers[index]
            layer = directory.layer
            if index < last or directory.is_masked:
                is_there, hides_below = layer.shows(directory, name)
                if not is_there:
                    if hides_below:
                        return None
                    continue
            st = layer.stat(layer.dirfd(directory), name)
            if st is None:
                continue
            return None if marks.may_be_whiteout(st) and layer.is_whiteout(directory, name, st) else (index, st)
        return None

    def _upper_directory(self, parent: Directory, name: bytes, st: Stat) -> Directory:
        key = key_of(UPPER, st.st_ino)
        known = self._known_directory(key, parent, name)
        if known is not None:
            return known
        upper, dirfd = self.upper, self.upper_fd(parent)
        found = upper.listmarks(dirfd, name)
        opaque = upper.getmark(dirfd, name, marks.OPAQUE) if marks.OPAQUE in found else None
        if upper.is_aufs_opaque(dirfd, name):
            opaque = b"y"
        redirect = self._merge.redirect(upper, dirfd, name) if marks.REDIRECT in found else None
        lowers: tuple[LowerDir, ...] = ()
        first = None
        if opaque != b"y":
            lowers, first = self._merge.below(parent.lowers, name, redirect)
        ino = self.table.number(upper.fs, st.st_ino) if first is None else self.table.number(lowers[0].layer.fs, first.st_ino)
        directory = Directory(ino, lowers)
        directory.in_upper = True
        directory.redirect = redirect
        directory.is_opaque = opaque == b"y"
        directory.has_origin = bool(lowers)
        directory.is_impure = marks.IMPURE in found
        directory.has_xattr_whiteouts = opaque == b"x"
        return self._add_directory(directory, key, parent, name)

    def _lower_directory(self, parent: Directory, name: bytes, index: int, st: Stat) -> Directory:
        top = parent.lowers[index].layer
        key = key_of(top.index, st.st_ino)
        known = self._known_directory(key, parent, name)
        if known is not None:
            return known
        lowers, _ = self._merge.stack(parent.lowers[index:], (name,))
        return self._add_directory(Directory(self.table.number(top.fs, st.st_ino), lowers), key, parent, name)

    def _known_directory(self, key: Key, parent: Directory, name: bytes) -> Directory | None:
        for known in (self.table.find(key), self.table.find_stray(parent, name)):
            if isinstance(known, Directory) and known.has_name(parent, name):
                return known
        return None

    def _add_directory(self, directory: Directory, key: Key, parent: Directory, name: bytes) -> Directory:
        """One real directory can show at two places: a redirect copied by `cp -a`, a lower listed with its own subdirectory."""
        if self.table.find(key) is None:
            self.table.add(directory, key)
        else:
            self.table.add_stray(directory, parent, name)
        directory.add_name(parent, name)
        return directory

    def adopt(self, parent: Directory, name: bytes, st: Stat) -> Inode:
        """The inode of something just made in the upper under a name that nobody had: nothing need be asked."""
        ino = self.table.number(self.upper.fs, st.st_ino)
        if stat.S_ISDIR(st.st_mode):
            directory = Directory(ino, ())
            directory.is_impure = False
            directory.listing = Listing()
            inode: Inode = directory
        else:
            inode = Inode(ino, st.st_mode)
        inode.in_upper = True
        self.table.add(inode, key_of(UPPER, st.st_ino))
        inode.add_name(parent, name)
        if parent.listing is not None:
            parent.listing.add(name)
        return inode

    def adopt_nameless(self, st: Stat, pin: int) -> Inode:
        """The inode of a file made without a name; the descriptor that keeps it is now the inode's."""
        inode = Inode(self.table.number(self.upper.fs, st.st_ino), st.st_mode)
        inode.in_upper = True
        self.table.pin(inode, pin)
        self.table.add(inode, key_of(UPPER, st.st_ino))
        return inode

    def _upper_file(self, parent: Directory, name: bytes, st: Stat) -> Inode:
        key = key_of(UPPER, st.st_ino)
        inode = self.table.find(key)
        if inode is None:
            metacopy = self._metacopy(self.upper, self.upper_fd(parent), name, parent.lowers) if marks.may_be_metacopy(st) else None
            inode = self._with_origin(parent, name, st)
            inode.in_upper = True
            inode.metacopy = metacopy
            inode.has_origin = inode.ino != self.table.own_number(self.upper.fs, st.st_ino)
            self.table.add(inode, key)
        inode.add_name(parent, name)
        return inode

    def _with_origin(self, parent: Directory, name: bytes, st: Stat) -> Inode:
        """An upper object with the number of what it was copied up from, if that is known: it had that before.

        Only an impure directory has such entries. A lower object with several names is told apart from its copies, unless an index keeps
        them together (ovl_getattr), so then the copy has its own.
        """
        value = self.upper.getmark(self.upper_fd(parent), name, marks.ORIGIN) if self._is_impure(parent) else None
        origin = marks.decode_origin(value) if value else None
        found = self.origins.find(origin) if origin else None
        if found is None or value is None or stat.S_IFMT(found[1].st_mode) != stat.S_IFMT(st.st_mode):
            return Inode(self.table.number(self.upper.fs, st.st_ino), st.st_mode)
        fs, lower = found
        if lower.st_nlink == 1:
            return Inode(self.table.number(fs, lower.st_ino), st.st_mode)
        index_name = self.index.of_upper(value, st) if self.index is not None else b""
        inode = Inode(self.table.number(fs, lower.st_ino) if index_name else self.table.number(self.upper.fs, st.st_ino), st.st_mode)
        self._note_index(inode, index_name, st, lower.st_nlink)
        return inode

    def _note_index(self, inode: Inode, index_name: bytes, st: Stat, lower_nlink: int) -> None:
        if index_name and self.index is not None:
            inode.index_name = index_name
            inode.lower_links = self.index.links(index_name, st, lower_nlink) - st.st_nlink + 1

    def _is_impure(self, directory: Directory) -> bool:
        if directory.is_impure is None:
            directory.is_impure = self.upper.getmark(self.upper_fd(directory), b".", marks.IMPURE) is not None
        return directory.is_impure

    def _lower_file(self, parent: Directory, name: bytes, directory: LowerDir, st: Stat) -> Inode:
        layer, real_ino = directory.layer, st.st_ino
        key = key_of(layer.index, real_ino)
        inode = self.table.find(key)
        if inode is None and self.index is not None:
            inode = self._indexed(self.index, parent, name, directory, st)
        if inode is None:
            inode = Inode(self.table.number(layer.fs, real_ino), st.st_mode)
            if marks.may_be_metacopy(st):
                inode.metacopy = self._metacopy(layer, layer.dirfd(directory), name, _below(parent, directory))
            inode.lower_links = st.st_nlink
            self.table.add(inode, key)
        if inode.lower_dir is None:
            inode.lower_dir, inode.lower_name = directory, name
        if not inode.in_upper:
            inode.add_name(parent, name)
        return inode

    def _indexed(self, index: Index, parent: Directory, name: bytes, directory: LowerDir, st: Stat) -> Inode | None:
        """The copy of a lower file with several names, which one of the others was copied up by."""
        if st.st_nlink == 1:
            return None
        layer = directory.layer
        index_name = index.name_of(Place(layer, layer.dirfd(directory), name))
        real = index.copy_of(index_name, st) if index_name is not None else None
        if real is None or index_name is None:
            return None
        inode = self.table.find(key_of(UPPER, real.st_ino))
        if inode is None:
            metacopy = None
            if marks.may_be_metacopy(real):
                metacopy = self._metacopy(self.upper, index.fd, index_name, _below(parent, directory, or_itself=True), name)
            inode = Inode(self.table.number(layer.fs, st.st_ino), st.st_mode)
            inode.in_upper = inode.has_origin = True
            inode.metacopy = metacopy
            self._note_index(inode, index_name, real, st.st_nlink)
            self.table.add(inode, key_of(UPPER, real.st_ino))
        self.table.add_key(inode, key_of(layer.index, st.st_ino))
        return inode

    def _metacopy(self, layer: Layer, dirfd: int, at: bytes, below: tuple[LowerDir, ...], name: bytes | None = None) -> Data | None:
        """Where the data of a file lie, if not with the rest of it. name: the file's, if it is not `at`."""
        mark = layer.getmark(dirfd, at, marks.METACOPY)
        return self._merge.data(Place(layer, dirfd, at), mark, below, at if name is None else name) if mark is not None else None

    # -- listing

    def listing(self, directory: Directory) -> Listing:
        """All names of a directory. Kept with it, and kept true by every change: it then answers for names that are not there."""
        if directory.listing is None:
            directory.listing = Listing(self._names(directory))
        return directory.listing

    def _names(self, directory: Directory) -> list[bytes]:
        if directory.is_orphan:
            return []
        names: dict[bytes, int] = {}
        hidden: set[bytes] = set()
        if directory.in_upper:
            self._add_upper_names(directory, names, hidden)
        bottom = directory.lowers[-1] if directory.lowers else None
        for lower in directory.lowers:
            # Nothing asks the bottom one about single names, so its contents need not be kept.
            contents = lower.layer.read(lower) if lower is bottom else lower.layer.contents(lower)
            names.update(contents.names if not hidden else ((name, 0) for name in contents.names if name not in hidden))
            if contents.hides_all:
                break
            hidden |= contents.whiteouts
        # A lower that is FUSE itself may have longer names, which the kernel asks nobody for and has been known to overflow buffers with.
        return [name for name in names if len(name) <= _NAME_MAX]

    def _add_upper_names(self, directory: Directory, names: dict[bytes, int], hidden: set[bytes]) -> None:
        upper, dirfd = self.upper, self.upper_fd(directory)
        found = upper.scan(dirfd)
        names.update(found)
        if 0 not in found.values() and not directory.has_xattr_whiteouts and not upper.reads_aufs:
            return
        for name, form in found.items():
            is_aufs = upper.reads_aufs and name.startswith(marks.AUFS_PREFIX)
            if form and (form != stat.S_IFREG or not (directory.has_xattr_whiteouts or is_aufs)):
                continue
            st = upper.stat(dirfd, name)
            if st is not None and upper.is_whiteout(dirfd, name, st, has_xattr_whiteouts=directory.has_xattr_whiteouts):
                del names[name]
                hidden.add(name[len(marks.AUFS_PREFIX) :] if is_aufs and stat.S_ISREG(st.st_mode) else name)


def _below(parent: Directory, lower: LowerDir, *, or_itself: bool = False) -> tuple[LowerDir, ...]:
    """The lower directories of a directory below one of them."""
    return parent.lowers[parent.lowers.index(lower) + (not or_itself) :]
