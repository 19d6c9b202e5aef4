"""The daemon's own course: check, open, mount, answer, serve, sync, let go.

Everything that opens a path comes before the mount. What is made before it is taken back if there is no mount in the end.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress

from pyoverlay import registry
from pyoverlay.core import syscalls
from pyoverlay.core.index import IndexRefused
from pyoverlay.core.policy import Fsync, Policy
from pyoverlay.core.stack import open_view
from pyoverlay.core.view import View
from pyoverlay.daemon import control, logs, privileges, refusals
from pyoverlay.daemon.holders import described, holders, open_proc
from pyoverlay.daemon.options import DEFAULT_INODES, Options, policy
from pyoverlay.daemon.refusals import Directory, Layers
from pyoverlay.daemon.request import Request
from pyoverlay.errors import NoPrivilege, Refusal, printable
from pyoverlay.fuse import latency
from pyoverlay.fuse.binding import wire
from pyoverlay.fuse.mountpoint import MountOptions, MountPoint, open_mount_point
from pyoverlay.fuse.operations import Operations
from pyoverlay.fuse.session import STOP_SIGNALS, Session
from pyoverlay.fuse.wired import limit_inodes, operations_for
from pyoverlay.fuse.wired_calls import calls_for

log = logging.getLogger(__name__)

_WIDE = 4096  # descriptors for which there is room from the start: 32 KiB of the kernel's memory


def serve(request: Request, announce: Callable[[], None]) -> None:
    """Mount what is asked for, call `announce` when the mount answers, return when it is gone.

    Raises PyoverlayError for what cannot be mounted, with nothing left behind.
    """
    os.umask(0)  # the kernel has applied the caller's already
    _raise_limits()
    _widen_descriptor_table()
    privileged = refusals.is_privileged()
    if os.geteuid() == 0:
        syscalls.keep_capabilities_over_setfsuid()
    rules = policy(request.options, privileged=privileged, overflow_is_mapped=refusals.overflow_is_mapped())
    with ExitStack() as held, ExitStack() as undo, ExitStack() as looked:
        layers = refusals.examine(request.options, request.merged, held, looked, undo, userxattr=rules.userxattr)
        view = _open(layers, rules)
        held.callback(view.close)
        if rules.fsync is Fsync.VOLATILE and layers.work is not None:
            refusals.mark_volatile(layers.work, undo)
        point = open_mount_point(layers.merged.path)
        held.callback(point.close)
        latency_fd = _latency_fd(request.options, held)
        entry = _Entry(layers, request.options, rules, point, keeps_awake=latency_fd >= 0)
        held.callback(entry.close)
        operations = operations_for(view, wire, writeback=request.options.writeback)
        held.callback(operations.asking.close)
        proc = held.enter_context(open_proc())
        session = Session(
            operations,
            point,
            stop_timeout=request.options.stop_timeout,
            who_holds=lambda: _who_holds(proc, point),
            beside=lambda: entry.tell(operations),
            asking=operations.asking,
        )
        logs.stay_off_source_files()

        def on_mount() -> None:
            privileges.drop(writes=layers.upper is not None)
            limit_inodes(view, wire, request.options.inodes or DEFAULT_INODES, drops_names=request.options.inodes is not None)

        def on_answer() -> None:
            undo.pop_all()
            entry.write()
            log.info("%s: mounted, %d lowers%s", printable(layers.merged.path), len(layers.lowers), "" if layers.upper else ", read-only")
            announce()
            forbid_paths()

        options = mount_options(request.options, layers.lowers, privileged=os.geteuid() == 0)
        looked.close()
        if wire is not None:
            wire.latency(latency_fd)
        try:
            session.run(
                options,
                on_answer,
                on_mount=on_mount,
                stop_at=_stop_signals(request),
                on_signal={signal.SIGUSR1: logs.Level().switch, signal.SIGUSR2: lambda: _say_how_it_is(view, entry.record)},
            )
            log.info("%s: unmounted", printable(layers.merged.path))
        finally:
            _sync(view, rules, entry)


def mount_options(options: Options, lowers: Sequence[Directory], *, privileged: bool) -> MountOptions:
    """The generic options: as root all users are served, with suid and dev, unless told otherwise; as a user neither can be had.

    What a lower's own mount denies, the overlay does not give unless it is asked to: a set-user-id program on a stick or in somebody's
    FUSE mount would be root's.
    """
    flags = [os.fstatvfs(lower.fd).f_flag for lower in lowers] if privileged else []
    if not privileged and (options.suid or options.dev):
        raise NoPrivilege("-o suid,dev", "only root's mounts may have them", errno.EPERM, "leave them out")
    return MountOptions(
        source=options.source or "pyoverlay",
        subtype=options.subtype,
        allow_other=privileged if options.allow_other is None else options.allow_other,
        read_only=options.read_only or options.upper is None,
        suid=privileged and not any(flag & os.ST_NOSUID for flag in flags) if options.suid is None else options.suid,
        dev=privileged and not any(flag & os.ST_NODEV for flag in flags) if options.dev is None else options.dev,
        exec=options.exec,
        sync=options.sync,
        dirsync=options.dirsync,
        noatime=options.noatime,
        nodiratime=options.nodiratime,
    )


def _open(layers: Layers, rules: Policy) -> View:
    lowers, data_lowers = ([layer.path for layer in each] for each in (layers.lowers, layers.data_lowers))
    try:
        return open_view(lowers, _path(layers.upper), _path(layers.work), rules, calls_for(rules, wire), data_lowers)
    except IndexRefused as error:
        remedy = "mount it as then, or remove `index` from the work directory, or leave index=on out"
        raise Refusal(error.filename, error.strerror or "", error.errno, remedy) from error
    except OSError as error:
        raise Refusal.of(error, layers.merged.given) from error


def _path(directory: Directory | None) -> bytes | None:
    return None if directory is None else directory.path


def _latency_fd(options: Options, held: ExitStack) -> int:
    """See latency.open_device; the extension is what asks."""
    if wire is None:
        if options.cpu_latency:
            raise Refusal(latency.DEVICE, "is asked by the extension, which is not loaded", remedy="leave out cpu_latency=on")
        return -1
    fd = latency.open_device(options.cpu_latency)
    if fd >= 0:
        held.callback(os.close, fd)
    return fd


# What the caller's shell set for its own programs is not for a process that serves everybody: past RLIMIT_CPU it would be killed, and past
# RLIMIT_FSIZE every caller's write refused. The hard limits stay: they are the machine's.
_LIMITS = (resource.RLIMIT_NOFILE, resource.RLIMIT_FSIZE, resource.RLIMIT_CPU, resource.RLIMIT_AS, resource.RLIMIT_DATA)
_FELT = (
    (resource.RLIMIT_FSIZE, "no file can be written past %d bytes: a hard limit of whoever mounted"),
    (resource.RLIMIT_CPU, "the daemon will be killed after %d seconds of processor time: a hard limit of whoever mounted"),
)


def _raise_limits() -> None:
    for limit in _LIMITS:
        _, hard = resource.getrlimit(limit)
        with suppress(ValueError):  # a hard limit past what the kernel grants now
            resource.setrlimit(limit, (hard, hard))
    for limit, consequence in _FELT:
        _, hard = resource.getrlimit(limit)
        if hard != resource.RLIM_INFINITY:
            log.warning(consequence, hard)


def _widen_descriptor_table() -> None:
    """Make room for descriptors before there is a second thread.

    Each time that the kernel doubles the table of a process with several it waits until no processor reads the old one (expand_fdtable,
    fs/file.c): 8 to 15 ms at 64, 128, 256 and so on, in which nobody was answered.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    fd = os.open("/", os.O_PATH | os.O_CLOEXEC)
    try:
        os.close(fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, min(soft, _WIDE) - 1))
    finally:
        os.close(fd)


def _stop_signals(request: Request) -> tuple[signal.Signals, ...]:
    """A terminal that closes ends a mount in its foreground; one in the background outlives it."""
    if request.foreground:
        return (*STOP_SIGNALS, signal.SIGHUP)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    return STOP_SIGNALS


def _who_holds(proc: int, point: MountPoint) -> str:
    mount = point.mount
    assert mount is not None
    with privileges.looking_at_processes():
        return described(holders(proc, mount_id=mount.id, device=mount.device))


def _say_how_it_is(view: View, record: registry.Record) -> None:
    """The answer to SIGUSR2."""
    logs.say(
        "%s: up %.0f s, %d inodes known, %d of at most %d descriptors cached",
        printable(record.merged), time.time() - record.started, len(view.table), len(view.cache), view.cache.limit,
    )  # fmt: skip


def _sync(view: View, rules: Policy, entry: _Entry) -> None:
    """What umount(8) did not wait for. A failure is left in the registry: `pyoverlay umount` reports it."""
    if not view.is_dirty or rules.fsync is Fsync.VOLATILE:
        return
    entry.failure = "the upper was not synced: the last changes may be lost"  # unless something is said of it below
    try:
        view.sync()
        entry.failure = None
    except OSError as error:
        log.critical("%s: the upper could not be synced: %s", printable(entry.record.merged), error.strerror)
        entry.failure = f"the upper could not be synced ({error.strerror}): the last changes may be lost"


class _Entry:
    """The line of one mount in the registry. A mount without one works all the same, and the log says so."""

    def __init__(self, layers: Layers, options: Options, rules: Policy, point: MountPoint, *, keeps_awake: bool) -> None:
        pid = os.getpid()
        self._point = point
        self._directory = _registry_directory()
        self.failure: str | None = None  # what `pyoverlay umount` is told
        self.record = registry.Record(
            id=registry.new_id(),
            pid=pid,
            start_time=registry.start_time(pid) or 0,
            device="",
            merged=layers.merged.path,
            lowers=tuple(lower.path for lower in layers.lowers),
            upper=_path(layers.upper),
            work=_path(layers.work),
            options=tuple(option for option in options.given if not option.startswith(("lowerdir", "upperdir=", "workdir="))),
            started=time.time(),
            data_lowers=tuple(lower.path for lower in layers.data_lowers),
            features={**rules.plain(), "writeback": options.writeback, "extension": wire is not None, "cpu_latency": keeps_awake},
        )
        self._listener = _listener(self._directory, self.record)

    def write(self) -> None:
        mount = self._point.mount
        if mount is not None:
            self.record = registry.located(self.record, mount.device)
        if self._directory is not None:
            try:
                registry.write(self._directory, self.record)
            except OSError as error:
                log.warning("%s: this mount will not be listed: %s", registry.own_directory(), error.strerror)

    async def tell(self, operations: Operations) -> None:
        """Answer whoever asks for the mount's counts."""
        if self._listener is not None:
            view = operations.view
            await control.answer(
                self._listener,
                lambda: {"requests": operations.requests(), "inodes": len(view.table.by_ino), "descriptors": len(view.cache)},
            )

    def close(self) -> None:
        if self._directory is None:
            return
        if self._listener is not None:
            self._listener.close()
            control.remove(self._directory, self.record)
        try:
            if self.failure is None:
                registry.remove(self._directory, self.record)
            else:
                registry.leave_failure(self._directory, self.record, self.failure)
        except OSError as error:
            log.critical("%s: `pyoverlay umount` cannot be told how it ended: %s", registry.own_directory(), error.strerror)
        finally:
            os.close(self._directory)


def _registry_directory() -> int | None:
    try:
        return registry.open_directory()
    except OSError as error:
        log.warning("%s: this mount will not be listed: %s", registry.own_directory(), error.strerror)
        return None


def _listener(directory: int | None, record: registry.Record) -> socket.socket | None:
    if directory is None:
        return None
    try:
        return control.listen(directory, record)
    except OSError as error:
        log.warning("%s: this mount cannot be asked for its counts: %s", registry.own_directory(), error.strerror)
        return None


def forbid_paths() -> None:
    """The tests' seam: with PYOVERLAY_FORBID_PATHS in the environment an absolute path opened from here on ends the daemon.

    It could lead through our own mount, where nobody would answer. The environment variable names nothing but that.
    """
    if "PYOVERLAY_FORBID_PATHS" not in os.environ:
        return

    def look(event: str, arguments: tuple[object, ...]) -> None:
        if event == "import" or (event in ("open", "os.listdir", "os.scandir") and _is_absolute(arguments[0])):
            log.critical("after the mount answered: %s %r", event, arguments[0])
            logging.shutdown()
            os._exit(99)

    sys.addaudithook(look)


def _is_absolute(path: object) -> bool:
    """A link of /proc/self/fd leads to what is open, and through no mount on the way but one over /proc itself."""
    return isinstance(path, str | bytes) and os.path.isabs(path) and not os.fsencode(path).startswith(b"/proc/self/fd/")
