"""Taking a mount away from outside: sync it, unmount it, wait for its daemon; say who is in the way.

The mount itself is touched only where its daemon is there to answer.
"""

from __future__ import annotations

import errno
import os
import select
import subprocess
from contextlib import suppress

from pyoverlay import mountinfo, registry
from pyoverlay.core import syscalls
from pyoverlay.daemon.holders import described, holders, open_proc
from pyoverlay.errors import DaemonFailed, NoPrivilege, Refusal, printable
from pyoverlay.fuse.mountpoint import fusermount

OUR_TYPE = "fuse.pyoverlay"


def unmount(merged: bytes, *, lazily: bool = False, wait: float = 60.0) -> None:
    """Unmount the overlay at `merged` and return when its upper is synced and its daemon gone.

    lazily: detach it, synced where its daemon answers, and wait for nobody. wait: seconds for the daemon's end. Raises Refusal: not a
    mount of ours, busy, dead, or the daemon could not sync the upper; DaemonFailed: it does not end.
    """
    point = os.path.realpath(merged)
    mount, record = _find(merged, point)
    is_alive = record is not None and record.is_alive
    if not is_alive and not lazily:
        remedy = f"pyoverlay umount --lazy {printable(merged)}"
        raise Refusal(merged, "a dead mount: its daemon is gone", errno.ENOTCONN, remedy)
    pidfd = _pidfd(record) if is_alive else None
    try:
        if is_alive:
            _sync(merged, mount)
        _take_away(merged, mount, lazily=lazily)
        if pidfd is not None and not lazily:
            _wait(merged, record, pidfd, wait)
    finally:
        if pidfd is not None:
            os.close(pidfd)
    if record is not None and not (lazily and is_alive):
        _report_failure(merged, record)


def _find(merged: bytes, point: bytes) -> tuple[mountinfo.Mount, registry.Record | None]:
    mount = mountinfo.topmost(point)
    if mount is None:
        if not os.path.lexists(point):
            raise Refusal(merged, "does not exist", errno.ENOENT)
        raise Refusal(merged, "nothing is mounted here", errno.EINVAL)
    # The device number comes back with a later mount, so the place must be the same as well.
    record = next((r for r in reversed(registry.records()) if r.device == mount.device and r.merged == mount.point), None)
    if record is None and mount.type != OUR_TYPE:
        raise Refusal(merged, f"not an overlay of pyoverlay but a mount of type {mount.type}", errno.EINVAL, "use umount")
    return mount, record


def _pidfd(record: registry.Record | None) -> int | None:
    """A descriptor of the daemon, None if it ended meanwhile."""
    assert record is not None
    with suppress(ProcessLookupError):
        fd = os.pidfd_open(record.pid)
        if record.is_alive:  # and so this is it: the number was not given away between the two
            return fd
        os.close(fd)
    return None


def _sync(merged: bytes, mount: mountinfo.Mount) -> None:
    """Write what is dirty in the page cache: umount(2) would too, but could not say that it failed."""
    try:
        fd = os.open(mount.point, os.O_RDONLY | os.O_DIRECTORY)
    except PermissionError:  # the root of the merged tree is closed to us: the daemon's own sync has to do
        return
    except OSError as error:
        raise Refusal(merged, "the mount does not answer", error.errno, f"pyoverlay umount --lazy {printable(merged)}") from error
    try:
        syscalls.syncfs(fd)
    except OSError as error:
        remedy = "still mounted; make room or look into the log, then try again"
        raise Refusal(merged, "what was written could not be stored", error.errno, remedy) from error
    finally:
        os.close(fd)


def _take_away(merged: bytes, mount: mountinfo.Mount, *, lazily: bool) -> None:
    try:
        if os.geteuid() == 0:
            syscalls.umount2(mount.point, syscalls.MNT_DETACH if lazily else 0)
        else:
            _fusermount(mount.point, lazily=lazily)
    except PermissionError as error:
        raise NoPrivilege(merged, "may not be unmounted by this user", error.errno, "be root, or whoever mounted it") from error
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise Refusal(merged, "cannot be unmounted", error.errno) from error
        raise _busy(merged, mount) from error


def _fusermount(point: bytes, *, lazily: bool) -> None:
    arguments = [fusermount(), "-u", *(["-z"] if lazily else []), "--", os.fsdecode(point)]
    result = subprocess.run(arguments, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    if result.returncode == 0:
        return
    if b"busy" in result.stderr:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
    raise NoPrivilege(point, printable(result.stderr.strip() or b"fusermount3 refused"))


def _busy(merged: bytes, mount: mountinfo.Mount) -> Refusal:
    inner = next((m for m in mountinfo.mounts() if m.point.startswith(mount.point + b"/")), None)
    if inner is not None:
        return Refusal(merged, f"busy: something is mounted inside, at {printable(inner.point)}", errno.EBUSY, "unmount that first")
    proc = open_proc()
    try:
        found = holders(proc, point=mount.point, mount_id=mount.id, device=mount.device)
    finally:
        os.close(proc)
    return Refusal(merged, f"busy: held by {described(found)}", errno.EBUSY, "end that, or detach it with --lazy")


def _wait(merged: bytes, record: registry.Record | None, pidfd: int, seconds: float) -> None:
    assert record is not None
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    if not poll.poll(seconds * 1000):
        raise DaemonFailed(
            f"{printable(merged)}: unmounted, but its daemon (pid {record.pid}) has not ended within {seconds:g} s: "
            "another mount namespace may hold the mount, or the upper's disk is slow"
        )


def _report_failure(merged: bytes, record: registry.Record) -> None:
    """Raise what the daemon left in the registry at its end, and clear it away."""
    left = next((r for r in registry.records() if r.id == record.id), None)
    if left is None or left.is_alive:
        return
    registry.clear(left)
    if left.failure is not None:
        raise Refusal(merged, f"unmounted, but {left.failure}", None, "see the log")
