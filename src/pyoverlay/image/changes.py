"""What an upper says, name by name: what a layer made of it holds. Changes nothing.

Not what differs from the lowers, which `report.changes` finds by comparing: a layer also holds copies that were not changed, and an upper
alone can be made one. Two things need the lowers: a directory that was renamed (a redirect) has its other half under another name there,
and is shown whole; a metacopy file has its data there.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

from pyoverlay.core import marks
from pyoverlay.core.inode import Directory, Inode, key_of
from pyoverlay.core.layer import Lower, LowerDir, Place
from pyoverlay.core.syscalls import Stat
from pyoverlay.core.view import View
from pyoverlay.errors import Refusal


@dataclass(frozen=True, slots=True)
class Whiteout:
    """`path` is deleted."""

    path: bytes


@dataclass(frozen=True, slots=True)
class Opaque:
    """Nothing of what lies below the layer shows in the directory `path`, with a slash at its end; empty for the root. st: of it."""

    path: bytes
    st: Stat


@dataclass(frozen=True, slots=True)
class Object:
    """Something that is there. place: where its attributes and target lie, valid until the next change is asked for.

    first: the path of an earlier object of which this is another name, else None. inode: where the data is to be asked for if it does not
    lie at `place`.
    """

    path: bytes
    st: Stat
    place: Place
    first: bytes | None = None
    inode: Inode | None = None


Change = Whiteout | Opaque | Object
_Step: TypeAlias = "Change | Iterator[_Step]"  # a change, or those of a directory that come next


def changes(view: View, *, knows_lowers: bool, name: bytes) -> Iterator[Change]:
    """What the view's top layer holds (see open_probed), in order of path, each directory followed by its opaque mark and what is in it.

    knows_lowers: the view has the layers below too. name: what to call the layer in a refusal. Raises Refusal for what no layer can hold,
    OSError for what cannot be read, with the path in the layer as its filename where it is the upper's.
    """
    return _Walk(view, knows_lowers, name).run()


@dataclass(slots=True)
class _Walk:
    view: View
    knows_lowers: bool
    name: bytes
    _first: dict[int, bytes] = field(default_factory=dict)  # path by identity, of what has several names

    @property
    def _top(self) -> Lower:
        return self.view.lowers[0]

    def run(self) -> Iterator[Change]:
        # Instead of recursion: a tree may be deeper than Python's stack.
        pending = [self._in_upper(self._top.root, b"", os.fstat(self._top.root_fd), is_opaque=False)]
        while pending:
            step = next(pending[-1], None)
            if step is None:
                pending.pop()
            elif isinstance(step, Iterator):
                pending.append(step)
            else:
                yield step
            self.view.trim()

    def _in_upper(self, directory: LowerDir, path: bytes, st: Stat, *, is_opaque: bool) -> Iterator[_Step]:
        """What lies in a directory of the upper, its mark first."""
        try:
            contents = self._top.read(directory)
        except OSError as error:
            raise OSError(error.errno, error.strerror, os.fsdecode(path.rstrip(b"/"))) from error
        if is_opaque or contents.hides_all:
            yield Opaque(path, st)
        for name in sorted({*contents.names, *contents.whiteouts}):
            below = path + name
            if name in contents.whiteouts:
                yield Whiteout(below)
                continue
            found = self._top.stat(self._top.dirfd(directory), name)
            if found is None:  # deleted since the directory was read
                continue
            if name.startswith(marks.AUFS_PREFIX):
                raise self._unspeakable(below)
            if stat.S_ISDIR(found.st_mode):
                yield from self._upper_directory(directory, name, below, found)
            else:
                yield self._upper_object(directory, name, below, found)

    def _upper_directory(self, parent: LowerDir, name: bytes, path: bytes, st: Stat) -> Iterator[_Step]:
        dirfd = self._top.dirfd(parent)
        found = self._top.listmarks(dirfd, name)
        yield Object(path, st, Place(self._top, dirfd, name))
        if marks.REDIRECT in found:
            yield Opaque(path + b"/", st)
            yield self._in_merged(self._merged_directory(path), path + b"/")
            return
        is_opaque = marks.OPAQUE in found and self._top.getmark(self._top.dirfd(parent), name, marks.OPAQUE) == b"y"
        yield self._in_upper(LowerDir(self._top, parent, name), path + b"/", st, is_opaque=is_opaque)

    def _upper_object(self, directory: LowerDir, name: bytes, path: bytes, st: Stat) -> Object:
        place = Place(self._top, self._top.dirfd(directory), name)
        is_metacopy = stat.S_ISREG(st.st_mode) and marks.METACOPY in self._top.listmarks(place.dirfd, name)
        inode = self._merged(path) if is_metacopy else None
        return Object(path, st, place, self._first_name(key_of(self._top.index, st.st_ino), path, st), inode)

    def _in_merged(self, directory: Directory, path: bytes) -> Iterator[_Step]:
        """What shows in a directory of the merged view, whichever layer it is in."""
        for name in sorted(self.view.listing(directory)):
            found = self.view.lookup(directory, name)
            if found is None:
                continue
            inode, st = found
            below = path + name
            if name.startswith(marks.AUFS_PREFIX):
                raise self._unspeakable(below)
            if isinstance(inode, Directory):
                yield Object(below, st, self.view.place(inode))
                yield self._in_merged(inode, below + b"/")
            else:
                yield Object(below, st, self.view.place(inode), self._first_name(inode.keys[0], below, st), inode)
            self.view.release(inode)
        directory.listing = None

    def _first_name(self, identity: int, path: bytes, st: Stat) -> bytes | None:
        """The path under which an object was already met; None, and remembered, where this is the first."""
        if st.st_nlink == 1:
            return None
        first = self._first.setdefault(identity, path)
        return None if first == path else first

    def _merged_directory(self, path: bytes) -> Directory:
        inode = self._merged(path)
        assert isinstance(inode, Directory)
        return inode

    def _merged(self, path: bytes) -> Inode:
        """The object that the whole overlay shows at a path which the upper has."""
        if not self.knows_lowers:
            remedy = "mount it and name the mount point, or name the layers below with --lower"
            raise Refusal(self.name + b"/" + path, "part of it lies in a lower, and the lowers are not known", remedy=remedy)
        here: Inode = self.view.root
        for name in path.split(b"/"):
            assert isinstance(here, Directory)
            found = self.view.lookup(here, name)
            if found is None:
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), path)
            here = found[0]
        return here

    def _unspeakable(self, path: bytes) -> Refusal:
        return Refusal(
            self.name + b"/" + path, "a layer cannot hold a name that begins with .wh.: it would delete another", errno.EINVAL, "rename it"
        )
