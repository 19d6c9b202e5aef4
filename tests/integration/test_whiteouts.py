"""Whiteouts and opaque directories: what a delete leaves in the upper, and what stays hidden."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from pyoverlay.testing import Directory, Fifo, File, Symlink, Whiteout
from tests.integration.looks import OPAQUE, WHITEOUT, Here, Opaque, is_opaque, layers, shape
from tests.posix.check import fails, opened
from tests.posix.system_calls import RENAME_EXCHANGE, renameat2


def assert_absent(path: Path) -> None:
    """By name and in the listing, freshly asked."""
    with fails(errno.ENOENT):
        os.lstat(path)
    with fails(errno.ENOENT):
        os.open(path, os.O_RDONLY)
    assert path.name not in os.listdir(path.parent)


@layers({"f": b"old", "s": Symlink("x"), "p": Fifo(), "stays": b""})
def test_unlink_of_a_lower_object_leaves_a_whiteout(alone: Here) -> None:
    for name in ("f", "s", "p"):
        os.unlink(alone.merged / name)
        assert_absent(alone.merged / name)
        st = os.lstat(alone.upper / name)
        assert (stat.S_IFMT(st.st_mode), st.st_rdev) == (stat.S_IFCHR, 0)
    assert shape(alone.upper) == {"f": WHITEOUT, "s": WHITEOUT, "p": WHITEOUT}
    assert shape(alone.merged) == {"stays": b""}
    alone.remount()
    assert shape(alone.merged) == {"stays": b""}


@layers({"f": b"old"}, upper={"f": b"new", "own": b"own"})
def test_unlink_of_an_upper_object_leaves_a_whiteout_only_over_a_lower_one(here: Here) -> None:
    os.unlink(here.merged / "f")
    os.unlink(here.merged / "own")
    assert shape(here.upper) == {"f": WHITEOUT}
    assert shape(here.merged) == {}


@layers({"d": {}, "full": {"f": b""}})
def test_rmdir_of_a_lower_directory_leaves_a_whiteout(here: Here) -> None:
    os.rmdir(here.merged / "d")
    os.unlink(here.merged / "full" / "f")
    assert shape(here.upper) == {"d": WHITEOUT, "full": {"f": WHITEOUT}}
    os.rmdir(here.merged / "full")
    assert shape(here.upper) == {"d": WHITEOUT, "full": WHITEOUT}
    assert shape(here.merged) == {}


@layers({"d": {"a": b"", "b": b""}}, upper={"d": {"a": Whiteout(), "c": b"own"}})
def test_rmdir_is_judged_on_the_merged_view(here: Here) -> None:
    with fails(errno.ENOTEMPTY):
        os.rmdir(here.merged / "d")
    os.unlink(here.merged / "d" / "c")
    with fails(errno.ENOTEMPTY):
        os.rmdir(here.merged / "d")
    os.unlink(here.merged / "d" / "b")
    os.rmdir(here.merged / "d")
    assert shape(here.upper) == {"d": WHITEOUT}


@layers({"d": {"a": b""}, "e": {}}, upper={"d": {"a": Whiteout()}, "own": {}})
def test_rmdir_of_a_directory_with_nothing_but_whiteouts_works(here: Here) -> None:
    assert os.listdir(here.merged / "d") == []
    os.rmdir(here.merged / "d")
    os.rmdir(here.merged / "own")
    assert shape(here.upper) == {"d": WHITEOUT}


@layers({"f": b"old", "d": {"below": b"old", "deep": {"deeper": b"old"}}})
def test_a_directory_made_over_a_whiteout_is_opaque(here: Here) -> None:
    os.unlink(here.merged / "f")
    os.mkdir(here.merged / "f", 0o700)
    shutil.rmtree(here.merged / "d")
    os.mkdir(here.merged / "d")
    assert shape(here.upper) == {"f": Opaque({}), "d": Opaque({})}
    assert os.getxattr(here.upper / "d", OPAQUE) == b"y"
    assert stat.S_IMODE(os.lstat(here.merged / "f").st_mode) == 0o700
    assert_absent(here.merged / "d" / "below")
    assert_absent(here.merged / "d" / "deep")
    assert OPAQUE not in os.listxattr(here.merged / "d")


@layers({"d": {"f": b"old", "deep": {"g": b"old", "deeper": {"h": b"old"}}}})
def test_nothing_below_a_directory_made_anew_comes_back_by_name_or_in_a_listing(alone: Here) -> None:
    d = alone.merged / "d"
    for path in ("f", "deep/g", "deep/deeper/h"):
        os.stat(d / path)  # known to the kernel before, so that a stale answer would be noticed
    subprocess.run(["rm", "-r", d], check=True)
    os.mkdir(d)
    for path in ("f", "deep"):
        assert_absent(d / path)
    with fails(errno.ENOENT):
        os.stat(d / "deep" / "g")
    os.mkdir(d / "deep")
    assert_absent(d / "deep" / "g")
    os.mkdir(d / "deep" / "deeper")
    assert_absent(d / "deep" / "deeper" / "h")
    (d / "f").write_bytes(b"new")
    assert shape(alone.merged) == {"d": {"f": b"new", "deep": {"deeper": {}}}}
    alone.remount()
    assert shape(alone.merged) == {"d": {"f": b"new", "deep": {"deeper": {}}}}
    assert is_opaque(alone.upper / "d")


@layers({"f": b"old", "g": b"old", "d": {"x": b"old"}})
def test_every_kind_of_object_can_be_made_over_a_whiteout(here: Here) -> None:
    makers: dict[str, Callable[[Path], object]] = {
        "file": lambda path: path.write_bytes(b"new"),
        "symlink": lambda path: os.symlink("target", path),
        "fifo": lambda path: os.mkfifo(path),
        "link": lambda path: os.link(here.merged / "g", path),
        "mkdir": lambda path: os.mkdir(path),
    }
    expected = {"file": b"new", "symlink": "-> target", "fifo": "p", "link": b"old", "mkdir": Opaque({})}
    for name in ("f", "d"):
        for kind, make in makers.items():
            subprocess.run(["rm", "-r", here.merged / name], check=True)
            assert shape(here.upper)[name] == WHITEOUT
            make(here.merged / name)
            assert shape(here.upper)[name] == expected[kind], (name, kind)
            assert name in os.listdir(here.merged)


@layers({"f": b"old"})
def test_a_failed_create_over_a_whiteout_leaves_the_whiteout(here: Here) -> None:
    os.unlink(here.merged / "f")
    for act in (
        lambda: os.open(here.merged / "f", os.O_RDONLY),
        lambda: os.link(here.merged / "missing", here.merged / "f"),
        lambda: os.rename(here.merged / "f", here.merged / "g"),
        lambda: os.unlink(here.merged / "f"),
        lambda: os.rmdir(here.merged / "f"),
        lambda: os.chmod(here.merged / "f", 0o600),
    ):
        with fails(errno.ENOENT):
            act()
    assert shape(here.upper) == {"f": WHITEOUT}


@layers({"f": b"top", "d": {"a": b"top"}}, {"f": b"bottom", "g": b"bottom", "d": {"a": b"bottom", "b": b"bottom"}})
def test_two_lowers_merge_by_precedence(here: Here) -> None:
    assert shape(here.merged) == {"f": b"top", "g": b"bottom", "d": {"a": b"top", "b": b"bottom"}}
    os.unlink(here.merged / "f")
    os.unlink(here.merged / "d" / "b")
    assert shape(here.merged) == {"g": b"bottom", "d": {"a": b"top"}}
    assert shape(here.upper) == {"f": WHITEOUT, "d": {"b": WHITEOUT}}


@layers(
    {"f": Whiteout(), "d": Whiteout(), "part": {"x": Whiteout(), "y": b"top"}},
    {"f": b"hidden", "d": {"hidden": b""}, "part": {"x": b"hidden", "y": b"hidden", "z": b"bottom"}},
)
def test_whiteouts_inside_a_lower_hide_what_is_below_them(here: Here) -> None:
    assert shape(here.merged) == {"part": {"y": b"top", "z": b"bottom"}}
    assert_absent(here.merged / "f")
    assert_absent(here.merged / "d")
    assert_absent(here.merged / "part" / "x")
    os.mkdir(here.merged / "d")
    (here.merged / "f").write_bytes(b"new")
    assert shape(here.merged / "d") == {}
    assert_absent(here.merged / "d" / "hidden")
    assert shape(here.merged)["f"] == b"new"


@layers(
    {"d": Directory({"top": b""}, xattrs={OPAQUE: b"y"})},
    {"d": {"hidden": b"", "deep": {"hidden": b""}}},
)
def test_an_opaque_directory_inside_a_lower_hides_what_is_below_it(here: Here) -> None:
    assert shape(here.merged) == {"d": {"top": b""}}
    assert_absent(here.merged / "d" / "hidden")
    os.mkdir(here.merged / "d" / "deep")
    assert_absent(here.merged / "d" / "deep" / "hidden")
    (here.merged / "d" / "hidden").write_bytes(b"new")
    assert shape(here.merged) == {"d": {"top": b"", "hidden": b"new", "deep": {}}}


@layers({"x": b"file", "y": {"top": b""}}, {"x": {"hidden": b""}, "y": b"file"}, {"x": {"deeper": b""}, "y": {"bottom": b""}})
def test_a_file_over_a_directory_and_the_reverse_end_the_merge(here: Here) -> None:
    assert shape(here.merged) == {"x": b"file", "y": {"top": b""}}
    assert_absent(here.merged / "y" / "bottom")
    os.unlink(here.merged / "x")
    os.mkdir(here.merged / "x")
    assert shape(here.merged / "x") == {}
    assert_absent(here.merged / "x" / "deeper")
    assert_absent(here.merged / "x" / "hidden")


@layers({"f": b"old", "d": {"x": b"old"}}, upper={"f": {"own": b""}, "d": b"file"})
def test_an_upper_that_hides_another_kind_wins(here: Here) -> None:
    assert shape(here.merged) == {"f": {"own": b""}, "d": b"file"}
    shutil.rmtree(here.merged / "f")
    os.unlink(here.merged / "d")
    assert shape(here.upper) == {"f": WHITEOUT, "d": WHITEOUT}
    assert shape(here.merged) == {}


@layers({"f": b"old"}, upper={"own": Whiteout()})
def test_a_whiteout_over_nothing_is_simply_absent(here: Here) -> None:
    assert_absent(here.merged / "own")
    (here.merged / "own").write_bytes(b"new")
    assert shape(here.upper) == {"own": b"new"}
    os.unlink(here.merged / "own")
    assert_absent(here.merged / "own")


@layers({"d": {"f": b""}}, upper={})
def test_nobody_can_make_a_whiteout_through_the_mount(here: Here) -> None:
    with fails(errno.EPERM):
        os.mknod(here.merged / "new", stat.S_IFCHR, 0)
    with fails(errno.EEXIST):
        os.mknod(here.merged / "d", stat.S_IFCHR, 0)
    assert shape(here.upper) == {}


@layers({f"f{number:03}": b"x" for number in range(200)})
def test_two_hundred_whiteouts_and_back(here: Here) -> None:
    for name in os.listdir(here.merged):
        os.unlink(here.merged / name)
    assert shape(here.merged) == {}
    assert set(shape(here.upper).values()) == {WHITEOUT}
    assert len(shape(here.upper)) == 200
    for number in range(200):
        (here.merged / f"f{number:03}").write_bytes(b"%d" % number)
    assert shape(here.merged) == {f"f{number:03}": b"%d" % number for number in range(200)}


@layers({"a": {"one": b"1"}, "b": {"two": b"2"}})
def test_what_is_moved_away_leaves_a_whiteout_and_what_is_exchanged_does_not(here: Here) -> None:
    renameat2(here.merged / "a" / "one", here.merged / "b" / "two", RENAME_EXCHANGE)
    assert shape(here.upper) == {"a": {"one": b"2"}, "b": {"two": b"1"}}
    os.rename(here.merged / "a" / "one", here.merged / "b" / "new")
    assert shape(here.upper) == {"a": {"one": WHITEOUT}, "b": {"two": b"1", "new": b"2"}}
    assert shape(here.merged) == {"a": {}, "b": {"two": b"1", "new": b"2"}}


@layers({"d": {"x": b"old"}}, upper={"d": Directory({"y": b"own"}, xattrs={OPAQUE: b"y"})})
def test_entries_of_an_opaque_upper_directory_leave_no_whiteouts(here: Here) -> None:
    os.unlink(here.merged / "d" / "y")
    assert shape(here.upper) == {"d": Opaque({})}
    (here.merged / "d" / "x").write_bytes(b"new")
    os.unlink(here.merged / "d" / "x")
    assert shape(here.upper) == {"d": Opaque({})}
    os.rmdir(here.merged / "d")
    assert shape(here.upper) == {"d": WHITEOUT}


@layers({"d": {"f": b"old"}})
def test_an_open_descriptor_of_a_removed_lower_directory_is_empty(here: Here) -> None:
    with opened(here.merged / "d", os.O_RDONLY | os.O_DIRECTORY) as fd:
        subprocess.run(["rm", "-r", here.merged / "d"], check=True)
        os.mkdir(here.merged / "d")
        (here.merged / "d" / "new").write_bytes(b"")
        assert os.listdir(fd) == []
    assert os.listdir(here.merged / "d") == ["new"]


@layers({".wh.f": b"content", "f": b"seen", ".wh..wh..opq": b"not empty"})
def test_names_with_an_aufs_prefix_and_content_are_ordinary_files(alone: Here) -> None:
    assert shape(alone.merged) == {".wh.f": b"content", "f": b"seen", ".wh..wh..opq": b"not empty"}
    (alone.merged / ".wh.new").write_bytes(b"")
    os.unlink(alone.merged / ".wh.f")
    assert shape(alone.merged) == {"f": b"seen", ".wh..wh..opq": b"not empty", ".wh.new": b""}
    assert shape(alone.upper) == {".wh.f": WHITEOUT, ".wh.new": b""}
    alone.remount()
    assert shape(alone.merged) == {"f": b"seen", ".wh..wh..opq": b"not empty", ".wh.new": b""}


@layers({"f": File(b"x", uid=1, gid=2)})
@pytest.mark.root
def test_a_whiteout_holds_nothing_of_what_it_hides(here: Here) -> None:
    os.chmod(here.merged / "f", 0o4755)
    os.unlink(here.merged / "f")
    st = os.lstat(here.upper / "f")
    assert (st.st_uid, st.st_gid, st.st_size) == (0, 0, 0)
    assert stat.S_IMODE(st.st_mode) & 0o6111 == 0
