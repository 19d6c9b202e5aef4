"""Identity: numbers, names, listings, and what is kept for as long as the kernel knows an object."""

from __future__ import annotations

import os
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyoverlay.core.inode import ROOT_INO, Directory, Inode, InodeTable, Listing, key_of
from pyoverlay.testing import Directory as Folder
from pyoverlay.testing import HardLink, Tree
from tests.unit.conftest import StackFactory
from tests.unit.merged import IS_ROOT, Stack, mark

RESERVED = range(1 << 62, 1 << 63)


def table_with(*numbers: int) -> InodeTable:
    table = InodeTable()
    for number in numbers:
        table.add(Inode(number, 0o100644), key_of(1, number))
    return table


def test_a_real_object_has_its_own_number() -> None:
    assert table_with().number(0, 4711) == 4711
    assert table_with().number(3, 4711) == 3 << 52 | 4711


def test_a_number_that_another_object_holds_is_not_given_again() -> None:
    table = table_with(4711)
    first, second = table.number(0, 4711), table.number(0, 4711)
    assert first in RESERVED
    assert second in RESERVED
    assert first != second


@pytest.mark.parametrize(("fs", "real"), [(0, 0), (0, 1), (0, 1 << 62), (1, 1 << 52), (2, (1 << 64) - 1)])
def test_a_number_that_does_not_fit_is_taken_from_the_reserved_range(fs: int, real: int) -> None:
    assert table_with().number(fs, real) in RESERVED


def test_a_64_bit_number_of_the_upper_s_own_file_system_is_kept_below_the_reserved_range() -> None:
    assert table_with().number(0, 1 << 61) == 1 << 61


def test_removing_an_inode_frees_its_number_its_keys_and_its_names() -> None:
    table, directory = InodeTable(), Directory(2, ())
    inode = Inode(3, 0o100644)
    table.add(inode, key_of(1, 3))
    table.add_key(inode, key_of(0, 9))
    inode.add_name(directory, b"a")
    inode.add_name(directory, b"b")
    assert directory.dependants == 2
    table.remove(inode)
    assert len(table) == 0
    assert table.find(key_of(1, 3)) is None
    assert table.find(key_of(0, 9)) is None
    assert table.number(0, 3) == 3
    assert directory.dependants == 0


def test_a_name_is_counted_once_however_often_it_is_looked_up() -> None:
    directory, inode = Directory(2, ()), Inode(3, 0o100644)
    for _ in range(3):
        inode.add_name(directory, b"a")
        inode.add_name(directory, b"b")
    assert directory.dependants == 2
    assert sorted(name for _, name in inode.names()) == [b"a", b"b"]
    inode.remove_name(directory, b"a")
    inode.remove_name(directory, b"a")
    assert inode.names() == [(directory, b"b")]
    assert not inode.is_orphan
    inode.remove_name(directory, b"b")
    assert inode.is_orphan
    assert directory.dependants == 0


def test_offsets_stay_while_names_come_and_go() -> None:
    listing = Listing([b"a", b"b", b"c", b"d"])
    offsets = {name: offset for offset, name in listing.after(2)}
    assert list(offsets.values()) == [3, 4, 5, 6]
    listing.remove(b"b")
    listing.add(b"e")
    listing.add(b"b")
    assert list(listing.after(offsets[b"a"])) == [(5, b"c"), (6, b"d"), (7, b"e"), (8, b"b")]
    assert list(listing.after(8)) == []


def test_a_reader_sees_each_name_that_stays_once_while_all_others_are_removed() -> None:
    names = [b"%d" % number for number in range(1000)]
    listing = Listing(names)
    seen = []
    for offset, name in listing.after(2):
        seen.append(name)
        if offset % 2:
            listing.remove(name)
    assert seen == names
    assert list(listing) == names[1::2]


def test_holes_are_dropped_and_offsets_kept() -> None:
    listing = Listing([b"%d" % number for number in range(10_000)])
    for number in range(9_990):
        listing.remove(b"%d" % number)
    assert len(listing._order) < 100
    assert list(listing.after(2)) == [(3 + number, b"%d" % number) for number in range(9_990, 10_000)]


@settings(max_examples=30, deadline=None)
@given(st.randoms(use_true_random=False))
def test_a_listing_is_the_names_in_the_order_they_came(chance: random.Random) -> None:
    listing, model, last = Listing([]), dict[bytes, int](), 2
    for _ in range(150):
        name = b"%d" % chance.randrange(20)
        if chance.random() < 0.5:
            listing.add(name)
            if name not in model:
                last += 1
                model[name] = last
        else:
            listing.remove(name)
            model.pop(name, None)
        place = chance.randrange(last + 2)
        assert list(listing.after(place)) == sorted((offset, name) for name, offset in model.items() if offset > place)
        assert len(listing) == len(model)
        assert (name in listing) == (name in model)


# -- in a view

LOWER: Tree = {"file": "1", "other": "2", "directory": {"inside": "3", "deep": {"bottom": "4"}}, "a": "linked", "b": HardLink("a")}


def look_everywhere(one: Stack) -> None:
    one.merged.tree()


def test_when_all_is_forgotten_the_table_is_empty_again(stack: StackFactory) -> None:
    one = stack(LOWER)
    look_everywhere(one)
    assert len(one.merged.view.table) == 8
    one.merged.forget()
    assert list(one.merged.view.table.by_ino) == [ROOT_INO]
    assert one.merged.view.root.dependants == 0


def test_when_all_is_forgotten_after_every_kind_of_change_the_table_is_empty_again(stack: StackFactory) -> None:
    one = stack(LOWER)
    merged = one.merged
    look_everywhere(one)
    merged.write("file", b"changed")
    merged.rename("file", "directory/file")
    merged.mkdir("new")
    merged.create("new/file")
    merged.link("new/file", "new/link")
    merged.unlink("other")
    merged.unlink("directory/deep/bottom")
    merged.rmdir("directory/deep")
    merged.chmod("a", 0o600)
    merged.unlink("new/file")
    merged.symlink("x", "new/symlink")
    merged.rename("new/symlink", "symlink")
    merged.forget()
    assert list(merged.view.table.by_ino) == [ROOT_INO]
    assert merged.view.root.dependants == 0


def test_closing_a_view_leaves_no_descriptor(stack: StackFactory) -> None:
    before = set(os.listdir("/proc/self/fd"))
    one = stack(LOWER)
    look_everywhere(one)
    one.merged.write("directory/deep/bottom", b"changed")
    one.merged.walk("file")
    one.merged.chmod("file", 0o600)
    one.merged.unlink("file")
    one.merged.create("new", b"new")
    one.merged.unlink("new")
    one.close()
    assert set(os.listdir("/proc/self/fd")) == before


def test_forgetting_closes_the_descriptors_of_what_is_forgotten(stack: StackFactory) -> None:
    one = stack(LOWER)
    before = len(os.listdir("/proc/self/fd"))
    look_everywhere(one)
    one.merged.create("new", b"new")
    one.merged.unlink("new")
    one.merged.mkdir("made")
    one.merged.rmdir("made")
    assert len(os.listdir("/proc/self/fd")) > before
    one.merged.forget()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.root
def test_looking_through_redirects_again_and_again_keeps_no_descriptor(stack: StackFactory) -> None:
    """Each step of a redirect's path was opened anew with every look-up, and stayed open until the limit of all descriptors."""
    one = stack({"a": {"b": {"c": {"d": {"in": "it"}}}}}, {"a": {"b": {"c": {"d": {"below": "it"}}}}})
    one.merged.rename("a/b/c", "moved")
    one.open()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        assert one.merged.listdir("moved/d") == ["below", "in"]
        one.merged.forget()
        assert len(os.listdir("/proc/self/fd")) == before


def test_a_number_is_kept_over_copy_up_rename_and_remount(stack: StackFactory) -> None:
    one = stack(LOWER)
    numbers = {path: one.merged.ino(path) for path in ("file", "directory/inside", "directory/deep", "directory")}
    one.merged.write("file", b"changed")
    one.merged.chmod("directory/deep", 0o700)
    one.merged.write("directory/inside", b"changed")
    assert {path: one.merged.ino(path) for path in numbers} == numbers
    one.merged.rename("file", "directory/renamed")
    one.merged.rename("directory/inside", "inside")
    assert one.merged.ino("directory/renamed") == numbers["file"]
    again = one.open()
    assert again.ino("directory/deep") == numbers["directory/deep"]
    if IS_ROOT:  # a handle is opened with CAP_DAC_READ_SEARCH
        assert again.ino("directory/renamed") == numbers["file"]
        assert again.ino("inside") == numbers["directory/inside"]


def test_a_number_of_an_upper_file_is_not_given_to_the_next_while_the_first_is_known(stack: StackFactory) -> None:
    one = stack({})
    for _ in range(50):
        first = one.merged.create("file", b"first")
        real = one.merged.stat("file").st_ino
        one.merged.unlink("file")
        one.merged.create("file", b"second")
        assert one.merged.stat("file").st_ino != real
        assert one.merged.read_inode(first) == b"first"
        one.merged.unlink("file")
        one.merged.forget()


@pytest.mark.root  # redirects are followed with trusted.* marks alone
def test_two_directories_that_claim_one_lower_have_two_numbers(stack: StackFactory) -> None:
    """`cp -a` in an upper copies the redirect with the rest."""
    redirect = {mark("redirect"): b"/directory"}
    one = stack(LOWER, upper={"one": Folder({}, xattrs=redirect), "two": Folder({}, xattrs=redirect)})
    first, second, original = (one.merged.ino(name) for name in ("one", "two", "directory"))
    assert len({first, second, original}) == 3
    assert sum(number in RESERVED for number in (first, second, original)) == 2
    assert one.merged.listdir("one") == one.merged.listdir("two") == ["deep", "inside"]
    one.merged.create("one/new")
    assert one.merged.listdir("two") == ["deep", "inside"]
    assert (one.merged.ino("one"), one.merged.ino("two")) == (first, second)


@pytest.mark.root  # origins are followed with CAP_DAC_READ_SEARCH alone
def test_two_files_that_claim_one_origin_have_two_numbers(stack: StackFactory) -> None:
    one = stack(LOWER)
    number = one.merged.ino("file")
    one.merged.chmod("file", 0o600)
    one.merged.create("copy")
    os.setxattr(one.upper / "copy", mark("origin"), os.getxattr(one.upper / "file", mark("origin")))
    again = one.open()
    assert again.ino("file") == number
    assert again.ino("copy") in RESERVED


def test_a_lower_listed_with_its_own_subdirectory_has_one_number_for_each_place(stack: StackFactory) -> None:
    one = stack({"sub": {"file": "1", "deep": {"x": "2"}}})
    one.lowers.append(one.lowers[0] / "sub")
    merged = one.open()
    seen = merged.tree()
    assert {b"sub", b"sub/file", b"sub/deep", b"file", b"deep", b"deep/x"} < seen.keys()
    numbers = [merged.ino(os.fsdecode(path)) for path in seen if path != b"."]
    assert len(numbers) == len(set(numbers))
    merged.write("file", b"changed")
    assert merged.read("sub/file") == b"1"
    one.lowers.pop()


def test_a_copied_up_file_with_more_lower_names_is_kept_for_them(stack: StackFactory) -> None:
    """A FORGET between the copy-up and the look-up of the other name must not bring the old bytes back."""
    one = stack(LOWER)
    one.merged.write("a", b"CHANGE")
    one.merged.forget()
    assert one.merged.read("b") == b"CHANGE"
    assert one.merged.ino("a") == one.merged.ino("b")
