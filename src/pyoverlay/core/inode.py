"""Identity: which object is which, and what number it bears.

An inode number is chosen once and kept over copy-up and rename. It is the lowest object's own number, with the file system's index in
high bits where the layers lie on several; a number that another object holds is never given twice, the newcomer gets one from a range of
its own.

    bit 63 62      52                                                   0
        0  R  file system        the real object's number
           R = 1: reserved range, counted up from 2^62

Objects are found by what they really are (`Key`): the layer, the number there. An upper object's number is free again the moment its
last name goes, and ext4 gives it to the next file at once, before the kernel has forgotten the old one: so an object that loses its last
name is pinned by a descriptor until FORGET.
"""

from __future__ import annotations

import bisect
import logging
import os
import stat
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from pyoverlay.core.layer import Held, LowerDir

log = logging.getLogger(__name__)

ROOT_INO = 1
UPPER = 0  # the upper's layer index
_FS_SHIFT = 52
_RESERVED = 1 << 62
REFUSED_INO = (1 << 63) - 1  # of what shows as a name and no more; no object's
_LAYERS = 1024  # more than the 500 of the kernel

Key = int


def key_of(layer: int, real_ino: int) -> Key:
    """What a real object is known by: its layer's index and its number there. 0 is the upper."""
    return real_ino * _LAYERS + layer


class Data(NamedTuple):
    """Where the data of a metacopy file lie: under a name in a directory of a lower; or, with no directory, at a path in one of the
    data-only layers, which nobody looked up yet. mark: the value of the file's `metacopy`.
    """

    directory: LowerDir | None
    name: bytes
    path: tuple[bytes, ...] = ()
    mark: bytes = b""


class Inode(Held):
    """An object of the merged view.

    ino: its number, the node id of FUSE. format: S_IFMT of its mode, which never changes. nlookup: references the kernel holds.
    in_upper: it has an upper object, which `parent` and `name` reach (or `pin`, once it has no name); before that they are the name by
    which it was last looked up. links: further names like it, where known. lower_dir, lower_name: where its lower object is; kept after
    copy-up, since a hard link of it may still be found there. lower_links: names of the lower object that still show and are not the
    upper's.
    kept_name: a link of the upper object in the work directory, while names of its lower object show that may yet want one in the upper,
    or in the place of a pin. index_name: the one that it has in the index for good, with index=on.
    has_origin: its number is that of a lower object, so that a directory of the upper that it enters is impure.
    metacopy: where its data lie, if they are not with the rest of it. fd: a data descriptor: of those data; else of the upper object if
    in_upper, else of the lower one.
    """

    __slots__ = (
        "format",
        "has_origin",
        "in_upper",
        "index_name",
        "ino",
        "is_writable",
        "kept_name",
        "keys",
        "links",
        "lower_dir",
        "lower_links",
        "lower_name",
        "metacopy",
        "name",
        "nlookup",
        "parent",
        "pin",
    )

    def __init__(self, ino: int, mode: int) -> None:
        Held.__init__(self)  # inodes come by thousands, and super() would take a fifth of all this
        self.ino = ino
        self.format = stat.S_IFMT(mode)
        self.nlookup = 0
        self.parent: Directory | None = None
        self.name = b""
        self.links: set[tuple[Directory, bytes]] | None = None
        self.in_upper = False
        self.has_origin = False
        self.lower_dir: LowerDir | None = None
        self.lower_name = b""
        self.lower_links = 0
        self.is_writable = False
        self.metacopy: Data | None = None
        self.pin = -1
        self.kept_name = b""
        self.index_name = b""
        self.keys: tuple[Key, ...] = ()

    @property
    def is_regular(self) -> bool:
        return self.format == stat.S_IFREG

    @property
    def is_orphan(self) -> bool:
        """Without a name: an open file that was unlinked, a working directory that was removed."""
        return self.parent is None and self.ino != ROOT_INO

    def has_name(self, parent: Directory, name: bytes) -> bool:
        return (self.parent is parent and self.name == name) or (self.links is not None and (parent, name) in self.links)

    def has_other_name(self, parent: Directory, name: bytes) -> bool:
        """Is a name known that is not this one?"""
        return bool(self.links) or (self.parent is not None and (self.parent is not parent or self.name != name))

    def add_name(self, parent: Directory, name: bytes) -> None:
        """Another name, or the first."""
        if self.parent is None:
            self.parent, self.name = parent, name
        elif not self.has_name(parent, name):
            if self.links is None:
                self.links = set()
            self.links.add((parent, name))
        else:
            return
        parent.dependants += 1

    def remove_name(self, parent: Directory, name: bytes) -> None:
        if self.parent is parent and self.name == name:
            self.parent, self.name = self.links.pop() if self.links else (None, b"")
        elif self.links is not None and (parent, name) in self.links:
            self.links.discard((parent, name))
        else:
            return
        parent.dependants -= 1

    def names(self) -> list[tuple[Directory, bytes]]:
        first = [(self.parent, self.name)] if self.parent is not None else []
        return [*first, *(self.links or ())]


class Listing:
    """The complete list of a directory's names, each at an offset that stays its own while others come and go.

    Offsets count up and are never used again, so that a reader who comes back (telldir, seekdir, an NFS cookie) finds its place. They
    start at 3: the reader asks for what lies after an offset, and "." and ".." are 1 and 2.
    """

    __slots__ = ("_names", "_next", "_offsets", "_order")

    def __init__(self, names: Sequence[bytes] = ()) -> None:
        self._next = 3 + len(names)
        self._order: list[bytes | None] = list(names)
        self._offsets = array("Q", range(3, self._next)) if names else array("Q")
        self._names = dict(zip(names, self._offsets, strict=True)) if names else {}

    def __contains__(self, name: bytes) -> bool:
        return name in self._names

    def __len__(self) -> int:
        return len(self._names)

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._names)

    def add(self, name: bytes) -> None:
        if name not in self._names:
            self._names[name] = self._next
            self._order.append(name)
            self._offsets.append(self._next)
            self._next += 1

    def remove(self, name: bytes) -> None:
        offset = self._names.pop(name, None)
        if offset is None:
            return
        self._order[bisect.bisect_left(self._offsets, offset)] = None
        if len(self._order) > 2 * len(self._names) + 64:
            self._drop_holes()

    def _drop_holes(self) -> None:
        live = [(name, offset) for name, offset in zip(self._order, self._offsets, strict=True) if name is not None]
        self._order = [name for name, _ in live]
        self._offsets = array("Q", (offset for _, offset in live))

    def after(self, offset: int) -> Iterator[tuple[int, bytes]]:
        """(offset, name) of the entries past an offset, in order, while the directory may change."""
        place = bisect.bisect_right(self._offsets, offset)
        while place < len(self._order):
            offset, name = self._offsets[place], self._order[place]
            if name is not None:
                yield offset, name
            if place < len(self._offsets) and self._offsets[place] == offset:
                place += 1
            else:  # holes were dropped meanwhile
                place = bisect.bisect_right(self._offsets, offset)


class Directory(Inode):
    """A directory of the merged view.

    lowers: its lower directories, top first; with `in_upper`, the upper one lies above them. redirect: the mark on its upper directory.
    listing: its names, when they are all known. is_impure: its upper directory is marked so, or None where nobody looked.
    is_opaque: its upper directory bears the mark. is_append_only: nothing may be taken out of that, or None where nobody looked.
    dependants: inodes that have a name in it; it stays in the table as long as there are any.
    fd: O_PATH descriptor of its upper directory.
    """

    __slots__ = (
        "dependants",
        "has_default_acl",
        "has_xattr_whiteouts",
        "is_append_only",
        "is_impure",
        "is_opaque",
        "listing",
        "lowers",
        "redirect",
    )

    def __init__(self, ino: int, lowers: tuple[LowerDir, ...]) -> None:
        super().__init__(ino, stat.S_IFDIR)
        self.lowers = lowers
        self.listing: Listing | None = None
        self.redirect: bytes | None = None
        self.is_impure: bool | None = None
        self.is_opaque = False
        self.is_append_only: bool | None = None
        self.has_default_acl: bool | None = None  # None: nobody asked
        self.has_xattr_whiteouts = False
        self.dependants = 0


class InodeTable:
    """The inodes that the kernel knows, by number and by what they really are."""

    def __init__(self) -> None:
        self.by_ino: dict[int, Inode] = {}
        self._by_key: dict[Key, Inode] = {}
        self._strays: dict[tuple[int, bytes], Inode] = {}  # directories whose key another place holds: by place
        self._next_reserved = _RESERVED
        self.pinned = 0  # how many of them hold a pin

    def __len__(self) -> int:
        return len(self.by_ino)

    @staticmethod
    def own_number(fs: int, real_ino: int) -> int:
        """What a real object is called if nothing stands against it."""
        return fs << _FS_SHIFT | real_ino

    def number(self, fs: int, real_ino: int) -> int:
        """The number for a real object, free to be given: its own if nobody holds that."""
        ino = fs << _FS_SHIFT | real_ino
        if ino not in self.by_ino and ino > ROOT_INO and real_ino < (1 << _FS_SHIFT if fs else _RESERVED):
            return ino
        log.info("inode number %d of file system %d is held by another object: a reserved one is given", real_ino, fs)
        self._next_reserved += 1
        return self._next_reserved

    def renew(self, inodes: Iterable[Inode]) -> None:
        """Put these last in the order of `by_ino`, which is that of their coming."""
        for inode in inodes:
            self.by_ino[inode.ino] = self.by_ino.pop(inode.ino)

    def find(self, key: Key) -> Inode | None:
        return self._by_key.get(key)

    def find_stray(self, parent: Inode, name: bytes) -> Inode | None:
        return self._strays.get((parent.ino, name)) if self._strays else None

    def add(self, inode: Inode, *keys: Key) -> None:
        """A new one."""
        self.by_ino[inode.ino] = inode
        inode.keys = keys
        for key in keys:
            self._by_key[key] = inode

    def add_stray(self, inode: Inode, parent: Inode, name: bytes) -> None:
        self.by_ino[inode.ino] = inode
        self._strays[parent.ino, name] = inode

    def add_key(self, inode: Inode, key: Key) -> None:
        """A further real object that this inode stands for: its upper copy."""
        self._by_key[key] = inode
        if key not in inode.keys:
            inode.keys = (*inode.keys, key)

    def remove_key(self, inode: Inode, key: Key) -> None:
        if self._by_key.get(key) is inode:
            del self._by_key[key]

    def move_stray(self, directory: Inode, parent: Inode, name: bytes) -> None:
        """A directory got another place; it is known by that only if another one holds its key."""
        if directory in self._strays.values():
            self._drop_stray(directory)
            self._strays[parent.ino, name] = directory

    def _drop_stray(self, directory: Inode) -> None:
        self._strays = {place: other for place, other in self._strays.items() if other is not directory}

    def remove(self, inode: Inode) -> None:
        """Give an inode up: the kernel has forgotten it and nothing depends on it."""
        del self.by_ino[inode.ino]
        for key in inode.keys:
            self.remove_key(inode, key)
        if self._strays:
            self._drop_stray(inode)
        self.unpin(inode)
        while inode.parent is not None:
            inode.remove_name(inode.parent, inode.name)

    def pin(self, inode: Inode, fd: int) -> None:
        """Keep the object behind this descriptor, now the inode's, for as long as the kernel knows it. It may be the one of its data."""
        inode.pin = fd
        if fd == inode.fd:
            inode.pins += 1
        self.pinned += 1

    def unpin(self, inode: Inode) -> None:
        """Before its data descriptor is closed."""
        if inode.pin < 0:
            return
        if inode.pin == inode.fd:
            inode.pins -= 1
        else:
            os.close(inode.pin)
        inode.pin = -1
        self.pinned -= 1
