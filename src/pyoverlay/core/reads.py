"""The system calls by which a layer is read, one method each: what `Calls` is for those that change one, but that others may be quicker.

`Reads` makes them with the os module, whose stat_result holds 19 objects of which three are looked at, and which raises for each name that
is not there. Whoever has better ones puts them into `Layer.reads`: what is done with the answers is the same.
"""

from __future__ import annotations

import errno
import os
from typing import Protocol

from pyoverlay.core.syscalls import Stat


class Reads(Protocol):
    """The calls, under their names. Each raises what the call does, but for what it says it returns instead."""

    def lstat(self, dirfd: int, name: bytes, /) -> Stat | None:
        """None: there is no such name, or it is too long for this file system, and so not there (ovl_lookup_single)."""

    def fstat(self, fd: int, /) -> Stat: ...


class PlainReads:
    """Reads by the os module."""

    def lstat(self, dirfd: int, name: bytes, /) -> Stat | None:
        try:
            return os.stat(name, dir_fd=dirfd, follow_symlinks=False)
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                return None
            raise

    def fstat(self, fd: int, /) -> Stat:
        return os.fstat(fd)
