"""Layers and their descriptors: what a lower spells differently, and that a number that was closed is never used."""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from pyoverlay.core import syscalls
from pyoverlay.core.calls import Calls, remove_tree
from pyoverlay.core.layer import DescriptorCache, Held, Layer, LowerDir, open_below
from pyoverlay.core.policy import Policy, Whiteouts
from pyoverlay.core.reads import PlainReads, Reads
from pyoverlay.core.upper import Upper
from pyoverlay.fuse.binding import wire
from pyoverlay.testing import Device, Directory, Fifo, File, Symlink, Tree, Whiteout, is_whiteout, make_tree
from tests.posix.check import fails
from tests.posix.system_calls import IN_OPEN, Inotify
from tests.unit.conftest import StackFactory
from tests.unit.merged import POLICY, Stack, mark


def opened(cache: DescriptorCache) -> Held:
    held = Held()
    cache.put(held, os.open("/", os.O_PATH))
    return held


def is_open(fd: int) -> bool:
    return os.path.lexists(f"/proc/self/fd/{fd}")


def test_descriptors_past_the_limit_are_closed_between_operations_only() -> None:
    cache = DescriptorCache(4)
    held = [opened(cache) for _ in range(10)]
    numbers = [one.fd for one in held]
    assert all(map(is_open, numbers))
    cache.trim()
    assert len(cache) == 4
    assert sum(one.fd >= 0 for one in held) == 4
    assert all(is_open(one.fd) for one in held if one.fd >= 0)
    cache.close_all()
    assert len(cache) == 0
    assert not any(map(is_open, numbers))


def test_what_was_used_since_the_last_trim_is_kept_before_what_was_not() -> None:
    cache = DescriptorCache(6)
    held = [opened(cache) for _ in range(6)]
    cache.trim()
    for one in held:
        one.is_recent = False
    held[0].is_recent = held[3].is_recent = True
    held += [opened(cache), opened(cache)]
    cache.trim()
    assert [number for number, one in enumerate(held) if one.fd < 0] == [1, 2]
    cache.close_all()


def test_a_pinned_descriptor_keeps_its_number_whatever_the_limit() -> None:
    cache = DescriptorCache(0)
    held = [opened(cache) for _ in range(3)]
    held[1].pins = 1
    cache.trim()
    cache.trim()
    assert [one.fd >= 0 for one in held] == [False, True, False]
    cache.close_all()


def test_who_wants_to_know_is_told_before_a_number_is_free() -> None:
    cache, told = DescriptorCache(0), list[bool]()
    cache.before_close = lambda held: told.append(is_open(held.fd))
    held = opened(cache)
    cache.close(held)
    cache.close(held)
    assert told == [True]


# -- reaching directories


def test_a_descriptor_whose_closing_fails_is_gone_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    """The error of a server, which nobody waits for: it would have ended the request that makes room, and the mount with it."""
    cache = DescriptorCache(0)
    held = opened(cache)
    fd, held.is_recent = held.fd, False

    def fail(fd: int) -> None:
        os.close(fd)
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    cache.closers[fd] = fail
    cache.trim()
    assert (held.fd, len(cache), cache.closers, is_open(fd)) == (-1, 0, {}, False)
    assert "Disk quota exceeded" in caplog.text


def test_a_path_longer_than_path_max_is_reached_in_pieces(tmp_path: Path) -> None:
    names = [b"n" * 200] * 40
    here = os.open(tmp_path, os.O_PATH)
    top = here
    for name in names:
        os.mkdir(name, dir_fd=here)
        below = os.open(name, os.O_PATH | os.O_NOFOLLOW, dir_fd=here)
        if here != top:
            os.close(here)
        here = below
    before = len(os.listdir("/proc/self/fd"))
    found = open_below(top, names, syscalls.RESOLVE_BENEATH | syscalls.RESOLVE_NO_SYMLINKS)
    assert os.path.sameopenfile(found, here)
    with pytest.raises(FileNotFoundError):
        open_below(top, [*names, b"missing"], syscalls.RESOLVE_BENEATH | syscalls.RESOLVE_NO_SYMLINKS)
    assert len(os.listdir("/proc/self/fd")) == before + 1
    for fd in (found, here):
        os.close(fd)
    remove_tree(Calls(), top, names[0])
    os.close(top)
    assert os.listdir(tmp_path) == []


def test_no_symlink_in_a_layer_is_followed(stack: StackFactory, tmp_path: Path) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret/file").write_text("secret")
    one = stack({"out": Symlink(str(tmp_path / "secret")), "swapped": {"file": "inside"}})
    merged = one.merged
    assert merged.view.readlink(merged.walk("out")) == os.fsencode(tmp_path / "secret")
    swapped = merged.walk("swapped")
    assert merged.read("swapped/file") == b"inside"
    merged.view.cache.close_all()
    os.rename(one.lowers[0] / "swapped", one.lowers[0] / "was")
    os.symlink(tmp_path / "secret", one.lowers[0] / "swapped")
    with pytest.raises(OSError) as caught:
        merged.view.lookup(swapped, b"file")  # type: ignore[arg-type]
    assert caught.value.errno in (errno.ELOOP, errno.ENOTDIR)
    os.unlink(one.lowers[0] / "swapped")
    os.rename(one.lowers[0] / "was", one.lowers[0] / "swapped")
    one._before = one.look_at_lowers()  # the test itself moved things in there


def test_a_fifo_in_a_layer_is_never_opened(stack: StackFactory) -> None:
    one = stack({"fifo": Fifo(), "file": "x"})
    with pytest.raises(OSError) as caught:
        one.merged.view.data_fd(one.merged.walk("fifo"))
    assert caught.value.errno == errno.EINVAL
    lower = one.merged.view.lowers[0]
    with pytest.raises(OSError) as caught:
        lower.open_read(lower.root_fd, b"fifo")
    assert caught.value.errno == errno.ESTALE


@pytest.mark.root  # devices, and clones of mounts
@pytest.mark.parametrize("reads", [PlainReads(), pytest.param(wire, marks=pytest.mark.wire)], ids=["plain", "extension"])
@pytest.mark.parametrize("are_clones", [True, False])
def test_what_is_no_file_is_not_opened(stack: StackFactory, monkeypatch: pytest.MonkeyPatch, reads: Reads, are_clones: bool) -> None:
    """Opened and closed again, a tape would have been rewound, and a writer that waits for a reader of the fifo been let go."""

    def refused(dirfd: int, path: bytes, flags: int) -> int:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    if not are_clones:
        monkeypatch.setattr(syscalls, "open_tree", refused)  # as to an ordinary user
    special: Tree = {"null": Device(kind="c", major=1, minor=3), "fifo": Fifo()}
    policy = POLICY if are_clones else replace(POLICY, userxattr=True, privileged=False)
    view = stack(special, upper=special, policy=policy).merged.view
    view.read_by(reads)
    assert (view.upper.is_clone, view.lowers[0].is_clone) == (are_clones, are_clones)
    for layer in (view.lowers[0], view.upper):
        for name in (b"fifo",) if are_clones else (b"null", b"fifo"):  # the mount of a clone lets nobody open a device
            pin = view.upper.pin(layer.root_fd, name)
            opens = [partial(layer.open_read, layer.root_fd, name), partial(view.upper.open_pinned, pin, os.O_RDWR)]
            opens += [partial(view.upper.open_write, layer.root_fd, name)] if layer is view.upper else []
            with Inotify(f"/proc/self/fd/{pin}", IN_OPEN) as watched:
                for attempt in opens:
                    with fails(errno.ESTALE):
                        attempt()
                assert watched.events() == []
                os.close(os.open(f"/proc/self/fd/{pin}", os.O_RDWR if layer is view.upper else os.O_RDONLY | os.O_NONBLOCK))
                assert watched.events() == [(IN_OPEN, "")], "an open would have shown"
            os.close(pin)


def test_a_layer_has_no_method_that_changes_anything() -> None:
    reading = {name for name in vars(Layer) if not name.startswith("_")}
    assert reading == {
        "close", "dirfd", "fstat", "getmark", "getmark_of", "getxattr", "handle", "is_remote", "knows_owner", "listmarks", "listxattr",
        "open_covered", "open_descendant", "open_dir", "open_read", "read_xattr", "readlink", "scan", "stat", "stat_all", "stat_by_handle",
        "statvfs", "statx", "verity",
    }  # fmt: skip
    assert {"set_mark", "whiteout", "open_write"} <= vars(Upper).keys()


@pytest.mark.root  # an ordinary user cannot clone mounts
def test_nothing_can_be_written_through_a_lower_s_descriptor(stack: StackFactory) -> None:
    one = stack({"file": "x"})
    lower = one.merged.view.lowers[0]
    for attempt in (
        lambda: os.open(b"file", os.O_RDWR, dir_fd=lower.root_fd),
        lambda: os.mkdir(b"new", dir_fd=lower.root_fd),
        lambda: os.unlink(b"file", dir_fd=lower.root_fd),
        lambda: os.utime(b"file", dir_fd=lower.root_fd),
    ):
        with pytest.raises(OSError) as caught:
            attempt()
        assert caught.value.errno == errno.EROFS


@pytest.mark.root  # an ordinary user cannot clone mounts, and root of a namespace cannot make devices
def test_no_device_of_a_layer_can_be_opened(stack: StackFactory) -> None:
    """Not even one that was put in the place of a file between the look and the open. What a lower's mount allows is known all the same."""
    view = stack({"null": Device(kind="c", major=1, minor=3)}).merged.view
    os.mknod(b"null", stat.S_IFCHR | 0o666, os.makedev(1, 3), dir_fd=view.upper.root_fd)
    for layer in (view.lowers[0], view.upper):
        with pytest.raises(PermissionError):
            os.open(b"null", os.O_RDONLY, dir_fd=layer.root_fd)
    assert not view.lowers[0].is_nodev


# -- whiteouts of each spelling

BELOW: Tree = {"gone": "below", "kept": "below", "directory": {"below": "below"}}


def spellings() -> dict[str, Tree]:
    x_opaque = {mark("opaque"): b"x"}
    marked = {name: File("", xattrs={mark("whiteout"): value}) for name, value in (("gone", b""), ("below", b"y"))}
    return {
        "device": {"gone": Whiteout(), "directory": {"below": Whiteout()}},
        "aufs": {".wh.gone": "", "directory": {".wh.below": ""}},
        "attribute": {"gone": marked["gone"], "directory": Directory({"below": marked["below"]}, xattrs=x_opaque)},
    }


def with_marked_root(one: Stack) -> Stack:
    os.setxattr(one.lowers[0], mark("opaque"), b"x")
    one._before = one.look_at_lowers()
    one.open()
    return one


@pytest.mark.parametrize("spelling", ["device", "aufs", "attribute"])
def test_a_whiteout_of_each_spelling_hides_what_is_below(stack: StackFactory, spelling: str) -> None:
    one = with_marked_root(stack(spellings()[spelling], BELOW))
    assert one.merged.listdir() == ["directory", "kept"]
    assert one.merged.listdir("directory") == []
    assert not one.merged.exists("gone")
    assert not one.merged.exists("directory/below")
    one.open()
    assert not one.merged.exists("gone")  # looked up before anything is listed
    assert not one.merged.exists("directory/below")
    one.merged.create("gone", b"new")
    assert one.merged.read("gone") == b"new"
    one.merged.rmdir("directory")
    assert is_whiteout(one.upper / "directory")


@pytest.mark.parametrize("spelling", ["device", "aufs", "attribute"])
def test_a_whiteout_of_each_spelling_is_not_itself_shown_in_the_lowest_layer(stack: StackFactory, spelling: str) -> None:
    one = with_marked_root(stack(spellings()[spelling]))
    assert one.merged.listdir() == ["directory"]
    assert one.merged.listdir("directory") == []
    for name in ("gone", ".wh.gone", "directory/below", "directory/.wh.below"):
        assert not one.merged.exists(name)


def test_an_attribute_is_no_whiteout_where_the_directory_does_not_say_that_it_has_any(stack: StackFactory) -> None:
    one = stack({"gone": File("", xattrs={mark("whiteout"): b"y"})}, BELOW)
    assert one.merged.read("gone") == b""


def test_a_file_with_content_is_no_whiteout(stack: StackFactory) -> None:
    one = with_marked_root(stack({".wh.gone": "content", "kept": File("content", xattrs={mark("whiteout"): b"y"})}, BELOW))
    assert one.merged.read("gone") == b"below"
    assert one.merged.read("kept") == b"content"
    assert one.merged.read(".wh.gone") == b"content"


def test_with_kernel_whiteouts_alone_a_wh_name_is_a_name_like_any_other(stack: StackFactory) -> None:
    policy = Policy(userxattr=POLICY.userxattr, privileged=POLICY.privileged, whiteouts=Whiteouts.KERNEL)
    one = stack({".wh.gone": ""}, BELOW, policy=policy)
    assert one.merged.listdir() == [".wh.gone", "directory", "gone", "kept"]
    assert one.merged.read(".wh.gone") == b""


def test_in_the_upper_a_wh_name_is_a_name_like_any_other(stack: StackFactory) -> None:
    one = stack(BELOW, upper={".wh.kept": ""})
    one.merged.create(".wh.gone")
    one.merged.create("directory/.wh..wh..opq")
    assert one.merged.listdir() == [".wh.gone", ".wh.kept", "directory", "gone", "kept"]
    assert one.merged.listdir("directory") == [".wh..wh..opq", "below"]
    assert one.disk_tree().keys() >= {b".wh.gone", b"gone", b"directory/below"}


def test_an_aufs_opaque_file_hides_the_directory_below_and_itself(stack: StackFactory) -> None:
    one = stack({"directory": {".wh..wh..opq": "", "top": "top"}}, {"directory": {"middle": "m"}}, BELOW)
    assert one.merged.listdir("directory") == ["top"]
    assert not one.merged.exists("directory/middle")
    assert not one.merged.exists("directory/.wh..wh..opq")
    assert one.merged.listdir() == ["directory", "gone", "kept"]


def test_an_aufs_opaque_file_in_a_middle_layer_hides_what_is_below_that(stack: StackFactory) -> None:
    one = stack(
        {"directory": {"top": "t"}},
        {"directory": {".wh..wh..opq": "", "deep": {"m": "m"}}},
        {"directory": {"low": "l", "deep": {"l": "l"}}},
    )
    assert one.merged.listdir("directory") == ["deep", "top"]
    assert one.merged.listdir("directory/deep") == ["m"]


# -- what the upper puts down


def test_whiteouts_are_links_of_one_spare_which_goes_at_the_end(stack: StackFactory) -> None:
    one = stack({"a": "1", "b": "2", "c": "3"})
    for name in ("a", "b", "c"):
        one.merged.unlink(name)
    found = {os.stat(one.upper / name).st_ino for name in ("a", "b", "c")}
    assert len(found) == 1
    assert all(is_whiteout(one.upper / name) for name in ("a", "b", "c"))
    one.close()
    assert os.listdir(one.work / "work") == []
    assert os.stat(one.upper / "a").st_nlink == 3


@pytest.mark.parametrize("is_listed", [False, True], ids=["with a rename", "with a link"])
def test_when_a_spare_has_no_link_left_there_is_a_new_one(stack: StackFactory, is_listed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    one = stack({"a": "1", "b": "2", "c": "3"})
    one.merged.unlink("a")
    calls = one.merged.view.upper.calls
    link, left = calls.link, [1]

    def full(dirfd: int, name: bytes, new_dirfd: int, new: bytes) -> None:
        if left:
            left.pop()
            raise OSError(errno.EMLINK, os.strerror(errno.EMLINK))
        link(dirfd, name, new_dirfd, new)

    monkeypatch.setattr(calls, "link", full)
    if not is_listed:
        one.merged.chmod("b", 0o600)
    one.merged.unlink("b")
    one.merged.unlink("c")
    assert left == []
    assert all(is_whiteout(one.upper / name) for name in ("a", "b", "c"))
    assert os.stat(one.upper / "a").st_ino != os.stat(one.upper / "c").st_ino
    assert one.disk_tree() == {}


def test_a_directory_closed_to_its_owner_is_removed_with_all_it_holds(tmp_path: Path) -> None:
    make_tree(tmp_path, {"directory": {"deep": Directory({"file": "x"}, 0o000)}})
    dirfd = os.open(tmp_path, os.O_PATH)
    remove_tree(Calls(), dirfd, b"directory")
    os.close(dirfd)
    assert os.listdir(tmp_path) == []


def test_a_lower_directory_s_contents_are_read_once(stack: StackFactory) -> None:
    one = stack({"top": ""}, BELOW)
    lower = one.merged.view.lowers[0]
    contents = lower.contents(lower.root)
    assert list(contents.names) == [b"top"]
    assert lower.contents(lower.root) is contents


def test_a_masked_directory_shows_nothing(stack: StackFactory) -> None:
    one = stack({"directory": {"inside": "x"}})
    lower = one.merged.view.lowers[0]
    masked = LowerDir(lower, lower.root, b"directory", is_masked=True)
    assert list(lower.contents(masked).names) == []


def test_our_own_upper_and_work_seen_through_a_lower_show_empty(tmp_path: Path, stack: StackFactory) -> None:
    one = stack({"outside": "x"})
    one.merged.create("new", b"new")
    one.lowers.append(one.upper.parent)
    merged = one.open()
    assert merged.listdir() == ["lower1", "new", "outside", "upper", "work"]
    assert merged.listdir("upper") == merged.listdir("work") == []
    assert merged.listdir("lower1") == ["outside"]
    merged.create("upper/inside", b"y")
    assert merged.listdir("upper") == ["inside"]
    assert (one.upper / "upper/inside").read_bytes() == b"y"
    assert stat.S_ISDIR(merged.stat("work").st_mode)
    one.lowers.pop()
