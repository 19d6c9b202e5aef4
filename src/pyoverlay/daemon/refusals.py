"""What cannot be mounted, and why: every check that a person's request has to pass before anything is made.

Each refusal is one line: the path, the reason, the system's word for it, the way out. Directories are compared by where they lie in
their file system, not by their paths, so that bind mounts and symlinks hide nothing.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass

from pyoverlay import mountinfo
from pyoverlay.core import syscalls
from pyoverlay.core.calls import Calls, remove_tree
from pyoverlay.core.policy import OVERFLOW
from pyoverlay.daemon import locks
from pyoverlay.daemon.options import Options
from pyoverlay.daemon.privileges import Capability
from pyoverlay.errors import OptionRefused, Refusal, printable

_ALL_IDS = [(0, 0, 4294967295)]


@dataclass(frozen=True, slots=True)
class Directory:
    """A directory that was found: as the caller spelled it, opened, its real path, and where it lies."""

    given: bytes
    fd: int
    path: bytes
    location: mountinfo.Location


@dataclass(frozen=True, slots=True)
class Layers:
    """The directories of one mount, checked and locked. Their descriptors belong to the stacks that `examine` was given."""

    lowers: tuple[Directory, ...]
    upper: Directory | None
    work: Directory | None
    merged: Directory
    data_lowers: tuple[Directory, ...] = ()


def examine(options: Options, merged: bytes, held: ExitStack, looked: ExitStack, undo: ExitStack, *, userxattr: bool) -> Layers:
    """Check a request from top to bottom and lock its upper and work directory.

    held: gets the upper's and the work directory's descriptors and with them the locks, for as long as the mount lives. looked: gets the
    others, which nobody needs once it is mounted, and which would keep the lowers' own mounts busy. undo: gets what must be taken back if
    the mount is not made after all, such as a work directory made here. Raises Refusal, or OptionRefused where layers are missing.
    """
    if not options.lowers:
        raise OptionRefused("lowerdir", "missing: name at least one lower directory")
    among = mountinfo.mounts()
    target = _mount_point(merged, looked, among)
    lowers = tuple(_directory(path, "lower", looked, among) for path in options.lowers)
    data_lowers = tuple(_directory(path, "data-only layer", looked, among) for path in options.data_lowers)
    if options.upper is None:
        return Layers(lowers, None, None, target, data_lowers)
    upper = _directory(options.upper, "upper", held, among)
    _refuse_read_only(upper, "upper")
    _lock(upper, held, "upper")
    work = _work(options.work, upper, held, undo, among)
    _refuse_read_only(work, "work directory")
    _refuse_overlap((*lowers, *data_lowers), upper, work, target)
    _refuse_other_file_system(upper, work)
    _lock(work, held, "work directory")
    _refuse_kernel_overlay((upper, work), among)
    _refuse_incompatible(work)
    _refuse_without_xattrs(work, userxattr=userxattr)
    _take_back_inner_work(work, undo)
    return Layers(lowers, upper, work, target, data_lowers)


def is_privileged() -> bool:
    """Whether this process may mount in the initial user namespace: `trusted.*` attributes and any owner can be set."""
    return _id_ranges("uid_map") == _ALL_IDS and bool(syscalls.capget().effective >> Capability.SYS_ADMIN & 1)


def overflow_is_mapped() -> bool:
    """Whether the overflow id is somebody's in a user namespace that does not map every id: who shows as it may be anybody then."""
    maps = (_id_ranges("uid_map"), _id_ranges("gid_map"))
    return any(ranges != _ALL_IDS and any(0 <= OVERFLOW - first < length for first, _, length in ranges) for ranges in maps)


def _id_ranges(kind: str) -> list[tuple[int, ...]]:
    """The lines of /proc/self/uid_map or gid_map: first id here, first id outside, how many (user_namespaces(7))."""
    with open(f"/proc/self/{kind}", encoding="ascii") as file:
        return [tuple(map(int, line.split())) for line in file]


# ── the directories, one by one ─────────────────────────────────────────────────────────────────────────────────────────────


def _directory(path: bytes, role: str, held: ExitStack, among: list[mountinfo.Mount], flags: int = 0) -> Directory:
    try:
        fd = os.open(path, os.O_PATH | os.O_DIRECTORY | flags)
    except FileNotFoundError as error:
        raise Refusal(path, f"the {role} does not exist", error.errno, "make it with mkdir, or check the path") from error
    except NotADirectoryError as error:
        raise Refusal(path, f"the {role} is no directory", error.errno) from error
    except OSError as error:
        raise _unreachable(path, role, error) from error
    held.callback(os.close, fd)
    return Directory(path, fd, os.readlink(b"/proc/self/fd/%d" % fd), mountinfo.location(fd, among))


def _unreachable(path: bytes, role: str, error: OSError) -> Refusal:
    if error.errno == errno.ENOTCONN:
        return _dead_mount(path, role)
    return Refusal(path, f"the {role} cannot be reached", error.errno)


def _dead_mount(path: bytes, role: str) -> Refusal:
    remedy = f"take it away first: umount -l {printable(path)}"
    return Refusal(path, f"the {role} is a dead mount: its daemon is gone", errno.ENOTCONN, remedy)


def _mount_point(path: bytes, held: ExitStack, among: list[mountinfo.Mount]) -> Directory:
    role = "mount point"
    directory = _directory(path, role, held, among)
    if directory.path == b"/":
        raise Refusal(path, "the root directory cannot be mounted over", errno.EINVAL, "choose another mount point")
    try:
        os.statvfs(directory.fd)  # the one question that the kernel never answers from memory for a daemon that is gone
    except OSError as error:
        raise _unreachable(path, role, error) from error
    return directory


def _work(given: bytes | None, upper: Directory, held: ExitStack, undo: ExitStack, among: list[mountinfo.Mount]) -> Directory:
    role = "work directory"
    if given is not None:
        return _directory(given, role, held, among)
    path = default_work(upper.path)
    _make_default_work(path, undo)
    work = _directory(path, role, held, among, os.O_NOFOLLOW)  # whoever may write beside the upper may have replaced it
    if os.fstat(work.fd).st_uid != os.geteuid():
        raise Refusal(path, "the work directory belongs to another user", errno.EPERM, "name one with --workdir")
    return work


def default_work(upper: bytes) -> bytes:
    """The sibling `.UPPER-NAME.pyoverlay-work`."""
    above, name = os.path.split(upper)
    return os.path.join(above, b"." + name + b".pyoverlay-work")


def _make_default_work(path: bytes, undo: ExitStack) -> None:
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        if os.path.islink(path):
            raise Refusal(path, "a symbolic link is in the place of the work directory", errno.ELOOP, "remove it") from None
    except OSError as error:
        raise Refusal(path, "the work directory cannot be made", error.errno, "name another with --workdir") from error
    else:
        undo.callback(os.rmdir, path)


def _take_back_inner_work(work: Directory, undo: ExitStack) -> None:
    """What the core makes in a work directory that had none of it goes again with a mount that was not made."""
    for name in (b"work", b"index"):
        if not os.path.lexists(os.path.join(work.path, name)):
            undo.callback(_remove_if_there, work.fd, name)


def _remove_if_there(dirfd: int, name: bytes) -> None:
    with suppress(FileNotFoundError):
        remove_tree(Calls(), dirfd, name)


# ── how they lie to one another ─────────────────────────────────────────────────────────────────────────────────────────────


def _refuse_read_only(directory: Directory, role: str) -> None:
    if os.statvfs(directory.fd).f_flag & os.ST_RDONLY:
        remedy = "choose one that can be written to, or leave upperdir out for a read-only mount"
        raise Refusal(directory.given, f"the {role} is on a read-only file system", errno.EROFS, remedy)


def _refuse_other_file_system(upper: Directory, work: Directory) -> None:
    remedy = f"choose a directory beside {printable(upper.given)} with --workdir"
    if os.fstat(upper.fd).st_dev != os.fstat(work.fd).st_dev:
        raise Refusal(work.given, "the work directory is on another file system than the upper", errno.EXDEV, _beside(upper) or remedy)
    if upper.location.mount_id != work.location.mount_id:
        raise Refusal(work.given, "the work directory is on another mount than the upper", errno.EXDEV, _beside(upper) or remedy)


def _beside(upper: Directory) -> str | None:
    """What to say when the upper is the root of its mount: nothing lies beside it there."""
    if os.path.ismount(upper.path):
        return f"{printable(upper.given)} is the root of its file system: make the upper and the work directory two directories in it"
    return None


def _refuse_overlap(lowers: Sequence[Directory], upper: Directory, work: Directory, merged: Directory) -> None:
    if work.location.is_within(upper.location):
        raise Refusal(work.given, "the work directory lies inside the upper", errno.EINVAL, "choose one beside it with --workdir")
    if upper.location.is_within(work.location):
        raise Refusal(upper.given, "the upper lies inside the work directory", errno.EINVAL, "choose a work directory beside the upper")
    for outer, role in ((upper, "upper"), (work, "work directory")):
        for lower in lowers:
            if lower.location.is_within(outer.location):
                raise Refusal(lower.given, f"the lower lies inside the {role} {printable(outer.given)}", errno.ELOOP, "choose others")
        if merged.location.is_within(outer.location):
            raise Refusal(merged.given, f"the mount point lies inside the {role} {printable(outer.given)}", errno.ELOOP, "choose another")


# ── who else uses them, and what they can hold ──────────────────────────────────────────────────────────────────────────────


def _lock(directory: Directory, held: ExitStack, role: str) -> None:
    try:
        fd = os.open(b"/proc/self/fd/%d" % directory.fd, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise Refusal(directory.given, f"the {role} cannot be read", error.errno) from error
    held.callback(os.close, fd)
    try:
        locks.lock(fd)
    except locks.InUse as holder:
        remedy = f"{holder.remedy}, or choose another directory"
        raise Refusal(directory.given, f"the {role} is {holder}", errno.EBUSY, remedy) from None


def _refuse_kernel_overlay(ours: Sequence[Directory], among: list[mountinfo.Mount]) -> None:
    """The kernel's own overlay takes no lock that we could see: its mounts are read from the list."""
    identities = {_identity(os.fstat(directory.fd)): directory for directory in ours}
    for mount in mountinfo.kernel_overlays(among):
        for name in (b"upperdir", b"workdir"):
            path = mount.option(name)
            taken = identities.get(_identity(os.stat(path))) if path and os.path.isdir(path) else None
            if taken is not None:
                reason = f"already the {name.decode()} of the kernel's overlay at {printable(mount.point)}"
                raise Refusal(taken.given, reason, errno.EBUSY, f"umount {printable(mount.point)} first")


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _refuse_incompatible(work: Directory) -> None:
    """`work/incompat/NAME` is how a mount tells later ones that they must not just go on (fs/overlayfs/super.c)."""
    try:
        names = os.listdir(os.path.join(work.path, b"work/incompat"))
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise Refusal(work.given, "work/incompat cannot be read", error.errno) from error
    marker = os.path.join(work.path, b"work/incompat")
    if b"volatile" in names:
        reason = "the last mount was volatile and nothing vouches for what is in the upper"
        remedy = f"look at it, then rm -r {printable(os.path.join(marker, b'volatile'))}"
        raise Refusal(work.given, reason, errno.EINVAL, remedy)
    if names:
        reason = f"made by an overlay with a feature unknown here: {printable(sorted(names)[0])}"
        raise Refusal(work.given, reason, errno.EINVAL, f"use what made it, or rm -r {printable(marker)}")


def mark_volatile(work: Directory, undo: ExitStack) -> None:
    """Make `work/incompat/volatile/dirty`, as the kernel does, below the inner work directory that the core has made.

    undo: gets what takes it back: with a mount that was not made nothing has become volatile.
    """
    here = os.path.join(work.path, b"work")
    try:
        for name in (b"incompat", b"volatile"):
            here = os.path.join(here, name)
            with suppress(FileExistsError):
                os.mkdir(here, 0o700)
                undo.callback(os.rmdir, here)
        dirty = os.path.join(here, b"dirty")
        os.close(os.open(dirty, os.O_WRONLY | os.O_CREAT, 0o600))
        undo.callback(os.unlink, dirty)
    except OSError as error:
        raise Refusal(work.given, "cannot be marked as a volatile mount's", error.errno, "make room, or leave volatile out") from error


def _refuse_without_xattrs(work: Directory, *, userxattr: bool) -> None:
    spelling = b"user" if userxattr else b"trusted"
    name = spelling + b".overlay.opaque"
    path = b"/proc/self/fd/%d" % work.fd
    try:
        os.setxattr(path, name, b"0")
        os.removexattr(path, name)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            remedy = "make room in the upper's file system"
            raise Refusal(work.given, "there is no room for so much as a mark", error.errno, remedy) from error
        reason = f"its file system takes no {spelling.decode()}.* extended attributes"
        raise Refusal(work.given, reason, error.errno, "use ext4, xfs, btrfs or tmpfs (for user.*: from Linux 6.6)") from error
