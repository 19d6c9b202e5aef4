"""Owner and mode in an extended attribute: read in every layer, written in the upper, out of a caller's reach."""

from __future__ import annotations

import errno
import os
import stat
import struct
from collections.abc import Callable
from dataclasses import replace

import pytest

from pyoverlay.core import attributes, overrides
from pyoverlay.core.attributes import Wanted
from pyoverlay.core.calls import Caller
from pyoverlay.core.change import create, mkdir, mknod, symlink, tmpfile
from pyoverlay.core.overrides import Override
from pyoverlay.core.policy import Override as Kept
from pyoverlay.testing import Directory, File, Symlink
from tests.unit.conftest import StackFactory
from tests.unit.merged import POLICY, Merged

NAME = "user.containers.override_stat"
POLICIES = {
    NAME: replace(POLICY, override=Kept.CONTAINERS),
    "security.fuseoverlayfs.override_stat": replace(POLICY, override=Kept.PRIVILEGED),
}
OVERRIDDEN = POLICIES[NAME]


def code(act: Callable[[], object]) -> str:
    with pytest.raises(OSError) as caught:
        act()
    return errno.errorcode[caught.value.errno or 0]


def shown(merged: Merged, path: str) -> tuple[int, int, int]:
    st = merged.view.stat(merged.walk(path))
    return st.st_uid, st.st_gid, stat.S_IMODE(st.st_mode)


@pytest.mark.parametrize(
    ("value", "override"),
    [(b"0:0:755", (0, 0, 0o755)), (b"1:2:04711", (1, 2, 0o4711)), (b"4294967295:7:0", (4294967295, 7, 0)), (b"5:6:1:file", (5, 6, 1))],
)
def test_what_engines_write_is_read(value: bytes, override: tuple[int, int, int]) -> None:
    assert overrides.decode(value) == override


@pytest.mark.parametrize("value", [b"", b"1:2", b"a:0:755", b"-1:0:755", b"0:0:888", b"0:0:10000", b"0:4294967296:755", b"0:0:"])
def test_what_is_no_override_is_refused(value: bytes) -> None:
    assert code(lambda: overrides.decode(value)) == "EINVAL"


def test_what_is_written_is_what_engines_write() -> None:
    assert overrides.encode(Override(1000, 100, 0o4755)) == b"1000:100:4755"


@pytest.mark.root
def test_what_can_bear_no_attribute_is_given_away_itself(stack: StackFactory) -> None:
    one = stack(upper={"group": Directory({}, 0o700, xattrs={NAME: b"0:77:2775"})}, policy=OVERRIDDEN)
    view, caller = one.merged.view, Caller(1000, 100, 0o027)
    group = view.directory(one.merged.ino("group"))
    for parent, gid in ((view.root, 100), (group, 77)):
        symlink(view, parent, b"symlink", b"x", caller)
        mknod(view, parent, b"fifo", stat.S_IFIFO | 0o666, 0, caller)
        for name, mode in ((b"symlink", 0o777), (b"fifo", 0o640)):
            found = view.lookup(parent, name)
            assert found is not None
            assert (found[1].st_uid, found[1].st_gid, stat.S_IMODE(found[1].st_mode)) == (1000, gid, mode)


def test_there_are_no_acls(stack: StackFactory) -> None:
    entries = ((1, 6, 0), (2, 4, 7), (4, 4, 0), (16, 4, 0), (32, 0, 0))
    acl = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)
    name = "system.posix_acl_access"
    one = stack({"f": File("x", 0o640, xattrs={name: acl})}, policy=OVERRIDDEN)
    assert code(lambda: one.merged.getxattr("f", name)) == "ENODATA"
    assert code(lambda: one.merged.setxattr("f", name, acl)) == "ENOTSUP"
    assert one.merged.listxattr("f") == []
    one.merged.chmod("f", 0o600)
    assert name not in os.listxattr(one.upper / "f")


@pytest.mark.parametrize("name", [NAME, pytest.param("security.fuseoverlayfs.override_stat", marks=pytest.mark.root)])
def test_every_layer_shows_what_the_attribute_says(stack: StackFactory, name: str) -> None:
    one = stack(
        {
            "f": File("x", 0o600, xattrs={name: b"7:8:4711"}),
            "d": Directory({}, 0o700, xattrs={name: b"9:10:2775"}),
            "plain": File("", 0o640),
        },
        upper={"u": File("x", 0o600, xattrs={name: b"11:12:444"})},
        policy=POLICIES[name],
    )
    assert shown(one.merged, "f") == (7, 8, 0o4711)
    assert shown(one.merged, "d") == (9, 10, 0o2775)
    assert shown(one.merged, "u") == (11, 12, 0o444)
    assert shown(one.merged, "plain") == (os.geteuid(), os.getegid(), 0o640)
    assert one.merged.view.stat(one.merged.walk("f")).st_size == 1


def test_times_and_blocks_are_the_object_s_own(stack: StackFactory) -> None:
    one = stack({"f": File("x" * 5000, 0o600, mtime_ns=1_234_567_890_123_456_789, xattrs={NAME: b"7:8:644"})}, policy=OVERRIDDEN)
    st, real = one.merged.view.stat(one.merged.walk("f")), os.stat(one.lower_for_reading() / "f")
    for field in ("st_mtime_ns", "st_ctime_ns", "st_atime_ns", "st_blocks", "st_blksize", "st_ino", "st_dev", "st_nlink", "st_rdev"):
        assert getattr(st, field) == getattr(real, field)


def test_a_copy_is_the_process_s_own_on_disk_and_shows_what_it_did(stack: StackFactory) -> None:
    one = stack(
        {"d": Directory({"f": File("lower", 0o600, xattrs={NAME: b"7:8:4711"})}, 0o755, xattrs={NAME: b"9:10:750"})}, policy=OVERRIDDEN
    )
    one.merged.setattr("d/f", Wanted(mtime_ns=5))
    assert shown(one.merged, "d/f") == shown(one.fresh(), "d/f") == (7, 8, 0o4711)
    assert shown(one.merged, "d") == (9, 10, 0o750)
    real = os.stat(one.upper / "d/f")
    assert (real.st_uid, stat.S_IMODE(real.st_mode)) == (os.geteuid(), 0o600)
    assert os.getxattr(one.upper / "d/f", NAME) == b"7:8:4711"


def test_chmod_and_chown_change_the_attribute_alone(stack: StackFactory) -> None:
    one = stack(upper={"f": File("x", 0o600), "d": {}}, policy=OVERRIDDEN)
    before = os.stat(one.upper / "f")
    one.merged.chown("f", 1000, 2000)
    one.merged.chmod("f", 0o6755)
    assert shown(one.merged, "f") == (1000, 2000, 0o6755)
    one.merged.chown("f", 1001, -1)
    assert shown(one.merged, "f") == (1001, 2000, 0o755)  # as chown(2): set-user-id and set-group-id go
    after = os.stat(one.upper / "f")
    assert (after.st_uid, after.st_gid, after.st_mode) == (before.st_uid, before.st_gid, before.st_mode)
    assert os.getxattr(one.upper / "f", NAME) == b"1001:2000:755"
    one.merged.chmod("d", 0o2770)
    one.merged.chown("d", 5, 6)
    assert shown(one.merged, "d") == (5, 6, 0o2770)


def test_what_somebody_makes_is_theirs_by_the_attribute(stack: StackFactory) -> None:
    one = stack({"gone": "x"}, upper={"group": Directory({}, 0o700, xattrs={NAME: b"0:77:2775"})}, policy=OVERRIDDEN)
    view, caller = one.merged.view, Caller(1000, 100, 0o027)
    one.merged.unlink("gone")
    create(view, view.root, b"gone", 0o4666, caller)
    mkdir(view, view.root, b"made", 0o777, caller)
    group = view.directory(one.merged.ino("group"))
    create(view, group, b"file", 0o666, caller)
    mkdir(view, group, b"directory", 0o777, caller)
    _, st = tmpfile(view, view.root, 0o600, caller)
    assert (st.st_uid, st.st_gid, stat.S_IMODE(st.st_mode)) == (1000, 100, 0o600)
    merged = one.fresh()
    assert shown(merged, "gone") == (1000, 100, 0o4640)
    assert shown(merged, "made") == (1000, 100, 0o750)
    assert shown(merged, "group/file") == (1000, 77, 0o640)
    assert shown(merged, "group/directory") == (1000, 77, 0o2750)
    assert {os.stat(one.upper / name).st_uid for name in ("gone", "made", "group/file")} == {os.geteuid()}
    assert one.work_names() == []


def test_a_name_that_is_there_is_not_made_again(stack: StackFactory) -> None:
    one = stack(upper={"f": "old"}, policy=OVERRIDDEN)
    assert code(lambda: create(one.merged.view, one.merged.view.root, b"f", 0o600, Caller(0, 0, 0))) == "EEXIST"
    assert one.merged.read("f") == b"old"


def test_set_user_id_goes_with_a_write_by_somebody_else(stack: StackFactory) -> None:
    one = stack(upper={"f": File("x", 0o600, xattrs={NAME: b"7:8:6755"})}, policy=OVERRIDDEN)
    attributes.drop_privileges_of(one.merged.view, one.merged.walk("f"))
    assert shown(one.merged, "f") == (7, 8, 0o755)


def test_no_caller_sees_the_attribute_or_writes_it(stack: StackFactory) -> None:
    """Whoever could would choose the owner of a file, and set-user-id."""
    one = stack(upper={"f": File("x", 0o600, xattrs={NAME: b"7:8:644", "user.mine": b"1"})}, policy=OVERRIDDEN)
    assert one.merged.listxattr("f") == ["user.mine"]
    assert code(lambda: one.merged.getxattr("f", NAME)) == "ENODATA"
    for name in (NAME, "user.containers.override_security.capability", "security.fuseoverlayfs.override_stat"):
        assert code(lambda name=name: one.merged.setxattr("f", name, b"0:0:4755")) == "EPERM"  # type: ignore[misc]
        assert code(lambda name=name: one.merged.removexattr("f", name)) in ("EPERM", "ENODATA")  # type: ignore[misc]
    assert os.getxattr(one.upper / "f", NAME) == b"7:8:644"


def test_a_symlink_is_whose_it_is(stack: StackFactory) -> None:
    one = stack({"link": Symlink("f")}, policy=OVERRIDDEN)
    one.merged.setattr("link", Wanted(mtime_ns=5), follow=False)
    assert shown(one.merged, "link")[:2] == (os.geteuid(), os.getegid())


def test_without_the_option_the_attribute_is_an_ordinary_one(stack: StackFactory) -> None:
    one = stack(upper={"f": File("x", 0o600, xattrs={NAME: b"7:8:4755"})})
    assert shown(one.merged, "f") == (os.geteuid(), os.getegid(), 0o600)
    assert one.merged.listxattr("f") == [NAME]
