"""Metacopy files: found through the layers, made where metacopy=on, completed before their data change."""

from __future__ import annotations

import errno
import os
import struct
from dataclasses import replace

import pytest

from pyoverlay.core import copyup, syscalls
from pyoverlay.core.inode import Inode
from pyoverlay.core.policy import Policy, RedirectDir, Verity
from pyoverlay.core.syscalls import Stat
from pyoverlay.fuse.answers import Answers
from pyoverlay.testing import Directory, Fifo, File, HardLink, Symlink, Tree, Whiteout
from tests.posix.check import fails
from tests.unit.conftest import StackFactory
from tests.unit.merged import POLICY, Stack
from tests.unit.wired import WiredFaulty

pytestmark = pytest.mark.root  # trusted.* marks alone are followed

METACOPY, REDIRECT, OPAQUE = (f"trusted.overlay.{name}" for name in ("metacopy", "redirect", "opaque"))
DATA = os.urandom(10_000)
COPYING = replace(POLICY, metacopy=True)


def metacopy(redirect: bytes | None = None, mark: bytes = b"") -> File:
    return File(b"", size=len(DATA), xattrs={METACOPY: mark} | ({} if redirect is None else {REDIRECT: redirect}))


def digest(algorithm: int, value: bytes, *, version: int = 0) -> bytes:
    return struct.pack("BBBB", version, 4 + len(value), 0, algorithm) + value


FOUND: dict[str, tuple[str, tuple[Tree, ...]]] = {
    "under the same name": ("f", ({"f": metacopy()}, {"f": DATA})),
    "past a layer without it": ("f", ({"f": metacopy()}, {}, {"f": DATA})),
    "past another metacopy": ("f", ({"f": metacopy()}, {"f": metacopy()}, {"f": DATA})),
    "by a name in the same directory": ("d/f", ({"d": {"f": metacopy(b"g")}}, {"d": {"g": DATA}})),
    "by a path": ("f", ({"f": metacopy(b"/d/e/g")}, {"d": {"e": {"g": DATA}}})),
    "by a path, out of a directory no other layer has": ("d/f", ({"d": {"f": metacopy(b"/g")}}, {"g": DATA})),
    "by a path, out of an opaque directory": ("d/f", ({"d": Directory({"f": metacopy(b"/g")}, xattrs={OPAQUE: b"y"})}, {"g": DATA})),
    "by two redirects": ("f", ({"f": metacopy(b"/d/g")}, {"d": {"g": metacopy(b"h")}}, {"d": {"h": DATA}})),
    "by a redirect of its directory": ("d/f", ({"d": Directory({"f": metacopy()}, xattrs={REDIRECT: b"/e"})}, {"e": {"f": DATA}})),
    "by a redirect on the way": (
        "f", ({"f": metacopy(b"/d/g")}, {"d": Directory({}, xattrs={REDIRECT: b"/e"})}, {"e": {"g": DATA}, "d": {"g": b"hidden"}})
    ),
    "in a redirected directory's opaque half no further": (
        "f", ({"f": metacopy(b"/d/g")}, {"d": Directory({"g": DATA}, xattrs={OPAQUE: b"y"})}, {"d": {"g": b"hidden"}})
    ),
}  # fmt: skip

LOST: dict[str, tuple[int, tuple[Tree, ...]]] = {
    "nowhere": (errno.EIO, ({"f": metacopy()}, {})),
    "in a whiteout": (errno.EIO, ({"f": metacopy()}, {"f": Whiteout()}, {"f": DATA})),
    "in an aufs whiteout": (errno.EIO, ({"f": metacopy()}, {".wh.f": ""}, {"f": DATA})),
    "in a directory": (errno.EIO, ({"f": metacopy()}, {"f": {}}, {"f": DATA})),
    "in a symlink": (errno.EIO, ({"f": metacopy()}, {"f": Symlink("g"), "g": DATA})),
    "in a fifo": (errno.EIO, ({"f": metacopy(b"/p")}, {"p": Fifo()})),
    "behind a file": (errno.EIO, ({"f": metacopy(b"/g/f")}, {"g": DATA})),
    "above": (errno.EIO, ({"f": metacopy(b"/g"), "g": DATA}, {})),
    "in itself": (errno.EIO, ({"f": metacopy(b"/f")}, {})),
    "in a circle": (errno.EIO, ({"f": metacopy(b"g"), "g": metacopy(b"f")}, {"f": metacopy(b"g"), "g": metacopy(b"f")})),
    "out of the root": (errno.EINVAL, ({"f": metacopy(b"/../f")}, {"f": DATA})),
    "up": (errno.EINVAL, ({"f": metacopy(b"..")}, {"f": DATA})),
    "by an empty redirect": (errno.EINVAL, ({"f": metacopy(b"")}, {"f": DATA})),
    "by random bytes": (errno.EIO, ({"f": metacopy(b"\xff\x01 \n")}, {"f": DATA})),
    "by a very long name": (errno.EIO, ({"f": metacopy(b"/" + b"n" * 300)}, {"f": DATA})),
    "by a mark too short": (errno.EIO, ({"f": metacopy(mark=b"\0\1")}, {"f": DATA})),
}


@pytest.mark.parametrize("in_upper", [False, True], ids=["in a lower", "in the upper"])
@pytest.mark.parametrize("name", FOUND)
def test_the_data_are_found(stack: StackFactory, name: str, in_upper: bool) -> None:
    path, layers = FOUND[name]
    one = stack(*layers[1:], upper=layers[0]) if in_upper else stack(*layers)
    inode = one.merged.walk(path)
    assert one.merged.view.blocks(inode, one.merged.view.stat(inode)) * 512 >= len(DATA)
    assert one.merged.read(path) == DATA
    one.merged.write(path, b"changed", 3)
    assert one.open().read(path) == DATA[:3] + b"changed" + DATA[10:]
    assert METACOPY not in os.listxattr(one.upper / path)


@pytest.mark.parametrize("in_upper", [False, True], ids=["in a lower", "in the upper"])
@pytest.mark.parametrize("name", LOST)
def test_what_leads_to_no_data_spoils_its_own_path_alone(stack: StackFactory, name: str, in_upper: bool) -> None:
    code, (top, *below) = LOST[name]
    top = {**top, "other": "content"}
    one = stack(*below, upper=top) if in_upper else stack(top, *below)
    for act in (one.merged.walk, one.merged.read, one.merged.unlink, lambda path: one.merged.chmod(path, 0o600)):
        with pytest.raises(OSError) as caught:
            act("f")
        assert caught.value.errno == code
    assert "f" in one.merged.listdir()
    assert one.merged.read("other") == b"content"


@pytest.mark.parametrize("policy", [replace(POLICY, userxattr=True), replace(POLICY, redirect_dir=RedirectDir.NOFOLLOW)])
def test_a_metacopy_that_may_not_be_followed_is_eperm(stack: StackFactory, policy: Policy) -> None:
    mark = "user.overlay.metacopy" if policy.userxattr else METACOPY
    one = stack({"f": File("", size=9000, xattrs={mark: b""})}, {"f": DATA}, policy=policy)
    with pytest.raises(PermissionError):
        one.merged.walk("f")


def test_marks_of_the_other_spelling_mean_nothing(stack: StackFactory) -> None:
    one = stack({"f": File("", size=9000, xattrs={"user.overlay.metacopy": b"", "user.overlay.redirect": b"/g"})}, {"f": DATA, "g": DATA})
    assert one.merged.read("f") == bytes(9000)


def test_a_metacopy_with_blocks_of_its_own_is_found_when_it_is_opened(stack: StackFactory) -> None:
    """erofs gives a file that has no data all its blocks; here the file has other data, which must not show."""
    one = stack({"f": File(b"x" * 9000, xattrs={METACOPY: b""})}, {"f": DATA})
    assert one.merged.read("f")[:9000] == DATA[:9000]
    one.merged.write("f", b"changed")
    assert one.open().read("f")[:9000] == b"changed" + DATA[7:9000]


# -- digests


def test_a_digest_is_held_against_the_data(stack: StackFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """This kernel may lack fs-verity, so what it says is given here."""
    monkeypatch.setattr(syscalls, "measure_verity", lambda _: (1, b"d" * 32))
    layers: tuple[Tree, Tree] = (
        {
            "good": metacopy(mark=digest(1, b"d" * 32)),
            "wrong": metacopy(mark=digest(1, b"e" * 32)),
            "other": metacopy(mark=digest(2, b"d" * 32)),
            "later": metacopy(mark=digest(1, b"d" * 32, version=1)),
            "long": metacopy(mark=digest(1, b"d" * 32) + b"x"),
            "none": metacopy(),
            "zero": metacopy(mark=digest(0, b"")),
        },
        dict.fromkeys(("good", "wrong", "other", "later", "long", "none", "zero"), DATA),
    )
    readable = {
        Verity.OFF: {"good", "wrong", "other", "later", "long", "none", "zero"},
        Verity.ON: {"good", "none", "zero"},
        Verity.REQUIRE: {"good"},
    }
    for verity, expected in readable.items():
        one = stack(*layers, policy=replace(POLICY, verity=verity))
        assert {name for name in layers[0] if _read(one, str(name)) == DATA} == expected


def _read(one: Stack, name: str) -> bytes | None:
    try:
        return one.merged.read(name)
    except OSError as error:
        assert error.errno == errno.EIO
        return None


def test_without_fs_verity_a_digest_is_eio(stack: StackFactory) -> None:
    one = stack({"f": metacopy(mark=digest(1, b"d" * 32))}, {"f": DATA}, policy=replace(POLICY, verity=Verity.ON))
    assert one.merged.stat("f").st_size == len(DATA)
    with pytest.raises(OSError) as caught:
        one.merged.read("f")
    assert caught.value.errno == errno.EIO


def test_a_metacopy_is_made_with_the_digest_of_its_data(stack: StackFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(syscalls, "measure_verity", lambda _: (1, b"d" * 32))
    one = stack({"f": DATA}, policy=replace(COPYING, verity=Verity.REQUIRE))
    one.merged.chmod("f", 0o600)
    assert os.getxattr(one.upper / "f", METACOPY) == digest(1, b"d" * 32)
    assert one.open().read("f") == DATA


def test_where_a_digest_is_required_data_without_one_are_copied(stack: StackFactory) -> None:
    one = stack({"f": DATA}, policy=replace(COPYING, verity=Verity.REQUIRE))
    one.merged.chmod("f", 0o600)
    assert METACOPY not in os.listxattr(one.upper / "f")
    assert one.merged.read("f") == DATA


# -- metacopy=on

LOWER: Tree = {
    "f": File(DATA, mode=0o4755, xattrs={"security.capability": bytes.fromhex("0100000200200000000000000000000000000000")}),
    "g": HardLink("f"),
    "d": {"in": DATA},
    "empty": "",
}


def test_a_change_of_attributes_copies_no_data(stack: StackFactory) -> None:
    one = stack(LOWER, policy=COPYING)
    one.merged.chmod("f", 0o4711)
    one.merged.utime("d/in", 1, 2)
    one.merged.setxattr("empty", "user.x", b"1")
    for path in ("f", "d/in"):
        assert os.getxattr(one.upper / path, METACOPY) == b""
        assert os.stat(one.upper / path).st_blocks <= 8
        assert os.stat(one.upper / path).st_size == len(DATA)
        assert one.merged.read(path) == DATA
    assert METACOPY not in os.listxattr(one.upper / "empty")
    assert one.open().read("f") == DATA


def test_its_data_come_without_taking_away_what_writing_does_and_reach_who_reads(stack: StackFactory) -> None:
    one = stack(LOWER, policy=COPYING)
    one.merged.chmod("f", 0o4711)
    inode = one.merged.walk("f")
    reader = one.merged.view.data_fd(inode)
    before = one.merged.tree()
    copyup.copy_up(one.merged.view, inode)
    assert one.merged.tree() == before
    assert sorted(os.listxattr(one.upper / "f")) == ["security.capability", "trusted.overlay.origin"]
    assert os.stat(one.upper / "f").st_mode & 0o7777 == 0o4711
    one.merged.write("f", b"new", 5000)
    expected = DATA[:5000] + b"new" + DATA[5003:]
    assert os.pread(reader, 20_000, 0) == expected
    assert one.open().read("f") == expected


@pytest.mark.parametrize("size", [0, 4000, len(DATA), 20_000])
def test_a_truncation_copies_what_is_left(stack: StackFactory, size: int) -> None:
    one = stack(LOWER, policy=COPYING)
    one.merged.chmod("f", 0o600)
    one.merged.truncate("f", size)
    assert one.merged.read("f") == (DATA + bytes(20_000))[:size]
    assert one.open().read("f") == (DATA + bytes(20_000))[:size]
    assert METACOPY not in os.listxattr(one.upper / "f")


def test_renamed_and_linked_it_says_where_its_data_are(stack: StackFactory) -> None:
    one = stack(LOWER, policy=COPYING)
    one.merged.rename("f", "d/f")
    one.merged.link("d/in", "in2")
    one.merged.unlink("d/in")
    one.merged.rename("d", "e")
    one.merged.rename("e/f", "e/h")
    for path, redirect in (("e/h", b"/f"), ("in2", b"/d/in")):
        assert os.getxattr(one.upper / path, REDIRECT) == redirect
        assert os.stat(one.upper / path).st_blocks <= 8
        assert one.merged.read(path) == DATA
    one.open()
    assert (one.merged.read("e/h"), one.merged.read("in2"), one.merged.read("g")) == (DATA, DATA, DATA)
    assert one.merged.listdir("e") == ["h"]


def test_without_redirects_a_metacopy_that_moves_gets_its_data(stack: StackFactory) -> None:
    one = stack({"f": DATA}, upper={"f": metacopy()}, policy=replace(POLICY, redirect_dir=RedirectDir.FOLLOW))
    one.merged.rename("f", "g")
    assert METACOPY not in os.listxattr(one.upper / "g")
    assert one.open().read("g") == DATA


def test_both_names_of_a_lower_file_lead_to_one_metacopy(stack: StackFactory) -> None:
    one = stack(LOWER, policy=COPYING)
    one.merged.walk("g")
    one.merged.chmod("f", 0o600)
    assert os.stat(one.upper / "f").st_ino == os.stat(one.upper / "g").st_ino
    one.merged.write("g", b"new")
    assert one.merged.read("f") == b"new" + DATA[3:]
    one.open()
    assert one.merged.read("f") == one.merged.read("g") == b"new" + DATA[3:]


def test_an_unlinked_metacopy_can_still_be_read_and_completed(stack: StackFactory) -> None:
    one = stack({"f": DATA}, policy=COPYING)
    one.merged.chmod("f", 0o600)
    inode = one.merged.walk("f")
    one.merged.unlink("f")
    assert one.merged.read_inode(inode) == DATA
    copyup.copy_up(one.merged.view, inode)
    assert one.merged.view.has_upper_data(inode)
    assert one.merged.read_inode(inode) == DATA


@pytest.mark.parametrize("index", [False, True])
def test_a_new_name_by_one_that_the_upper_lacks_finds_the_data(stack: StackFactory, index: bool) -> None:
    """The copy has no name in the upper any more, so nothing there says where its data lie."""
    one = stack({"a": DATA, "b": HardLink("a")}, policy=replace(COPYING, index=index))
    one.merged.chmod("a", 0o600)
    one.merged.unlink("a")
    one.merged.link("b", "new")
    one.merged.unlink("b")
    assert one.merged.read("new") == DATA
    assert one.open().read("new") == DATA


def test_a_listing_that_fails_in_the_middle_has_told_what_comes_before(stack: StackFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel has a reference for each entry that it was told, and for no other."""
    names = (b"a", b"b", b"c")
    one = stack({"a": "1", "b": "2", "c": "3"}, policy=replace(POLICY, metacopy=True))
    view, blocks = one.merged.view, one.merged.view.blocks
    for name in names:
        one.merged.chmod(os.fsdecode(name), 0o600)
    before = {name: one.merged.walk(os.fsdecode(name)).nlookup for name in names}
    asked: list[Inode] = []

    def fail(inode: Inode, st: Stat) -> int:
        asked.append(inode)
        if len(asked) == 2:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return blocks(inode, st)

    monkeypatch.setattr(view, "blocks", fail)
    told = {name for _, name, _ in Answers(view).entries(view.root.ino, 2, 4096)}
    assert len(told) == 1
    found = {name: view.lookup(view.root, name) for name in names}
    assert {name: here[0].nlookup for name, here in found.items() if here} == {name: before[name] + (name in told) for name in names}


def test_what_a_completion_that_fails_has_copied_is_a_hole_again(stack: StackFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    one = stack({"f": DATA}, policy=COPYING)
    one.merged.chmod("f", 0o600)
    before = os.stat(one.upper / "f")

    def fail(dirfd: int, name: bytes, attribute: bytes) -> None:
        assert os.fstat(dirfd).st_blocks > before.st_blocks, "the data are there"
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(one.merged.view.upper.calls, "removexattr", fail)
    with fails(errno.ENOSPC):
        one.merged.write("f", b"x")
    after = os.stat(one.upper / "f")
    assert (after.st_size, after.st_blocks, after.st_mtime_ns) == (before.st_size, before.st_blocks, before.st_mtime_ns)
    monkeypatch.undo()
    one.merged.write("f", b"x")
    assert one.merged.read("f") == b"x" + DATA[1:]


@pytest.mark.wire
def test_a_metacopy_of_a_lower_is_not_for_the_one_call(stack: StackFactory) -> None:
    one = stack({"f": metacopy()}, {"f": DATA})
    calls = one.merged.view.upper.calls = WiredFaulty(0, AssertionError())
    assert one.merged.read("f") == DATA
    one.merged.write("f", b"x")
    assert one.merged.read("f") == one.fresh().read("f") == b"x" + DATA[1:]
    assert calls.at_once == 0


def test_a_metacopy_that_is_redirected_beside_itself_is_found_from_elsewhere(stack: StackFactory) -> None:
    """The kernel writes one name for a rename in the same directory: moved on, it has to be the whole path."""
    one = stack({"d": {"g": DATA}}, upper={"d": {"f": metacopy(b"g")}}, policy=COPYING)
    assert one.merged.read("d/f") == DATA
    one.merged.rename("d/f", "moved")
    assert os.getxattr(one.upper / "moved", REDIRECT) == b"/d/g"
    assert one.merged.read("moved") == one.fresh().read("moved") == DATA
