"""What lies below an object: the directories that are merged with it, the file that holds its data.

Both are found by going down the lowers, from the top, with a path that the marks on the way may change: `redirect` leads elsewhere,
`opaque` ends the search, `metacopy` lets it go on for a file as it does for directories. It is the loop of ovl_lookup and what it calls,
fs/overlayfs/namei.c.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import NamedTuple

from pyoverlay.core import marks
from pyoverlay.core.inode import UPPER, Data
from pyoverlay.core.layer import Layer, LowerDir, Place, next_with
from pyoverlay.core.syscalls import Stat

Path = tuple[bytes, ...]
Found = tuple[tuple[LowerDir, ...], Stat | None]


class _Step(NamedTuple):
    """What one layer has to say of a directory: it is there or not; whether the layers below count; under which names they are asked."""

    directory: LowerDir | None
    st: Stat | None
    hides_below: bool
    names: Path
    from_root: bool


class _FileStep(NamedTuple):
    """The same of a file. data: it is there, with its data. is_absolute: it is there, and an absolute redirect leads on."""

    data: Data | None
    hides_below: bool
    names: Path
    from_root: bool
    is_metacopy: bool = False
    is_absolute: bool = False


class Merge:
    """The lowers, as one looks down on them.

    roots: the lowers' roots, from the top. has_data_layers: below them lie layers that only an absolute redirect reaches. follows: redirect
    and metacopy marks are followed; else they are EPERM, for a user could have written them. masked: (st_dev, st_ino) of the directories
    that show empty.
    """

    def __init__(self, roots: tuple[LowerDir, ...], *, has_data_layers: bool, follows: bool, masked: frozenset[tuple[int, int]]) -> None:
        self._roots = roots
        self._has_data_layers = has_data_layers
        self._follows = follows
        self._masked = masked

    # -- directories

    def redirect(self, layer: Layer, dirfd: int, name: bytes) -> bytes:
        """The redirect of an object that bears one. EINVAL: it is none; EPERM where it may not be followed (ovl_lookup)."""
        if not self._follows:
            raise _failure(errno.EPERM)
        return marks.check_redirect(layer.getmark(dirfd, name, marks.REDIRECT) or b"")

    def below(self, parents: tuple[LowerDir, ...], name: bytes, redirect: bytes | None) -> Found:
        """The lower directories under an upper one, and what the first says of itself."""
        if redirect is None:
            return self.stack(parents, (name,))
        if redirect.startswith(b"/"):
            return self.stack(self._roots, _components(redirect))
        return self.stack(parents, (redirect,))

    def stack(self, parents: tuple[LowerDir, ...], names: Path) -> Found:
        """The directories of that path under these, from the top, until one hides the rest; and what the first says of itself."""
        found: list[LowerDir] = []
        first: Stat | None = None
        index = 0
        while (index := next_with(names[0], parents, index)) < len(parents):
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
                parents, index = self._roots, self._index_below(base.layer)
        return tuple(found), first

    def _index_below(self, layer: Layer) -> int:
        """Where the lowers below a layer begin."""
        return sum(root.layer.index <= layer.index for root in self._roots)

    def _descend(self, base: LowerDir, names: Path, *, is_last: bool) -> _Step:
        """Follow a path in one layer, reading on each directory the marks that count for the layers below."""
        passed: list[LowerDir] = []
        try:
            return self._walk(base, names, passed, is_last=is_last)
        finally:
            for directory in passed:
                base.layer.cache.close(directory)  # nobody is left who would

    def _walk(self, base: LowerDir, names: Path, passed: list[LowerDir], *, is_last: bool) -> _Step:
        here, layer, below, from_root, hides_below = base, base.layer, names, False, False
        # The last of these parents may still lead on, by an absolute redirect, to layers that have no such parent; the lowest layer
        # leads nowhere.
        has_marks = layer is not self._roots[-1].layer if self._follows else not is_last
        st: Stat | None = None
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
            if here is not base:
                passed.append(here)
            here = LowerDir(layer, here, name, self._is_masked(layer, at, name, st))
            opaque = layer.getmark(at, name, marks.OPAQUE) if marks.OPAQUE in found else None
            if has_marks:
                here.has_xattr_whiteouts = opaque == b"x"
            if opaque == b"y":
                hides_below = True
            elif marks.REDIRECT in found:
                redirect = self.redirect(layer, at, name)
                is_absolute = redirect.startswith(b"/")
                head = _components(redirect) if is_absolute else (*below[: len(below) - len(names) + place], redirect)
                below = (*head, *names[place + 1 :])
                if is_absolute:
                    # It leads out of whatever an opaque directory above hides (ovl_check_redirect).
                    from_root, hides_below = True, False
        return _Step(here, st, hides_below, below, from_root)

    def _is_masked(self, layer: Layer, dirfd: int, name: bytes, st: Stat) -> bool:
        if (st.st_dev, st.st_ino) in self._masked:
            return True
        return not layer.is_clone and layer.statx(dirfd, name).is_mount_root

    # -- the data of files

    def data(self, place: Place, mark: bytes, parents: tuple[LowerDir, ...], name: bytes) -> Data:
        """Where the data of a metacopy file lie. mark: the value of its `metacopy`; parents: its directory in the layers below its own;
        name: what the file is called there if nothing says otherwise.

        EPERM: such files are not followed; EIO: the mark is malformed, or there are no data (ovl_lookup).
        """
        if not self._follows:
            raise _failure(errno.EPERM)
        marks.check_metacopy(mark)
        layer = place.layer
        redirect = self._redirect_of_file(*place)
        is_absolute = redirect is not None and redirect.startswith(b"/")
        names = _components(redirect) if redirect is not None else (name,)
        if is_absolute:
            parents = self._roots[self._index_below(layer) :]
        found = self._find_data(parents, names, leads_to_data_layers=is_absolute and layer.index != UPPER)
        return found._replace(mark=mark)

    def _find_data(self, parents: tuple[LowerDir, ...], names: Path, *, leads_to_data_layers: bool) -> Data:
        """Down the layers, past files that are metacopies themselves. An upper reaches a data-only layer by way of a lower alone."""
        index = 0
        while index < len(parents):
            base = parents[index]
            index += 1
            step = self._descend_to_file(base, names)
            if step.data is not None:
                return step.data
            if step.is_metacopy:
                leads_to_data_layers = step.is_absolute
            if step.hides_below:
                break
            names = step.names
            if step.from_root:
                parents, index = self._roots, self._index_below(base.layer)
        if self._has_data_layers and leads_to_data_layers:
            return Data(None, b"", names)
        raise _failure(errno.EIO)

    def _descend_to_file(self, base: LowerDir, names: Path) -> _FileStep:
        *above, name = names
        step = self._descend(base, tuple(above), is_last=False)
        here, layer = step.directory, base.layer
        absent = _FileStep(None, step.hides_below, (*step.names, name), step.from_root)
        if here is None:
            return absent
        is_there, hides = layer.shows(here, name)
        hides_below = step.hides_below or hides
        if not is_there:
            return absent._replace(hides_below=hides_below)
        dirfd = layer.dirfd(here)
        st = layer.stat(dirfd, name)
        if st is None or not stat.S_ISREG(st.st_mode):
            return absent._replace(hides_below=True)
        mark = layer.getmark(dirfd, name, marks.METACOPY)
        if mark is None:
            return absent._replace(data=Data(here, name))
        marks.check_metacopy(mark)
        redirect = self._redirect_of_file(layer, dirfd, name)
        if redirect is None:
            return _FileStep(None, hides_below, absent.names, step.from_root, is_metacopy=True)
        if redirect.startswith(b"/"):
            return _FileStep(None, False, _components(redirect), True, is_metacopy=True, is_absolute=True)
        return _FileStep(None, hides_below, (*step.names, redirect), step.from_root, is_metacopy=True)

    def _redirect_of_file(self, layer: Layer, dirfd: int, name: bytes) -> bytes | None:
        value = layer.getmark(dirfd, name, marks.REDIRECT)
        return marks.check_redirect(value) if value is not None else None


def _components(redirect: bytes) -> Path:
    return tuple(redirect.removeprefix(b"/").split(b"/"))


def _failure(code: int) -> OSError:
    return OSError(code, os.strerror(code))
