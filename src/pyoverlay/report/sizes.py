"""Sizes as Docker counts and prints them."""

from __future__ import annotations

import errno
import stat
from dataclasses import dataclass

from pyoverlay.core.layer import Lower, LowerDir
from pyoverlay.core.policy import Policy
from pyoverlay.core.stack import open_probed

_UNITS = ("B", "kB", "MB", "GB", "TB", "PB", "EB")


def human(size: int) -> str:
    """Three digits in units of 1000, as `docker ps` prints sizes (go-units, HumanSizeWithPrecision): 2.82kB, 10.5MB, 0B."""
    value, unit = float(size), 0
    while float(text := f"{value:.3g}") >= 1000 and unit < len(_UNITS) - 1:
        value /= 1000
        unit += 1
    return text + _UNITS[unit]


@dataclass(frozen=True, slots=True)
class Usage:
    """What a layer holds. size: bytes. unreadable: directories that this user may not read, and that are not counted."""

    size: int = 0
    unreadable: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(self.size + other.size, self.unreadable + other.unreadable)


def usage(layer: bytes, policy: Policy, masked: frozenset[tuple[int, int]]) -> Usage:
    """The apparent size of everything in a layer that is no directory, each hard link once (moby, daemon/internal/directory).

    masked: directories that are not looked into, by (st_dev, st_ino): an upper that lies in a lower. What is mounted inside is left out,
    as in the merged view. No atime moves. Raises OSError with the path as its filename.
    """
    view = open_probed([layer], policy, masked=masked)
    try:
        return _Count(view.lowers[0], masked).run()
    finally:
        view.close()


class _Count:
    """One pass, with a stack of its own: a tree may be deeper than Python's."""

    def __init__(self, layer: Lower, masked: frozenset[tuple[int, int]]) -> None:
        self._layer = layer
        self._masked = masked
        self._linked: set[int] = set()  # by inode number, what has several names
        self._size = 0
        self._unreadable = 0

    def run(self) -> Usage:
        pending = [self._layer.root]
        while pending:
            directory = pending.pop()
            try:
                pending += self._subdirectories(directory)
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EPERM, errno.EXDEV, errno.ENOENT):
                    raise
                # EXDEV: a mount point, in a layer that could not be cloned. ENOENT: removed meanwhile.
                self._unreadable += error.errno in (errno.EACCES, errno.EPERM)
            self._layer.cache.trim()
        return Usage(self._size, self._unreadable)

    def _subdirectories(self, directory: LowerDir) -> list[LowerDir]:
        """Those of a directory, whose other entries are counted."""
        dirfd = self._layer.dirfd(directory)
        found = []
        for name, form in self._layer.scan(dirfd).items():
            st = self._layer.stat(dirfd, name) if form != stat.S_IFDIR or self._masked else None
            is_directory = form == stat.S_IFDIR or (st is not None and stat.S_ISDIR(st.st_mode))
            if is_directory and (st is None or (st.st_dev, st.st_ino) not in self._masked):
                found.append(LowerDir(self._layer, directory, name))
            elif not is_directory and st is not None and (st.st_nlink == 1 or st.st_ino not in self._linked):
                self._size += st.st_size
                if st.st_nlink > 1:
                    self._linked.add(st.st_ino)
        return found
