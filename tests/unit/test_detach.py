"""Renaming directories of lowers with `user.` marks, where no redirect may be written: their trees are copied up."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import replace

import pytest
import trio

from pyoverlay.core.detach import Detachment
from pyoverlay.core.inode import Directory as Inode
from pyoverlay.core.inode import Inode as Node
from pyoverlay.core.policy import RedirectDir
from pyoverlay.core.syscalls import RENAME_EXCHANGE
from pyoverlay.fuse import detaching
from pyoverlay.fuse.asking import Asking
from pyoverlay.fuse.detaching import UnderWay
from pyoverlay.testing import Directory, Fifo, File, HardLink, Symlink, Tree, is_whiteout
from tests.unit.conftest import StackFactory
from tests.unit.merged import POLICY, Faulty, Merged, Stack, TreeSeen, timeless

USER = replace(POLICY, userxattr=True)
OPAQUE = "user.overlay.opaque"

LOWER: Tree = {
    "d": {
        "f": File("lower", mode=0o640, xattrs={"user.note": b"kept"}),
        "linked": "linked",
        "e": {"deep": {"g": "deep"}, "s": Symlink("../f"), "p": Fifo()},
        "gone": "hidden",
    },
    "outside": HardLink("d/linked"),
    "other": {"x": "x"},
    "empty": {},
}
BELOW: Tree = {"d": {"below": "below", "e": {"deep": {"h": "below"}}}}


@pytest.fixture
def one(stack: StackFactory) -> Stack:
    return stack(LOWER, BELOW, policy=USER)


def moved(tree: TreeSeen, old: bytes, new: bytes) -> TreeSeen:
    """The tree as it is after a rename."""

    def path(of: bytes) -> bytes:
        return new + of[len(old) :] if of == old or of.startswith(old + b"/") else of

    return {path(name): replace(entry, first_name=path(entry.first_name)) for name, entry in tree.items()}


def numbers(merged: Merged, top: str) -> dict[str, int]:
    found = {"": merged.ino(top)}
    for name in merged.listdir(top):
        inode = merged.walk(f"{top}/{name}")
        below = numbers(merged, f"{top}/{name}") if isinstance(inode, Inode) else {"": inode.ino}
        found |= {f"/{name}{rest}": ino for rest, ino in below.items()}
    return found


@pytest.mark.parametrize("to", ["new", "other/new", "empty"])
def test_a_merged_directory_moves_with_all_it_shows(one: Stack, to: str) -> None:
    one.merged.unlink("d/gone")
    one.merged.create("d/e/new", b"new")
    before, inodes = timeless(one.merged.tree()), numbers(one.merged, "d")
    one.merged.rename("d", to)
    expected = moved({name: entry for name, entry in before.items() if name != to.encode()}, b"d", to.encode())
    assert timeless(one.merged.tree()) == expected
    assert numbers(one.merged, to) == inodes
    assert one.work_names() == []
    assert is_whiteout(one.upper / "d")
    assert os.getxattr(one.upper / to, OPAQUE) == os.getxattr(one.upper / to / "e", OPAQUE) == b"y"
    assert not [path for path in (one.upper / to).rglob("*") if is_whiteout(path)]
    assert timeless(one.open().tree()) == expected


def test_what_was_open_before_goes_on(one: Stack) -> None:
    inode = one.merged.walk("d/e/deep/g")
    reader = one.merged.view.data_fd(inode)
    one.merged.rename("d", "new")
    one.merged.write("new/e/deep/g", b"DEEP")
    assert os.pread(reader, 10, 0) == b"DEEP"
    assert one.merged.walk("new/e/deep/g") is inode


def test_both_sides_of_an_exchange_move(one: Stack) -> None:
    one.merged.rename("d", "other", RENAME_EXCHANGE)
    assert one.open().read("other/e/deep/h") == b"below"
    assert one.merged.read("d/x") == b"x"


def test_a_second_rename_copies_nothing(one: Stack) -> None:
    one.merged.rename("d", "new")
    counted = one.merged.view.upper.calls = Faulty(0, AssertionError())
    one.merged.rename("new", "newer")
    assert counted.made == ["rename"]


def test_past_the_limit_it_is_exdev_and_nothing_was_copied(stack: StackFactory) -> None:
    one = stack({"d": {"big": "x" * 100_000, "small": "small"}, "e": {"small": "small"}}, policy=replace(USER, rename_copy_limit=50_000))
    with pytest.raises(OSError) as caught:
        one.merged.rename("d", "new")
    assert caught.value.errno == errno.EXDEV
    assert os.listdir(one.upper) == os.listdir(one.work / "work") == []
    one.merged.rename("e", "new")
    assert one.open().read("new/small") == b"small"


def test_holes_do_not_count(stack: StackFactory) -> None:
    one = stack({"d": {"sparse": File("x", size=1 << 30)}}, policy=replace(USER, rename_copy_limit=1 << 20))
    one.merged.rename("d", "new")
    assert os.stat(one.upper / "new/sparse").st_blocks <= 16


@pytest.mark.parametrize("redirect_dir", [RedirectDir.OFF, RedirectDir.NOFOLLOW])
def test_who_asked_for_no_redirects_gets_exdev(stack: StackFactory, redirect_dir: RedirectDir) -> None:
    one = stack(LOWER, policy=replace(USER, redirect_dir=redirect_dir))
    with pytest.raises(OSError) as caught:
        one.merged.rename("d", "new")
    assert caught.value.errno == errno.EXDEV


def test_whatever_fails_the_tree_stays_and_the_work_directory_is_empty(stack: StackFactory) -> None:
    at = 0
    while True:
        at += 1
        one = stack(LOWER, BELOW, policy=USER)
        one.merged.unlink("d/gone")
        before, calls = timeless(one.merged.tree()), one.merged.view.upper.calls
        faulty = one.merged.view.upper.calls = Faulty(at, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        try:
            one.merged.rename("d", "new")
        except OSError as error:
            assert error.errno == errno.ENOSPC
            assert timeless(one.merged.tree()) == one.disk_tree() == before
            one.merged.view.upper.calls = calls
            one.merged.rename("d", "new")
        one.merged.view.upper.calls = calls
        assert one.work_names() == one.litter()
        assert timeless(one.merged.tree()) == one.disk_tree() == moved(before, b"d", b"new")
        one.close()
        if faulty.count < at:
            return


def test_before_the_first_file_is_published_a_failure_leaves_nothing(one: Stack) -> None:
    directory = one.merged.walk("d")
    assert isinstance(directory, Inode)
    with Detachment(one.merged.view, directory, 1 << 20) as tree:
        for _ in tree.survey():
            pass
        assert [tree.prepare(inode) is not None for inode in tree.files] == [True] * len(tree.files)
        assert len(one.work_names()) == 8
    assert one.work_names() == []
    assert [name for _, _, names in os.walk(one.upper) for name in names] == []


def test_others_may_change_the_tree_meanwhile(one: Stack) -> None:
    directory = one.merged.walk("d")
    assert isinstance(directory, Inode)
    with Detachment(one.merged.view, directory, 1 << 20) as tree:
        for _ in tree.survey():
            pass
        for inode in tree.files:
            if tree.prepare(inode) is None:
                raise AssertionError
        one.merged.write("d/f", b"LOWER")
        one.merged.unlink("d/below")
        one.merged.rename("d/e/deep/g", "moved")
        one.merged.create("d/e/deep/new", b"new")
        for inode in list(tree.copies):
            tree.publish(inode)
        for _ in tree.detach():
            pass
    one.merged.rename("d", "new")
    one.open()
    assert one.merged.read("new/f") == b"LOWER"
    assert one.merged.listdir("new") == ["e", "f", "gone", "linked"]
    assert one.merged.listdir("new/e/deep") == ["h", "new"]
    assert one.merged.read("new/e/deep/new") == b"new"


def test_a_caller_who_is_killed_ends_it_and_nothing_is_left(stack: StackFactory) -> None:
    """Its data are copied in a thread, in which the extension says so."""
    one = stack({"d": {"a": "a", "big": "x" * (1 << 20), "c": "c"}}, policy=USER)
    directory = one.merged.walk("d")
    assert isinstance(directory, Inode)
    copying: dict[Node, UnderWay] = {}

    async def in_thread(call: Callable[..., object], *arguments: object) -> object:
        for under_way in copying.values():
            assert under_way.request == 17
            assert under_way.copy is not None
            under_way.copy.is_cancelled = True
        return call(*arguments)

    with pytest.raises(OSError) as caught:
        trio.run(detaching.detach, one.merged.view, directory, copying, 17, in_thread, Asking((), lambda change: None))
    assert caught.value.errno == errno.EINTR
    assert copying == {}
    assert one.work_names() == []
    assert [name for _, _, names in os.walk(one.upper) for name in names] == []
    one.merged.rename("d", "new")
    assert one.merged.read("new/big") == b"x" * (1 << 20)


def test_directories_closed_to_writing_are_copied_up_all_the_same(stack: StackFactory) -> None:
    one = stack({"d": {"closed": Directory({"f": "f"}, mode=0o555)}}, policy=USER)
    one.merged.rename("d", "new")
    assert one.open().read("new/closed/f") == b"f"
    assert os.stat(one.upper / "new/closed").st_mode & 0o777 == 0o555
