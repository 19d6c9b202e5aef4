"""The index: names of one lower file stay one file on disk."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path

import pytest

from pyoverlay.core import marks
from pyoverlay.testing import File, HardLink, Symlink, Tree
from tests.unit.conftest import StackFactory
from tests.unit.merged import POLICY, Merged, Stack

pytestmark = pytest.mark.root  # file handles are root's to open

INDEXED = replace(POLICY, index=True)
LOWER: Tree = {"a": "content", "b": HardLink("a"), "d": {"c": HardLink("a")}, "single": "single", "s": Symlink("a"), "t": HardLink("s")}


def entries(one: Stack) -> list[Path]:
    return sorted((one.work / "index").iterdir())


def nlink_mark(one: Stack) -> bytes:
    (entry,) = entries(one)
    return os.getxattr(entry, "trusted.overlay.nlink", follow_symlinks=False)


@pytest.fixture
def one(stack: StackFactory) -> Stack:
    return stack(LOWER, policy=INDEXED)


def numbers(merged: Merged, *paths: str) -> set[tuple[int, int]]:
    return {(merged.ino(path), merged.nlink(path)) for path in paths}


def test_a_copy_up_by_one_name_is_the_copy_of_all_over_remounts(one: Stack) -> None:
    before = numbers(one.merged, "a", "b", "d/c")
    assert len(before) == 1
    one.open()
    one.merged.write("a", b"CON")
    for _ in range(2):
        assert [one.merged.read(path) for path in ("d/c", "b", "a")] == [b"CONtent"] * 3
        assert numbers(one.merged, "d/c", "b", "a") == before
        one.open()
    (entry,) = entries(one)
    assert os.stat(entry).st_ino == os.stat(one.upper / "a").st_ino
    assert marks.encode_origin(marks.decode_origin(bytes.fromhex(entry.name)) or pytest.fail("no handle")).hex() == entry.name
    assert nlink_mark(one) == b"U+1"  # the index entry and `a`; shown are three
    assert not (one.upper / "b").exists()


def test_what_was_looked_up_becomes_links_of_the_copy(one: Stack) -> None:
    one.merged.walk("a")
    one.merged.walk("b")
    one.merged.write("b", b"CON")
    assert os.stat(one.upper / "a").st_nlink == 3
    assert nlink_mark(one) == b"U+0"
    one.open().write("d/c", b"new")
    assert one.merged.read("a") == b"newtent"


def test_a_single_name_and_a_directory_are_not_indexed(one: Stack) -> None:
    one.merged.chmod("single", 0o600)
    one.merged.chmod("d", 0o700)
    assert entries(one) == []


def test_symlinks_are_kept_together_too(one: Stack) -> None:
    one.merged.utime("s", 1, 2)
    assert one.open().stat("t").st_mtime_ns == 2
    assert numbers(one.merged, "s", "t") == numbers(one.merged, "t")


@pytest.mark.parametrize("touched", [False, True], ids=["lower", "copied up"])
def test_links_are_counted_as_names_come_and_go(one: Stack, touched: bool) -> None:
    if touched:
        one.merged.chmod("a", 0o600)
    one.merged.unlink("b")
    assert one.merged.nlink("a") == one.open().nlink("d/c") == 2
    one.merged.link("a", "e")
    one.merged.rename("d/c", "f")
    assert one.merged.nlink("e") == one.open().nlink("f") == 3
    one.merged.rename("single", "e")
    assert one.merged.nlink("f") == one.open().nlink("a") == 2
    one.merged.unlink("a")
    one.merged.write("f", b"last")
    assert one.open().nlink("f") == 1
    one.merged.unlink("f")
    assert entries(one) == []
    assert sorted(one.open().listdir()) == ["d", "e", "s", "t"]


def test_an_open_file_outlives_its_index_entry(one: Stack) -> None:
    inode = one.merged.walk("a")
    for path in ("a", "b", "d/c"):
        one.merged.unlink(path)
    one.merged.view.cache.limit = 0
    for _ in range(2):
        one.merged.view.trim()
    assert one.merged.read_inode(inode) == b"content"
    assert one.merged.view.nlink(inode, one.merged.view.stat(inode)) == 0
    assert entries(one) == []


def test_names_that_came_with_the_copy_keep_it_in_the_index(one: Stack) -> None:
    for path in ("a", "b", "d/c"):
        one.merged.walk(path)
    one.merged.chmod("a", 0o600)
    one.merged.unlink("a")
    assert len(entries(one)) == 1
    one.merged.unlink("b")
    one.merged.unlink("d/c")
    assert entries(one) == []


def test_a_name_that_is_renamed_over_counts_no_more(one: Stack) -> None:
    one.merged.rename("single", "b")
    assert one.merged.nlink("a") == one.open().nlink("a") == 2


def test_with_metacopy_the_other_names_find_the_data(stack: StackFactory) -> None:
    data = os.urandom(9000)
    one = stack({"d": {"a": data}, "b": HardLink("d/a")}, policy=replace(INDEXED, metacopy=True))
    one.merged.chmod("d/a", 0o600)
    assert one.open().read("b") == data
    assert one.merged.stat("b").st_mode & 0o777 == 0o600
    one.merged.write("b", b"x")
    assert one.open().read("d/a") == b"x" + data[1:]


def test_without_the_option_nothing_is_written_or_read(stack: StackFactory) -> None:
    one = stack(LOWER)
    one.merged.chmod("a", 0o600)
    assert not (one.work / "index").exists()


# -- when it is opened


def refused(one: Stack) -> OSError:
    with pytest.raises(OSError) as caught:
        one.open()
    return caught.value


def test_another_lower_or_another_upper_is_estale(one: Stack, stack: StackFactory) -> None:
    lower, upper = one.lowers[0], one.upper
    one.close()
    one.lowers[0] = stack(LOWER).lowers[0]
    assert refused(one).errno == errno.ESTALE
    one.lowers[0] = lower
    one.open()
    one.close()
    one.upper = upper.with_name("another")
    one.upper.mkdir()
    error = refused(one)
    assert error.errno == errno.ESTALE
    assert "index belongs to another upper" in str(error)
    one.upper = upper
    one.open()


def test_what_leads_nowhere_goes_and_what_is_no_entry_is_refused(one: Stack) -> None:
    one.merged.chmod("a", 0o600)
    one.close()
    (entry,) = entries(one)
    index = one.work / "index"
    (index / "#12").mkdir()
    (index / "#12" / "in").write_text("left by a crash")
    os.link(entry, index / ("00fb1d0001" + "0" * 48))  # the copy under another handle
    (one.upper / "a").unlink()  # behind our back: the entry's count says that two names show
    one.open()
    assert entries(one) == [entry]
    one.close()
    os.setxattr(entry, "trusted.overlay.nlink", b"U-1")
    one.open()
    assert entries(one) == []
    one.close()
    (index / "name").write_text("")
    assert refused(one).errno == errno.EINVAL
    (index / "name").unlink()
    one.open()


def test_a_copy_whose_count_is_lost_goes_with_its_last_name(one: Stack) -> None:
    one.merged.chmod("a", 0o600)
    one.close()
    (entry,) = entries(one)
    os.removexattr(entry, "trusted.overlay.nlink")
    one.open()
    assert entries(one) == [entry]
    one.close()
    (one.upper / "a").unlink()  # behind our back
    one.open()
    assert entries(one) == []


def test_a_directory_in_the_place_of_a_copy_is_eio(one: Stack) -> None:
    one.merged.chmod("a", 0o600)
    one.close()
    (entry,) = entries(one)
    entry.unlink()
    entry.mkdir()
    with pytest.raises(OSError) as caught:
        one.open().walk("b")
    assert caught.value.errno == errno.EIO


@pytest.mark.parametrize("mark", [b"U+1x", b"", b"X+1", b"U1", b"U-100", b"U+" + b"9" * 40])
def test_a_malformed_count_is_the_copys_own(one: Stack, mark: bytes) -> None:
    one.merged.chmod("a", 0o600)
    one.close()
    os.setxattr(entries(one)[0], "trusted.overlay.nlink", mark)
    assert one.open().nlink("b") == 2


FILES: Tree = {"x": File("x"), "y": HardLink("x")}


def test_hard_links_of_several_layers_do_not_meet(stack: StackFactory) -> None:
    one = stack({"a": "above", "b": HardLink("a")}, FILES, policy=INDEXED)
    one.merged.chmod("a", 0o600)
    one.merged.chmod("y", 0o640)
    one.open()
    assert (one.merged.stat("b").st_mode & 0o777, one.merged.stat("x").st_mode & 0o777) == (0o600, 0o640)
    assert len(entries(one)) == 2
