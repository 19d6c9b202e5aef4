"""Lowers that may not answer: whatever is done over them is done right, one question at a time, and no call of theirs is made at once."""

from __future__ import annotations

import contextvars
import errno
import os
import select
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import pytest
import trio

from pyoverlay.core import copyup
from pyoverlay.core import stack as stacking
from pyoverlay.core.remote import Errand, MustAsk, NoReplies, RemoteLower, Replies, replies
from pyoverlay.core.view import View
from pyoverlay.fuse.answers import Answers
from pyoverlay.fuse.asking import Asking, _Closer
from pyoverlay.fuse.wired import WiredOperations
from pyoverlay.testing import HardLink, Symlink, Tree
from tests.posix.check import fails
from tests.unit.asked import Asked, Told
from tests.unit.conftest import StackFactory
from tests.unit.merged import POLICY, Merged, Stack, timeless

T = TypeVar("T")

TOP: Tree = {"d": {"top": "top", "both": "from the top"}, "file": "file", "link": Symlink("target"), "empty": {}}
BOTTOM: Tree = {"d": {"both": "hidden", "below": "below", "deep": {"bottom": "bottom"}}, "one": "1", "two": HardLink("one")}


def _chmod_one_of_two(merged: Merged) -> None:
    merged.stat("two")
    merged.chmod("one", 0o600)


OPERATIONS: dict[str, Callable[[Merged], object]] = {
    "look": lambda m: [m.listdir(), m.listdir("d"), m.listdir("d/deep"), m.exists("d/none"), m.read("d/deep/bottom")],
    "write": lambda m: m.write("d/below", b"W"),
    "truncate": lambda m: m.truncate("d/deep/bottom", 3),
    "chmod of a directory": lambda m: m.chmod("d/deep", 0o700),
    "chmod of a hard link": _chmod_one_of_two,
    "chown of a symlink": lambda m: m.chown("link", os.geteuid(), os.getegid()),
    "setxattr": lambda m: m.setxattr("file", "user.new", b"value"),
    "create": lambda m: m.create("d/deep/new", b"new"),
    "mkdir where there was one": lambda m: [m.rmdir("empty"), m.mkdir("empty")],
    "link": lambda m: m.link("d/deep/bottom", "d/linked"),
    "unlink": lambda m: [m.unlink("d/both"), m.unlink("one")],
    "rename of a file": lambda m: m.rename("d/below", "d/deep/moved"),
    "rename over a file": lambda m: m.rename("file", "d/both"),
}


@contextmanager
def every_lower_is_remote(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(stacking, "is_local", lambda fd: False)
        yield


@pytest.fixture
def remote(stack: StackFactory, monkeypatch: pytest.MonkeyPatch) -> Stack:
    with every_lower_is_remote(monkeypatch):
        made = stack(TOP, BOTTOM)
    assert all(isinstance(lower, RemoteLower) for lower in made.merged.view.lowers)
    return made


@pytest.mark.parametrize("name", OPERATIONS)
def test_what_is_done_is_the_same_whatever_has_to_be_asked_for(stack: StackFactory, remote: Stack, name: str) -> None:
    near = stack(TOP, BOTTOM)
    asked = Asked(remote.merged.view)
    assert _plain(OPERATIONS[name](asked)) == _plain(OPERATIONS[name](near.merged))
    assert asked.told.asked
    assert timeless(remote.merged.tree()) == timeless(near.merged.tree())
    assert remote.disk_tree() == near.disk_tree()
    assert remote.work_names() == remote.litter() == []


def test_a_directory_that_is_opened_again_has_said_already_what_it_holds(stack: StackFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for one descriptor each beginning opens the directories anew, from nearer or further up: it went on for ever."""
    deep: Tree = {"file": "x"}
    for _ in range(6):
        deep = {"a": deep, "b": {}}
    with every_lower_is_remote(monkeypatch):
        merged = Asked(stack(deep, limit=1).merged.view)
    merged.chmod("a/a/a/a/a/a/file", 0o600)
    merged.rename("a/a/a/a/a/a/file", "a/a/b/moved")
    asked = merged.told.asked
    assert len(asked) < 400
    assert merged.read("a/a/b/moved") == b"x"


def _plain(found: object) -> object:
    """What can be compared: no objects of either view."""
    return [_plain(each) for each in found] if isinstance(found, list) else found if isinstance(found, str | bytes | bool) else None


def test_a_request_that_nothing_can_be_asked_for_calls_no_lower(remote: Stack) -> None:
    before = replies.set(NoReplies())
    try:
        for name in ("look", "chmod of a directory", "create", "rename of a file"):
            with pytest.raises(MustAsk) as caught:
                OPERATIONS[name](remote.merged)
            assert caught.value.question is None
    finally:
        replies.reset(before)
    assert remote.merged.tree().keys() >= {b"file", b"d/deep/bottom"}
    assert remote.work_names() == []


def test_an_error_of_the_lower_is_the_answer(remote: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    asked = Asked(remote.merged.view)
    inode = asked.walk("link")
    assert stat.S_ISLNK(inode.format)
    monkeypatch.setattr("pyoverlay.core.layer.Lower.readlink", fail)
    with fails(errno.EIO):
        asked.told(lambda: remote.merged.view.readlink(inode))


def test_a_descriptor_that_comes_too_late_is_closed(remote: Stack) -> None:
    given = Replies()
    before = replies.set(given)
    try:
        with pytest.raises(MustAsk) as caught:
            remote.merged.view.lowers[0].open_dir(remote.merged.view.lowers[0].root_fd, b"d")
    finally:
        replies.reset(before)
    given.close()
    descriptors = len(os.listdir("/proc/self/fd"))
    assert caught.value.question is not None
    contextvars.Context().run(caught.value.question.run)
    assert len(os.listdir("/proc/self/fd")) == descriptors - 1, "the question's own"


def test_a_file_that_was_opened_for_a_request_is_closed_where_that_holds_nobody_up(remote: Stack) -> None:
    """close(2) of a file asks the server (FLUSH), of a directory it does not."""
    lower, _ = remote.merged.view.lowers
    assert isinstance(lower, RemoteLower)
    later: list[int] = []
    lower.close_later = later.append
    told = Told()
    inode = told(lambda: remote.merged.walk("d/top"))
    fd = told(lambda: remote.merged.view.data_fd(inode))
    assert [os.path.sameopenfile(each, fd) for each in later] == [True, True], "that of the first beginning, and the reply's"
    lower.close_later = os.close
    for each in later:
        os.close(each)


def test_who_is_answered_anew_after_a_question_gives_one_reference(stack: StackFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a metacopy file are those of its data, so what shows of it may have to be asked for when it has been found."""
    with every_lower_is_remote(monkeypatch):
        one = stack({"file": "data"}, policy=replace(POLICY, metacopy=True, userxattr=False))
    view, told = one.merged.view, Told()
    Asked(view).chmod("file", 0o600)
    inode = told(lambda: one.merged.walk("file"))
    assert inode.metacopy is not None
    answers, before = Answers(view), inode.nlookup
    told(lambda: answers.lookup(view.root.ino, b"file"))
    assert inode.nlookup == before + 1
    told(lambda: answers.entries(view.root.ino, 2, 4096))
    assert inode.nlookup == before + 2


def test_an_errand_that_nobody_makes_gives_its_descriptors_back(remote: Stack) -> None:
    (lower, _) = remote.merged.view.lowers
    assert isinstance(lower, RemoteLower)
    closed: list[int] = []
    lower.close_later = closed.append
    errand = Errand(lower, lambda fd: None, lower.root_fd)
    errand.drop()
    errand.drop()
    assert len(closed) == 1
    os.close(closed[0])


def test_an_errand_for_which_there_is_no_room_keeps_nothing_open(remote: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    (lower, _) = remote.merged.view.lowers
    assert isinstance(lower, RemoteLower)
    before, dup = os.listdir("/proc/self/fd"), os.dup
    left = [1]

    def full(fd: int) -> int:
        if not left:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        left.pop()
        return dup(fd)

    monkeypatch.setattr(os, "dup", full)
    with fails(errno.EMFILE):
        Errand(lower, lambda *fds: None, lower.root_fd, lower.root_fd)
    assert os.listdir("/proc/self/fd") == before


# -- their threads


class Late(Asking):
    """No thread is free before `meanwhile` was done, by another request."""

    def __init__(self, meanwhile: Callable[[], object]) -> None:
        super().__init__((), lambda change: None)
        self._meanwhile = meanwhile

    async def with_thread_of(self, layer: RemoteLower, call: Callable[[], T]) -> T:
        self._meanwhile()
        return call()


class Sessionless(WiredOperations):
    """Handlers that are called by a test and by no session."""

    def __init__(self, view: View, asking: Asking) -> None:
        self.view = view
        self.asking = asking


def test_what_is_copied_from_a_file_is_its_own_though_that_is_copied_up_before_a_thread_is_free(remote: Stack) -> None:
    """The descriptor of a remote file is closed then, and its number may be another file's."""
    view = remote.merged.view
    target = remote.merged.create("target")
    source = remote.merged.walk("file")
    operations = Sessionless(view, Late(lambda: copyup.copy_up(view, source, 0)))
    assert trio.run(operations._copy_in_thread, source, 0, target, 0, 4, 0) == 4
    assert remote.merged.read("target") == b"file"
    assert (remote.merged.read("file"), source.in_upper) == (b"", True)


def test_a_server_that_fails_at_a_close_leaves_the_next_ones_to_be_closed() -> None:
    closer = _Closer()
    nothing = os.sysconf("SC_OPEN_MAX")  # no descriptor has this number
    ours, theirs = os.pipe()
    closer(nothing)
    closer(theirs)
    assert select.select([ours], [], [], 10)[0] == [ours], "the end of the other end"
    os.close(ours)


def test_what_is_to_be_closed_waits_until_a_thread_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    closer = _Closer()
    pipes = [os.pipe() for _ in range(2)]
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        closer(pipes[0][1])
    closer(pipes[1][1])
    for ours, _ in pipes:
        assert select.select([ours], [], [], 10)[0] == [ours], "the end of the other end"
        os.close(ours)


def test_a_caller_that_ends_while_it_is_looked_at_is_taken_for_killed(tmp_path: Path) -> None:
    """Its file in /proc can be opened by then, and no more be read: here it is a directory. The look is beside all requests, and an error
    in it would end the mount.
    """
    (tmp_path / "7" / "status").mkdir(parents=True)
    asking = Asking((), lambda change: None)
    asking._proc = os.open(tmp_path, os.O_PATH)
    assert asking._is_killed(7)
    asking.close()
