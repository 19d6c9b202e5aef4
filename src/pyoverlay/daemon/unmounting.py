"""Taking a mount away from outside: sync it, unmount it, wait for its daemon; say who is in the way.

A mount whose daemon hangs blocks whoever asks anything of it, in a sleep that no signal ends: what does ask is done by a child, which is
left behind if it does not come back.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress

from pyoverlay import mountinfo, registry
from pyoverlay.core import syscalls
from pyoverlay.core.calls import Calls, sync_all
from pyoverlay.daemon.holders import daemons, described, holders, in_other_namespaces, open_proc
from pyoverlay.daemon.launch import from_here
from pyoverlay.errors import DaemonFailed, NoPrivilege, Refusal, printable
from pyoverlay.fuse.mountpoint import MAKE_MTAB, MTAB, fusermount

OUR_TYPE = "fuse.pyoverlay"

_LOOK = 0.2  # seconds between two looks at a daemon that is to end
_THREADS_END = 2.0  # seconds in which the threads of a process that has ended are gone, unless something holds them

# Seconds that a mount which is only to be detached may take to sync.
_LAZY_PATIENCE = 5.0


def unmount(merged: bytes, *, lazily: bool = False, wait: float = 60.0) -> str | None:
    """Unmount the overlay at `merged` and return when its upper is synced and its daemon gone.

    lazily: detach it, synced where its daemon answers, and wait for nobody. wait: seconds for an answer, and for the daemon's end. What
    it returns is to be told to people: the daemon had died before, or has a thread left that a lower does not answer. Raises Refusal: not
    a mount of ours, busy, its daemon does not answer or could not sync the upper; DaemonFailed: it does not end.
    """
    mount, record = _find(merged, _mount_point(merged))
    if record is None:
        return _take_away_unlisted(merged, mount, lazily=lazily, wait=wait)
    if not record.is_alive:
        return _take_away_dead(merged, mount, record, lazily=lazily, wait=wait)
    pidfd = _pidfd(record)
    try:
        if pidfd is not None:
            _sync(merged, mount, record.pid, lazily=lazily, wait=wait)
        _take_away(merged, mount, lazily=lazily, wait=wait)
        note = _wait(merged, mount, record, pidfd, wait) if pidfd is not None and not lazily else None
    finally:
        if pidfd is not None:
            os.close(pidfd)
    if lazily or (left := _left_behind(merged, record)) is None or left.upper is None:
        return note
    _sync_upper(left, "unmounted, but its daemon died meanwhile, and the upper cannot be synced")
    return f"{printable(merged)}: unmounted; its daemon (pid {left.pid}) died meanwhile, and what it had written is on disk"


def _take_away_dead(merged: bytes, mount: mountinfo.Mount, record: registry.Record | None, *, lazily: bool, wait: float) -> str:
    """A mount that nobody serves: what its daemon had written is made durable here."""
    _take_away(merged, mount, lazily=lazily, wait=wait)
    note = "its daemon had died before; unmounted"
    if record is not None and record.upper is not None:
        _sync_upper(record, "unmounted, its daemon had died before, and the upper cannot be synced")
        note += ", and what it had written is on disk"
        _left_behind(merged, record)
    return f"{printable(merged)}: {note}"


def _take_away_unlisted(merged: bytes, mount: mountinfo.Mount, *, lazily: bool, wait: float) -> str | None:
    """A mount that is in no list to be read from here: where they are kept there was no room, or its caller had another runtime directory.

    Its daemon is one of those that are in no list; which one shows when it ends.
    """
    with ExitStack() as held:
        poll, pids = select.poll(), {}
        for pid in _unlisted_daemons(mount):
            with suppress(ProcessLookupError):
                pidfd = os.pidfd_open(pid)
                held.callback(os.close, pidfd)
                poll.register(pidfd, select.POLLIN)
                pids[pidfd] = pid
        if not _sync(merged, mount, None, lazily=lazily, wait=wait):
            return _take_away_dead(merged, mount, None, lazily=lazily, wait=wait)
        _take_away(merged, mount, lazily=lazily, wait=wait)
        if lazily:
            return None
        if not pids:
            reason = "its daemon is in no list and cannot be seen from here: it may be syncing yet"
            raise DaemonFailed(f"{printable(merged)}: unmounted, but {reason}")
        if not (ended := poll.poll(wait * 1000)):
            reason = f"its daemon has not ended within {wait:g} s: {_what_keeps_it(mount)}"
            raise DaemonFailed(f"{printable(merged)}: unmounted, but {reason}")
        pid = pids[ended[0][0]]
    return f"{printable(merged)}: unmounted; its daemon (pid {pid}) was in no list: only its log says if the upper could not be synced"


def _unlisted_daemons(mount: mountinfo.Mount) -> list[int]:
    listed = {record.pid for record in registry.records() if record.is_alive}
    with open_proc() as proc:
        found = daemons(proc, mount.device, int(mount.option(b"user_id") or 0))
        return [pid for pid in found if pid not in listed]


def _sync_upper(record: registry.Record, failure: str) -> None:
    """In the place of a daemon that died. Raises Refusal with that failure."""
    assert record.upper is not None
    assert record.work is not None
    beside = record.work if os.path.isdir(record.work) else record.upper  # somebody may have removed it by now
    try:
        with _opened(record.upper) as upper, _opened(beside) as work:
            sync_all(Calls(), upper, work)
    except OSError as error:
        raise Refusal(record.upper, failure, error.errno) from error


@contextmanager
def _opened(directory: bytes) -> Iterator[int]:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield fd
    finally:
        os.close(fd)


def _mount_point(merged: bytes) -> bytes:
    """Its path without symlinks, found without asking anything of the mount: it may hang."""
    path = from_here(merged.rstrip(b"/") or b"/")
    points = {mount.point for mount in mountinfo.mounts()}
    above = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
    for candidate in (above,) if b".." in path.split(b"/") else (os.path.normpath(path), above):  # `..` of a symlink is where that leads
        if candidate in points:
            return candidate
    return os.path.realpath(path)


def _find(merged: bytes, point: bytes) -> tuple[mountinfo.Mount, registry.Record | None]:
    mount = mountinfo.topmost(point)
    if mount is None:
        if not os.path.lexists(point):
            raise Refusal(merged, "does not exist", errno.ENOENT)
        raise Refusal(merged, "nothing is mounted here", errno.EINVAL)
    # The device number comes back with a later mount, so the place must be the same as well, or the daemon alive: a directory above it may
    # have been renamed, and it may show at a second place. The latest is the one that has the number now.
    records = (r for r in reversed(registry.records()) if r.device == mount.device and (r.merged == mount.point or r.is_alive))
    record = next((r for r in records if r.may_be_of(mount.option(b"user_id"))), None)
    if record is None and mount.type != OUR_TYPE:
        raise Refusal(merged, f"not an overlay of pyoverlay but a mount of type {mount.type}", errno.EINVAL, "use umount")
    return mount, record


def _pidfd(record: registry.Record) -> int | None:
    """A descriptor of the daemon, None if it ended meanwhile."""
    with suppress(ProcessLookupError):
        fd = os.pidfd_open(record.pid)
        if record.is_alive:  # and so this is it: the number was not given away between the two
            return fd
        os.close(fd)
    return None


def _sync(merged: bytes, mount: mountinfo.Mount, pid: int | None, *, lazily: bool, wait: float) -> bool:
    """Write what is dirty in the page cache: umount(2) would too, but could not say that it failed. Is there a daemon to write it?

    pid: of the daemon, where it is known.
    """
    if pid is not None and registry.is_stopped(pid):
        if lazily:
            return True
        remedy = f"kill -CONT {pid}, or detach it with --lazy"
        raise Refusal(merged, f"its daemon (pid {pid}) is stopped and cannot sync it", errno.EBUSY, remedy)
    code = _in_child(lambda: _sync_from_inside(mount, is_to_answer=not lazily), _LAZY_PATIENCE if lazily else wait)
    if code in (errno.ENOTCONN, errno.ECONNABORTED):  # it ended meanwhile
        return False
    if code == 0 or lazily:
        return True
    if code is None:
        named, remedy = ("its daemon", "") if pid is None else (f"its daemon (pid {pid})", f"kill {pid}, or ")
        raise Refusal(merged, f"{named} has not answered within {wait:g} s", errno.ETIMEDOUT, f"{remedy}detach it with --lazy")
    raise Refusal(merged, "what was written could not be stored", code, "still mounted; make room or look into the log, then try again")


def _sync_from_inside(mount: mountinfo.Mount, *, is_to_answer: bool) -> None:
    try:
        fd = os.open(mount.point, os.O_RDONLY | os.O_DIRECTORY)
    except PermissionError:  # the root of the merged tree is closed to us: the daemon's own sync has to do
        return
    syscalls.syncfs(fd)
    if is_to_answer:
        os.fstatvfs(fd)  # with nothing to write the sync has asked the daemon nothing, and whoever waits for it keeps the mount busy


def _in_child(function: Callable[[], None], seconds: float) -> int | None:
    """Have a child call the function: the errno it failed with, 0, or None if it has not come back within so many seconds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # from Python 3.12, of threads: the command line has none
        pid = os.fork()
    if pid == 0:
        _call_and_exit(function)
    pidfd = os.pidfd_open(pid)
    try:
        if not select.select([pidfd], [], [], seconds)[0]:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)  # in vain while it waits for the daemon
            return None
    finally:
        os.close(pidfd)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def _call_and_exit(function: Callable[[], None]) -> None:
    code = errno.EIO
    try:
        null = os.open(os.devnull, os.O_RDWR)
        for fd in range(3):  # whoever reads what we print must not wait for a child that hangs
            os.dup2(null, fd)
        function()
        code = 0
    except OSError as error:
        code = error.errno or errno.EIO
    finally:
        os._exit(code)


def _take_away(merged: bytes, mount: mountinfo.Mount, *, lazily: bool, wait: float) -> None:
    """wait: seconds that the kernel may take, which writes what is dirty first, by a daemon that may hang meanwhile."""
    seconds = _LAZY_PATIENCE if lazily else max(wait, _LAZY_PATIENCE)
    try:
        if os.geteuid() == 0:
            _umount(mount, lazily=lazily, seconds=seconds)
        else:
            _fusermount(mount.point, lazily=lazily, seconds=seconds)
    except PermissionError as error:
        raise NoPrivilege(merged, "may not be unmounted by this user", error.errno, "be root, or whoever mounted it") from error
    except TimeoutError as error:
        remedy = f"end its daemon, or {'have root umount it with -f' if lazily else 'detach it with --lazy'}"
        raise Refusal(merged, f"not unmounted within {seconds:g} s", error.errno, remedy) from error
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise Refusal(merged, "cannot be unmounted", error.errno) from error
        raise _busy(merged, mount) from error


def _umount(mount: mountinfo.Mount, *, lazily: bool, seconds: float) -> None:
    """umount2(2), by a child that may be given up: whoever lets go of the last reference writes what is dirty."""
    code = _in_child(lambda: syscalls.umount2(mount.point, syscalls.MNT_DETACH if lazily else 0), seconds)
    if code is None and lazily:
        return  # detached it is; what is dirty the child writes when it can
    if code != 0:
        code = errno.ETIMEDOUT if code is None else code
        raise OSError(code, os.strerror(code))


def _fusermount(point: bytes, *, lazily: bool, seconds: float) -> None:
    arguments = [fusermount(), "-u", *(["-z"] if lazily else []), "--", os.fsdecode(point)]
    process = subprocess.Popen(arguments, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        _, told = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()  # in vain while it waits for the daemon, so it is not waited for
        raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT)) from None
    if process.returncode == 0:
        return
    if b"busy" in told:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
    raise NoPrivilege(point, printable(told.strip() or b"fusermount3 refused"), None, MAKE_MTAB if os.fsencode(MTAB) in told else None)


def _busy(merged: bytes, mount: mountinfo.Mount) -> Refusal:
    inner = next((m for m in mountinfo.mounts() if m.point.startswith(mount.point + b"/")), None)
    if inner is not None:
        return Refusal(merged, f"busy: something is mounted inside, at {printable(inner.point)}", errno.EBUSY, "unmount that first")
    with open_proc() as proc:
        found = holders(proc, mount_id=mount.id, device=mount.device)
    return Refusal(merged, f"busy: held by {described(found)}", errno.EBUSY, "end that, or detach it with --lazy")


def _wait(merged: bytes, mount: mountinfo.Mount, record: registry.Record, pidfd: int, seconds: float) -> str | None:
    """Until the daemon has ended. One that has done all it had to may have threads that wait for a lower's server, which no signal ends:
    what it returns says so.
    """
    end = time.monotonic() + seconds
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    while not poll.poll(min(_LOOK, max(end - time.monotonic(), 0)) * 1000):
        if registry.has_ended(record.pid):
            if poll.poll(_THREADS_END * 1000):
                return None
            return f"{printable(merged)}: unmounted; a thread of its daemon (pid {record.pid}) is left, which waits for a lower's server"
        if time.monotonic() < end:
            continue
        raise DaemonFailed(
            f"{printable(merged)}: unmounted, but its daemon (pid {record.pid}) has not ended within {seconds:g} s: {_what_keeps_it(mount)}"
        )
    return None


def _what_keeps_it(mount: mountinfo.Mount) -> str:
    """Why a daemon whose mount was taken away here serves on."""
    copy = next((other for other in mountinfo.mounts() if other.device == mount.device), None)
    if copy is not None:
        return f"it is mounted at {printable(copy.point)} as well; umount that too"
    with open_proc() as proc:
        found = in_other_namespaces(proc, mount.device)
    if found:
        return f"it is still mounted in another mount namespace, of {described(found)}; end that, or umount it there (nsenter -m -t PID)"
    return "a mount namespace that cannot be seen from here may hold the mount, or the upper's disk is slow"


def _left_behind(merged: bytes, record: registry.Record) -> registry.Record | None:
    """The record of a daemon that was killed before it could take it back, which is cleared away. Raises what another one left to tell."""
    left = next((r for r in registry.records() if r.id == record.id), None)
    if left is None or left.is_alive:
        return None
    registry.clear(left)
    if left.failure is not None:
        raise Refusal(merged, f"unmounted, but {left.failure}", None, "see the log")
    return left
