"""Copy-up: what a copy keeps, in which order it comes to be, and where it goes if the world moves on meanwhile."""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import replace

import pytest

from pyoverlay.core import attributes, copyup
from pyoverlay.core.attributes import Wanted
from pyoverlay.core.calls import Calls, Order
from pyoverlay.core.marks import decode_origin
from pyoverlay.core.objects import failure
from pyoverlay.core.policy import Fsync
from pyoverlay.testing import Device, Directory, Fifo, File, HardLink, Node, Socket, Symlink, Tree, snapshot
from tests.unit.conftest import StackFactory
from tests.unit.merged import IS_ROOT, Faulty, Merged, Stack, mark, timeless
from tests.unit.wired import WiredFaulty

ACL_ACCESS = bytes.fromhex("02000000 01000600ffffffff 02000400e8030000 04000400ffffffff 10000600ffffffff 20000000ffffffff")
CAPABILITY = bytes.fromhex("01000002 00200000 00000000 00000000 00000000")  # cap_net_raw=ep
OLD_NS = -12345 * 10**9 + 987654321  # before 1970


def copied(merged: Merged, path: str) -> None:
    copyup.copy_up(merged.view, merged.walk(path))
    merged.view.trim()


OBJECTS: dict[str, Node] = {
    "file": File(b"content" * 1000, 0o640, mtime_ns=OLD_NS, xattrs={"user.one": b"1", "user.two": bytes(range(256))}),
    "empty": File("", 0o600),
    "suid": File("program", 0o4755),
    "sgid": File("program", 0o2755),
    "sparse": File("start", size=1 << 26),
    "symlink": Symlink("target/of/it", mtime_ns=OLD_NS),
    "fifo": Fifo(0o622, mtime_ns=OLD_NS),
    "socket": Socket(0o755),
    "directory": Directory({}, 0o1711, mtime_ns=OLD_NS, xattrs={"user.one": b"1"}),
    "unreadable": File("secret", 0o400),
}
ROOT_OBJECTS: dict[str, Node] = {
    "owned": File("x", 0o6755, uid=1000, gid=2000),
    "owned_symlink": Symlink("x", uid=1000, gid=2000),
    "capable": File("x", 0o755, uid=1000, xattrs={"security.capability": CAPABILITY}),
    "trusted": File("x", xattrs={"trusted.one": b"1", "trusted.overlay.overlay.opaque": b"y"}),
    "device": Device("b", 7, 250, 0o660),
    "acl": File("x", 0o660, xattrs={"system.posix_acl_access": ACL_ACCESS}),
    "default_acl": Directory({}, 0o750, xattrs={"system.posix_acl_default": ACL_ACCESS}),
}


def is_file(name: str) -> bool:
    return isinstance({**OBJECTS, **ROOT_OBJECTS}[name], File)


@pytest.mark.parametrize("name", [*OBJECTS, *(ROOT_OBJECTS if IS_ROOT else {})])
def test_a_copy_is_like_the_original_and_nothing_else_changed(stack: StackFactory, name: str) -> None:
    assert_copy_is_like_original(stack, name)


@pytest.mark.wire
@pytest.mark.parametrize("name", [name for name in (*OBJECTS, *(ROOT_OBJECTS if IS_ROOT else {})) if is_file(name) and name != "sparse"])
def test_a_copy_made_in_one_call_is_like_the_original_and_nothing_else_changed(stack: StackFactory, name: str) -> None:
    calls = WiredFaulty(0, AssertionError())
    assert_copy_is_like_original(stack, name, calls)
    assert calls.at_once == 1


def assert_copy_is_like_original(stack: StackFactory, name: str, calls: Calls | None = None) -> None:
    node = {**OBJECTS, **ROOT_OBJECTS}[name]
    one = stack({"d": Directory({"deep": Directory({name: node}, mtime_ns=OLD_NS)}, 0o711, mtime_ns=OLD_NS)})
    before, inode = one.merged.tree(), one.merged.walk(f"d/deep/{name}")
    one.merged.view.upper.calls = calls or one.merged.view.upper.calls
    copied(one.merged, f"d/deep/{name}")
    assert one.merged.walk(f"d/deep/{name}") is inode
    original, copy = (os.lstat(layer / "d/deep" / name) for layer in (one.lowers[0], one.upper))
    assert (copy.st_size, copy.st_atime_ns, copy.st_rdev) == (original.st_size, original.st_atime_ns, original.st_rdev)
    assert one.merged.tree() == before
    assert one.fresh().tree() == before
    lower, upper = snapshot(one.lower_for_reading()), snapshot(one.upper)
    for path in (b"d", b"d/deep", os.fsencode(f"d/deep/{name}")):
        unmarked = tuple(pair for pair in upper[path].xattrs if not pair[0].startswith(mark("")) or pair[0].startswith(mark("overlay.")))
        assert replace(upper[path], xattrs=unmarked) == lower[path]
    assert one.work_names() == []


def test_a_sparse_file_stays_sparse_hole_for_hole(stack: StackFactory) -> None:
    one = stack({"file": ""})
    block = os.statvfs(one.lowers[0]).f_bsize
    with open(one.lowers[0] / "file", "r+b") as file:
        for place in (3, 64, 65, 200):
            file.seek(place * block)
            file.write(b"%d" % place * 10)
        file.truncate(300 * block)
    one._before = one.look_at_lowers()
    copied(one.merged, "file")
    assert os.stat(one.upper / "file").st_blocks == os.stat(one.lowers[0] / "file").st_blocks
    assert (one.upper / "file").read_bytes() == (one.lower_for_reading() / "file").read_bytes()


def test_where_ranges_cannot_be_copied_the_data_is_read_and_written(stack: StackFactory) -> None:
    one = stack({"file": File(os.urandom(3 << 20), size=5 << 20)})

    class NoRanges(Faulty):
        def copy_file_range(self, fd: int, new_fd: int, length: int, offset: int, new_offset: int) -> int:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    one.merged.view.upper.calls = NoRanges(0, AssertionError())
    copied(one.merged, "file")
    assert (one.upper / "file").read_bytes() == (one.lower_for_reading() / "file").read_bytes()


def test_owner_then_attributes_then_mode_then_times_then_the_name(stack: StackFactory) -> None:
    """chown clears suid and capabilities, a mode may forbid its owner to set attributes, data moves times."""
    one = stack({"file": File("content", 0o4755, xattrs={"user.one": b"1"})})
    order: list[str] = []

    class Recorded(Faulty):
        def _call(self, call, *arguments):  # type: ignore[no-untyped-def]
            order.append(call.__name__)
            return super()._call(call, *arguments)

    one.merged.view.upper.calls = Recorded(0, AssertionError())
    copied(one.merged, "file")
    setting = ["chown", "setxattr", "setxattr", "chmod", "utimens"]  # the file's own attribute and the origin
    data = ["open", "ficlone", "copy_file_range", "ftruncate"]
    assert order == [*data, *setting, "setxattr", "rename", "utimens"]  # impure, the name, the parent's


ORDERS = {Order.NOTHING: [], Order.DATA: ["sync_file_range"], Order.DATA_AND_SIZE: ["fdatasync"], Order.ALL: ["fsync"]}


@pytest.mark.wire
@pytest.mark.parametrize("order", Order)
def test_one_call_makes_the_same_system_calls_and_waits_for_the_disk_last(stack: StackFactory, order: Order) -> None:
    """It says first that inode numbers are to be looked up, and has the disk work while it sets the attributes."""
    one = stack({"file": File("content", 0o4755, xattrs={"user.one": b"1"})})
    ordered(one, order)
    calls = one.merged.view.upper.calls = WiredFaulty(0, AssertionError())
    copied(one.merged, "file")
    starting = ["start_writeback"] if order is not Order.NOTHING else []
    setting = ["setxattr", "setxattr", "chmod", "utimens"]
    data = ["open", "ficlone", "pwrite", *starting]
    assert calls.made == ["setxattr", *data, *setting, *ORDERS[order], "rename", "utimens"]


def ordered(one: Stack, order: Order) -> None:
    """As on a file system, and in a mount, in which so much has to be on disk."""
    upper = one.merged.view.upper
    upper.is_memory = False
    upper.fsync = {Order.NOTHING: Fsync.VOLATILE, Order.ALL: Fsync.STRICT}.get(order, Fsync.ORDERED)
    upper.keeps_order = order is Order.DATA
    assert upper.order is order


@pytest.mark.wire
def test_a_file_system_that_will_not_share_blocks_is_asked_once(stack: StackFactory) -> None:
    one = stack({"one": "1", "two": "2"})
    calls = one.merged.view.upper.calls = WiredFaulty(0, failure(errno.EOPNOTSUPP))
    calls.at = 3  # impure, open, and the question
    copied(one.merged, "one")
    copied(one.merged, "two")
    assert calls.made.count("ficlone") == 1
    assert one.merged.read("one") + one.merged.read("two") == b"12"


@pytest.mark.wire
@pytest.mark.parametrize("what", ["long", "sparse", "many attributes", "two names"])
def test_what_one_call_does_not_make_is_made_in_steps(stack: StackFactory, what: str) -> None:
    many = {f"user.{number:0120}": b"v" for number in range(20)}
    lower: Tree = {
        "long": File(bytes(range(256)) * 257),
        "sparse": File("start", size=1 << 15),
        "many attributes": File("x", xattrs=many),
        "two names": "linked",
        "other name": HardLink("two names"),
    }
    one = stack(lower)
    before = one.merged.tree()
    calls = one.merged.view.upper.calls = WiredFaulty(0, AssertionError())
    copied(one.merged, what)
    assert calls.at_once == 0
    assert one.merged.tree() == before
    assert (one.upper / what).stat().st_blocks <= (one.lowers[0] / what).stat().st_blocks
    assert one.work_names() == []


@pytest.mark.root  # `user.` marks do not say where data are
@pytest.mark.wire
def test_a_metacopy_that_nobody_took_for_one_gets_its_data(stack: StackFactory) -> None:
    one = stack({"file": File("hole", xattrs={mark("metacopy"): b""})}, {"file": "data"})
    calls = one.merged.view.upper.calls = WiredFaulty(0, AssertionError())
    copied(one.merged, "file")
    assert calls.at_once == 0
    assert (one.upper / "file").read_text() == "data"


def test_a_copy_bears_the_handle_of_its_original_and_its_directory_says_so(stack: StackFactory) -> None:
    one = stack({"d": {"file": "x"}})
    copied(one.merged, "d/file")
    for path in ("d/file", "d"):
        origin = decode_origin(os.getxattr(one.upper / path, mark("origin")))
        assert origin is not None
        assert not origin.is_upper
    assert os.getxattr(one.upper / "d", mark("impure")) == b"y"
    assert os.getxattr(one.upper, mark("impure")) == b"y"


def test_a_copy_up_to_truncate_copies_no_more_than_is_kept(stack: StackFactory) -> None:
    one = stack({"file": b"0123456789" * 1000})
    one.merged.truncate("file", 15)
    assert (one.upper / "file").read_bytes() == b"012345678901234"
    assert one.merged.read("file") == b"012345678901234"


def test_known_names_of_one_lower_file_stay_one_file(stack: StackFactory) -> None:
    one = stack({"a": "linked", "d": {"b": HardLink("a")}, "c": HardLink("a")})
    for path in ("a", "d/b"):
        one.merged.walk(path)
    one.merged.write("a", b"CHANGE")
    assert one.merged.read("d/b") == one.merged.read("c") == b"CHANGE"
    assert len({one.merged.ino(path) for path in ("a", "d/b", "c")}) == 1
    assert os.path.samefile(one.upper / "a", one.upper / "d/b")
    assert not (one.upper / "c").exists()  # nobody looked it up before the copy-up
    one.merged.rename("c", "e")
    assert os.path.samefile(one.upper / "a", one.upper / "e")


def test_an_object_without_a_name_is_copied_up_without_one(stack: StackFactory) -> None:
    one = stack({"file": "content"})
    inode = one.merged.unlink("file")
    with copyup.prepare(one.merged.view, inode) as copy:
        copyup.fill(copy)
        copyup.publish(one.merged.view, copy)
    attributes.write(one.merged.view, inode, b"CON", 0)
    assert one.merged.read_inode(inode) == b"CONtent"
    assert one.merged.view.nlink(inode, one.merged.view.stat(inode)) == 0
    assert not one.merged.exists("file")
    assert one.disk_tree() == {}
    one.merged.forget()
    assert len(one.merged.view.table) == 1


# -- between fill and publish: what another request may do while the data is on its way


def half_done(one: Stack, path: str, act: object) -> None:
    inode = one.merged.walk(path)
    with copyup.prepare(one.merged.view, inode) as copy:
        copyup.fill(copy)
        act(one.merged)  # type: ignore[operator]
        one.merged.view.cache.limit = 0
        one.merged.view.trim()
        one.merged.view.trim()
        copyup.publish(one.merged.view, copy)
    one.merged.view.cache.limit = 1000


FILE: Tree = {"d": {"file": "content"}, "other": "other", "e": {}}


def test_a_file_unlinked_during_its_copy_up_does_not_come_back(stack: StackFactory) -> None:
    one = stack(FILE)
    half_done(one, "d/file", lambda m: m.unlink("d/file"))
    assert not one.merged.exists("d/file")
    assert b"d/file" not in one.disk_tree()
    assert one.work_names() == []


def test_a_file_replaced_during_its_copy_up_stays_replaced(stack: StackFactory) -> None:
    one = stack(FILE)
    half_done(one, "d/file", lambda m: m.rename("other", "d/file"))
    assert one.merged.read("d/file") == b"other"
    assert one.fresh().read("d/file") == b"other"


@pytest.mark.root  # directories of lowers are renamed with trusted.* marks alone
def test_a_file_whose_directory_is_renamed_during_its_copy_up_goes_with_it(stack: StackFactory) -> None:
    one = stack(FILE)
    half_done(one, "d/file", lambda m: m.rename("d", "e/moved"))
    assert one.merged.read("e/moved/file") == b"content"
    assert (one.upper / "e/moved/file").read_bytes() == b"content"
    assert one.fresh().read("e/moved/file") == b"content"


def test_a_link_looked_up_during_a_copy_up_leads_to_the_copy(stack: StackFactory) -> None:
    one = stack({"a": "linked", "b": HardLink("a")})
    half_done(one, "a", lambda m: m.walk("b"))
    assert os.path.samefile(one.upper / "a", one.upper / "b")
    assert one.merged.nlink("a") == 2


def test_a_cancelled_copy_up_is_eintr_and_leaves_nothing(stack: StackFactory) -> None:
    one = stack({"file": b"content"})
    inode = one.merged.walk("file")

    def cancelled() -> None:
        with copyup.prepare(one.merged.view, inode) as copy:
            copy.is_cancelled = True
            copyup.fill(copy)

    with pytest.raises(OSError) as caught:
        cancelled()
    assert caught.value.errno == errno.EINTR
    assert not inode.in_upper
    assert snapshot(one.upper).keys() == {b"."}
    assert one.work_names() == []
    one.merged.write("file", b"CON")
    assert one.merged.read("file") == b"CONtent"


def test_a_descriptor_opened_before_a_copy_up_reads_what_is_written_after_it(stack: StackFactory) -> None:
    one = stack({"file": "content"})
    fd = one.merged.view.data_fd(one.merged.walk("file"))
    one.merged.write("file", b"CON")
    assert one.merged.view.data_fd(one.merged.walk("file")) == fd
    assert os.pread(fd, 100, 0) == b"CONtent"


def test_an_owner_that_cannot_be_kept_refuses_the_copy_up(stack: StackFactory) -> None:
    """Nobody's file becomes the daemon's."""
    one = stack({"d": {"file": "x"}})

    class NoOwners(Faulty):
        def chown(self, dirfd: int, name: bytes, uid: int, gid: int) -> None:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    one.merged.view.upper.calls = NoOwners(0, AssertionError())
    with pytest.raises(PermissionError):
        copied(one.merged, "d/file")
    assert timeless(snapshot(one.upper)) == {}
    assert one.work_names() == []


def test_setting_a_size_past_the_end_copies_all_and_adds_zeros(stack: StackFactory) -> None:
    one = stack({"file": "content"})
    one.merged.truncate("file", 10)
    assert one.merged.read("file") == b"content\0\0\0"
    one.merged.setattr("file", Wanted(size=3, mode=0o600, mtime_ns=OLD_NS))
    st = one.merged.stat("file")
    assert (st.st_size, stat.S_IMODE(st.st_mode), st.st_mtime_ns) == (3, 0o600, OLD_NS)
