"""From paths to layers: the only place where the core takes a path from outside, before anything is mounted.

Where the process may, each lower becomes a detached clone of its mount, read-only and without atime; the upper and the work directory
come from one clone of the mount they share, since a rename between two clones is EXDEV.
"""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Sequence
from contextlib import suppress
from uuid import uuid4

from pyoverlay.core import marks, syscalls
from pyoverlay.core.calls import Calls, remove_tree
from pyoverlay.core.index import Index
from pyoverlay.core.layer import DescriptorCache, Lower, Place, closed_on_failure, is_local, tolerated
from pyoverlay.core.overrides import OverridingCalls
from pyoverlay.core.policy import Policy, Uuid, Whiteouts
from pyoverlay.core.probe import ProbedLower
from pyoverlay.core.remote import RemoteLower
from pyoverlay.core.upper import Upper
from pyoverlay.core.view import View

_OPEN_DIR = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_INDEX = b"../index"  # beside work/work
_OPEN_UPPER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC  # syncfs(2) refuses O_PATH


def open_view(
    lowers: Sequence[bytes],
    upper: bytes | None,
    work: bytes | None,
    policy: Policy,
    calls: Calls | None = None,
    data_layers: Sequence[bytes] = (),
) -> View:
    """Open the layers, from the top, and clear what an earlier mount left in the work directory.

    calls: by which the upper is changed. data_layers: lowers below these that show nothing but data of metacopy files. Paths are absolute.
    Raises OSError with the path as its filename: what open(2) raises, EXDEV (upper and work on two mounts), EROFS, EPERM or EOPNOTSUPP (no
    extended attributes in the work directory).
    """
    cache = DescriptorCache(_descriptors(len(lowers) + len(data_layers)))
    prefix = marks.USER if policy.userxattr else marks.TRUSTED
    filesystems: list[int] = []
    opened: list[Lower | Upper] = []
    try:
        upper_layer: Upper | None = None
        if upper is not None and work is not None:
            upper_layer = _open_upper(upper, work, policy, prefix, cache, filesystems, calls or _calls(policy))
            opened.append(upper_layer)
        lower_layers: list[Lower] = []
        for index, path in enumerate((*lowers, *data_layers), start=1):
            root, is_clone = _open_lower(path, policy)
            with closed_on_failure(root):
                fs = _filesystem(root, filesystems)
                kind = Lower if is_local(root) else RemoteLower
                lower = kind(root, index, fs, is_clone=is_clone, mark_prefix=prefix, cache=cache, whiteouts=policy.whiteouts)
                if is_clone:
                    _open_no_devices(root)  # now that the layer knows what the mount it comes from says of them
            lower.override = policy.override.attribute
            lower_layers.append(lower)
            opened.append(lower)
        shown, data = tuple(lower_layers[: len(lowers)]), tuple(lower_layers[len(lowers) :])
        view = View(shown, upper_layer, policy, cache, _masked(upper, work), data)
    except OSError:
        for layer in opened:
            layer.close()
        raise
    try:
        if upper_layer is not None and work is not None:
            _identify(upper_layer, policy)
            if policy.index:
                view.index = _open_index(view, upper_layer)
    except OSError as error:
        view.close()
        error.filename = os.fsdecode(upper or b"")
        raise
    return view


def _descriptors(layers: int) -> int:
    """How many may be cached: half of those there are, if the other half is enough for the layers and the 64 that all else takes."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(8, min(limit // 2, limit - layers - 64))


def _identify(upper: Upper, policy: Policy) -> None:
    """Give the overlay its identity, if it is to have one and has none. What cannot be is logged (ovl_init_uuid_xattr)."""
    if policy.uuid in (Uuid.OFF, Uuid.NULL) or upper.getmark(upper.root_fd, b".", marks.UUID) is not None:
        return
    if policy.uuid is Uuid.AUTO and upper.getmark(upper.root_fd, b".", marks.IMPURE) is not None:
        return
    with tolerated("the upper gets no uuid"):
        upper.set_mark(upper.root_fd, b".", marks.UUID, uuid4().bytes)


def _open_index(view: View, upper: Upper) -> Index:
    """`index` in the work directory, bound to this upper and the top lower, without what leads nowhere."""
    with suppress(FileExistsError):
        upper.calls.mkdir(_INDEX, 0o700, upper.work_fd)
    fd = os.open(_INDEX, _OPEN_UPPER | os.O_NOFOLLOW, dir_fd=upper.work_fd)
    index = Index(fd, upper, view.origins)
    with closed_on_failure(fd):
        index.verify(Place(view.lowers[0], view.lowers[0].root_fd, b"."))
        index.clean()
    return index


def open_probed(
    lowers: Sequence[bytes],
    policy: Policy,
    *,
    upper: bytes | None = None,
    masked: frozenset[tuple[int, int]],
    data_layers: Sequence[bytes] = (),
) -> View:
    """A view to ask single names of: lowers alone, or below `upper` as one more layer that is only read. Nothing is written anywhere.

    Layer 1 is the upper, there or not; the lowers count from 2. In an upper `.wh.NAME` is an ordinary file, unless the mount reads it as
    a whiteout. masked: (st_dev, st_ino) of directories that show empty. data_layers: as for open_view. Raises OSError with the path as its
    filename.
    """
    cache = DescriptorCache(max(64, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4))
    prefix = marks.USER if policy.userxattr else marks.TRUSTED
    uppers_whiteouts = Whiteouts.AUFS if policy.whiteouts is Whiteouts.AUFS else Whiteouts.KERNEL
    wanted = [(path, policy.whiteouts) for path in (*lowers, *data_layers)]
    if upper is not None:
        wanted.insert(0, (upper, uppers_whiteouts))
    filesystems: list[int] = []
    opened: list[Lower] = []
    try:
        for index, (path, whiteouts) in enumerate(wanted, start=1 if upper is not None else 2):
            root, is_clone = _open_lower(path, policy)
            with closed_on_failure(root):
                fs = _filesystem(root, filesystems)
                opened.append(ProbedLower(root, index, fs, is_clone=is_clone, mark_prefix=prefix, cache=cache, whiteouts=whiteouts))
            opened[-1].override = policy.override.attribute
        shown = len(opened) - len(data_layers)
        return View(tuple(opened[:shown]), None, policy, cache, masked, tuple(opened[shown:]))
    except OSError:
        for layer in opened:
            layer.close()
        raise


def _calls(policy: Policy) -> Calls:
    attribute = policy.override.attribute
    return Calls() if attribute is None else OverridingCalls(attribute)


def _filesystem(fd: int, filesystems: list[int]) -> int:
    """A small number for the file system: its place among those seen, the upper's first."""
    dev = os.fstat(fd).st_dev
    if dev not in filesystems:
        filesystems.append(dev)
    return filesystems.index(dev)


def _masked(*paths: bytes | None) -> frozenset[tuple[int, int]]:
    found = (os.stat(path) for path in paths if path is not None)
    return frozenset((st.st_dev, st.st_ino) for st in found)


def _open_lower(path: bytes, policy: Policy) -> tuple[int, bool]:
    """(descriptor, is it a clone). Root of a user namespace may clone where no mount is locked in place above what it covers."""
    try:
        fd = syscalls.open_tree(syscalls.AT_FDCWD, path, syscalls.OPEN_TREE_CLONE)
    except OSError:
        if policy.privileged:
            raise
        return os.open(path, _OPEN_DIR), False
    try:
        _make_read_only(fd)
    except OSError as error:
        os.close(fd)
        raise OSError(error.errno, error.strerror, os.fsdecode(path)) from None
    return fd, True


def _make_read_only(fd: int) -> None:
    try:
        syscalls.mount_setattr(fd, syscalls.MOUNT_ATTR_RDONLY | syscalls.MOUNT_ATTR_NOATIME, syscalls.MOUNT_ATTR__ATIME)
    except PermissionError:
        # In a user namespace the atime settings are locked; read-only, which we may set, stops atime as well.
        syscalls.mount_setattr(fd, syscalls.MOUNT_ATTR_RDONLY, 0)


def _open_no_devices(fd: int) -> None:
    """Opening a device has effects, even if it is closed at once, and somebody may put one in the place of a file that is to be opened."""
    syscalls.mount_setattr(fd, syscalls.MOUNT_ATTR_NODEV, 0)


def _open_upper(
    upper: bytes, work: bytes, policy: Policy, prefix: bytes, cache: DescriptorCache, filesystems: list[int], calls: Calls
) -> Upper:
    upper_fd = os.open(upper, _OPEN_UPPER)
    try:
        work_fd = os.open(work, _OPEN_UPPER)
    except OSError:
        os.close(upper_fd)
        raise
    try:
        if syscalls.statx(upper_fd).mount_id != syscalls.statx(work_fd).mount_id:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), os.fsdecode(work))
        is_clone = policy.privileged
        if is_clone:
            upper_fd, work_fd = _clone_both(upper, upper_fd, work, work_fd)
        inner = _open_inner_work(calls, work_fd, work)
        with closed_on_failure(inner):
            fs = _filesystem(upper_fd, filesystems)
            layer = Upper(upper_fd, inner, fs, is_clone=is_clone, mark_prefix=prefix, cache=cache, fsync=policy.fsync, calls=calls)
            layer.keeps_order = keeps_order(upper_fd)
        layer.override = policy.override.attribute
        layer.reads_aufs = policy.whiteouts is Whiteouts.AUFS
        layer.doubts_owners = policy.overflow_is_mapped
        layer.squash = (policy.squash_uid, policy.squash_gid)
        return layer
    except OSError:
        os.close(upper_fd)
        raise
    finally:
        os.close(work_fd)


def _clone_both(upper: bytes, upper_fd: int, work: bytes, work_fd: int) -> tuple[int, int]:
    """Both anew, from one clone of their mount, taken at the deepest directory above both. The given descriptors are closed."""
    real_upper, real_work = os.path.realpath(upper), os.path.realpath(work)
    common = os.path.commonpath([real_upper, real_work])
    resolve = syscalls.RESOLVE_BENEATH | syscalls.RESOLVE_NO_SYMLINKS
    opened: list[int] = []
    clone = syscalls.open_tree(syscalls.AT_FDCWD, common, syscalls.OPEN_TREE_CLONE)
    try:
        _open_no_devices(clone)
        for old, real, path in ((upper_fd, real_upper, upper), (work_fd, real_work, work)):
            opened.append(syscalls.openat2(clone, os.path.relpath(real, common), _OPEN_UPPER, resolve))
            if not os.path.sameopenfile(old, opened[-1]):
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), os.fsdecode(path))
    except OSError:
        for fd in opened:
            os.close(fd)
        raise
    finally:
        os.close(clone)
    os.close(upper_fd)
    os.close(work_fd)
    new_upper, new_work = opened
    return new_upper, new_work


def _open_inner_work(calls: Calls, work_fd: int, work: bytes) -> int:
    """`work/work`, as the kernel has it, emptied of what a mount that was killed left there."""
    path = os.fsdecode(os.path.join(work, b"work"))
    try:
        try:
            calls.mkdir(b"work", 0o700, work_fd)
        except FileExistsError:
            pass
        # What is made in it must inherit nothing from whatever directory the work directory lies in: no group, no ACL. And the kernel
        # leaves it with mode 000.
        calls.let_us_in(work_fd, b"work", 0o700)
        fd = os.open(b"work", os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=work_fd)
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from None
    try:
        _remove_acls(calls, fd)
        _clear(calls, fd)
    except OSError as error:
        os.close(fd)
        raise OSError(error.errno, error.strerror, path) from None
    return fd


def _remove_acls(calls: Calls, fd: int) -> None:
    for attribute in (b"system.posix_acl_default", b"system.posix_acl_access"):
        try:
            calls.removexattr(fd, b".", attribute)
        except OSError as error:
            if error.errno not in (errno.ENODATA, errno.EOPNOTSUPP):
                raise


def _clear(calls: Calls, fd: int) -> None:
    with os.scandir(fd) as entries:
        left = [os.fsencode(entry.name) for entry in entries]
    for name in left:
        if name != b"incompat":
            remove_tree(calls, fd, name)


def keeps_order(fd: int) -> bool:
    """Does this file system keep a rename behind data that was written out before it? xfs, and ext4 with a journal.

    Measured with a shutdown that loses the log's tail: of 500 files none was torn after sync_file_range, all were without. statfs cannot
    tell ext4 with and without a journal apart; /sys/fs/ext4/DEVICE/journal_task can.
    """
    dev = os.fstat(fd).st_dev
    try:
        device = os.path.basename(os.readlink(f"/sys/dev/block/{os.major(dev)}:{os.minor(dev)}"))
    except OSError:
        return False
    if os.path.isdir(f"/sys/fs/xfs/{device}"):
        return True
    try:
        with open(f"/sys/fs/ext4/{device}/journal_task", encoding="ascii") as file:
            return file.read().strip().isdigit()
    except OSError:
        return False
