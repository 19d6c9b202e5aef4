"""The merged view: precedence, what hides what, redirects, and what an object says of itself."""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest

from pyoverlay.core.inode import Directory as MergedDirectory
from pyoverlay.core.layer import Layer
from pyoverlay.core.policy import RedirectDir
from pyoverlay.core.stack import open_view
from pyoverlay.testing import Directory, File, HardLink, Symlink, Tree, Whiteout
from tests.unit.conftest import StackFactory
from tests.unit.merged import IS_ROOT, POLICY, Merged, mark

OPAQUE = {mark("opaque"): b"y"}
needs_redirects = pytest.mark.root  # with trusted.* marks alone are redirects followed


def opaque(entries: Tree) -> Directory:
    return Directory(entries, xattrs=OPAQUE)


def redirected(to: str, entries: Tree | None = None) -> Directory:
    return Directory(entries or {}, xattrs={mark("redirect"): os.fsencode(to)})


# -- precedence


def test_the_topmost_layer_that_has_a_name_wins(stack: StackFactory) -> None:
    one = stack({"a": "1", "b": "1"}, {"a": "2", "b": "2", "c": "2"}, {"a": "3", "d": "3"}, upper={"a": "upper"})
    assert {name: one.merged.read(name) for name in one.merged.listdir()} == {"a": b"upper", "b": b"1", "c": b"2", "d": b"3"}


def test_directories_of_all_layers_merge(stack: StackFactory) -> None:
    one = stack({"d": {"1": "", "both": "1"}}, {"d": {"2": "", "both": "2"}}, upper={"d": {"0": ""}})
    assert one.merged.listdir("d") == ["0", "1", "2", "both"]
    assert one.merged.read("d/both") == b"1"


@pytest.mark.parametrize("above", ["file", Symlink("x"), Whiteout()], ids=["file", "symlink", "whiteout"])
def test_what_is_no_directory_ends_the_merge(stack: StackFactory, above: object) -> None:
    one = stack({"d": {"1": ""}}, {"d": above}, {"d": {"3": ""}})
    assert one.merged.listdir("d") == ["1"]
    assert not one.merged.exists("d/3")


def test_a_file_hides_a_directory_and_a_directory_a_file(stack: StackFactory) -> None:
    one = stack({"a": "file", "b": {"1": ""}}, {"a": {"2": ""}, "b": "file"})
    assert one.merged.read("a") == b"file"
    assert one.merged.listdir("b") == ["1"]


@pytest.mark.parametrize("where", ["upper", "middle", "bottom"])
def test_an_opaque_directory_hides_what_is_below_it(stack: StackFactory, where: str) -> None:
    hiding: Tree = {"d": opaque({"mine": "", "deep": {"mine": ""}})}
    other: Tree = {"d": {"other": "", "deep": {"other": ""}}}
    one = stack(*((other, hiding, {"d": {"hidden": ""}}) if where == "middle" else (other, hiding) if where == "bottom" else (other,)),
                upper=hiding if where == "upper" else {})  # fmt: skip
    expected = ["deep", "mine"] if where == "upper" else ["deep", "mine", "other"]
    assert one.merged.listdir("d") == expected
    assert one.merged.listdir("d/deep") == expected[1:]
    assert not one.merged.exists("d/hidden")


def test_an_opaque_mark_of_the_other_spelling_is_inert_data(stack: StackFactory) -> None:
    other = "user.overlay.opaque" if IS_ROOT else "user.overlay2.opaque"
    one = stack({"d": Directory({"1": ""}, xattrs={other: b"y"})}, {"d": {"2": ""}})
    assert one.merged.listdir("d") == ["1", "2"]
    assert one.merged.getxattr("d", other) == b"y"


def test_marks_are_not_shown_and_a_caller_s_own_are(stack: StackFactory) -> None:
    one = stack({"d": Directory({}, xattrs={**OPAQUE, mark("overlay.opaque"): b"mine", "user.note": b"n"})})
    assert one.merged.listxattr("d") == sorted([mark("opaque"), "user.note"])
    assert one.merged.getxattr("d", mark("opaque")) == b"mine"
    with pytest.raises(OSError) as caught:
        one.merged.getxattr("d", mark("redirect"))
    assert caught.value.errno == errno.ENODATA


def test_a_name_too_long_for_any_layer_is_refused(stack: StackFactory) -> None:
    one = stack({"d": {}})
    assert not one.merged.exists("d/" + "n" * 255)
    with pytest.raises(OSError) as caught:
        one.merged.exists("d/" + "n" * 256)
    assert caught.value.errno == errno.ENAMETOOLONG


def test_cve_2026_31694_a_name_longer_than_names_may_be_is_not_listed(stack: StackFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lower that is FUSE itself may list names of 4095 bytes, which made the kernel overflow a page where they were passed on."""
    one = stack({"d": {"x" * 255: "", "plain": ""}})
    scan = Layer.scan

    def with_long_names(layer: Layer, dirfd: int) -> dict[bytes, int]:
        found = scan(layer, dirfd)
        return found | {name + b"x": kind for name, kind in found.items() if name.startswith(b"x")}

    monkeypatch.setattr(Layer, "scan", with_long_names)
    assert sorted(one.merged.listdir("d")) == ["plain", "x" * 255]


def test_any_bytes_are_a_name(stack: StackFactory) -> None:
    name = os.fsdecode(bytes(byte for byte in range(1, 256) if byte != ord("/"))[:255])
    one = stack({name: "lower"})
    assert one.merged.listdir() == [name]
    one.merged.write(name, b"upper")
    one.merged.rename(name, name[::-1])
    assert one.disk_tree().keys() == {os.fsencode(name[::-1])}


def test_without_an_upper_every_change_is_erofs(stack: StackFactory) -> None:
    one = stack({"file": "x", "d": {"in": "y"}})
    merged = Merged(open_view([os.fsencode(lower) for lower in one.lowers], None, None, POLICY))
    try:
        assert merged.listdir("d") == ["in"]
        for change in (
            lambda: merged.create("new"),
            lambda: merged.mkdir("d/new"),
            lambda: merged.unlink("file"),
            lambda: merged.chmod("file", 0o600),
            lambda: merged.write("file", b"y"),
            lambda: merged.rename("file", "new"),
            lambda: merged.setxattr("d", "user.x", b"y"),
            lambda: merged.link("file", "new"),
        ):
            with pytest.raises(OSError) as caught:
                change()
            assert caught.value.errno == errno.EROFS
        merged.view.sync()
        assert not merged.view.is_dirty
    finally:
        merged.view.close()


# -- redirects


@needs_redirects
@pytest.mark.parametrize("to", ["old", "/old"], ids=["relative", "absolute"])
def test_a_redirect_leads_to_the_directory_below(stack: StackFactory, to: str) -> None:
    one = stack({"old": {"1": "", "deep": {"2": ""}}}, upper={"new": redirected(to, {"0": ""}), "old": Whiteout()})
    assert one.merged.listdir() == ["new"]
    assert one.merged.listdir("new") == ["0", "1", "deep"]
    assert one.merged.listdir("new/deep") == ["2"]


@needs_redirects
def test_an_absolute_redirect_leads_out_of_a_directory_that_lowers_do_not_have(stack: StackFactory) -> None:
    one = stack({"old": {"1": ""}}, upper={"pure": {"new": redirected("/old")}})
    assert one.merged.listdir("pure/new") == ["1"]


@needs_redirects
def test_each_layer_s_redirect_counts_for_the_layers_below_it(stack: StackFactory) -> None:
    one = stack({"second": redirected("first", {"1": ""})}, {"first": redirected("/zero", {"2": ""})}, {"zero": {"3": ""}},
                upper={"third": redirected("/second", {"0": ""})})  # fmt: skip
    assert one.merged.listdir("third") == ["0", "1", "2", "3"]


@needs_redirects
def test_a_redirect_on_the_way_counts_too(stack: StackFactory) -> None:
    one = stack(
        {"middle": redirected("/base", {"deep": {"1": ""}})}, {"base": {"deep": {"2": ""}}}, upper={"new": redirected("/middle/deep")}
    )
    assert one.merged.listdir("new") == ["1", "2"]


@needs_redirects
def test_a_relative_redirect_behind_another_starts_where_that_one_leads(stack: StackFactory) -> None:
    one = stack(
        {"middle": redirected("/base", {"deep": redirected("deeper", {"1": ""})})},
        {"base": {"deeper": {"2": ""}}, "middle": {"deeper": {"wrong": ""}}},
        upper={"new": redirected("/middle/deep")},
    )
    assert one.merged.listdir("new") == ["1", "2"]


@needs_redirects
def test_an_absolute_redirect_of_a_lower_is_followed_where_no_layer_below_has_its_parent(stack: StackFactory) -> None:
    """An earlier upper, now a lower: `mkdir new; mv old new/old`. The parent is that layer's alone, what it redirects to is not."""
    one = stack({"new": opaque({"old": redirected("/old", {"1": ""})}), "old": Whiteout()}, {"old": {"2": ""}})
    assert one.merged.listdir("new/old") == ["1", "2"]


@needs_redirects
def test_an_absolute_redirect_leads_out_of_an_opaque_directory_on_the_way(stack: StackFactory) -> None:
    one = stack(
        {"x": opaque({"y": redirected("/z", {"1": ""})})}, {"z": {"2": ""}, "x": {"y": {"wrong": ""}}}, upper={"w": redirected("/x/y")}
    )
    assert one.merged.listdir("w") == ["1", "2"]


@needs_redirects
def test_a_redirect_to_itself_or_in_a_circle_ends(stack: StackFactory) -> None:
    one = stack({"a": redirected("/b", {"1": ""}), "b": redirected("/a", {"2": ""})}, {"a": redirected("a", {"3": ""}), "b": {"4": ""}},
                upper={"a": redirected("/a", {"0": ""})})  # fmt: skip
    assert one.merged.listdir("a") == ["0", "1", "4"]
    assert one.merged.listdir("b") == ["2", "3"]


@needs_redirects
@pytest.mark.parametrize("target", [{"nothing": ""}, {"old": "file"}, {"old": Whiteout()}, {"old": Symlink("nothing")}])
def test_a_redirect_to_no_directory_leaves_the_upper_one_alone(stack: StackFactory, target: Tree) -> None:
    one = stack(target, upper={"new": redirected("/old", {"0": ""})})
    assert one.merged.listdir("new") == ["0"]


@needs_redirects
@pytest.mark.parametrize("to", ["..", "/..", "/../x", "a/b", "", "/", "/a//b"])
def test_a_malformed_redirect_spoils_its_own_path_alone(stack: StackFactory, to: str) -> None:
    one = stack({"old": {"1": ""}}, upper={"bad": redirected(to), "good": redirected("old")})
    with pytest.raises(OSError) as caught:
        one.merged.walk("bad")
    assert caught.value.errno == errno.EINVAL
    assert one.merged.listdir("good") == ["1"]
    assert one.merged.listdir() == ["bad", "good", "old"]


@pytest.mark.parametrize("where", ["upper", "lower"])
def test_a_redirect_that_may_not_be_followed_is_eperm(stack: StackFactory, where: str) -> None:
    """`user.` marks can be anybody's: to follow one would let its writer read what lies where it leads."""
    policy = replace(POLICY, redirect_dir=RedirectDir.NOFOLLOW)
    layers: tuple[Tree, ...] = ({"new": redirected("/secret")}, {"secret": {"file": "s"}})
    one = stack(*layers[where == "upper" :], upper=layers[0] if where == "upper" else {}, policy=policy)
    if where == "lower":
        one.lowers.append(one.lowers[-1])  # so that the layer with the mark is not the last: nothing looks there
        one.open()
    with pytest.raises(OSError) as caught:
        one.merged.walk("new")
    assert caught.value.errno == errno.EPERM
    if where == "lower":
        one.lowers.pop()


# -- what is known without asking


def test_a_complete_listing_answers_for_names_that_are_not_there(stack: StackFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    one = stack({"d": {"a": ""}})
    one.merged.listdir("d")
    directory = one.merged.walk("d")
    assert isinstance(directory, MergedDirectory)
    one.merged.view.cache.close_all()
    monkeypatch.setattr(os, "stat", None)
    assert one.merged.view.lookup(directory, b"missing") is None


def test_a_listing_stays_true_over_every_change(stack: StackFactory) -> None:
    one = stack({"a": "1", "b": "2", "d": {"in": "3"}})
    merged = one.merged
    merged.listdir()
    merged.create("new")
    merged.unlink("a")
    merged.rename("b", "c")
    merged.mkdir("e")
    merged.link("c", "l")
    merged.symlink("x", "s")
    merged.mknod("p", stat.S_IFIFO | 0o600)
    assert merged.listdir() == one.fresh().listdir() == ["c", "d", "e", "l", "new", "p", "s"]


def test_offsets_of_a_merged_directory_stay_while_entries_go(stack: StackFactory) -> None:
    one = stack({"d": {f"{number:03}": "" for number in range(100)}})
    directory = one.merged.walk("d")
    assert isinstance(directory, MergedDirectory)
    seen = []
    for offset, name in one.merged.view.listing(directory).after(2):
        seen.append((offset, name))
        one.merged.unlink(f"d/{os.fsdecode(name)}")
    assert [offset for offset, _ in seen] == list(range(3, 103))
    assert len({name for _, name in seen}) == 100
    one.merged.rmdir("d")


# -- what an object says of itself


def test_links_are_counted_over_layers(stack: StackFactory) -> None:
    one = stack({"a": "x", "b": HardLink("a"), "c": HardLink("a")})
    merged = one.merged
    assert merged.nlink("a") == 3
    merged.unlink("c")
    assert merged.nlink("a") == merged.nlink("b") == 2
    merged.write("a", b"y")
    assert merged.nlink("a") == merged.nlink("b") == 2
    merged.link("b", "d")
    assert merged.nlink("a") == 3
    inode = merged.walk("a")
    for name in ("a", "b", "d"):
        merged.unlink(name)
    assert merged.view.nlink(inode, merged.view.stat(inode)) == 0


def test_a_merged_directory_has_one_link_and_a_removed_one_none(stack: StackFactory) -> None:
    one = stack({"d": {}}, upper={"d": {}})
    assert one.merged.nlink("d") == 1
    removed = one.merged.rmdir("d")
    assert one.merged.view.nlink(removed, one.merged.view.stat(removed)) == 0


def test_statfs_is_the_upper_s(stack: StackFactory) -> None:
    one = stack({})
    assert one.merged.view.statfs().f_blocks == os.statvfs(one.upper).f_blocks


def test_two_file_systems_never_share_a_number(stack: StackFactory, tmp_path: Path) -> None:
    one = stack({"a": File("x")})
    other = Path("/dev/shm") / f"pyoverlay-test-{os.getpid()}"
    if os.stat("/dev/shm").st_dev == os.stat(tmp_path).st_dev:
        pytest.skip("/dev/shm is no file system of its own here")
    other.mkdir()
    try:
        (other / "b").write_text("y")
        one.lowers.append(other)
        merged = one.open()
        a, b = merged.ino("a"), merged.ino("b")
        assert (a >> 52, b >> 52) == (0, 1)
        assert b & (1 << 52) - 1 == os.stat(other / "b").st_ino
        merged.write("b", b"z")
        assert merged.ino("b") == b
    finally:
        one.close()
        one.lowers.pop()
        (other / "b").unlink()
        other.rmdir()
