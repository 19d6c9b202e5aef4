"""Whatever a mark says, its object alone is refused, with an errno that callers know; everything beside it works."""

from __future__ import annotations

import errno
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyoverlay.testing import HardLink, Tree
from tests.unit.merged import POLICY, Stack

pytestmark = pytest.mark.root

MARKS = ("opaque", "redirect", "metacopy", "origin", "impure", "nlink", "whiteout", "upper", "uuid", "protattr", "overlay.opaque")
PATHS = ("upper/d", "upper/f", "upper/linked", "lower1/d", "lower1/f", "lower1/d/in")
ANSWERS = {errno.EIO, errno.EINVAL}

# Bytes at random, and what is nearly right: paths, with "..", of endless names; handles and digests cut short or too long.
VALUES = st.one_of(
    st.binary(max_size=64),
    st.lists(st.sampled_from([b"..", b".", b"", b"d", b"f", b"in", b"x" * 300, b"\xff"]), max_size=9).map(b"/".join),
    st.tuples(st.sampled_from([b"/", b"", b"\0\xfb", b"\0\4\0\1", b"U", b"L-", b"y"]), st.binary(max_size=2000)).map(b"".join),
)

UPPER: Tree = {"d": {"new": "new"}, "f": "f", "linked": "linked", "also": HardLink("linked"), "fine": "fine"}
LOWER: Tree = {"d": {"in": "in"}, "f": "f", "g": "g"}
BELOW: Tree = {"d": {"in": "below", "deep": {"file": "file"}}, "f": "below"}


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("marks")


@settings(max_examples=150, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
@given(marked=st.lists(st.tuples(st.sampled_from(PATHS), st.sampled_from(MARKS), VALUES), min_size=1, max_size=4), index=st.booleans())
def test_a_mark_spoils_nothing_but_its_object(apart: Path, marked: list[tuple[str, str, bytes]], index: bool) -> None:
    one = Stack(apart / "stack", (LOWER, BELOW), UPPER, replace(POLICY, index=index))
    try:
        one.close()
        for path, name, value in marked:
            if path.startswith("upper/f"):
                os.truncate(apart / "stack" / path, 9000)  # a hole, as a metacopy is
            os.setxattr(apart / "stack" / path, f"trusted.overlay.{name}", value)
        merged = one.open()
        assert {"d", "f", "linked", "also", "fine", "g"} <= set(merged.listdir())
        assert merged.read("fine") == b"fine"
        for path in ("d", "f", "linked", "also", "d/in", "d/new", "d/deep/file", "g"):
            try:
                inode = merged.walk(path)
                if inode.is_regular:
                    merged.read_inode(inode)
                    merged.write(path, b"changed")
                    assert merged.read(path).startswith(b"changed")
                else:
                    merged.listdir(path)
            except (FileNotFoundError, NotADirectoryError):
                assert path.startswith("d/"), path
            except OSError as error:
                assert error.errno in ANSWERS, (path, error)
        assert merged.read("fine") == b"fine"
    finally:
        one.close()
        shutil.rmtree(apart / "stack")
