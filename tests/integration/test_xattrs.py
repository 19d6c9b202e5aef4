"""Extended attributes: what is the caller's, what is the overlay's own, and that neither is taken for the other."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from pyoverlay.testing import Directory, File, OverlayFactory, Symlink
from tests.integration.looks import OPAQUE, REDIRECT, WHITEOUT, Here, layers, mark, shape
from tests.posix.check import NOBODY, as_user, fails


@layers({"f": File(b"x", xattrs={"user.a": b"1", "trusted.b": b"2", "security.c": b"3"})})
@pytest.mark.root
def test_the_first_setxattr_copies_up_and_keeps_the_others(here: Here) -> None:
    os.setxattr(here.merged / "f", "user.new", b"4")
    for layer in (here.merged, here.upper):
        values = {name: os.getxattr(layer / "f", name) for name in ("user.a", "trusted.b", "security.c", "user.new")}
        assert values == {"user.a": b"1", "trusted.b": b"2", "security.c": b"3", "user.new": b"4"}


@layers(
    {
        "f": File(b"x", xattrs={"user.a": b"1"}),
        "d": Directory({"g": b""}, xattrs={"user.a": b"1"}),
        "s": Symlink("f", xattrs={"trusted.a": b"1"}),
    }
)
@pytest.mark.root
def test_a_removed_attribute_of_a_lower_object_stays_removed(alone: Here) -> None:
    for name, attribute in (("f", "user.a"), ("d", "user.a"), ("s", "trusted.a")):
        os.removexattr(alone.merged / name, attribute, follow_symlinks=False)
    alone.remount()
    for name, attribute in (("f", "user.a"), ("d", "user.a"), ("s", "trusted.a")):
        with fails(errno.ENODATA):
            os.getxattr(alone.merged / name, attribute, follow_symlinks=False)
        assert os.listxattr(alone.merged / name, follow_symlinks=False) == []


def _filling(path: Path) -> dict[str, bytes]:
    """Attributes for all the room that there is; on ext4 that is a block and some hundred bytes beside the inode."""
    found: dict[str, bytes] = {}
    path.write_bytes(b"")
    for size in (3000, 1000, 300, 100, 40, 20, 10, 5, 2, 1, 0) * 2:
        try:
            os.setxattr(path, f"user.{len(found)}", bytes(size))
        except OSError as error:
            assert error.errno == errno.ENOSPC
        else:
            found[f"user.{len(found)}"] = bytes(size)
    return found


@pytest.mark.parametrize("size", [5, 1 << 20])  # bytes: of a copy-up by one call, and by many
def test_a_file_whose_attributes_fill_their_room_is_copied_up(overlay: OverlayFactory, tmp_path: Path, size: int) -> None:
    """The mark that says where it came from found no room, and every change of such a file was ENOSPC."""
    given = _filling(tmp_path / "scratch")
    made = overlay({"f": File(b"x" * size, xattrs=given)})
    number = os.stat(made.merged / "f").st_ino
    os.chmod(made.merged / "f", 0o600)
    with open(made.merged / "f", "ab") as file:
        file.write(b"y")
    assert {name: os.getxattr(made.writable / "f", name) for name in os.listxattr(made.merged / "f")} == given
    assert (made.writable / "f").read_bytes() == b"x" * size + b"y"
    assert os.stat(made.merged / "f").st_ino == number


@layers({"f": b"x", "d": {"g": b"g"}})
def test_a_failed_change_of_an_attribute_copies_nothing_up(here: Here) -> None:
    with fails(errno.ENODATA):
        os.setxattr(here.merged / "f", "user.x", b"1", os.XATTR_REPLACE)
    with fails(errno.ENODATA):
        os.removexattr(here.merged / "f", "user.x")
    with fails(errno.ENODATA):
        os.removexattr(here.merged / "d", "user.x")
    with fails(errno.EOPNOTSUPP):
        os.setxattr(here.merged / "f", "nosuchspace.x", b"1")
    assert mark(here.merged / "f", "user.x") is None
    assert shape(here.merged) == {"f": b"x", "d": {"g": b"g"}}


@layers({"d": {"low": b"low"}, "f": b"f"})
@pytest.mark.root  # sets what only root may
def test_a_callers_own_marks_are_kept_apart_and_do_nothing(alone: Here) -> None:
    """Stored one level deeper, shown as they were set (fs/overlayfs/xattrs.c): one overlay can be the upper of another."""
    marks = {OPAQUE: b"y", REDIRECT: b"/elsewhere", "trusted.overlay.whiteout": b"", "trusted.overlay.overlay.opaque": b"deeper"}
    for name, value in marks.items():
        os.setxattr(alone.merged / "d", name, value)
        os.setxattr(alone.merged / "f", name, value)
    for _ in range(2):
        for name in ("d", "f"):
            assert sorted(os.listxattr(alone.merged / name)) == sorted(marks)
            assert {each: os.getxattr(alone.merged / name, each) for each in marks} == marks
        assert shape(alone.merged / "d") == {"low": b"low"}
        assert os.getxattr(alone.upper / "d", "trusted.overlay.overlay.opaque") == b"y"
        assert mark(alone.upper / "d", OPAQUE) is None
        alone.remount()
    os.removexattr(alone.merged / "d", OPAQUE)
    with fails(errno.ENODATA):
        os.getxattr(alone.merged / "d", OPAQUE)
    assert os.getxattr(alone.merged / "d", "trusted.overlay.overlay.opaque") == b"deeper"


@layers({"d": {"f": b"old"}})
@pytest.mark.root
def test_the_overlays_own_marks_are_not_shown(here: Here) -> None:
    (here.merged / "d" / "f").write_bytes(b"new")
    os.rename(here.merged / "d" / "f", here.merged / "d" / "g")
    os.mkdir(here.merged / "d" / "f")
    assert os.getxattr(here.upper / "d" / "f", OPAQUE) == b"y"
    for name in ("d", "d/g", "d/f"):
        assert os.listxattr(here.merged / name) == [], name
        for hidden in (OPAQUE, "trusted.overlay.origin", "trusted.overlay.impure"):
            with fails(errno.ENODATA):
                os.getxattr(here.merged / name, hidden)
            with fails(errno.ENODATA):
                os.removexattr(here.merged / name, hidden)
    assert os.getxattr(here.upper / "d" / "f", OPAQUE) == b"y"


SECRET = "test_marks_of_the_other_spelling_are_data/secret"


@layers(
    {
        "d": Directory({"top": b""}, xattrs={"user.overlay.opaque": b"y"}),
        "e": Directory({}, xattrs={"user.overlay.redirect": f"/{SECRET}".encode()}),
        "f": File(b"", xattrs={"user.overlay.whiteout": b""}),
        "m": File(b"mine", xattrs={"user.overlay.metacopy": b"", "user.overlay.redirect": f"/{SECRET}".encode()}),
    },
    {"d": {"bottom": b""}, "secret": File(b"secret", mode=0o600)},
)
@pytest.mark.root
def test_marks_of_the_other_spelling_are_data(here: Here) -> None:
    """An ordinary user can set `user.` attributes on files of their own: were they believed, they would open root's files."""
    assert shape(here.merged) == {"d": {"top": b"", "bottom": b""}, "e": {}, "f": b"", "m": b"mine", "secret": b"secret"}
    assert os.getxattr(here.merged / "d", "user.overlay.opaque") == b"y"
    assert "user.overlay.redirect" in os.listxattr(here.merged / "m")


@layers({"secret": File(b"secret", mode=0o600), "home": Directory({}, uid=NOBODY)})
@pytest.mark.root
def test_a_user_who_sets_marks_of_the_other_spelling_through_the_mount_gains_nothing(alone: Here) -> None:
    def plant() -> None:
        with open("home/f", "xb") as file:
            os.setxattr(file.fileno(), "user.overlay.metacopy", b"")
            os.setxattr(file.fileno(), "user.overlay.redirect", f"/{alone.name}/secret".encode())
        os.mkdir("home/d")
        os.setxattr("home/d", "user.overlay.redirect", f"/{alone.name}".encode())
        os.setxattr("home/d", "user.overlay.opaque", b"x")
        with open("home/d/w", "xb") as file:
            os.setxattr(file.fileno(), "user.overlay.whiteout", b"")

    as_user(alone.merged, plant)
    for _ in range(2):
        assert shape(alone.merged) == {"home": {"f": b"", "d": {"w": b""}}, "secret": b"secret"}
        alone.remount()


@layers({"f": File(b"x", mode=0o600, uid=NOBODY)})
@pytest.mark.root
def test_an_ordinary_user_sets_no_mark(here: Here) -> None:
    def plant() -> None:
        for name in (OPAQUE, REDIRECT, "trusted.overlay.whiteout"):
            with fails(errno.EPERM):
                os.setxattr("f", name, b"y")

    as_user(here.merged, plant)
    assert not here.upper.exists()


@layers({"f": b"x"})
def test_attributes_survive_a_rename_and_a_whiteout_has_none(here: Here) -> None:
    os.setxattr(here.merged / "f", "user.a", b"1")
    os.rename(here.merged / "f", here.merged / "g")
    assert os.getxattr(here.merged / "g", "user.a") == b"1"
    assert shape(here.upper) == {"f": WHITEOUT, "g": b"x"}
    assert [name for name in os.listxattr(here.upper / "f") if name.startswith("user.")] == []
    assert stat.S_ISCHR(os.lstat(here.upper / "f").st_mode)
