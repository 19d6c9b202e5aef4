"""The merged view: which object a name stands for, what a directory lists.

Nothing here changes a layer. A name is looked for in the upper, then in the lowers from the top. The first object found is the one,
unless it is a directory: then directories of that name further down are merged with it, until something hides them: a whiteout, an opaque
mark, an object that is no directory. It is ovl_lookup of fs/overlayfs/namei.c, step for step.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import stat
from collections.abc import Iterable, Iterator

from pyoverlay.core import marks
from pyoverlay.core.index import Index
from pyoverlay.core.inode import UPPER, Data, Directory, Inode, Key, Listing, key_of
from pyoverlay.core.layer import Layer, LowerDir, Place, next_with
from pyoverlay.core.objects import Objects, failure
from pyoverlay.core.syscalls import Stat

log = logging.getLogger(__name__)

_NAME_MAX = 255  # bytes, <linux/limits.h>
_MAX_REPORTED = 1000  # paths whose refusal was logged: each is logged once


class View(Objects):
    """The layers as one tree."""

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
            directory.is_impure = directory.is_append_only = False
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
