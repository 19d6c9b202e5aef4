"""The merged view: which object a name stands for, what a directory lists, what an object says of itself.

Nothing here changes a layer. A name is looked for in the upper, then in the lowers from the top. The first object found is the one,
unless it is a
directory: then directories of that name further down are merged with it, until something hides them: a whiteout, an opaque mark, an
object that is no directory. It is ovl_lookup of fs/overlayfs/namei.c, step for step.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import Callable
from typing import NamedTuple

from pyoverlay.core import marks, syscalls
from pyoverlay.core.inode import ROOT_INO, Directory, Inode, InodeTable, Key, Listing, key_of
from pyoverlay.core.layer import DescriptorCache, Layer, Lower, LowerDir, Place, Upper, closed_on_failure, readable_dir
from pyoverlay.core.owners import ACLS, Owners
from pyoverlay.core.policy import Policy

log = logging.getLogger(__name__)

UPPER = 0  # the upper's layer index


class _Step(NamedTuple):
    """What one layer has to say of a directory: it is there or not; whether the layers below count; under which names they are asked."""

    directory: LowerDir | None
    st: os.stat_result | None
    hides_below: bool
    names: tuple[bytes, ...]
    from_root: bool


def failure(code: int) -> OSError:
    """An OSError of that errno."""
    return OSError(code, os.strerror(code))


class View:
    """The layers as one tree.

    lowers: from the top. upper: None in a read-only mount. masked: (st_dev, st_ino) of the directories that show empty inside a lower:
    our own upper and work directory. The layers and the cache are owned: `close` closes them.
    """

    def __init__(
        self, lowers: tuple[Lower, ...], upper: Upper | None, policy: Policy, cache: DescriptorCache, masked: frozenset[tuple[int, int]]
    ) -> None:
        self.lowers = lowers
        self.policy = policy
        self.owners = Owners(policy)
        self.cache = cache
        self.table = InodeTable()
        self.after_open: Callable[[Inode], None] | None = None  # told of each data descriptor that appears or starts to write
        self.before_drop: Callable[[Inode], None] | None = None  # told of each inode that goes: its number may then be another's
        self._upper = upper
        self._masked = masked
        self._follows_redirects = policy.redirect_dir.is_followed and not policy.userxattr
        # For file handles: the uuid of each file system that lowers lie on, and a descriptor there.
        self._filesystems: dict[int, tuple[bytes, int]] = {}
        for lower in lowers:
            if lower.fs not in self._filesystems:
                fd = readable_dir(lower.root_fd)
                self._filesystems[lower.fs] = (syscalls.filesystem_uuid(fd), fd)
        self.name_max = max(os.statvfs(layer.root_fd).f_namemax for layer in (*lowers, *([upper] if upper is not None else [])))
        self.root = Directory(ROOT_INO, tuple(lower.root for lower in lowers))
        self.root.in_upper = upper is not None
        self.root.has_xattr_whiteouts = upper is not None and upper.getmark(upper.root_fd, b".", marks.OPAQUE) == b"x"
        self.root.nlookup = 1
        self.table.add(self.root)

    @property
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
        self.cache.close_all()
        for inode in self.table.by_ino.values():
            if inode.pin >= 0:
                os.close(inode.pin)
                inode.pin = -1
            if inode.kept_name:
                self.upper.discard(inode.kept_name)
        for _, fd in self._filesystems.values():
            os.close(fd)
        self._filesystems = {}
        for layer in (*self.lowers, *([self._upper] if self._upper is not None else [])):
            layer.close()

    def trim(self) -> None:
        """Close what the descriptor limit does not allow. Between operations only."""
        if len(self.cache) > self.cache.limit:
            self.cache.trim()

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

        A copied-up file of which the lower has more names stays: they must lead to the copy for as long as we are mounted.
        """
        while inode.nlookup <= 0 and inode.ino != ROOT_INO and inode.ino in self.table.by_ino:
            if isinstance(inode, Directory) and inode.dependants:
                return
            if inode.in_upper and inode.lower_links > 0:
                return
            parents = [parent for parent, _ in inode.names()]
            if self.before_drop is not None:
                self.before_drop(inode)
            self.cache.close(inode)
            if inode.kept_name:
                self.upper.discard(inode.kept_name)
            self.table.remove(inode)
            for parent in parents[1:]:
                self.release(parent)
            if not parents:
                return
            inode = parents[0]

    # -- descriptors

    def upper_fd(self, directory: Directory) -> int:
        """O_PATH descriptor of a directory's upper half."""
        if directory.fd >= 0:
            directory.is_recent = True
            return directory.fd
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
        return self.cache.put(directory, upper.open_descendant(start, names[::-1]))

    def lower_place(self, inode: Inode) -> Place:
        """Where the lower object lies, the top one of a directory."""
        directory = inode.lowers[0] if isinstance(inode, Directory) else inode.lower_dir
        if directory is None:
            raise failure(errno.ESTALE)
        name = b"." if isinstance(inode, Directory) else inode.lower_name
        return Place(directory.layer, directory.layer.dirfd(directory), name)

    def place(self, inode: Inode) -> Place:
        """Where the object's attributes lie now."""
        if not inode.in_upper:
            return self.lower_place(inode)
        if isinstance(inode, Directory):
            return Place(self.upper, self.upper_fd(inode), b".")
        if inode.parent is None:
            return Place(self.upper, self.upper.work_fd, inode.kept_name) if inode.kept_name else Place(self.upper, inode.pin, b"")
        return Place(self.upper, self.upper_fd(inode.parent), inode.name)

    def is_memory(self, inode: Inode) -> bool:
        """Do the object's data lie in memory, so that reading them never waits?"""
        if inode.in_upper:
            return self.upper.is_memory
        return inode.lower_dir is not None and inode.lower_dir.layer.is_memory

    def data_fd(self, inode: Inode, *, write: bool = False) -> int:
        """Descriptor of a regular file's data, of its upper copy if there is one. EROFS for writing if there is none.

        EACCES: for writing, of what belongs to nobody (`owners`). EPERM: the data lies elsewhere (metacopy), which is not followed here;
        the kernel answers so with metacopy=off. What this file itself holds is a hole.
        """
        if inode.fd >= 0 and (inode.is_writable or not write):
            inode.is_recent = True
            return inode.fd
        if not inode.is_regular:
            raise failure(errno.EISDIR if isinstance(inode, Directory) else errno.EINVAL)
        layer, dirfd, name = self.place(inode)
        if not write:
            fd = layer.open_read(dirfd, name) if name else self.upper.open_pinned(dirfd, os.O_RDONLY)
        elif not inode.in_upper:
            raise failure(errno.EROFS)
        else:
            self.require_owner(inode, errno.EACCES)
            fd = self.upper.open_write(dirfd, name) if name else self.upper.open_pinned(dirfd, os.O_RDWR)
        with closed_on_failure(fd):
            if layer.is_metacopy(fd):
                raise failure(errno.EPERM)
        return self.set_data_fd(inode, fd, is_writable=write)

    def set_data_fd(self, inode: Inode, fd: int, *, is_writable: bool) -> int:
        """Keep this as the inode's descriptor, under the number it has if it has one: a reader in a thread goes on with the new file."""
        inode.is_writable = is_writable
        if inode.fd < 0:
            self.cache.put(inode, fd)
        else:
            os.dup2(fd, inode.fd, inheritable=False)
            os.close(fd)
        if self.after_open is not None:
            self.after_open(inode)
        return inode.fd

    # -- attributes

    def stat(self, inode: Inode) -> os.stat_result:
        """What the real object says; `nlink` says what differs."""
        if inode.in_upper:
            fd = inode.fd if inode.fd >= 0 else inode.pin
            if fd >= 0:
                return os.fstat(fd)
        layer, dirfd, name = self.place(inode)
        st = layer.stat(dirfd, name) if name else os.fstat(dirfd)
        if st is None:
            raise failure(errno.ESTALE)
        return st

    def require_owner(self, inode: Inode, code: int = errno.EOVERFLOW) -> None:
        """Fail with that errno, before anything is changed, for an object whose owner or group has no counterpart in the view."""
        if self.owners.are_mapped and not self.owners.are_known(self.stat(inode)):
            raise failure(code)

    def nlink(self, inode: Inode, st: os.stat_result) -> int:
        """A directory with several halves has one link, as the kernel's overlay says too: the true count would cost a scan, and
        `find` trusts 1.
        """
        if isinstance(inode, Directory):
            if inode.is_orphan:
                return 0
            return st.st_nlink if len(inode.lowers) + inode.in_upper == 1 else 1
        return st.st_nlink + inode.lower_links - bool(inode.kept_name) if inode.in_upper else inode.lower_links

    def readlink(self, inode: Inode) -> bytes:
        layer, dirfd, name = self.place(inode)
        return layer.readlink(dirfd, name)

    def getxattr(self, inode: Inode, name: bytes) -> bytes:
        """A caller's extended attribute; its own names in our spelling are kept one level deeper. ENODATA where there is none,
        EOPNOTSUPP.
        """
        layer, dirfd, at = self.place(inode)
        value = layer.read_xattr(dirfd, at, marks.escape_xattr(name, layer.mark_prefix))
        return self.owners.shown_acl(value) if name in ACLS else value

    def listxattr(self, inode: Inode) -> list[bytes]:
        """The names of an object's attributes, all but the marks."""
        layer, dirfd, at = self.place(inode)
        names = (marks.unescape_xattr(name, layer.mark_prefix) for name in layer.listxattr(dirfd, at))
        return [name for name in names if name is not None]

    def has_default_acl(self, directory: Directory) -> bool:
        """Do new entries of a directory inherit an ACL? Asked of the disk once."""
        if directory.has_default_acl is None:
            layer, dirfd, at = self.place(directory)
            directory.has_default_acl = layer.getxattr(dirfd, at, b"system.posix_acl_default") is not None
        return directory.has_default_acl

    def statfs(self) -> os.statvfs_result:
        """The upper's; of a read-only mount the top lower's."""
        return os.statvfs((self._upper or self.lowers[0]).root_fd)

    # -- lookup

    def lookup(self, parent: Directory, name: bytes) -> tuple[Inode, os.stat_result] | None:
        """The object that a name stands for, with its attributes; None: there is none. ENAMETOOLONG: no layer could hold that name."""
        if len(name) > self.name_max:
            raise failure(errno.ENAMETOOLONG)
        if parent.listing is not None and name not in parent.listing:
            return None
        if parent.in_upper:
            upper = self.upper
            st = upper.stat(self.upper_fd(parent), name)
            if st is not None:
                if stat.S_ISDIR(st.st_mode):
                    return self._upper_directory(parent, name, st), st
                if upper.is_whiteout(self.upper_fd(parent), name, st, has_xattr_whiteouts=parent.has_xattr_whiteouts):
                    return None
                return self._upper_file(parent, name, st), st
        return self.lookup_lower(parent, name)

    def lookup_lower(self, parent: Directory, name: bytes) -> tuple[Inode, os.stat_result] | None:
        """As lookup, as if the upper had nothing of that name."""
        found = self.find_lower(parent, name)
        if found is None:
            return None
        index, st = found
        if stat.S_ISDIR(st.st_mode):
            return self._lower_directory(parent, name, index, st), st
        inode = self._lower_file(parent, name, parent.lowers[index], st)
        return inode, (self.stat(inode) if inode.in_upper else st)

    def find_lower(self, parent: Directory, name: bytes) -> tuple[int, os.stat_result] | None:
        """The first lower of a directory that shows a name, by its place among parent.lowers; None where none does or one hides it."""
        several = len(parent.lowers) > 1
        for index, directory in enumerate(parent.lowers):
            layer = directory.layer
            if directory.is_masked or (several and index < len(parent.lowers) - 1):
                is_there, hides_below = layer.shows(directory, name)
                if not is_there:
                    if hides_below:
                        return None
                    continue
            st = layer.stat(layer.dirfd(directory), name)
            if st is None:
                continue
            return None if layer.is_whiteout(directory, name, st) else (index, st)
        return None

    def _upper_directory(self, parent: Directory, name: bytes, st: os.stat_result) -> Directory:
        key = key_of(UPPER, st.st_ino)
        known = self._known_directory(key, parent, name)
        if known is not None:
            return known
        upper, dirfd = self.upper, self.upper_fd(parent)
        found = upper.listmarks(dirfd, name)
        opaque = upper.getmark(dirfd, name, marks.OPAQUE) if marks.OPAQUE in found else None
        redirect = self._redirect(upper, dirfd, name) if marks.REDIRECT in found else None
        lowers: tuple[LowerDir, ...] = ()
        first = None
        if opaque != b"y":
            lowers, first = self._stack_below(parent, name, redirect)
        ino = self.table.number(upper.fs, st.st_ino) if first is None else self.table.number(lowers[0].layer.fs, first.st_ino)
        directory = Directory(ino, lowers)
        directory.in_upper = True
        directory.redirect = redirect
        directory.is_opaque = opaque == b"y"
        directory.has_origin = bool(lowers)
        directory.is_impure = marks.IMPURE in found
        directory.has_xattr_whiteouts = opaque == b"x"
        return self._add_directory(directory, key, parent, name)

    def _lower_directory(self, parent: Directory, name: bytes, index: int, st: os.stat_result) -> Directory:
        top = parent.lowers[index].layer
        key = key_of(top.index, st.st_ino)
        known = self._known_directory(key, parent, name)
        if known is not None:
            return known
        lowers, _ = self._stack(parent.lowers[index:], (name,))
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

    def adopt(self, parent: Directory, name: bytes, st: os.stat_result) -> Inode:
        """The inode of something just made in the upper under a name that nobody had: nothing need be asked."""
        ino = self.table.number(self.upper.fs, st.st_ino)
        if stat.S_ISDIR(st.st_mode):
            directory = Directory(ino, ())
            directory.is_impure = False
            directory.listing = Listing([])
            inode: Inode = directory
        else:
            inode = Inode(ino, st.st_mode)
        inode.in_upper = True
        self.table.add(inode, key_of(UPPER, st.st_ino))
        inode.add_name(parent, name)
        if parent.listing is not None:
            parent.listing.add(name)
        return inode

    def adopt_nameless(self, st: os.stat_result, pin: int) -> Inode:
        """The inode of a file made without a name; the descriptor that keeps it is now the inode's."""
        inode = Inode(self.table.number(self.upper.fs, st.st_ino), st.st_mode)
        inode.in_upper = True
        inode.pin = pin
        self.table.add(inode, key_of(UPPER, st.st_ino))
        return inode

    def _upper_file(self, parent: Directory, name: bytes, st: os.stat_result) -> Inode:
        key = key_of(UPPER, st.st_ino)
        inode = self.table.find(key)
        if inode is None:
            ino = self._upper_number(parent, name, st)
            inode = Inode(ino, st.st_mode)
            inode.in_upper = True
            inode.has_origin = ino != self.table.own_number(self.upper.fs, st.st_ino)
            self.table.add(inode, key)
        inode.add_name(parent, name)
        return inode

    def _upper_number(self, parent: Directory, name: bytes, st: os.stat_result) -> int:
        """The number of what it was copied up from, if that is known: it had that before.

        Only an impure directory has such entries. A lower object with several names is told apart from its copies, unless an index keeps
        them together (ovl_getattr), so then the copy has its own.
        """
        if self._is_impure(parent):
            value = self.upper.getmark(self.upper_fd(parent), name, marks.ORIGIN)
            origin = marks.decode_origin(value) if value else None
            found = self._find_origin(origin) if origin else None
            if found is not None and found[1].st_nlink == 1 and stat.S_IFMT(found[1].st_mode) == stat.S_IFMT(st.st_mode):
                return self.table.number(found[0], found[1].st_ino)
        return self.table.number(self.upper.fs, st.st_ino)

    def _is_impure(self, directory: Directory) -> bool:
        if directory.is_impure is None:
            directory.is_impure = self.upper.getmark(self.upper_fd(directory), b".", marks.IMPURE) is not None
        return directory.is_impure

    def origin_of(self, place: Place) -> marks.Origin | None:
        """What names a lower object on disk for good; None where its file system has no handles."""
        uuid, _ = self._filesystems[place.layer.fs]
        try:
            return marks.Origin(uuid, syscalls.name_to_handle_at(place.dirfd, place.name))
        except OSError as error:
            if error.errno in (errno.EOPNOTSUPP, errno.EOVERFLOW):
                return None
            raise

    def _find_origin(self, origin: marks.Origin) -> tuple[int, os.stat_result] | None:
        """(file system, attributes) of the object that a handle names, or None: gone, of another file system, or we may not ask."""
        same = [(fs, fd) for fs, (uuid, fd) in self._filesystems.items() if uuid == origin.uuid]
        if not same:
            return None
        fs, mount_fd = same[0]
        try:
            fd = syscalls.open_by_handle_at(mount_fd, origin.handle, os.O_PATH)
        except OSError:
            return None  # ESTALE: the lower was changed; EPERM: no CAP_DAC_READ_SEARCH. The number is then the upper's own.
        try:
            return fs, os.fstat(fd)
        finally:
            os.close(fd)

    def _lower_file(self, parent: Directory, name: bytes, directory: LowerDir, st: os.stat_result) -> Inode:
        key = key_of(directory.layer.index, st.st_ino)
        inode = self.table.find(key)
        if inode is None:
            inode = Inode(self.table.number(directory.layer.fs, st.st_ino), st.st_mode)
            inode.lower_dir, inode.lower_name = directory, name
            inode.lower_links = st.st_nlink
            self.table.add(inode, key)
        if not inode.in_upper:
            inode.add_name(parent, name)
        return inode

    # -- merging directories

    def _redirect(self, layer: Layer, dirfd: int, name: bytes) -> bytes:
        """The redirect of a directory. EPERM where it may not be followed: a user could have written it (ovl_lookup)."""
        if not self._follows_redirects:
            raise failure(errno.EPERM)
        return marks.check_redirect(layer.getmark(dirfd, name, marks.REDIRECT) or b"")

    def _stack_below(self, parent: Directory, name: bytes, redirect: bytes | None) -> tuple[tuple[LowerDir, ...], os.stat_result | None]:
        """The lower directories under an upper one."""
        if redirect is None:
            return self._stack(parent.lowers, (name,))
        if redirect.startswith(b"/"):
            return self._stack(self.root.lowers, tuple(redirect[1:].split(b"/")))
        return self._stack(parent.lowers, (redirect,))

    def _stack(self, parents: tuple[LowerDir, ...], names: tuple[bytes, ...]) -> tuple[tuple[LowerDir, ...], os.stat_result | None]:
        """The directories of that path under these, from the top, until one hides the rest; and what the first says of itself."""
        found: list[LowerDir] = []
        first: os.stat_result | None = None
        index = 0
        while index < len(parents):
            base = parents[index]
            index += 1
            step = self._descend(base, names, is_last=index == len(parents))
            if step.directory is not None:
                found.append(step.directory)
                first = first or step.st
            if step.hides_below:
                break
            names = step.names
            if step.from_root:
                parents = self.root.lowers
                index = sum(lower.layer.index <= base.layer.index for lower in parents)
        return tuple(found), first

    def _descend(self, base: LowerDir, names: tuple[bytes, ...], *, is_last: bool) -> _Step:
        """Follow a path in one layer, reading on each directory the marks that count for the layers below."""
        here, layer, below, from_root, hides_below = base, base.layer, names, False, False
        # The last of these parents may still lead on, by an absolute redirect, to layers that have no such parent; the lowest layer
        # leads nowhere.
        has_marks = layer is not self.lowers[-1] if self._follows_redirects else not is_last
        st: os.stat_result | None = None
        for place, name in enumerate(names):
            if not is_last or from_root or here.is_masked:
                is_there, hides = layer.shows(here, name)
                hides_below = hides_below or hides
                if not is_there:
                    return _Step(None, None, hides_below, below, from_root)
            st = layer.stat(layer.dirfd(here), name)
            if st is None:
                return _Step(None, None, hides_below, below, from_root)
            if not stat.S_ISDIR(st.st_mode):
                return _Step(None, None, True, below, from_root)
            at = layer.dirfd(here)
            found = layer.listmarks(at, name) if has_marks else frozenset[bytes]()
            here = LowerDir(layer, here, name, self._is_masked(layer, at, name, st))
            if marks.OPAQUE in found and layer.getmark(at, name, marks.OPAQUE) == b"y":
                hides_below = True
            elif marks.REDIRECT in found:
                redirect = self._redirect(layer, at, name)
                is_absolute = redirect.startswith(b"/")
                head = tuple(redirect[1:].split(b"/")) if is_absolute else (*below[: len(below) - len(names) + place], redirect)
                below = (*head, *names[place + 1 :])
                if is_absolute:
                    # It leads out of whatever an opaque directory above hides (ovl_check_redirect).
                    from_root, hides_below = True, False
        return _Step(here, st, hides_below, below, from_root)

    def _is_masked(self, layer: Layer, dirfd: int, name: bytes, st: os.stat_result) -> bool:
        if (st.st_dev, st.st_ino) in self._masked:
            return True
        return not layer.is_clone and syscalls.statx(dirfd, name).is_mount_root

    # -- listing

    def listing(self, directory: Directory) -> Listing:
        """All names of a directory. Kept with it, and kept true by every change: it then answers for names that are not there."""
        if directory.listing is None:
            directory.listing = Listing(self._names(directory))
        return directory.listing

    def _names(self, directory: Directory) -> list[bytes]:
        if directory.is_orphan:
            return []
        names: dict[bytes, None] = {}
        hidden: set[bytes] = set()
        if directory.in_upper:
            self._add_upper_names(directory, names, hidden)
        bottom = directory.lowers[-1] if directory.lowers else None
        for lower in directory.lowers:
            # Nothing asks the bottom one about single names, so its contents need not be kept.
            contents = lower.layer.read(lower) if lower is bottom else lower.layer.contents(lower)
            names.update(contents.names if not hidden else ((name, None) for name in contents.names if name not in hidden))
            if contents.hides_all:
                break
            hidden |= contents.whiteouts
        return list(names)

    def _add_upper_names(self, directory: Directory, names: dict[bytes, None], hidden: set[bytes]) -> None:
        upper, dirfd = self.upper, self.upper_fd(directory)
        for entry in upper.scan(dirfd):
            name = os.fsencode(entry.name)
            is_file = entry.is_file(follow_symlinks=False)
            is_plain = entry.is_symlink() or entry.is_dir(follow_symlinks=False) or (is_file and not directory.has_xattr_whiteouts)
            st = None if is_plain else upper.stat(dirfd, name)
            if st is not None and upper.is_whiteout(dirfd, name, st, has_xattr_whiteouts=directory.has_xattr_whiteouts):
                hidden.add(name)
            else:
                names[name] = None
