"""Lowers that are asked for single names.

A mount reads a lower directory once and answers from the listing ever after. Whoever wants to know of a few names, and then ends, would
pay for a directory of a hundred thousand with each: here a name costs the same few system calls however many lie beside it.
"""

from __future__ import annotations

import stat

from pyoverlay.core import marks
from pyoverlay.core.layer import Lower, LowerDir


class ProbedLower(Lower):
    """A Lower that looks for one name at a time. Its listings are read as ever."""

    def shows(self, directory: LowerDir, name: bytes) -> tuple[bool, bool]:
        if directory.is_masked:
            return False, False
        dirfd = self.dirfd(directory)
        hides_all = self._has_empty_file(dirfd, marks.AUFS_OPAQUE)
        st = self.stat(dirfd, name)
        if st is None:
            return False, hides_all or self._has_empty_file(dirfd, marks.AUFS_PREFIX + name)
        if not self.is_whiteout(directory, name, st):
            return True, hides_all
        # An aufs whiteout hides the name without its prefix, not its own.
        return False, hides_all or not (self._reads_aufs and name.startswith(marks.AUFS_PREFIX) and stat.S_ISREG(st.st_mode))

    def _has_empty_file(self, dirfd: int, name: bytes) -> bool:
        """Is the whiteout `name` of aufs there?"""
        if not self._reads_aufs:
            return False
        st = self.stat(dirfd, name)
        return st is not None and marks.may_be_whiteout_file(st)
