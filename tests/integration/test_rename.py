"""Rename across layers: directories of a lower move by redirect, everything else by copy-up, and what is left behind is hidden."""

from __future__ import annotations

import errno
import os
import subprocess
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from pyoverlay.testing import Directory, OverlayFactory, Symlink, Tree, Whiteout, snapshot
from tests.integration.looks import REDIRECT, WHITEOUT, Here, Opaque, layers, litter, mark, shape
from tests.posix.check import fails, opened
from tests.posix.kernel_overlay import KernelOverlay
from tests.posix.system_calls import RENAME_EXCHANGE, RENAME_NOREPLACE, renameat2


def assert_the_kernel_shows_the_same(here: Here, directory: Path) -> None:
    """Unmount, let the kernel mount the upper, compare the trees, mount again and compare once more."""
    expected = _comparable(here.merged)
    here.overlay.umount()
    place = directory / "kernel"
    place.mkdir()
    kernel = KernelOverlay(here.overlay.lowers, here.overlay.writable, place, ("redirect_dir=on",))
    kernel.mount()
    try:
        assert _comparable(place / here.name) == expected
    finally:
        kernel.umount()
    here.overlay.mount()
    assert _comparable(here.merged) == expected


def _comparable(directory: Path) -> dict[bytes, object]:
    """Without link counts: the kernel's overlay does not join the links of a lower again."""
    return {name: replace(entry, nlink=0, first_name=b"") for name, entry in snapshot(directory).items()}


TREE: Tree = {"f": b"file", "deep": {"g": b"deeper", "s": Symlink("g")}}


@layers({"old": TREE, "other": {}})
@pytest.mark.root  # a redirect is followed with trusted.* marks alone
def test_a_lower_directory_moves_by_redirect_and_copies_nothing(alone: Here, tmp_path: Path) -> None:
    os.rename(alone.merged / "old", alone.merged / "new")
    moved = {"f": b"file", "deep": {"g": b"deeper", "s": "-> g"}}
    assert shape(alone.merged) == {"new": moved, "other": {}}
    assert shape(alone.upper) == {"old": WHITEOUT, "new": {}}
    assert mark(alone.upper / "new", REDIRECT) in (b"old", f"/{alone.name}/old".encode())
    assert_the_kernel_shows_the_same(alone, tmp_path)


@layers({"a": {"b": {"c": {"f": b"deep"}}}, "x": {"y": {}}})
@pytest.mark.root  # a redirect is followed with trusted.* marks alone
def test_lower_directories_turned_inside_out(alone: Here, tmp_path: Path) -> None:
    m = alone.merged
    os.rename(m / "a" / "b" / "c", m / "x" / "y" / "c")
    os.rename(m / "a" / "b", m / "x" / "y" / "c" / "b")
    os.rename(m / "x" / "y", m / "a" / "y")
    expected = {"a": {"y": {"c": {"b": {}, "f": b"deep"}}}, "x": {}}
    assert shape(m) == expected
    assert_the_kernel_shows_the_same(alone, tmp_path)
    assert shape(alone.merged) == expected


@layers({"d": {"low": b"l", "both": b"l"}}, upper={"d": {"up": b"u", "both": b"u"}})
@pytest.mark.root  # a redirect is followed with trusted.* marks alone
def test_a_merged_directory_moves_whole(alone: Here, tmp_path: Path) -> None:
    os.rename(alone.merged / "d", alone.merged / "new")
    assert shape(alone.merged) == {"new": {"low": b"l", "up": b"u", "both": b"u"}}
    assert shape(alone.upper) == {"d": WHITEOUT, "new": {"up": b"u", "both": b"u"}}
    assert_the_kernel_shows_the_same(alone, tmp_path)


@layers({"d": {"top": b"t", "both": b"t"}}, {"d": {"bottom": b"b", "both": b"b"}, "e": {"other": b"o"}})
@pytest.mark.root  # a redirect is followed with trusted.* marks alone
def test_a_directory_merged_from_two_lowers_moves_whole(alone: Here, tmp_path: Path) -> None:
    os.rename(alone.merged / "d", alone.merged / "e2")
    os.rename(alone.merged / "e", alone.merged / "d")
    assert shape(alone.merged) == {"e2": {"top": b"t", "both": b"t", "bottom": b"b"}, "d": {"other": b"o"}}
    assert_the_kernel_shows_the_same(alone, tmp_path)


@layers({"d": TREE})
@pytest.mark.root  # a redirect is followed with trusted.* marks alone
def test_a_moved_lower_directory_can_be_changed_and_moved_again(alone: Here, tmp_path: Path) -> None:
    m = alone.merged
    os.rename(m / "d", m / "e")
    (m / "e" / "f").write_bytes(b"changed")
    os.unlink(m / "e" / "deep" / "g")
    os.rename(m / "e" / "deep", m / "e" / "deeper")
    os.mkdir(m / "d")
    (m / "d" / "f").write_bytes(b"another")
    os.rename(m / "e", m / "d" / "e")
    os.rename(m / "d", m / "z")
    expected = {"z": {"f": b"another", "e": {"f": b"changed", "deeper": {"s": "-> g"}}}}
    assert shape(m) == expected
    assert_the_kernel_shows_the_same(alone, tmp_path)
    assert shape(alone.merged) == expected


@layers({"d": TREE})
@pytest.mark.root  # a redirect is followed with trusted.* marks alone
def test_a_directory_made_where_one_moved_away_is_empty(alone: Here, tmp_path: Path) -> None:
    os.rename(alone.merged / "d", alone.merged / "e")
    os.mkdir(alone.merged / "d")
    assert shape(alone.merged / "d") == {}
    with fails(errno.ENOENT):
        os.stat(alone.merged / "d" / "f")
    assert shape(alone.upper)["d"] == Opaque({})
    os.rmdir(alone.merged / "d")
    os.rename(alone.merged / "e", alone.merged / "d")
    assert shape(alone.merged) == {"d": {"f": b"file", "deep": {"g": b"deeper", "s": "-> g"}}}
    assert_the_kernel_shows_the_same(alone, tmp_path)


@layers({"one": {"a": b"1"}, "two": {"b": b"2", "sub": {"c": b"3"}}})
@pytest.mark.root  # a redirect is followed with trusted.* marks alone
def test_two_lower_directories_change_places(alone: Here, tmp_path: Path) -> None:
    renameat2(alone.merged / "one", alone.merged / "two", RENAME_EXCHANGE)
    expected = {"one": {"b": b"2", "sub": {"c": b"3"}}, "two": {"a": b"1"}}
    assert shape(alone.merged) == expected
    assert_the_kernel_shows_the_same(alone, tmp_path)
    renameat2(alone.merged / "one", alone.merged / "two" / "a", RENAME_EXCHANGE)
    expected = {"one": b"1", "two": {"a": {"b": b"2", "sub": {"c": b"3"}}}}
    assert shape(alone.merged) == expected


@layers({"d": TREE, "empty": {}, "hidden": {"x": b""}}, upper={"hidden": {"x": Whiteout()}, "own": {"u": b"u"}})
@pytest.mark.root  # a redirect is followed with trusted.* marks alone
def test_a_directory_moves_over_an_empty_one(alone: Here, tmp_path: Path) -> None:
    os.rename(alone.merged / "d", alone.merged / "empty")
    os.rename(alone.merged / "own", alone.merged / "hidden")
    expected = {"empty": {"f": b"file", "deep": {"g": b"deeper", "s": "-> g"}}, "hidden": {"u": b"u"}}
    assert shape(alone.merged) == expected
    with fails(errno.ENOENT):
        os.stat(alone.merged / "hidden" / "x")
    assert_the_kernel_shows_the_same(alone, tmp_path)
    assert shape(alone.merged) == expected


@layers({"full": {"x": b""}, "d": {}, "f": b"f"}, upper={"own": {}})
@pytest.mark.root  # a redirect is followed with trusted.* marks alone
def test_refused_renames_of_directories_change_nothing(here: Here) -> None:
    for source in ("d", "own"):
        with fails(errno.ENOTEMPTY):
            os.rename(here.merged / source, here.merged / "full")
        with fails(errno.ENOTDIR):
            os.rename(here.merged / source, here.merged / "f")
        with fails(errno.EEXIST):
            renameat2(here.merged / source, here.merged / "f", RENAME_NOREPLACE)
    with fails(errno.EISDIR):
        os.rename(here.merged / "f", here.merged / "d")
    assert shape(here.merged) == {"full": {"x": b""}, "d": {}, "f": b"f", "own": {}}
    assert WHITEOUT not in shape(here.upper).values()


@layers({"f": b"old", "g": b"target"})
def test_a_lower_file_moves_by_copy_up(here: Here) -> None:
    os.rename(here.merged / "f", here.merged / "new")
    assert shape(here.upper) == {"f": WHITEOUT, "new": b"old"}
    os.rename(here.merged / "new", here.merged / "g")
    assert shape(here.upper) == {"f": WHITEOUT, "g": b"old"}
    assert shape(here.merged) == {"g": b"old"}


@layers({"g": b"target", "h": b"h"}, upper={"own": b"own"})
def test_an_upper_file_moved_leaves_a_whiteout_only_over_a_lower_one(here: Here) -> None:
    os.rename(here.merged / "own", here.merged / "g")
    assert shape(here.upper) == {"g": b"own"}
    os.rename(here.merged / "g", here.merged / "free")
    assert shape(here.upper) == {"g": WHITEOUT, "free": b"own"}
    os.rename(here.merged / "free", here.merged / "g")
    assert shape(here.upper) == {"g": b"own"}
    assert shape(here.merged) == {"g": b"own", "h": b"h"}


@layers({"own": {"below": b"old"}}, upper={"pure": {"deep": {"f": b"f"}}})
@pytest.mark.root  # a redirect is followed with trusted.* marks alone
def test_a_pure_upper_directory_over_the_whiteout_of_another_is_opaque(alone: Here, tmp_path: Path) -> None:
    subprocess.run(["rm", "-r", alone.merged / "own"], check=True)
    os.rename(alone.merged / "pure", alone.merged / "own")
    assert shape(alone.merged) == {"own": {"deep": {"f": b"f"}}}
    assert shape(alone.upper) == {"own": Opaque({"deep": {"f": b"f"}})}
    with fails(errno.ENOENT):
        os.stat(alone.merged / "own" / "below")
    assert_the_kernel_shows_the_same(alone, tmp_path)


@layers({"target": {"deep": {"old": b"old"}}}, upper={"pure": {"deep": {"f": b"f"}}})
@pytest.mark.root  # a redirect is followed with trusted.* marks alone
def test_a_pure_upper_directory_moved_below_a_merged_one_does_not_merge(alone: Here, tmp_path: Path) -> None:
    subprocess.run(["rm", "-r", alone.merged / "target" / "deep"], check=True)
    os.rename(alone.merged / "pure" / "deep", alone.merged / "target" / "deep")
    assert shape(alone.merged) == {"pure": {}, "target": {"deep": {"f": b"f"}}}
    assert_the_kernel_shows_the_same(alone, tmp_path)


@layers({"d": {"f": b"f", "sub": {"g": b"g"}}})
@pytest.mark.root  # a redirect is followed with trusted.* marks alone
def test_descriptors_keep_working_while_a_lower_directory_moves(here: Here) -> None:
    m = here.merged
    with (
        opened(m / "d", os.O_RDONLY | os.O_DIRECTORY) as d,
        opened(m / "d" / "sub", os.O_RDONLY | os.O_DIRECTORY) as sub,
        opened(m / "d" / "f", os.O_RDWR) as f,
    ):
        number = os.fstat(d).st_ino
        os.rename(m / "d", m / "e")
        assert os.fstat(d).st_ino == os.stat(m / "e").st_ino == number
        os.write(f, b"F")
        os.close(os.open("made", os.O_WRONLY | os.O_CREAT, dir_fd=sub))
        os.rename("f", "sub/f", src_dir_fd=d, dst_dir_fd=d)
        assert sorted(os.listdir(sub)) == ["f", "g", "made"]
    assert shape(m) == {"e": {"sub": {"f": b"F", "g": b"g", "made": b""}}}


@layers({"d": {"low": b"low"}})
@pytest.mark.root  # a redirect is followed with trusted.* marks alone
def test_the_mark_of_a_redirect_is_not_shown(here: Here) -> None:
    os.rename(here.merged / "d", here.merged / "e")
    assert os.listxattr(here.merged / "e") == []
    with fails(errno.ENODATA):
        os.getxattr(here.merged / "e", REDIRECT)


@layers(
    {"a": {"moved": b"lower"}},
    upper={"a": Whiteout(), "b": Directory({}, xattrs={REDIRECT: b"/test_a_redirect_that_was_there_is_followed/a"})},
)
@pytest.mark.root  # a redirect is followed with trusted.* marks alone
def test_a_redirect_that_was_there_is_followed(here: Here) -> None:
    assert shape(here.merged) == {"b": {"moved": b"lower"}}
    (here.merged / "b" / "moved").write_bytes(b"changed")
    assert shape(here.merged) == {"b": {"moved": b"changed"}}


@layers({"d": {f"{number}": {"f": b"%d" % number} for number in range(30)}})
@pytest.mark.root  # a redirect is followed with trusted.* marks alone
def test_thirty_lower_directories_shuffled(alone: Here, tmp_path: Path) -> None:
    """Each is moved to where its neighbour was, twice round, by way of a free name."""
    d = alone.merged / "d"
    for _ in range(2):
        os.rename(d / "0", d / "free")
        for number in range(1, 30):
            os.rename(d / f"{number}", d / f"{number - 1}")
        os.rename(d / "free", d / "29")
    expected = {f"{number}": {"f": b"%d" % ((number + 2) % 30)} for number in range(30)}
    assert shape(d) == expected
    assert_the_kernel_shows_the_same(alone, tmp_path)
    assert shape(alone.merged / "d") == expected


def test_without_redirects_a_lower_directory_stays_and_mv_copies(overlay: OverlayFactory) -> None:
    made = overlay({"d": TREE}, options=["-o", "redirect_dir=off"])
    with fails(errno.EXDEV):
        os.rename(made.merged / "d", made.merged / "e")
    assert shape(made.merged) == {"d": {"f": b"file", "deep": {"g": b"deeper", "s": "-> g"}}}
    subprocess.run(["mv", made.merged / "d", made.merged / "e"], check=True)
    assert shape(made.merged) == {"e": {"f": b"file", "deep": {"g": b"deeper", "s": "-> g"}}}
    os.mkdir(made.merged / "own")
    os.rename(made.merged / "own", made.merged / "own2")
    assert sorted(shape(made.merged)) == ["e", "own2"]


@pytest.mark.root  # mounts it over root's
def test_with_user_marks_a_lower_directory_moves_by_being_copied_up(overlay: OverlayFactory) -> None:
    made = overlay({"d": {**TREE, "big": b"x" * (1 << 20)}}, {"d": {"below": "below"}}, options=["-o", "userxattr"])
    numbers = {path: os.lstat(made.merged / "d" / path).st_ino for path in ("", "f", "deep", "deep/g", "below", "big")}
    with (made.merged / "d" / "f").open() as before:
        os.rename(made.merged / "d", made.merged / "e")
        (made.merged / "e" / "f").write_text("changed")
        assert before.read() == "changed"
    expected = {"f": b"changed", "deep": {"g": b"deeper", "s": "-> g"}, "below": b"below", "big": b"x" * (1 << 20)}
    assert {path: os.lstat(made.merged / "e" / path).st_ino for path in numbers} == numbers
    assert shape(made.merged) == {"e": expected}
    made.remount()
    assert shape(made.merged) == {"e": expected}
    assert litter(made) == []
    made.umount()
    kernel = KernelOverlay(made.lowers, made.writable, made.merged, ("userxattr",))
    kernel.mount()
    try:
        assert shape(made.merged) == {"e": expected}
    finally:
        kernel.umount()


def test_past_its_limit_it_stays_and_mv_copies(overlay: OverlayFactory) -> None:
    made = overlay({"d": {"big": b"x" * (1 << 20)}}, options=["-o", "userxattr,rename_copy_limit=512K"])
    with fails(errno.EXDEV):
        os.rename(made.merged / "d", made.merged / "e")
    assert os.listdir(made.writable) == []
    subprocess.run(["mv", made.merged / "d", made.merged / "e"], check=True)
    assert shape(made.merged) == {"e": {"big": b"x" * (1 << 20)}}


def test_while_a_tree_is_copied_up_for_a_rename_others_are_served(overlay: OverlayFactory) -> None:
    """Each of many files takes its turn with what others ask, which goes into the tree and out of it."""
    tree: Tree = {f"f{number}": "content" for number in range(100)}
    made = overlay({"d": {"a": tree, "b": tree}}, options=["-o", "userxattr"])
    done = threading.Event()

    def move() -> None:
        os.rename(made.merged / "d", made.merged / "e")
        done.set()

    mover = threading.Thread(target=move)
    mover.start()
    made_up = 0
    while not done.is_set():
        try:
            (made.merged / "d" / "a" / f"new{made_up}").write_text("new")
            (made.merged / "d" / "b" / f"f{made_up}").unlink()
        except FileNotFoundError:
            break  # it has moved
        made_up += 1
    mover.join()
    names = set(os.listdir(made.merged / "e" / "a"))
    made.remount()
    assert set(os.listdir(made.merged / "e" / "a")) == names >= {f"f{number}" for number in range(100)}
    assert {f"new{number}" for number in range(made_up)} <= names
    assert not {f"f{number}" for number in range(made_up)} & set(os.listdir(made.merged / "e" / "b"))
    assert litter(made) == []
