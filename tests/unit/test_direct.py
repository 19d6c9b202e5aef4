"""What the receiver calls by itself, without a mount."""

from __future__ import annotations

import os

from pyoverlay.fuse import direct
from pyoverlay.fuse.answers import Answers
from pyoverlay.testing import Directory
from tests.unit.conftest import StackFactory

SECOND = 10**9
ATIME, MTIME, ATIME_NOW, MTIME_NOW = 1 << 4, 1 << 5, 1 << 7, 1 << 8  # FATTR_* of <linux/fuse.h>


def test_the_present_is_told_by_the_clock_of_the_upper(stack: StackFactory) -> None:
    """The daemon's own is ahead of it by up to 4 ms: touch(1), and what was written next looked older to make(1). A directory: of a file
    with a descriptor the extension changes the times itself.
    """
    one = stack({"d": Directory({}, mtime_ns=5)})
    found = one.merged.view.lookup(one.merged.view.root, b"d")
    assert found is not None
    setattr_ = direct.functions(Answers(one.merged.view))[direct.SETATTR]
    setattr_(found[0].ino, ATIME | MTIME | ATIME_NOW | MTIME_NOW, 0, 0, 0, 0, 3, 4, 3, 4)
    st = os.stat(one.upper / "d")
    assert st.st_atime_ns == st.st_mtime_ns == st.st_ctime_ns
    setattr_(found[0].ino, ATIME | MTIME | MTIME_NOW, 0, 0, 0, 0, 3, 4, 3, 4)
    st = os.stat(one.upper / "d")
    assert (st.st_atime_ns, st.st_mtime_ns) == (3 * SECOND + 4, st.st_ctime_ns)
