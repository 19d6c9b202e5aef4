"""Rename: every kind of object over every kind of target, and the marks that make it right for whoever mounts the layers next."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable

import pytest

from pyoverlay.core.inode import Directory as MergedDirectory
from pyoverlay.core.names import path_in_lowers
from pyoverlay.core.policy import Policy, RedirectDir
from pyoverlay.core.rename import rename
from pyoverlay.core.syscalls import RENAME_EXCHANGE, RENAME_NOREPLACE, RENAME_WHITEOUT
from pyoverlay.testing import HardLink, Symlink, Tree, is_whiteout
from tests.unit.conftest import StackFactory
from tests.unit.merged import IS_ROOT, POLICY, Faulty, Merged, Stack, TreeSeen, mark, timeless

LOWER: Tree = {
    "parent": {"stays": "here"},
    "lower_file": "lower file",
    "copied_file": "copied file",
    "whiteout": "hidden",
    "whiteout_of_directory": {"hidden": "hidden"},
    "symlink": Symlink("target"),
    "lower_directory": {"one": "1", "deep": {"two": "2"}},
    "merged_directory": {"one": "1"},
    "opaque_directory": {"hidden": "hidden"},
    "empty_lower_directory": {},
    "emptied_directory": {"one": "1", "deep": {"two": "2"}},
}
BELOW: Tree = {"lower_directory": {"three": "3", "deep": {"four": "4"}}, "emptied_directory": {"three": "3"}}


def opaque_directory(m: Merged) -> None:
    m.unlink("opaque_directory/hidden")
    m.rmdir("opaque_directory")
    m.mkdir("opaque_directory")
    m.create("opaque_directory/new", b"new")


def merged_directory(m: Merged) -> None:
    m.create("merged_directory/new", b"new")


def pure_directory(m: Merged) -> None:
    m.mkdir("pure_directory", 0o750)
    m.mkdir("pure_directory/deep")
    m.create("pure_directory/deep/new", b"new")


def emptied_directory(m: Merged) -> None:
    for name in ("one", "three", "deep/two"):
        m.unlink(f"emptied_directory/{name}")
    m.rmdir("emptied_directory/deep")


def whiteout_of_directory(m: Merged) -> None:
    m.unlink("whiteout_of_directory/hidden")
    m.rmdir("whiteout_of_directory")


PREPARATIONS: dict[str, Callable[[Merged], object]] = {
    "copied_file": lambda m: m.chmod("copied_file", 0o600),
    "upper_file": lambda m: m.create("upper_file", b"upper file"),
    "whiteout": lambda m: m.unlink("whiteout"),
    "whiteout_of_directory": whiteout_of_directory,
    "opaque_directory": opaque_directory,
    "merged_directory": merged_directory,
    "pure_directory": pure_directory,
    "empty_upper_directory": lambda m: m.mkdir("empty_upper_directory"),
    "emptied_directory": emptied_directory,
}
FILES = ["lower_file", "copied_file", "upper_file", "symlink"]
FULL_DIRECTORIES = ["lower_directory", "merged_directory", "opaque_directory", "pure_directory"]
EMPTY_DIRECTORIES = ["empty_lower_directory", "empty_upper_directory", "emptied_directory"]
NOTHING = ["nothing", "whiteout", "whiteout_of_directory"]

SOURCES = [*FILES, *FULL_DIRECTORIES, "emptied_directory"]
TARGETS = [*NOTHING, *FILES, *EMPTY_DIRECTORIES, *FULL_DIRECTORIES]
FLAGS = {"": 0, "noreplace": RENAME_NOREPLACE, "exchange": RENAME_EXCHANGE}


def expected_errno(source: str, target: str, flags: int) -> int:
    if target in NOTHING:
        if flags & RENAME_EXCHANGE:
            return errno.ENOENT
        return 0
    if flags & RENAME_NOREPLACE:
        return errno.EEXIST
    if flags & RENAME_EXCHANGE:
        return 0
    if (source in FILES) != (target in FILES):
        return errno.EISDIR if source in FILES else errno.ENOTDIR
    return errno.ENOTEMPTY if target in FULL_DIRECTORIES else 0


def below(tree: TreeSeen, path: str) -> TreeSeen:
    top = os.fsencode(path)
    return {place[len(top) :]: entry for place, entry in tree.items() if place == top or place.startswith(top + b"/")}


def without(tree: TreeSeen, *paths: str) -> TreeSeen:
    return {place: entry for place, entry in tree.items() if not any(place in below_keys(tree, path) for path in paths)}


def below_keys(tree: TreeSeen, path: str) -> set[bytes]:
    top = os.fsencode(path)
    return {place for place in tree if place == top or place.startswith(top + b"/")}


def anonymous(tree: TreeSeen) -> list[tuple[object, ...]]:
    """By relative path, without the names that a snapshot carries."""
    return sorted((place, entry.kind, entry.mode, entry.size, entry.digest, entry.target, entry.xattrs) for place, entry in tree.items())


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("source", SOURCES)
def test_a_rename_moves_the_whole_object_and_nothing_else(stack: StackFactory, source: str, target: str, flags: str) -> None:
    for limit in (None, 4):  # all descriptors kept, and next to none
        judge_rename(stack(LOWER, BELOW, limit=limit), source, target, flags)


def judge_rename(one: Stack, source: str, target: str, flags: str) -> None:
    if source == target:
        target = "nothing"
    for name in (source, target):
        if name in PREPARATIONS:
            PREPARATIONS[name](one.merged)
    before = timeless(one.merged.tree())
    number = one.merged.ino(source)
    code = expected_errno(source, target, FLAGS[flags])
    if code:
        with pytest.raises(OSError) as caught:
            one.merged.rename(source, target, FLAGS[flags])
        assert errno.errorcode[caught.value.errno or 0] == errno.errorcode[code]
        assert timeless(one.merged.tree()) == one.disk_tree() == before
        return
    one.merged.rename(source, target, FLAGS[flags])
    after = timeless(one.merged.tree())
    assert after == one.disk_tree()
    assert anonymous(below(after, target)) == anonymous(below(before, source))
    assert anonymous(below(after, source)) == (anonymous(below(before, target)) if flags == "exchange" else [])
    assert without(after, source, target) == without(before, source, target)
    assert one.merged.ino(target) == number
    assert one.work_names() == []
    go_on(one, source, target)


def go_on(one: Stack, source: str, target: str) -> None:
    """What was moved is alive: it can be changed, moved on and back, and its old name made anew."""
    merged = one.merged
    if isinstance(merged.walk(target), MergedDirectory):
        merged.create(f"{target}/later", b"later")
    else:
        merged.chown(target, -1, -1)
    merged.rename(target, "parent/moved")
    assert merged.exists("parent/stays")
    if not merged.exists(source):
        merged.mkdir(source)
        assert merged.listdir(source) == []
        assert one.fresh().listdir(source) == []
        merged.rmdir(source)
        merged.rename("parent/moved", source)
    assert timeless(merged.tree()) == one.disk_tree()


def test_removing_all_after_all_kinds_of_renames_leaves_an_empty_tree(stack: StackFactory) -> None:
    one = stack(LOWER, BELOW)
    for name, prepare in PREPARATIONS.items():
        if name not in ("whiteout", "whiteout_of_directory"):
            prepare(one.merged)
    merged = one.merged
    merged.rename("upper_file", "parent/a")
    merged.rename("lower_file", "opaque_directory/b")
    merged.rename("pure_directory", "parent/c")
    if IS_ROOT:
        merged.rename("lower_directory", "parent/d")
        merged.rename("merged_directory", "emptied_directory")
    remove_all(merged, "")
    assert merged.listdir() == []
    assert one.disk_tree() == {}
    merged.forget()
    assert len(merged.view.table) == 1


def remove_all(merged: Merged, directory: str) -> None:
    for name in merged.listdir(directory):
        path = f"{directory}/{name}".lstrip("/")
        if isinstance(merged.walk(path), MergedDirectory):
            remove_all(merged, path)
            merged.rmdir(path)
        else:
            merged.unlink(path)


# -- the marks


@pytest.mark.root
def test_in_its_parent_a_lower_directory_is_redirected_by_a_name_elsewhere_by_a_path(stack: StackFactory) -> None:
    one = stack({"d": {"in": {"deep": {"file": "x"}}}, "e": {}})
    one.merged.rename("d/in", "d/out")
    assert os.getxattr(one.upper / "d/out", mark("redirect")) == b"in"
    assert is_whiteout(one.upper / "d/in")
    one.merged.rename("d/out/deep", "e/deep")
    assert os.getxattr(one.upper / "e/deep", mark("redirect")) == b"/d/in/deep"
    one.merged.rename("d/out", "e/out")
    assert os.getxattr(one.upper / "e/out", mark("redirect")) == b"/d/in"
    one.merged.rename("e/out", "e/again")
    assert os.getxattr(one.upper / "e/again", mark("redirect")) == b"/d/in"
    assert one.disk_tree() == timeless(one.merged.tree())
    deep = one.merged.walk("e/deep")
    assert isinstance(deep, MergedDirectory)
    assert path_in_lowers(deep) == b"/d/in/deep"


def test_an_upper_directory_that_comes_to_a_merged_parent_is_opaque_before_it_does(stack: StackFactory) -> None:
    """At no moment does it merge with what lowers have under its new name."""
    one = stack({"d": {"below": "x"}}, upper={"new": {"file": "y"}})
    one.merged.unlink("d/below")
    one.merged.rmdir("d")
    one.merged.rename("new", "d")
    assert os.getxattr(one.upper / "d", mark("opaque")) == b"y"
    assert one.merged.listdir("d") == one.fresh().listdir("d") == ["file"]


@pytest.mark.parametrize(("name", "is_impure"), [("new", False), ("lower_file", True)])
def test_a_directory_is_impure_where_something_of_a_lower_came_to_it(stack: StackFactory, name: str, is_impure: bool) -> None:
    """Only there are inode numbers looked up by origin, which costs each entry an attribute (ovl_rename)."""
    one = stack(LOWER)
    one.merged.create("new")
    one.merged.mkdir("made")
    one.merged.rename(name, "made/moved")
    assert (mark("impure") in os.listxattr(one.upper / "made")) is is_impure


@pytest.mark.parametrize("redirect_dir", [RedirectDir.OFF, RedirectDir.FOLLOW, RedirectDir.NOFOLLOW])
def test_without_redirects_a_lower_directory_is_exdev_and_a_new_one_moves_and_hides(stack: StackFactory, redirect_dir: RedirectDir) -> None:
    policy = Policy(userxattr=POLICY.userxattr, privileged=POLICY.privileged, redirect_dir=redirect_dir)
    one = stack({"d": {"below": "x"}, "e": {"hidden": "y"}}, policy=policy)
    with pytest.raises(OSError) as caught:
        one.merged.rename("d", "new")
    assert caught.value.errno == errno.EXDEV
    one.merged.unlink("e/hidden")
    one.merged.rmdir("e")
    one.merged.mkdir("made")
    one.merged.rename("made", "e")
    assert one.merged.listdir("e") == one.fresh().listdir("e") == []


def test_a_whiteout_stays_only_where_a_lower_would_show(stack: StackFactory) -> None:
    one = stack({"lower": "x", "gone": "y"})
    one.merged.unlink("gone")
    one.merged.rename("lower", "new")
    assert is_whiteout(one.upper / "lower")
    one.merged.rename("new", "newer")
    assert not os.path.lexists(one.upper / "new")
    one.merged.rename("newer", "gone")
    assert not os.path.lexists(one.upper / "newer")
    assert one.merged.listdir() == one.fresh().listdir() == ["gone"]


def test_renaming_one_name_of_a_file_over_another_does_nothing(stack: StackFactory) -> None:
    one = stack({"a": "x", "b": HardLink("a")})
    one.merged.walk("a")
    parent = one.merged.view.root
    rename(one.merged.view, parent, b"a", parent, b"b")
    assert one.merged.listdir() == ["a", "b"]
    one.merged.write("a", b"y")
    rename(one.merged.view, parent, b"a", parent, b"b")
    assert one.merged.listdir() == one.fresh().listdir() == ["a", "b"]


def test_a_rename_with_a_whiteout_is_einval(stack: StackFactory) -> None:
    one = stack({"file": "x"})
    parent = one.merged.view.root
    with pytest.raises(OSError) as caught:
        rename(one.merged.view, parent, b"file", parent, b"new", RENAME_WHITEOUT)
    assert caught.value.errno == errno.EINVAL
    assert one.merged.listdir() == ["file"]


@pytest.mark.root
@pytest.mark.parametrize("code", [errno.E2BIG, errno.ERANGE])
def test_a_redirect_too_long_for_an_attribute_is_exdev(stack: StackFactory, code: int) -> None:
    one = stack({"d": {"file": "x"}, "e": {}})

    class Short(Faulty):
        def setxattr(self, dirfd: int, name: bytes, attribute: bytes, value: bytes, flags: int) -> None:
            if attribute == os.fsencode(mark("redirect")):
                raise OSError(code, os.strerror(code))
            super().setxattr(dirfd, name, attribute, value, flags)

    one.merged.view.upper.calls = Short(0, AssertionError())
    with pytest.raises(OSError) as caught:
        one.merged.rename("d", "e/new")
    assert caught.value.errno == errno.EXDEV
    assert one.merged.listdir() == ["d", "e"]


def test_a_target_whose_whiteouts_were_cleared_lives_on_if_the_rename_then_fails(stack: StackFactory) -> None:
    one = stack(LOWER, BELOW)
    pure_directory(one.merged)
    emptied_directory(one.merged)
    target = one.merged.walk("emptied_directory")
    calls = one.merged.view.upper.calls

    class Once(Faulty):
        def rename(self, dirfd: int, name: bytes, new_dirfd: int, new: bytes, flags: int = 0) -> None:
            if name == b"pure_directory":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            super().rename(dirfd, name, new_dirfd, new, flags)

    one.merged.view.upper.calls = Once(0, AssertionError())
    with pytest.raises(OSError):
        one.merged.rename("pure_directory", "emptied_directory")
    one.merged.view.upper.calls = calls
    assert one.merged.walk("emptied_directory") is target
    one.merged.create("emptied_directory/new", b"alive")
    assert one.merged.read("emptied_directory/new") == one.fresh().read("emptied_directory/new") == b"alive"
    assert stat.S_ISDIR(one.merged.stat("emptied_directory").st_mode)


@pytest.mark.parametrize("is_copied", [False, True])
def test_what_was_replaced_lives_on_as_long_as_it_is_known(stack: StackFactory, is_copied: bool) -> None:
    one = stack({"new": "new", "old": "old"})
    if is_copied:
        one.merged.chmod("old", 0o600)
    inode = one.merged.walk("old")
    one.merged.rename("new", "old")
    one.merged.view.cache.limit = 0
    for _ in range(2):
        one.merged.view.trim()
    assert one.merged.read_inode(inode) == b"old"
    assert one.merged.view.nlink(inode, one.merged.view.stat(inode)) == 0
    assert one.merged.read("old") == b"new"


@pytest.mark.root  # `user.` marks do not redirect
def test_a_directory_renamed_twice_in_its_parent_goes_on_to_name_what_the_lowers_call_it(stack: StackFactory) -> None:
    one = stack({"a": {"in": "in"}})
    one.merged.rename("a", "b")
    one.merged.rename("b", "c")
    assert os.getxattr(one.upper / "c", mark("redirect")) == b"a"
    assert one.fresh().listdir("c") == ["in"]
