"""What a person names, a mount point or an upper, and the layers that stand for it."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pyoverlay import mountinfo
from pyoverlay.core import syscalls
from pyoverlay.core.policy import Policy
from pyoverlay.core.stack import open_probed
from pyoverlay.core.view import View
from pyoverlay.errors import Refusal
from pyoverlay.report import kernel_overlay, mounts
from pyoverlay.report.changes import Comparison, masked
from pyoverlay.report.mounts import Mount, State

_FUSE, _OVERLAY = 0x65735546, 0x794C7630  # FUSE_SUPER_MAGIC, OVERLAYFS_SUPER_MAGIC of <linux/magic.h>


@dataclass(frozen=True, slots=True)
class Target:
    """An upper and what is known of what lies below it.

    given: as the caller spelled it. lowers: top first; empty where they are not known. work, merged: the work directory and the mount
    point, if it is one that answers and can be reached, of a live mount; None of a bare upper. is_lowest: nothing lies below it, and that
    is known. spelling_is_known: the policy has it from a mount, or somebody said so; else it is a guess.
    """

    given: bytes
    upper: bytes
    lowers: tuple[bytes, ...]
    policy: Policy
    work: bytes | None = None
    merged: bytes | None = None
    data_lowers: tuple[bytes, ...] = ()
    is_lowest: bool = False
    spelling_is_known: bool = True

    @property
    def knows_lowers(self) -> bool:
        return bool(self.lowers) or self.is_lowest

    def sync(self) -> None:
        """What programs wrote to the mount and the kernel still holds reaches the upper, where this user may ask for it."""
        if self.merged is None:
            return
        try:
            fd = os.open(self.merged, os.O_RDONLY | os.O_DIRECTORY)
        except PermissionError:  # a user's mount lets nobody else in, not even root
            return
        try:
            syscalls.syncfs(fd)
        finally:
            os.close(fd)

    def open(self) -> View:
        """A read-only view of the layers, to be closed. Raises Refusal."""
        try:
            empty = masked(self.upper, self.work)
            return open_probed(self.lowers, self.policy, upper=self.upper, masked=empty, data_layers=self.data_lowers)
        except OSError as error:
            raise self.refusal(error) from error

    def compare(self) -> Comparison:
        """What the upper changes, to be closed. Raises Refusal; also where the lowers are not known."""
        if not self.lowers:
            remedy = "name the layers below with --lower, or mount it and name the mount point"
            raise Refusal(self.given, "an upper says what it holds, not what that changes", remedy=remedy)
        try:
            known = self.spelling_is_known
            return Comparison(self.upper, self.lowers, self.policy, self.work, self.data_lowers, spelling_is_known=known)
        except OSError as error:
            raise self.refusal(error) from error

    def refusal(self, error: OSError) -> Refusal:
        """What the system refused while layers were read. A path in the merged tree is one below what the caller has named."""
        name = b"" if error.filename is None else os.fsencode(error.filename)
        if name in (b"", b"."):  # a layer's root, and which can be asked for
            layers = (self.upper, *self.lowers, *self.data_lowers)
            name = next((layer for layer in layers if not os.access(layer, os.R_OK | os.X_OK, effective_ids=True)), b"")
        return Refusal(os.path.join(self.given, name) if name else self.given, "refused by the system", error.errno)


def find(path: bytes, *, lowers: Sequence[bytes] = (), data_lowers: Sequence[bytes] = (), userxattr: bool = False) -> Target:
    """The target that a path names: a mount point, of ours or of the kernel's overlay, or any directory that is, was or could be an upper.

    lowers, data_lowers, userxattr: what an upper that is not mounted does not tell. A mount whose daemon hangs or died is found all the
    same. Raises Refusal.
    """
    if (mount := mounts.at(path)) is not None:
        return _mounted(path, mount, mount.record.merged)
    _require_directory(path)
    if (magic := _magic(path)) in (_FUSE, _OVERLAY) and os.path.ismount(path):
        if magic == _OVERLAY:
            return _of_the_kernel(path)
        raise Refusal(path, "a FUSE mount that is not in pyoverlay's list", errno.EINVAL, "name its upper directory instead")
    if not lowers and (mount := mounts.over(path)) is not None:
        return _mounted(path, mount, mount.record.merged if mounts.is_here(mount.record) else None)
    real = os.path.realpath(path)
    policy = _for_this_process(path, Policy(userxattr=userxattr or not may_read_trusted(), metacopy=True), real)
    shown, data = (tuple(map(os.path.realpath, layers)) for layers in (lowers, data_lowers))
    return Target(path, real, shown, policy, data_lowers=data, spelling_is_known=policy.userxattr)


def _mounted(path: bytes, mount: Mount, merged: bytes | None) -> Target:
    record = mount.record
    if record.upper is None:
        raise _read_only(path)
    policy = _for_this_process(path, replace(mounts.policy_of(record, path), metacopy=True), record.upper)
    to_sync = merged if mount.state is State.UP else None
    return Target(path, record.upper, record.lowers, policy, record.work, to_sync, record.data_lowers)


def _for_this_process(path: bytes, policy: Policy, upper: bytes) -> Policy:
    """The mount's policy, with the privileges of whoever looks at its layers."""
    try:
        return replace(policy, privileged=may_clone(upper))
    except OSError as error:
        raise Refusal(path, "its upper cannot be opened", error.errno) from error


def _require_directory(path: bytes) -> None:
    try:
        if not os.path.isdir(path):
            os.stat(path)
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
    except OSError as error:
        raise Refusal(path, "neither a mount nor an upper", error.errno, "name a mount point of pyoverlay, or an upper") from error


def _magic(path: bytes) -> int:
    fd = os.open(path, os.O_PATH | os.O_DIRECTORY)
    try:
        return syscalls.fstatfs_type(fd)
    finally:
        os.close(fd)


def _of_the_kernel(path: bytes) -> Target:
    """A mount of the kernel's overlay has the same layers, in the same format."""
    merged = os.path.realpath(path)
    mount = mountinfo.topmost(merged)
    if mount is None:
        raise Refusal(path, "its mount is not in /proc/self/mountinfo", errno.EINVAL)
    found = kernel_overlay.layers(path, mount)
    if found.upper is None:
        raise _read_only(path)
    policy = _for_this_process(path, found.policy, found.upper)
    return Target(path, found.upper, found.lowers, policy, found.work, merged, found.data_lowers)


def _read_only(path: bytes) -> Refusal:
    return Refusal(path, "mounted read-only: there is no upper, and nothing has changed", errno.EROFS)


def may_read_trusted() -> bool:
    """Whether trusted.* attributes show: to root of the initial user namespace."""
    with open("/proc/self/uid_map", encoding="ascii") as file:
        return os.geteuid() == 0 and file.read().split() == ["0", "0", "4294967295"]


def may_clone(path: bytes) -> bool:
    """Whether this process may clone a layer's mount: then it is looked at without leaving so much as an atime behind. Raises OSError."""
    try:
        fd = syscalls.open_tree(syscalls.AT_FDCWD, path, syscalls.OPEN_TREE_CLONE)
    except PermissionError:
        return False
    os.close(fd)
    return True
