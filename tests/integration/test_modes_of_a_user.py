"""An ordinary user's daemon is held by modes that hold neither root nor, on ext4, what the user asks for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pyoverlay.testing import Directory, File, Tree, make_tree, snapshot
from tests.integration.unprivileged import USER, as_user

pytestmark = pytest.mark.root  # makes the user's directories

CLOSED: Tree = {
    "d": Directory({"f": "lower", "e": Directory({"g": "lower"}, mode=0o555), "closed": File("lower", mode=0o444)}, mode=0o555),
    "searched": Directory({"above": "above", "both": "above", ".wh.gone": ""}, mode=0o311),
}
BELOW: Tree = {"searched": {"below": "below", "both": "below", "gone": "below"}}

SCRIPT = """
$po mount lower:lower2 upper merged
cat merged/searched/above merged/searched/both merged/searched/below
cat merged/searched/gone 2>/dev/null || echo " none"
echo changed > merged/d/f
chmod 600 merged/d/closed
echo changed > merged/d/e/g
stat -c "%a %n" merged/d merged/d/e merged/d/closed
chmod 700 merged/d
mv merged/d merged/moved
cat merged/moved/f merged/moved/e/g merged/moved/closed
$po umount merged
$po mount lower:lower2 upper merged
cat merged/moved/f merged/moved/e/g
ls merged
$po umount merged
stat -c "%a %n" upper/moved/e
"""


def given(path: Path, tree: Tree) -> None:
    path.mkdir(exist_ok=True)
    make_tree(path, tree)
    for parent, directories, files in os.walk(path):
        for name in (".", *directories, *files):
            os.lchown(os.path.join(parent, name), USER, USER)


def test_files_in_closed_directories_are_changed_and_moved(home: Path) -> None:
    given(home / "lower", CLOSED)
    given(home / "lower2", BELOW)
    before = [snapshot(home / name) for name in ("lower", "lower2")]
    result = as_user(home, SCRIPT)
    assert result.stderr == ""
    assert result.stdout == (
        "aboveabovebelow none\n"
        "555 merged/d\n555 merged/d/e\n600 merged/d/closed\n"
        "changed\nchanged\nlower"
        "changed\nchanged\nmoved\nsearched\n"
        "555 upper/moved/e\n"
    )
    assert [snapshot(home / name) for name in ("lower", "lower2")] == before
