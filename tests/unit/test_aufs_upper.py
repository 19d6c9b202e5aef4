"""`whiteouts=aufs`: an upper in which somebody else has spelled whiteouts `.wh.NAME`."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import replace

import pytest

from pyoverlay.core.policy import Whiteouts
from pyoverlay.testing import Symlink, Tree
from tests.unit.conftest import StackFactory
from tests.unit.merged import POLICY, Stack

AUFS = replace(POLICY, whiteouts=Whiteouts.AUFS)

LOWER: Tree = {"gone": "old", "kept": "kept", "dir": {"below": "old"}, "opaque": {"hidden": "old", "again": "old"}}
UPPER: Tree = {
    ".wh.gone": "",
    ".wh.dir": "",
    ".wh.filled": "data",
    "new": "new",
    "opaque": {".wh..wh..opq": "", "again": "new", "own": "new"},
}


@pytest.fixture
def one(stack: StackFactory) -> Stack:
    return stack(LOWER, upper=UPPER, policy=AUFS)


def code(act: Callable[[], object]) -> str:
    with pytest.raises(OSError) as caught:
        act()
    return errno.errorcode[caught.value.errno or 0]


def test_they_hide_what_a_lower_has_and_themselves(one: Stack) -> None:
    for name in ("gone", ".wh.gone", "dir", ".wh.dir", "opaque/hidden", "opaque/.wh..wh..opq"):
        assert not one.merged.exists(name)
    assert sorted(one.merged.listdir()) == [".wh.filled", "kept", "new", "opaque"]
    assert sorted(one.merged.listdir("opaque")) == ["again", "own"]
    assert one.merged.read("opaque/again") == b"new"
    assert not one.merged.exists("gone")  # and by the listing


def test_looking_changes_nothing(stack: StackFactory) -> None:
    one = stack(LOWER, upper=UPPER, policy=AUFS)
    before = one.disk_tree()
    one.merged.tree()
    assert one.disk_tree() == before


def test_elsewhere_they_are_ordinary_files(stack: StackFactory) -> None:
    one = stack(LOWER, upper=UPPER)
    assert one.merged.exists("gone")
    assert one.merged.exists(".wh.gone")
    assert sorted(one.merged.listdir("opaque")) == [".wh..wh..opq", "again", "hidden", "own"]


@pytest.mark.parametrize("lists_first", [False, True], ids=["unlisted", "listed"])
def test_a_name_that_one_hides_can_be_had_anew(one: Stack, lists_first: bool) -> None:
    if lists_first:
        one.merged.listdir()
    one.merged.create("gone", b"anew")
    one.merged.mkdir("dir")
    merged = one.fresh()
    assert merged.read("gone") == b"anew"
    assert merged.listdir("dir") == []
    for name in ("gone", "dir"):
        assert not (one.upper / f".wh.{name}").exists()
    merged.unlink("gone")
    merged.rmdir("dir")
    merged = one.fresh()
    assert not merged.exists("gone")
    assert not merged.exists("dir")


def test_a_link_and_a_rename_go_to_a_name_that_one_hides(one: Stack) -> None:
    one.merged.link("new", "gone")
    one.merged.mkdir("made")
    one.merged.rename("made", "dir")
    merged = one.fresh()
    assert merged.read("gone") == b"new"
    assert merged.listdir("dir") == []


def test_a_name_that_would_read_as_one_cannot_be_made(one: Stack) -> None:
    assert code(lambda: one.merged.create(".wh.x")) == "EINVAL"
    assert code(lambda: one.merged.mkdir(".wh.x")) == "EINVAL"
    assert code(lambda: one.merged.symlink("x", ".wh.x")) == "EINVAL"
    assert code(lambda: one.merged.link("new", ".wh.x")) == "EINVAL"
    assert code(lambda: one.merged.rename("new", ".wh.x")) == "EINVAL"
    assert one.merged.read("new") == b"new"


def test_a_directory_that_holds_nothing_else_is_empty(stack: StackFactory) -> None:
    one = stack({"d": {"a": "", "b": ""}}, upper={"d": {".wh.a": "", ".wh.b": ""}}, policy=AUFS)
    assert one.merged.listdir("d") == []
    one.merged.rmdir("d")
    assert not one.fresh().exists("d")


def test_a_symlink_in_the_place_of_a_directory_is_not_followed_to_its_mark(stack: StackFactory) -> None:
    """Swapped in between the look and the question; outside there is what would hide all below."""
    one = stack(LOWER, upper={"link": Symlink("elsewhere"), "elsewhere": {".wh..wh..opq": ""}}, policy=AUFS)
    upper = one.merged.view.upper
    assert upper.is_aufs_opaque(upper.root_fd, b"elsewhere")
    with pytest.raises(OSError) as caught:
        upper.is_aufs_opaque(upper.root_fd, b"link")
    assert caught.value.errno in (errno.ENOTDIR, errno.ELOOP)
