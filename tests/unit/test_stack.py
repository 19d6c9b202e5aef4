"""From paths to layers: what is refused, what is cleared, and what is cloned."""

from __future__ import annotations

import errno
import os
import resource
import stat
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pyoverlay.core import syscalls
from pyoverlay.core.policy import Fsync
from pyoverlay.core.stack import keeps_order, open_probed, open_view
from pyoverlay.core.view import View
from pyoverlay.testing import Directory, File, Tree, Whiteout, is_whiteout, make_tree, snapshot
from tests.unit.conftest import StackFactory
from tests.unit.merged import POLICY, Faulty, Merged
from tests.unit.test_change import DEFAULT_ACL


@pytest.fixture
def layers(tmp_path: Path) -> Path:
    """A lower with one file, an empty upper and a work directory."""
    make_tree(tmp_path, {"lower": {"file": "lower", "d": {"in": "in"}}, "upper": {}, "work": {}})
    return tmp_path


def opened(layers: Path, **paths: Path) -> View:
    lower, upper, work = (paths.get(name, layers / name) for name in ("lower", "upper", "work"))
    return open_view([os.fsencode(lower)], os.fsencode(upper), os.fsencode(work), POLICY)


@pytest.mark.parametrize("missing", ["lower", "upper", "work"])
def test_a_missing_layer_is_named_and_nothing_stays_open(layers: Path, missing: str) -> None:
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(FileNotFoundError) as caught:
        opened(layers, **{missing: layers / "nowhere"})
    assert os.fspath(layers / "nowhere") in os.fsdecode(caught.value.filename)
    assert set(os.listdir("/proc/self/fd")) == before


OPENING = (
    *((syscalls, name) for name in ("open_tree", "mount_setattr", "openat2", "statx", "fstatfs_type")),
    *((os, name) for name in ("open", "fstat", "fstatvfs", "statvfs", "stat", "getxattr", "mkdir", "scandir")),
)


@pytest.mark.parametrize("open_layers", ["open_view", "open_probed"])
def test_whichever_call_fails_while_layers_are_opened_nothing_stays_open(layers: Path, open_layers: str) -> None:
    """A program may ask for the difference of two trees as often as it likes, one of them on a server that is gone."""
    before, at, failed = len(os.listdir("/proc/self/fd")), 0, 0
    while True:
        at += 1
        made: list[str] = []
        with pytest.MonkeyPatch.context() as patch:
            for module, name in OPENING:
                patch.setattr(module, name, partial(_failing, made, at, name, getattr(module, name)))
            try:
                view = opened(layers) if open_layers == "open_view" else probed(layers)
            except OSError as error:
                assert error.errno == errno.EIO
                failed += 1
            else:
                view.close()
        assert len(os.listdir("/proc/self/fd")) == before, f"{made[-1]}, call {at}"
        if len(made) < at:
            break
    assert failed > 10


def _failing(made: list[str], at: int, name: str, call: Callable[..., object], *arguments: object, **named: object) -> object:
    made.append(name)
    if len(made) == at:
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    return call(*arguments, **named)


def probed(layers: Path) -> View:
    return open_probed([os.fsencode(layers / "lower")], POLICY, upper=os.fsencode(layers / "upper"), masked=frozenset())


@pytest.mark.parametrize("place", ["upper", "work"])
def test_a_layer_that_is_no_directory_is_refused(layers: Path, place: str) -> None:
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(NotADirectoryError):
        opened(layers, **{place: layers / "lower/file"})
    assert set(os.listdir("/proc/self/fd")) == before


def test_upper_and_work_on_two_file_systems_are_exdev(layers: Path) -> None:
    if os.stat("/dev/shm").st_dev == os.stat(layers).st_dev:
        pytest.skip("/dev/shm is no file system of its own here")
    other = Path(f"/dev/shm/pyoverlay-test-{os.getpid()}")
    other.mkdir()
    before = set(os.listdir("/proc/self/fd"))
    try:
        with pytest.raises(OSError) as caught:
            opened(layers, work=other)
        assert (caught.value.errno, caught.value.filename) == (errno.EXDEV, os.fspath(other))
        assert os.listdir(other) == []
    finally:
        other.rmdir()
    assert set(os.listdir("/proc/self/fd")) == before


def test_what_an_earlier_mount_left_in_the_work_directory_is_cleared(layers: Path) -> None:
    left: Tree = {"#1": "half a copy", "#2": Whiteout(), "#3": Directory({"deep": Directory({"closed": "x"}, 0o000)}), "index": {}}
    make_tree(layers / "work", {"work": left, "kept": "not ours"})
    opened(layers).close()
    assert snapshot(layers / "work").keys() == {b".", b"kept", b"work"}


def test_the_kernel_s_list_of_incompatible_features_is_left_alone(layers: Path) -> None:
    make_tree(layers / "work", {"work": {"incompat": {"volatile": {"dirty": ""}}}})
    opened(layers).close()
    assert (layers / "work/work/incompat/volatile/dirty").exists()


def test_a_work_directory_that_the_kernel_closed_is_opened(layers: Path) -> None:
    make_tree(layers / "work", {"work": Directory({}, 0o000)})
    opened(layers).close()
    assert stat.S_IMODE(os.stat(layers / "work/work").st_mode) == 0o700


def test_a_symlink_in_place_of_the_inner_work_directory_is_not_followed(layers: Path) -> None:
    os.symlink(layers / "lower", layers / "work/work")
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError):
        opened(layers)
    assert set(os.listdir("/proc/self/fd")) == before
    assert (layers / "lower/file").exists()


def test_nothing_is_inherited_from_where_the_work_directory_lies(layers: Path) -> None:
    """A setgid directory with a default ACL would else give its group and its ACL to whatever is built there."""
    os.setxattr(layers / "work", "system.posix_acl_default", DEFAULT_ACL)
    os.chmod(layers / "work", 0o2777)
    merged = Merged(opened(layers))
    try:
        work = os.stat(layers / "work/work")
        assert stat.S_IMODE(work.st_mode) == 0o700
        assert [name for name in os.listxattr(layers / "work/work") if name.startswith("system.")] == []
        merged.unlink("file")
        merged.mkdir("file", 0o755)  # built in the work directory
        merged.chmod("d/in", 0o640)
    finally:
        merged.view.close()
    for name in ("file", "d", "d/in"):
        assert [attribute for attribute in os.listxattr(layers / "upper" / name) if attribute.startswith("system.")] == []
    assert stat.S_IMODE(os.stat(layers / "upper/file").st_mode) == 0o755


def test_layers_are_reached_without_their_paths(layers: Path) -> None:
    merged = Merged(opened(layers))
    try:
        for name in ("lower", "upper", "work"):
            os.rename(layers / name, layers / f"{name} moved")
        assert merged.read("file") == b"lower"
        merged.write("file", b"UPPER")
        merged.unlink("d/in")
        assert is_whiteout(layers / "upper moved/d/in")
        assert (layers / "upper moved/file").read_bytes() == b"UPPER"
    finally:
        merged.view.close()


@pytest.mark.root
def test_a_mount_inside_a_lower_does_not_show_and_what_it_covers_does(layers: Path) -> None:
    target = os.fsencode(layers / "lower/d")
    tree = syscalls.open_tree(syscalls.AT_FDCWD, os.fsencode(layers / "upper"), syscalls.OPEN_TREE_CLONE)
    libc = syscalls._libc
    try:
        assert libc.syscall(429, tree, b"", syscalls.AT_FDCWD, target, 4) == 0  # move_mount, MOVE_MOUNT_F_EMPTY_PATH
        assert os.listdir(layers / "lower/d") == []
        merged = Merged(opened(layers))
        try:
            assert merged.listdir("d") == ["in"]
        finally:
            merged.view.close()
    finally:
        os.close(tree)
        syscalls.umount2(target)


@pytest.mark.root
def test_reading_a_lower_moves_no_time_of_access(layers: Path) -> None:
    make_tree(layers / "lower", {"old": File("x", atime_ns=1, mtime_ns=2), "olddir": Directory({"y": ""}, atime_ns=1, mtime_ns=2)})
    os.symlink("target", layers / "lower/link")
    os.utime(layers / "lower/link", ns=(1, 2), follow_symlinks=False)
    merged = Merged(opened(layers))
    try:
        merged.tree()
        merged.chmod("old", 0o600)
    finally:
        merged.view.close()
    assert [os.lstat(layers / "lower" / name).st_atime_ns for name in ("old", "olddir", "link")] == [1, 1, 1]


def test_what_a_sync_makes_durable_is_the_upper_s_unless_the_mount_is_volatile(layers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """xfs is synced twice, and changed in between: the first may have left data in the disk's cache (crash/test_replay_of_a_mount.py)."""
    for magic, fsync, calls in (
        (0xEF53, Fsync.VOLATILE, []),
        (0xEF53, Fsync.ORDERED, ["syncfs"]),
        (0x58465342, Fsync.ORDERED, ["syncfs", "utimens", "syncfs"]),
    ):
        policy = replace(POLICY, fsync=fsync)
        merged = Merged(open_view([os.fsencode(layers / "lower")], os.fsencode(layers / "upper"), os.fsencode(layers / "work"), policy))
        monkeypatch.setattr(syscalls, "fstatfs_type", lambda _, magic=magic: magic)
        counted = merged.view.upper.calls = Faulty(0, AssertionError())
        merged.view.sync()
        assert counted.made == calls
        monkeypatch.undo()
        merged.view.close()


@pytest.mark.parametrize(("fsync", "calls"), [(Fsync.VOLATILE, []), (Fsync.ORDERED, ["fdatasync"]), (Fsync.STRICT, ["fsync"])])
def test_the_data_of_a_copy_up_is_on_disk_before_its_name(
    stack: StackFactory, monkeypatch: pytest.MonkeyPatch, fsync: Fsync, calls: list[str]
) -> None:
    one = stack({"file": "content"}, policy=replace(POLICY, fsync=fsync))
    upper = one.merged.view.upper
    upper.keeps_order = upper.is_memory = False
    made: list[str] = []
    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, lambda _, name=name: made.append(name))
    rename = upper.calls.rename

    def publish(*arguments: Any) -> None:
        made.append("rename")
        rename(*arguments)

    monkeypatch.setattr(upper.calls, "rename", publish)
    one.merged.chmod("file", 0o600)
    assert made == [*calls, "rename"]


def test_order_is_kept_by_a_journal_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing is known of a file system, nothing is believed of it."""
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        monkeypatch.setattr(os, "readlink", lambda _: "../../devices/virtual/block/nothing0")
        assert keeps_order(fd) is False
        monkeypatch.setattr(os.path, "isdir", lambda path: path == "/sys/fs/xfs/nothing0")
        assert keeps_order(fd) is True
    finally:
        os.close(fd)


def test_ten_lowers_of_which_some_are_the_same_directory(layers: Path) -> None:
    lowers = [os.fsencode(layers / "lower")] * 10
    merged = Merged(open_view(lowers, os.fsencode(layers / "upper"), os.fsencode(layers / "work"), POLICY))
    try:
        assert merged.listdir("d") == ["in"]
        merged.unlink("d/in")
        assert merged.listdir("d") == []
        merged.rmdir("d")
        assert merged.listdir() == ["file"]
    finally:
        merged.view.close()


def test_the_descriptor_limit_follows_the_process_s(layers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (4000, 4000))
    view = opened(layers)
    assert view.cache.limit == 2000
    view.close()
