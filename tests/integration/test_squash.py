"""-o squash_to_uid, squash_to_gid: in the view all belongs to one owner, and so does what is copied up or made."""

from __future__ import annotations

import os
import stat

import pytest

from pyoverlay.testing import OverlayFactory
from tests.posix.check import NOBODY, as_user

pytestmark = pytest.mark.root


def owners(*paths: os.PathLike[str]) -> set[tuple[int, int]]:
    return {(st.st_uid, st.st_gid) for st in map(os.lstat, paths)}


def test_a_user_changes_what_is_roots_in_the_lower(overlay: OverlayFactory) -> None:
    here = overlay({"d": {"f": b"roots"}}, options=["-o", f"squash_to_uid={NOBODY},squash_to_gid={NOBODY}"])
    d = here.merged / "d"
    assert owners(d, d / "f") == {(NOBODY, NOBODY)}

    def use() -> None:
        with open("f", "ab") as file:
            file.write(b", and a user's")
        os.chmod("f", 0o640)

    as_user(d, use)
    assert (d / "f").read_bytes() == b"roots, and a user's"
    assert owners(here.writable / "d", here.writable / "d/f", d / "f") == {(NOBODY, NOBODY)}
    assert stat.S_IMODE(os.stat(here.writable / "d/f").st_mode) == 0o640
    assert owners(here.lower / "d/f") == {(0, 0)}
