"""What a person names, a mount point or an upper, and the layers that stand for it."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass

from pyoverlay import registry
from pyoverlay.core import syscalls
from pyoverlay.core.policy import Policy, RedirectDir, Whiteouts
from pyoverlay.core.stack import open_probed
from pyoverlay.core.view import View
from pyoverlay.errors import Refusal, printable

_OVERLAYS = {0x65735546: "FUSE", 0x794C7630: "overlay"}  # FUSE_SUPER_MAGIC, OVERLAYFS_SUPER_MAGIC of <linux/magic.h>


@dataclass(frozen=True, slots=True)
class Target:
    """An upper and what is known of what lies below it.

    given: as the caller spelled it. lowers: top first; empty where they are not known. work, merged: the work directory and the mount
    point of a live mount; None of a bare upper.
    """

    given: bytes
    upper: bytes
    lowers: tuple[bytes, ...]
    policy: Policy
    work: bytes | None = None
    merged: bytes | None = None

    @property
    def knows_lowers(self) -> bool:
        return bool(self.lowers)

    def sync(self) -> None:
        """What programs wrote to the mount and the kernel still holds reaches the upper."""
        if self.merged is not None:
            fd = os.open(self.merged, os.O_RDONLY | os.O_DIRECTORY)
            try:
                syscalls.syncfs(fd)
            finally:
                os.close(fd)

    def open(self) -> View:
        """A read-only view of the layers, to be closed. Raises Refusal."""
        try:
            masked = frozenset((st.st_dev, st.st_ino) for st in (os.stat(path) for path in (self.upper, self.work) if path is not None))
            return open_probed(self.lowers, self.policy, upper=self.upper, masked=masked)
        except OSError as error:
            raise Refusal.of(error, self.given) from error


def find(path: bytes, *, lowers: Sequence[bytes] = (), userxattr: bool = False) -> Target:
    """The target that a path names: a live mount's mount point or upper, or any directory that was or could be an upper.

    lowers, userxattr: what a bare upper does not tell. Raises Refusal.
    """
    real = os.path.realpath(path)
    for record in reversed(registry.live()):
        if record.merged == real or (record.upper == real and not lowers):
            return _live(path, record, is_mount=record.merged == real)
    _require_directory(path)
    if (kind := _overlay_kind(path)) is not None and os.path.ismount(path):
        raise Refusal(path, f"a {kind} mount that is not in pyoverlay's list", errno.EINVAL, "name its upper directory instead")
    return Target(path, real, tuple(map(os.path.realpath, lowers)), _policy(real, userxattr=userxattr))


def _live(path: bytes, record: registry.Record, *, is_mount: bool) -> Target:
    if record.upper is None:
        raise Refusal(path, "mounted read-only: there is no upper, and nothing has changed", errno.EROFS)
    whiteouts = next((Whiteouts(option[10:]) for option in record.options if option.startswith("whiteouts=")), Whiteouts.AUTO)
    userxattr = "userxattr" in record.options or os.stat(f"/proc/{record.pid}").st_uid != 0
    policy = _policy(record.upper, userxattr=userxattr, whiteouts=whiteouts)
    return Target(path, record.upper, record.lowers, policy, record.work, record.merged if is_mount else None)


def _policy(upper: bytes, *, userxattr: bool, whiteouts: Whiteouts = Whiteouts.AUTO) -> Policy:
    return Policy(
        userxattr=userxattr or not _may_read_trusted(),
        redirect_dir=RedirectDir.FOLLOW,
        metacopy=True,
        whiteouts=whiteouts,
        privileged=_is_privileged(upper),
    )


def _require_directory(path: bytes) -> None:
    try:
        if not os.path.isdir(path):
            os.stat(path)
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
    except OSError as error:
        raise Refusal(path, "neither a mount nor an upper", error.errno, "name a mount point of pyoverlay, or an upper") from error


def _overlay_kind(path: bytes) -> str | None:
    fd = os.open(path, os.O_PATH | os.O_DIRECTORY)
    try:
        return _OVERLAYS.get(syscalls.fstatfs_type(fd))
    finally:
        os.close(fd)


def _may_read_trusted() -> bool:
    """Whether trusted.* attributes show: to root of the initial user namespace."""
    with open("/proc/self/uid_map", encoding="ascii") as file:
        return os.geteuid() == 0 and file.read().split() == ["0", "0", "4294967295"]


def _is_privileged(path: bytes) -> bool:
    """Whether this process may clone a mount: then a layer is looked at without leaving so much as an atime behind."""
    try:
        fd = syscalls.open_tree(syscalls.AT_FDCWD, path, syscalls.OPEN_TREE_CLONE)
    except PermissionError:
        return False
    except OSError as error:
        raise Refusal(path, f"cannot be opened as a layer: {printable(os.strerror(error.errno or 0))}", error.errno) from error
    os.close(fd)
    return True
