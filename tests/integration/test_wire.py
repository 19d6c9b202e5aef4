"""What the extension takes over from the kernel and must do as well: taking privileges away.

With HANDLE_KILLPRIV_V2 it is the daemon's duty to clear suid, sgid and file capabilities where a write, a truncation or a chown does so on
ext4. Each way to change a file is tried by each kind of caller, on ext4 and in the view, with the extension and without.
"""

from __future__ import annotations

import errno
import mmap
import os
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from pyoverlay.testing import File, Overlay, OverlayFactory, Tree, make_tree
from tests.integration.test_data_integrity import extension
from tests.posix.check import NOBODY, SOMEBODY, as_user, fails, opened
from tests.posix.system_calls import (
    ACL_ACCESS,
    ACL_GROUP_OBJ,
    ACL_MASK,
    ACL_OTHER,
    ACL_USER,
    ACL_USER_OBJ,
    CAP_NET_RAW,
    acl,
    capability,
    fallocate,
)

pytestmark = pytest.mark.root

GROUP = 4321
CAPABILITY = "security.capability"

Act = Callable[[str], object]


def write(name: str) -> None:
    with opened(name, os.O_WRONLY) as fd:
        os.write(fd, b"new")


def append(name: str) -> None:
    with opened(name, os.O_WRONLY | os.O_APPEND) as fd:
        os.write(fd, b"new")


def write_direct(name: str) -> None:
    with opened(name, os.O_WRONLY | os.O_DIRECT) as fd, mmap.mmap(-1, 4096) as buffer:
        os.pwrite(fd, buffer, 0)


def open_with_o_trunc(name: str) -> None:
    os.close(os.open(name, os.O_WRONLY | os.O_TRUNC))


def truncate(name: str) -> None:
    os.truncate(name, 3)


def ftruncate(name: str) -> None:
    with opened(name, os.O_WRONLY) as fd:
        os.ftruncate(fd, 100_000)


def allocate(name: str) -> None:
    with opened(name, os.O_WRONLY) as fd:
        fallocate(fd, 0, 0, 200_000)


def punch(name: str) -> None:
    with opened(name, os.O_WRONLY) as fd:
        fallocate(fd, 3, 0, 4096)


def copy_into(name: str) -> None:
    with opened(name, os.O_RDWR) as fd:
        os.copy_file_range(fd, fd, 100, 0, 8192)


def write_by_map(name: str) -> None:
    with opened(name, os.O_RDWR) as fd, mmap.mmap(fd, 0) as map_:
        map_[0:3] = b"new"
        map_.flush()


def chown_of_group(name: str) -> None:
    os.chown(name, -1, GROUP)


def chmod(name: str) -> None:
    os.chmod(name, 0o6755)


ACTS: dict[str, Act] = {
    act.__name__: act
    for act in (write, append, write_direct, open_with_o_trunc, truncate, ftruncate, copy_into, write_by_map, chown_of_group, chmod)
}
NEED_WIRE: dict[str, Act] = {act.__name__: act for act in (allocate, punch)}  # pyfuse3 has no FALLOCATE

# Who acts: uid, groups. The files belong to NOBODY and GROUP, and everybody may write them.
CALLERS = {"root": (0, ()), "owner": (NOBODY, ()), "member": (NOBODY, (GROUP,)), "stranger": (SOMEBODY, ())}
MODES = {"suid": 0o4777, "sgid": 0o2777, "both": 0o6777, "sgid-without-x": 0o2767, "capability": 0o777}


def files(act: str) -> dict[str, Tree]:
    """A directory for an act, with a file for each caller and each kind of privilege."""
    return {act: {f"{caller}-{kind}": privileged_file(kind) for caller in CALLERS for kind in MODES}}


def privileged_file(kind: str) -> File:
    xattrs = {CAPABILITY: capability(CAP_NET_RAW)} if kind == "capability" else {}
    return File(b"x" * 20_000, mode=MODES[kind], uid=NOBODY, gid=GROUP, xattrs=xattrs)


TREE: Tree = {act: tree for name in (*ACTS, *NEED_WIRE) for act, tree in files(name).items()}


@pytest.fixture(scope="module")
def views(module_overlay: OverlayFactory) -> dict[bool, Overlay]:
    """With the extension and without; files of a lower in `lower`, of the upper in `upper`."""
    made = {}
    for wire in (True, False):
        with extension(loaded=wire):
            made[wire] = module_overlay({"lower": TREE}, upper={"upper": TREE})
    return made


def state(path: Path) -> tuple[str, bool]:
    """What a file has now: its mode, and whether a capability."""
    return oct(os.stat(path).st_mode & 0o7777), CAPABILITY in os.listxattr(path)


def outcomes(directory: Path, act: Act) -> dict[str, tuple[bool, tuple[str, bool]]]:
    """For each file: whether the act was allowed to the caller in its name, and what the file has then."""
    found = {}
    for name in sorted(os.listdir(directory)):
        uid, groups = CALLERS[name.partition("-")[0]]
        found[name] = is_allowed(directory, act, name, uid, groups), state(directory / name)
    return found


def is_allowed(directory: Path, act: Act, name: str, uid: int, groups: tuple[int, ...]) -> bool:
    try:
        as_user(directory, partial(act, name), uid, groups)
    except AssertionError as failure:
        if "PermissionError" not in str(failure):
            raise
        return False
    return True


CASES = [
    *(pytest.param(act, True, id=f"{name}-wire", marks=pytest.mark.wire) for name, act in NEED_WIRE.items()),
    *(pytest.param(act, wire, id=f"{name}-{'wire' if wire else 'no-wire'}") for name, act in ACTS.items() for wire in (True, False)),
]


@pytest.mark.parametrize(("act", "wire"), CASES)
@pytest.mark.parametrize("place", ["lower", "upper"])
def test_privileges_go_as_on_ext4(views: dict[bool, Overlay], tmp_path: Path, act: Act, wire: bool, place: str) -> None:
    make_tree(tmp_path, files(act.__name__))
    on_ext4, found = outcomes(tmp_path / act.__name__, act), outcomes(views[wire].merged / place / act.__name__, act)
    expected = {name: (is_allowed, as_fuse_has_it(act, name, left)) for name, (is_allowed, left) in on_ext4.items()}
    assert found == expected


def as_fuse_has_it(act: Act, name: str, left: tuple[str, bool]) -> tuple[str, bool]:
    """ext4's outcome, but for two rules of FUSE, which hold with the extension and without.

    Setgid stays where the group may not execute: the kernel leaves it out when it takes privileges away by itself, and fuse.h says the
    same of HANDLE_KILLPRIV_V2, while ext4 clears it if the caller is not of that group. And what a map has dirtied comes to us as any
    write does, which takes a capability away.
    """
    mode, has_capability = left
    if name.endswith("sgid-without-x") and act is not chmod:
        mode = oct(MODES["sgid-without-x"])
    return mode, has_capability and act is not write_by_map


@pytest.mark.wire
def test_a_chown_that_changes_nothing_keeps_setuid(overlay: OverlayFactory) -> None:
    """On ext4 it clears it, and without the extension the kernel does; with HANDLE_KILLPRIV_V2 it sends us a SETATTR of nothing at all."""
    made = overlay({"f": privileged_file("suid")})
    os.chown(made.merged / "f", -1, -1)
    assert os.stat(made.merged / "f").st_mode & 0o7777 == MODES["suid"]


@pytest.mark.parametrize("size", [1, 1 << 20], ids=["copied-up-at-once", "copied-up-by-a-thread"])
@pytest.mark.parametrize(("caller", "group", "mode"), [(NOBODY, GROUP, 0o0775), (NOBODY, NOBODY, 0o2775), (0, GROUP, 0o2775)])
def test_an_acl_set_by_somebody_not_of_the_group_clears_setgid(
    overlay: OverlayFactory, size: int, caller: int, group: int, mode: int
) -> None:
    """CVE-2016-7097. The kernel says that it should go in a longer SETXATTR only, which libfuse does not know."""
    made = overlay({"f": File(b"x" * size, mode=0o2755, uid=NOBODY, gid=group)})
    value = acl((ACL_USER_OBJ, 7), (ACL_USER, 7, SOMEBODY), (ACL_GROUP_OBJ, 5), (ACL_MASK, 7), (ACL_OTHER, 5))
    as_user(made.merged, lambda: os.setxattr("f", ACL_ACCESS, value), caller)
    assert oct(os.stat(made.merged / "f").st_mode & 0o7777) == oct(mode)
    assert os.stat(made.writable / "f").st_mode & 0o7777 == mode


@pytest.mark.wire
def test_an_immutable_file_opens_and_refuses_the_write(overlay: OverlayFactory) -> None:
    """On ext4 open(2) refuses it. Here the kernel does not ask at open, and knows no such flag of a FUSE inode."""
    made = overlay({"f": b"old"})
    subprocess.run(["chattr", "+i", made.merged / "f"], check=True)
    try:
        with opened(made.merged / "f", os.O_WRONLY) as fd, fails(errno.EPERM):
            os.write(fd, b"new")
        with fails(errno.EPERM):
            os.unlink(made.merged / "f")
        assert (made.merged / "f").read_bytes() == b"old"
    finally:
        subprocess.run(["chattr", "-i", made.writable / "f"], check=True)


@pytest.mark.wire
@pytest.mark.parametrize("flag", ["a", "i"])
def test_the_flags_of_a_file_that_may_not_be_written_are_shown_and_taken_back(overlay: OverlayFactory, flag: str) -> None:
    """Neither that nor an fsync writes, and so needs a descriptor that does."""
    made = overlay({"f": b"old"})
    subprocess.run(["chattr", f"+{flag}", made.merged / "f"], check=True)
    try:
        made.remount()  # nothing is open any more
        shown = subprocess.run(["lsattr", made.merged / "f"], check=True, capture_output=True, text=True)
        assert flag in shown.stdout.split()[0]
        with opened(made.merged / "f", os.O_RDONLY) as fd:
            os.fsync(fd)
        subprocess.run(["chattr", f"-{flag}", made.merged / "f"], check=True)
        (made.merged / "f").write_bytes(b"new")
    finally:
        subprocess.run(["chattr", "-ai", made.writable / "f"], check=True)
