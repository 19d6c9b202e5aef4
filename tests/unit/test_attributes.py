"""What an object says of itself, changed: in an order in which nothing undoes anything, and with marks out of reach."""

from __future__ import annotations

import errno
import os
import stat

import pytest

from pyoverlay.core import attributes
from pyoverlay.core.attributes import Wanted
from pyoverlay.core.syscalls import NOW
from pyoverlay.testing import Directory, Fifo, File, Symlink
from tests.unit.conftest import StackFactory
from tests.unit.merged import IS_ROOT, mark


def test_all_attributes_at_once_come_out_as_wanted(stack: StackFactory) -> None:
    one = stack({"file": File("content", 0o4711)})
    uid, gid = (1000, 2000) if IS_ROOT else (os.getuid(), os.getgid())
    one.merged.setattr("file", Wanted(mode=0o6755, uid=uid, gid=gid, size=3, atime_ns=1, mtime_ns=-1))
    st = os.stat(one.upper / "file")
    assert (stat.S_IMODE(st.st_mode), st.st_uid, st.st_gid, st.st_size, st.st_atime_ns, st.st_mtime_ns) == (0o6755, uid, gid, 3, 1, -1)
    assert (one.upper / "file").read_bytes() == b"con"
    assert (one.lower_for_reading() / "file").read_bytes() == b"content"


@pytest.mark.parametrize("name", ["file", "d", "link"])
def test_now_is_the_time_of_the_change(stack: StackFactory, name: str) -> None:
    """By the clock that stamps the change itself, and no other."""
    one = stack({"file": File("x", mtime_ns=5), "d": Directory({}, mtime_ns=5), "link": Symlink("file", mtime_ns=5)})
    one.merged.setattr(name, Wanted(atime_ns=NOW, mtime_ns=NOW), follow=False)
    st = os.lstat(one.upper / name)
    assert st.st_atime_ns == st.st_mtime_ns == st.st_ctime_ns
    one.merged.setattr(name, Wanted(atime_ns=7, mtime_ns=NOW), follow=False)
    st = os.lstat(one.upper / name)
    assert (st.st_atime_ns, st.st_mtime_ns) == (7, st.st_ctime_ns)


def test_what_is_not_wanted_is_left_alone(stack: StackFactory) -> None:
    one = stack({"file": File("content", 0o640, mtime_ns=12345)})
    one.merged.setattr("file", Wanted(atime_ns=7))
    st = os.stat(one.upper / "file")
    assert (stat.S_IMODE(st.st_mode), st.st_size, st.st_atime_ns, st.st_mtime_ns) == (0o640, 7, 7, 12345)


def test_a_symlink_s_times_are_its_own(stack: StackFactory) -> None:
    one = stack({"link": Symlink("file"), "file": File("x", mtime_ns=5)})
    one.merged.utime("link", 1, 2)
    assert (os.lstat(one.upper / "link").st_atime_ns, os.lstat(one.upper / "link").st_mtime_ns) == (1, 2)
    assert not (one.upper / "file").exists()


def test_an_object_without_a_name_can_still_be_changed(stack: StackFactory) -> None:
    one = stack({"file": File("content", 0o644)})
    one.merged.chmod("file", 0o600)
    inode = one.merged.unlink("file")
    view = one.merged.view
    attributes.setattr(view, inode, Wanted(mode=0o640, size=3, mtime_ns=99))
    attributes.setxattr(view, inode, b"user.one", b"1")
    attributes.write(view, inode, b"xyz!", 0)
    st = view.stat(inode)
    assert (stat.S_IMODE(st.st_mode), st.st_size, st.st_nlink) == (0o640, 4, 0)
    assert view.getxattr(inode, b"user.one") == b"1"
    assert one.merged.read_inode(inode) == b"xyz!"
    assert one.disk_tree() == {}


def test_a_caller_s_own_mark_is_stored_one_level_deeper_and_means_nothing(stack: StackFactory) -> None:
    one = stack({"d": {"below": ""}})
    one.merged.setxattr("d", mark("opaque"), b"y")
    assert os.getxattr(one.upper / "d", mark("overlay.opaque")) == b"y"
    assert one.merged.getxattr("d", mark("opaque")) == b"y"
    assert one.merged.listxattr("d") == [mark("opaque")]
    assert one.merged.listdir("d") == one.fresh().listdir("d") == ["below"]
    one.merged.removexattr("d", mark("opaque"))
    assert one.merged.listxattr("d") == []
    assert mark("overlay.opaque") not in os.listxattr(one.upper / "d")


def test_our_own_marks_can_be_neither_read_nor_removed(stack: StackFactory) -> None:
    one = stack({"file": "x"})
    one.merged.chmod("file", 0o600)
    assert mark("origin") in os.listxattr(one.upper / "file")
    for call in (lambda: one.merged.getxattr("file", mark("origin")), lambda: one.merged.removexattr("file", mark("origin"))):
        with pytest.raises(OSError) as caught:
            call()
        assert caught.value.errno == errno.ENODATA
    one.merged.setxattr("file", mark("origin"), b"forged")
    assert os.getxattr(one.upper / "file", mark("origin")) != b"forged"


def test_create_and_replace_are_the_file_system_s_own(stack: StackFactory) -> None:
    one = stack({"file": File("x", xattrs={"user.one": b"1"})})
    with pytest.raises(FileExistsError):
        one.merged.setxattr("file", "user.one", b"2", os.XATTR_CREATE)
    with pytest.raises(OSError) as caught:
        one.merged.setxattr("file", "user.two", b"2", os.XATTR_REPLACE)
    assert caught.value.errno == errno.ENODATA
    one.merged.setxattr("file", "user.one", b"2", os.XATTR_REPLACE)
    assert one.merged.getxattr("file", "user.one") == b"2"
    assert os.getxattr(one.lowers[0] / "file", "user.one") == b"1"


@pytest.mark.parametrize("name", ["fifo", "link"])
def test_user_attributes_are_for_files_and_directories(stack: StackFactory, name: str) -> None:
    one = stack({"fifo": Fifo(), "link": Symlink("x")})
    with pytest.raises(PermissionError):
        one.merged.setxattr(name, "user.one", b"1")


@pytest.mark.parametrize(
    ("before", "after"), [(0o6755, 0o755), (0o6711, 0o711), (0o2644, 0o2644), (0o6644, 0o2644), (0o755, 0o755)], ids=oct
)
def test_a_write_by_somebody_else_clears_suid_and_sgid_of_an_executable_group(stack: StackFactory, before: int, after: int) -> None:
    one = stack({"file": File("x", before)})
    one.merged.setattr("file", Wanted(mode=before))
    attributes.drop_privileges_of(one.merged.view, one.merged.walk("file"))
    assert stat.S_IMODE(os.stat(one.upper / "file").st_mode) == after


@pytest.mark.root  # only root gives capabilities
def test_a_write_by_somebody_else_clears_capabilities(stack: StackFactory) -> None:
    capability = bytes.fromhex("0100000200200000000000000000000000000000")
    one = stack({"file": File("x", 0o755, xattrs={"security.capability": capability})})
    one.merged.chmod("file", 0o755)
    assert one.merged.getxattr("file", "security.capability") == capability
    attributes.drop_privileges_of(one.merged.view, one.merged.walk("file"))
    assert one.merged.listxattr("file") == []


@pytest.mark.root  # only root chooses owners
def test_chown_clears_suid_and_the_mode_given_with_it_stands(stack: StackFactory) -> None:
    one = stack({"a": File("x", 0o4755), "b": File("x", 0o4755), "d": Directory({}, 0o2775)})
    one.merged.chown("a", 1000, 1000)
    assert stat.S_IMODE(one.merged.stat("a").st_mode) == 0o755
    one.merged.setattr("b", Wanted(uid=1000, mode=0o4755))
    assert stat.S_IMODE(one.merged.stat("b").st_mode) == 0o4755
    one.merged.chown("d", 1000, 1000)
    assert stat.S_IMODE(one.merged.stat("d").st_mode) == 0o2775


def test_a_change_makes_the_view_dirty_and_a_sync_clean(stack: StackFactory) -> None:
    one = stack({"file": "x"})
    view = one.merged.view
    one.merged.read("file")
    assert not view.is_dirty
    one.merged.chmod("file", 0o4755)
    assert view.is_dirty
    view.sync()
    assert not view.is_dirty
    attributes.drop_privileges_of(view, one.merged.walk("file"))
    assert view.is_dirty
