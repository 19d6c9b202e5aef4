"""Spread one tree over two layers, so that every directory of it is a merged one."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from tests.whoami import IS_ROOT


def split(lower: Path, upper: Path) -> None:
    """Given the same tree twice: leave in the upper every second object, and in the lower something else under those names.

    Directories stay in both. Objects with several links stay whole in the upper: an overlay cannot join links across layers. Times
    of the directories are put back.
    """
    with _Directory(lower) as below, _Directory(upper) as above:
        _split(below.fd, above.fd)


class _Directory:
    """A directory by descriptor, so that the tree may be deeper than a path can say; its times are put back at the end."""

    def __init__(self, path: Path | bytes, parent: int | None = None) -> None:
        self.fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)
        self._st = os.fstat(self.fd)

    def __enter__(self) -> _Directory:
        return self

    def __exit__(self, *_: object) -> None:
        os.utime(self.fd, ns=(self._st.st_atime_ns, self._st.st_mtime_ns))
        os.close(self.fd)


def _split(lower: int, upper: int) -> None:
    for position, text in enumerate(sorted(os.listdir(lower))):
        name = os.fsencode(text)
        st = os.stat(name, dir_fd=lower, follow_symlinks=False)
        if stat.S_ISDIR(st.st_mode):
            with _Directory(name, lower) as below, _Directory(name, upper) as above:
                _split(below.fd, above.fd)
        elif position % 2 and st.st_nlink == 1:
            os.unlink(name, dir_fd=upper)
        elif st.st_nlink == 1:
            os.unlink(name, dir_fd=lower)
            os.mkfifo(name, 0o600, dir_fd=lower)
            if IS_ROOT:
                os.chown(name, 7, 7, dir_fd=lower)
