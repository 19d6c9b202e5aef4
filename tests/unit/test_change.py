"""Making and removing names: what shows, what lies in the upper, and who owns what is made."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable

import pytest

from pyoverlay.core import change, copyup, syscalls
from pyoverlay.core.calls import Caller
from pyoverlay.core.inode import Directory as MergedDirectory
from pyoverlay.fuse.binding import wire
from pyoverlay.fuse.wired_calls import WiredCalls
from pyoverlay.testing import Directory, Fifo, HardLink, Symlink, Tree, Whiteout, is_whiteout, snapshot
from tests.crash.cases import BELOW as CASE_BELOW
from tests.crash.cases import LOWER as CASE_LOWER
from tests.crash.cases import RUNNABLE
from tests.posix.check import fails
from tests.unit.conftest import StackFactory
from tests.unit.merged import IS_ROOT, POLICY, Faulty, Merged, Stack, mark, timeless

DEFAULT_ACL = bytes.fromhex("02000000 01000700ffffffff 02000600e8030000 04000500ffffffff 10000700ffffffff 20000000ffffffff")

LOWER: Tree = {
    "file": "lower",
    "symlink": Symlink("target"),
    "fifo": Fifo(),
    "empty": {},
    "directory": {"inside": "inside", "deep": {"bottom": "bottom"}},
    "copied": "to be copied up",
    "merged": {"one": "1"},
    "opaque": {"hidden": "h"},
}


def make_opaque(merged: Merged) -> None:
    merged.unlink("opaque/hidden")
    merged.rmdir("opaque")
    merged.mkdir("opaque")


def make_merged(merged: Merged) -> None:
    merged.create("merged/new")
    merged.unlink("merged/new")
    merged.unlink("merged/one")


PREPARE: dict[str, Callable[[Merged], object]] = {
    "copied": lambda m: m.chmod("copied", 0o600),
    "upper_file": lambda m: m.create("upper_file"),
    "upper_symlink": lambda m: m.symlink("target", "upper_symlink"),
    "upper_directory": lambda m: m.mkdir("upper_directory"),
    "merged": make_merged,
    "opaque": make_opaque,
}
FILES = ["file", "symlink", "fifo", "copied", "upper_file", "upper_symlink"]
EMPTY_DIRECTORIES = ["empty", "upper_directory", "merged", "opaque"]
LOWER_HAS = {"file", "symlink", "fifo", "copied", "empty", "merged", "opaque"}

MAKERS: dict[str, Callable[[Merged, str], object]] = {
    "create": lambda m, path: m.create(path, b"new"),
    "mkdir": lambda m, path: m.mkdir(path),
    "symlink": lambda m, path: m.symlink("target", path),
    "mkfifo": lambda m, path: m.mknod(path, stat.S_IFIFO | 0o640),
    "link": lambda m, path: m.link("directory/inside", path),
}


def prepared(stack: StackFactory, name: str, limit: int | None = None) -> Stack:
    one = stack(LOWER, limit=limit)
    if name in PREPARE:
        PREPARE[name](one.merged)
    return one


def remove(merged: Merged, name: str) -> object:
    return merged.unlink(name) if name in FILES else merged.rmdir(name)


@pytest.mark.parametrize("limit", [None, 4], ids=["descriptors kept", "four descriptors"])
@pytest.mark.parametrize("name", [*FILES, *EMPTY_DIRECTORIES])
def test_what_is_removed_is_gone_and_hidden_by_a_whiteout_where_a_lower_has_it(stack: StackFactory, name: str, limit: int | None) -> None:
    one = prepared(stack, name, limit)
    before = timeless(one.merged.tree())
    remove(one.merged, name)
    after = timeless(one.merged.tree())
    assert after == one.disk_tree()
    assert after == {path: entry for path, entry in before.items() if path.split(b"/")[0] != os.fsencode(name)}
    assert os.path.lexists(one.upper / name) == (name in LOWER_HAS)
    if name in LOWER_HAS:
        assert is_whiteout(one.upper / name)
    assert one.work_names() == []


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("name", [*FILES, *EMPTY_DIRECTORIES])
def test_what_is_made_where_something_was_removed_is_new_through_and_through(stack: StackFactory, name: str, maker: str) -> None:
    one = prepared(stack, name)
    remove(one.merged, name)
    MAKERS[maker](one.merged, name)
    assert timeless(one.merged.tree()) == one.disk_tree()
    if maker == "mkdir":
        assert one.merged.listdir(name) == []
        if name in LOWER_HAS:
            assert os.getxattr(one.upper / name, mark("opaque")) == b"y"
    assert one.work_names() == []
    if maker == "mkdir":
        one.merged.rmdir(name)
    else:
        one.merged.unlink(name)
    assert not one.merged.exists(name)
    assert is_whiteout(one.upper / name) if name in LOWER_HAS else not os.path.lexists(one.upper / name)


@pytest.mark.parametrize("maker", MAKERS)
def test_what_is_made_deep_in_a_lower_brings_its_directories_up_and_no_more(stack: StackFactory, maker: str) -> None:
    one = stack(LOWER)
    MAKERS[maker](one.merged, "directory/deep/new")
    assert timeless(one.merged.tree()) == one.disk_tree()
    made = {b".", b"directory", b"directory/deep", b"directory/deep/new"}
    assert snapshot(one.upper).keys() == made | ({b"directory/inside"} if maker == "link" else set())
    assert one.merged.listdir("directory/deep") == ["bottom", "new"]


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("is_listed", [False, True], ids=["not listed", "listed"])
def test_nothing_is_made_over_what_is_there(stack: StackFactory, maker: str, is_listed: bool) -> None:
    """The kernel looks first; the core does not rely on it."""
    one = stack(LOWER, upper={"upper": "x"})
    if is_listed:
        one.merged.listdir()
    before = snapshot(one.upper)
    root, caller, view = one.merged.view.root, one.merged.caller, one.merged.view
    inode = one.merged.create("source")
    direct: dict[str, Callable[[bytes], object]] = {
        "create": lambda name: change.create(view, root, name, 0o644, caller),
        "mkdir": lambda name: change.mkdir(view, root, name, 0o755, caller),
        "symlink": lambda name: change.symlink(view, root, name, b"x", caller),
        "mkfifo": lambda name: change.mknod(view, root, name, stat.S_IFIFO | 0o600, 0, caller),
        "link": lambda name: change.link(view, inode, root, name),
    }
    for name in (b"file", b"directory", b"upper"):
        with pytest.raises(FileExistsError):
            direct[maker](name)
    one.merged.unlink("source")
    assert timeless(snapshot(one.upper)) == timeless(before)
    assert one.work_names() == []


@pytest.mark.parametrize(
    ("act", "code"),
    [
        (lambda m: change.unlink(m.view, m.view.root, b"missing"), errno.ENOENT),
        (lambda m: change.unlink(m.view, m.view.root, b"empty"), errno.EISDIR),
        (lambda m: change.rmdir(m.view, m.view.root, b"missing"), errno.ENOENT),
        (lambda m: change.rmdir(m.view, m.view.root, b"file"), errno.ENOTDIR),
        (lambda m: m.rmdir("directory"), errno.ENOTEMPTY),
        (lambda m: m.mknod("new", stat.S_IFCHR | 0o600, 0), errno.EPERM),
        (lambda m: change.link(m.view, m.walk("directory"), m.view.root, b"new"), errno.EPERM),
        (lambda m: m.create("n" * 256), errno.ENAMETOOLONG),
    ],
    ids=["unlink nothing", "unlink dir", "rmdir nothing", "rmdir file", "rmdir full", "mknod 0/0", "link dir", "long"],
)
def test_what_cannot_be_done_is_refused_and_changes_nothing(stack: StackFactory, act: Callable[[Merged], object], code: int) -> None:
    one = stack(LOWER)
    with pytest.raises(OSError) as caught:
        act(one.merged)
    assert caught.value.errno == code
    assert timeless(snapshot(one.upper)) == {}


def test_in_a_removed_directory_nothing_can_be_made(stack: StackFactory) -> None:
    one = stack(LOWER)
    removed = one.merged.rmdir("empty")
    view, caller = one.merged.view, one.merged.caller
    file = one.merged.create("new")
    for act in (
        lambda: change.create(view, removed, b"x", 0o644, caller),
        lambda: change.mkdir(view, removed, b"x", 0o755, caller),
        lambda: change.link(view, file, removed, b"x"),
        lambda: change.tmpfile(view, removed, 0o600, caller),
    ):
        with pytest.raises(FileNotFoundError):
            act()
    assert list(view.listing(removed)) == []
    assert view.lookup(removed, b"x") is None
    assert stat.S_ISDIR(view.stat(removed).st_mode)


@pytest.mark.root  # an ordinary user cannot move a directory that is closed to its owner: its ".." changes
def test_a_directory_with_nothing_but_whiteouts_can_be_removed_when_it_is_closed_to_its_owner(stack: StackFactory) -> None:
    one = stack(LOWER)
    one.merged.unlink("merged/one")
    one.merged.listdir("merged")
    one.merged.chmod("merged", 0o000)
    one.merged.rmdir("merged")
    assert is_whiteout(one.upper / "merged")
    assert one.work_names() == []


# -- objects without a name


@pytest.mark.parametrize("name", ["file", "copied", "upper_file"])
def test_an_unlinked_file_lives_as_long_as_it_is_known(stack: StackFactory, name: str) -> None:
    one = prepared(stack, name)
    content = one.merged.read(name)
    inode = one.merged.unlink(name)
    one.merged.create(name, b"another")
    one.merged.view.cache.limit = 0
    one.merged.view.trim()
    one.merged.view.trim()
    assert one.merged.read_inode(inode) == content
    assert one.merged.read(name) == b"another"
    assert inode.ino != one.merged.ino(name)
    assert one.merged.view.nlink(inode, one.merged.view.stat(inode)) == 0


def test_a_file_made_without_a_name_can_be_given_one(stack: StackFactory) -> None:
    one = stack(LOWER)
    view = one.merged.view
    inode, st = change.tmpfile(view, one.merged.walk("directory"), 0o640, one.merged.caller)  # type: ignore[arg-type]
    inode.nlookup += 1
    assert view.nlink(inode, st) == 0
    assert one.merged.listdir("directory") == ["deep", "inside"]
    os.pwrite(view.data_fd(inode, write=True), b"content", 0)
    one.merged.unlink("file")
    change.link(view, inode, view.root, b"file")  # over a whiteout
    assert one.merged.read("file") == one.fresh().read("file") == b"content"
    assert one.merged.walk("file") is inode
    assert one.merged.nlink("file") == 1


def test_a_file_without_a_name_that_cannot_be_kept_leaves_nothing_open(stack: StackFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    one = stack(LOWER)
    view, caller = one.merged.view, one.merged.caller
    one.merged.create("file in the upper")
    before = os.listdir("/proc/self/fd")

    def fail(fd: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, "dup", fail)
    with fails(errno.EMFILE):
        change.tmpfile(view, view.root, 0o600, caller)
    assert os.listdir("/proc/self/fd") == before


def test_the_last_name_of_a_lower_file_goes_though_nothing_can_be_opened(stack: StackFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whiteout is there by then: the name must not go on to be listed because the object could not be pinned."""
    one = stack({"a": "lower", "b": HardLink("a")})
    one.merged.write("a", b"upper")
    inode = one.merged.unlink("a")
    assert one.merged.walk("b") is inode
    one.merged.listdir()

    def fail(dirfd: int, name: bytes) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(one.merged.view.upper, "pin", fail)
    one.merged.unlink("b")
    assert one.merged.listdir() == []
    assert one.merged.read_inode(inode) == b"upper"
    assert one.disk_tree() == {}
    one.merged.forget()
    assert one.work_names() == []


def test_an_unlinked_file_cannot_be_given_a_name_again(stack: StackFactory) -> None:
    one = stack({})
    one.merged.create("file")
    inode = one.merged.unlink("file")
    with pytest.raises(FileNotFoundError):
        change.link(one.merged.view, inode, one.merged.view.root, b"new")
    assert one.merged.listdir() == []


# -- one lower file, several names


@pytest.fixture
def linked(stack: StackFactory) -> Stack:
    """`a` is copied up and changed, and gone; `b` and `d/c` nobody ever looked up."""
    one = stack({"a": "linked", "b": HardLink("a"), "d": {"c": HardLink("a")}})
    one.merged.write("a", b"CHANGE")
    one.merged.unlink("a")
    return one


def test_when_the_copy_of_a_file_loses_its_name_the_lower_s_other_names_still_lead_to_it(linked: Stack) -> None:
    merged = linked.merged
    assert merged.read("b") == b"CHANGE"
    assert merged.nlink("b") == merged.nlink("d/c") == 2
    merged.forget()
    assert merged.read("d/c") == b"CHANGE"
    merged.chmod("d/c", 0o600)
    assert stat.S_IMODE(merged.stat("b").st_mode) == 0o600


def test_such_a_name_can_be_renamed_and_linked_and_exchanged(linked: Stack) -> None:
    merged = linked.merged
    merged.create("new", b"new")
    merged.rename("b", "new", syscalls.RENAME_EXCHANGE)
    merged.rename("d/c", "c")
    merged.link("new", "again")
    for name in ("new", "c", "again"):
        assert merged.read(name) == linked.fresh().read(name) == b"CHANGE"
        assert merged.nlink(name) == os.stat(linked.upper / name).st_nlink == 3
    assert os.path.samefile(linked.upper / "c", linked.upper / "again")


def test_when_all_names_are_gone_so_is_the_copy(linked: Stack) -> None:
    merged = linked.merged
    assert len(linked.work_names()) == 1
    merged.unlink("b")
    inode = merged.unlink("d/c")
    assert linked.work_names() == []
    assert merged.read_inode(inode) == b"CHANGE"
    assert merged.view.nlink(inode, merged.view.stat(inode)) == 0
    merged.forget()
    assert linked.work_names() == []
    assert len(merged.view.table) == 1
    assert linked.disk_tree().keys() == {b"d"}


def test_a_file_that_lost_its_name_during_its_copy_up_is_there_for_its_other_names(stack: StackFactory) -> None:
    one = stack({"a": "linked", "b": HardLink("a")})
    inode = one.merged.walk("a")
    with copyup.prepare(one.merged.view, inode) as copy:
        copyup.fill(copy)
        one.merged.unlink("a")
        copyup.publish(one.merged.view, copy)
    os.pwrite(one.merged.view.data_fd(inode, write=True), b"CHANGE", 0)
    one.merged.rename("b", "c")
    assert one.merged.read("c") == one.fresh().read("c") == b"CHANGE"
    assert one.merged.nlink("c") == 1


# -- who owns what is made


@pytest.fixture(params=[pytest.param(False, id="single calls"), pytest.param(True, id="the extension", marks=pytest.mark.wire)])
def making(stack: StackFactory, request: pytest.FixtureRequest) -> StackFactory:
    """As `stack`, with things made in both ways."""

    def make(lower: Tree) -> Stack:
        one = stack(lower)
        if request.param:
            assert wire is not None
            one.merged.view.upper.calls = WiredCalls(wire)
        return one

    return make


@pytest.mark.parametrize("place", ["new", "file"], ids=["in its place", "over a whiteout"])
@pytest.mark.parametrize("maker", ["create", "mkdir", "mkfifo"])
def test_the_caller_s_umask_applies(making: StackFactory, place: str, maker: str) -> None:
    one = making(LOWER)
    one.merged.unlink("file")
    old = os.umask(0o002)
    try:
        one.merged.caller = Caller(os.geteuid(), os.getegid(), 0o077)
        if maker == "create":
            one.merged.create(place, mode=0o666)
        elif maker == "mkdir":
            one.merged.mkdir(place, 0o777)
        else:
            one.merged.mknod(place, stat.S_IFIFO | 0o666)
        assert os.umask(0o002) == 0o002
    finally:
        os.umask(old)
    assert stat.S_IMODE(os.stat(one.upper / place).st_mode) == (0o700 if maker == "mkdir" else 0o600)


@pytest.mark.parametrize("place", ["directory/new", "directory/inside"], ids=["in its place", "over a whiteout"])
def test_in_a_directory_with_a_default_acl_that_applies_and_the_umask_does_not(making: StackFactory, place: str) -> None:
    one = making(LOWER)
    one.merged.unlink("directory/inside")
    one.merged.setxattr("directory", "system.posix_acl_default", DEFAULT_ACL)
    one.merged.caller = Caller(os.geteuid(), os.getegid(), 0o077)
    one.merged.mkdir(place, 0o770)
    assert one.merged.getxattr(place, "system.posix_acl_default") == DEFAULT_ACL
    assert "system.posix_acl_access" in one.merged.listxattr(place)
    assert stat.S_IMODE(one.merged.stat(place).st_mode) == 0o770
    assert one.work_names() == []


@pytest.mark.root
@pytest.mark.parametrize("place", ["group/new", "group/gone"], ids=["in its place", "over a whiteout"])
def test_in_a_setgid_directory_what_is_made_belongs_to_its_group(making: StackFactory, place: str) -> None:
    one = making({"group": Directory({"gone": "x"}, 0o2775, gid=2000)})
    one.merged.unlink("group/gone")
    one.merged.create(place)
    assert one.merged.stat(place).st_gid == 2000
    one.merged.unlink(place)
    one.merged.mkdir(place)
    st = one.merged.stat(place)
    assert (st.st_gid, stat.S_IMODE(st.st_mode)) == (2000, 0o2755)


@pytest.mark.root
@pytest.mark.parametrize("place", ["new", "file"], ids=["in its place", "over a whiteout"])
def test_what_is_made_for_another_user_belongs_to_that_user_and_we_stay_who_we_are(making: StackFactory, place: str) -> None:
    one = making(LOWER)
    os.chmod(one.upper, 0o777)
    one.merged.unlink("file")
    one.merged.caller = Caller(1000, 2000, 0o022)

    def create() -> None:
        syscalls.keep_capabilities_over_setfsuid()
        one.merged.create(place)

    assert errno_in_a_child(create) == 0
    st = os.stat(one.upper / place)
    assert (st.st_uid, st.st_gid) == (1000, 2000)
    one.merged.caller = Caller(0, 0, 0o022)
    one.merged.create("mine")
    assert (os.stat(one.upper / "mine").st_uid, os.stat(one.upper / "mine").st_gid) == (0, 0)


@pytest.mark.root
@pytest.mark.parametrize("is_dumpable", [True, False])
def test_making_something_for_another_user_changes_nothing_about_who_may_look_at_us(making: StackFactory, is_dumpable: bool) -> None:
    """The kernel sets PR_SET_DUMPABLE anew when fsuid changes, and /proc/PID of a process without it belongs to root."""
    one = making(LOWER)
    one.merged.caller = Caller(1000, 2000, 0o022)

    def create() -> None:
        syscalls.keep_capabilities_over_setfsuid()
        syscalls.set_dumpable(is_dumpable)
        one.merged.create("new")
        if syscalls.is_dumpable() is not is_dumpable:
            raise OSError(errno.EPROTO, "")

    assert errno_in_a_child(create) == 0


def errno_in_a_child(act: Callable[[], object]) -> int:
    """In a process of its own: what it does to its credentials is for good."""
    pid = os.fork()
    if not pid:
        code = 255
        try:
            act()
            code = 0
        except OSError as error:
            code = error.errno or 255
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_caller_that_we_cannot_be_is_refused_and_we_stay_who_we_are(making: StackFactory) -> None:
    one = making(LOWER)
    os.chmod(one.upper, 0o777)

    def create() -> None:
        if IS_ROOT:
            os.setgroups([])
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
        one.merged.caller = Caller(1000, 2000, 0o022)
        try:
            one.merged.create("new")
        finally:
            one.merged.caller = Caller(os.geteuid(), os.getegid(), 0o022)
            one.merged.create("mine")

    assert errno_in_a_child(create) == errno.EINVAL
    assert snapshot(one.upper).keys() == {b".", b"mine"}
    expected = (65534, 65534) if IS_ROOT else (os.geteuid(), os.getegid())
    assert (os.stat(one.upper / "mine").st_uid, os.stat(one.upper / "mine").st_gid) == expected


def test_a_new_directory_that_could_not_be_marked_is_there_all_the_same(stack: StackFactory) -> None:
    """The mark saves a later look-up the layers below; a rename puts it there when it is needed."""
    one = stack(LOWER)

    class NoMarks(Faulty):
        def setxattr(self, dirfd: int, name: bytes, attribute: bytes, value: bytes, flags: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    calls, one.merged.view.upper.calls = one.merged.view.upper.calls, NoMarks(0, AssertionError())
    one.merged.mkdir("new")
    one.merged.view.upper.calls = calls
    one.merged.rmdir("empty")
    one.merged.rename("new", "directory/new")
    assert isinstance(one.merged.walk("directory/new"), MergedDirectory)
    assert os.getxattr(one.upper / "directory/new", mark("opaque")) == b"y"


def test_a_whiteout_of_the_upper_s_own_hides_what_lowers_have(stack: StackFactory) -> None:
    one = stack(LOWER, upper={"file": Whiteout(), "directory": {"inside": Whiteout()}})
    assert "file" not in one.merged.listdir()
    assert one.merged.listdir("directory") == ["deep"]
    one.merged.create("file", b"new")
    one.merged.mkdir("directory/inside")
    assert timeless(one.merged.tree()) == one.disk_tree()


class NeverOntoItself(Faulty):
    """Sees that rename(2) is never asked to do nothing: of two links of one inode it leaves both (rename(2), BUGS)."""

    def rename(self, dirfd: int, name: bytes, new_dirfd: int, new: bytes, flags: int = 0) -> None:
        old = os.stat(name, dir_fd=dirfd, follow_symlinks=False)
        try:
            replaced = os.stat(new, dir_fd=new_dirfd, follow_symlinks=False)
        except FileNotFoundError:
            replaced = None
        assert replaced is None or (old.st_dev, old.st_ino) != (replaced.st_dev, replaced.st_ino), f"{name!r} over {new!r}"
        super().rename(dirfd, name, new_dirfd, new, flags)


@pytest.mark.parametrize("name", RUNNABLE)
def test_nothing_is_renamed_over_another_link_of_itself(stack: StackFactory, name: str) -> None:
    """All whiteouts are links of one inode: renamed over another, one in the work directory would stay there."""
    case = RUNNABLE[name]
    one = stack(CASE_LOWER, CASE_BELOW, policy=case.policy(POLICY))
    one.merged.view.upper.calls = NeverOntoItself(0, AssertionError())
    case.prepare(one.merged)
    case.act(one.merged)
    assert one.work_names() == one.litter()
