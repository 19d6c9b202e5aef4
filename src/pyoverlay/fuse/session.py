"""One FUSE session: open, mount, serve, unmount.

The order is what keeps the daemon from waiting for itself: everything that opens a file or imports a module happens in `Session()`,
before the directory is covered; `run` mounts and from then on passes no path to the kernel but the mount's own, from threads, while the
loop serves. libfuse is handed a connection by number (`/dev/fd/N`), so that it touches no path either and mounting is ours
(mountpoint.py).
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import trio

from pyoverlay.errors import Refusal, printable
from pyoverlay.fuse import loop, opcodes, threads
from pyoverlay.fuse.asking import ABANDON, Asking
from pyoverlay.fuse.binding import pyfuse3, wire
from pyoverlay.fuse.capabilities import Wanted
from pyoverlay.fuse.mountpoint import MountOptions, MountPoint

log = logging.getLogger(__name__)

# Requests that may wait for something at once, each by a task of pyfuse3's; with all of them waiting it would read no further request.
_MOST_TASKS = 10_000

_AGAIN = 0.1  # seconds between two attempts to get a thread

# A second one of these ends the daemon at once.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class _Course(NamedTuple):
    """What `run` was told to do when."""

    on_mount: Callable[[], None]
    on_answer: Callable[[], None]
    stop_at: tuple[signal.Signals, ...]
    on_signal: Mapping[int, Callable[[], None]]


class Session:
    """A connection to the kernel that serves `operations` at `point`.

    stop_timeout: seconds that a mount that is told to end serves those who still use it. who_holds: asked for a line that names them;
    it must pass no path to the kernel. beside: runs while the mount is served, and is cancelled at its end. asking: waits for lowers on
    behalf of `operations`. Raises Refusal where /dev/fuse or libfuse refuses.
    """

    def __init__(
        self,
        operations: pyfuse3.Operations,
        point: MountPoint,
        *,
        stop_timeout: float,
        who_holds: Callable[[], str],
        beside: Callable[[], Awaitable[None]] | None = None,
        asking: Asking | None = None,
    ) -> None:
        self._point = point
        self._stop_timeout = stop_timeout
        self._who_holds = who_holds
        self._beside = beside
        self._asking = asking or Asking((), lambda change: None)
        self._fd = point.open_connection()
        loop.install(wire, self._asking.give_up)
        if wire is not None:
            opcodes.attach(operations, wire, Wanted())
        with _libfuse_explains(point.path):
            pyfuse3.init(operations, f"/dev/fd/{self._fd}", set())

    def run(
        self,
        options: MountOptions,
        on_answer: Callable[[], None],
        *,
        on_mount: Callable[[], None] = lambda: None,
        stop_at: tuple[signal.Signals, ...] = STOP_SIGNALS,
        on_signal: Mapping[int, Callable[[], None]] | None = None,
    ) -> None:
        """Mount, call `on_answer` when the mount answers, serve until it is unmounted.

        on_mount: called before a request is read and before a thread is started; whatever it waited for in the mount would wait for
        ever. stop_at: the first of these signals unmounts, the second ends at once. on_signal: called at other signals, between
        requests. Raises Refusal if it cannot be mounted; what is raised by `on_answer` or by reading the connection comes out after the
        mount is gone.
        """
        # Not one of them may end the process between the mount and the receiver: that would leave a dead mount.
        signal.pthread_sigmask(signal.SIG_BLOCK, stop_at)
        try:
            threads.require(self._point.path)
            trio.run(self._run, options, _Course(on_mount, on_answer, stop_at, on_signal or {}))
        finally:
            # Closing the connection first: whoever waits in the mount gets ENOTCONN, and nothing that follows can wait for us.
            pyfuse3.close(unmount=False)
            if self._point.is_mounted:
                self._take_away()

    def _take_away(self) -> None:
        try:
            self._point.unmount(lazily=True)
        except OSError as error:
            if not self._point.is_mounted:
                return  # a thread that was left alone has done it meanwhile
            path = printable(self._point.path)
            log.error("%s: a dead mount is left, for %s; take it away with umount -l", path, error.strerror)

    async def _run(self, options: MountOptions, course: _Course) -> None:
        with trio.open_signal_receiver(*course.stop_at, *course.on_signal) as signals:
            self._point.attach(self._fd, options)
            course.on_mount()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, course.stop_at)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._announce, course.on_answer)
                nursery.start_soon(self._obey, signals, course.on_signal, nursery)
                if self._beside is not None:
                    nursery.start_soon(self._beside)
                self._asking.begin()
                await pyfuse3.main(max_tasks=_MOST_TASKS)
                nursery.cancel_scope.cancel()

    async def _announce(self, on_answer: Callable[[], None]) -> None:
        await _in_thread(self._point.wait_for_answer)
        on_answer()

    async def _obey(self, signals: trio.abc.AsyncIterator[int], others: Mapping[int, Callable[[], None]], nursery: trio.Nursery) -> None:
        is_leaving = False
        async for number in signals:
            name = signal.Signals(number).name
            if number in others:
                others[number]()
                continue
            if is_leaving:
                log.warning("%s again: ending at once", name)
                self._end()
                return
            log.info("%s: unmounting %s", name, printable(self._point.path))
            is_leaving = True
            nursery.start_soon(self._leave)

    async def _leave(self) -> None:
        """Unmount without losing what was accepted: dirty pages are written, as requests that are served, before the mount goes."""
        try:
            await _in_thread(self._point.sync)
        except OSError as error:
            log.error("dirty data of %s could not be written: %s", printable(self._point.path), error)
        try:
            await _in_thread(self._point.unmount)
        except OSError as error:
            await self._outlast_users(error)

    async def _outlast_users(self, error: OSError) -> None:
        path, holders = printable(self._point.path), self._who_holds()
        try:
            await _in_thread(partial(self._point.unmount, lazily=True))
        except OSError as failure:
            log.error("%s: cannot be detached: %s", path, failure.strerror)
        log.warning("%s: %s; held by %s; detached, serving them for at most %.0f s", path, error.strerror, holders, self._stop_timeout)
        with trio.move_on_after(self._stop_timeout):
            await trio.sleep_forever()  # until the last user goes, which ends the session and this task
        log.warning("%s: still in use after %.0f s: ending", path, self._stop_timeout)
        self._end()

    def _end(self) -> None:
        self._asking.give_up()
        pyfuse3.terminate()


async def _in_thread(function: Callable[[], None]) -> None:
    """Run it in a thread that is left alone when the session ends: it waits for requests that nobody answers any more.

    Where there is no thread to be had it waits for one: done here it would wait for itself.
    """
    is_told = False
    while True:
        try:
            return await threads.run(function, **{ABANDON: True})
        except threads.NoThread:
            if not is_told:
                log.warning("no thread can be started: trying again until one can be")
            is_told = True
            await trio.sleep(_AGAIN)  # nobody tells when one can be started


@contextmanager
def _libfuse_explains(path: bytes) -> Iterator[None]:
    """Have the Refusal say what libfuse said on descriptor 2, and nowhere else: pyfuse3 raises RuntimeError for everything."""
    said, end = os.pipe()
    stderr = os.dup(2)
    os.dup2(end, 2)
    os.close(end)
    try:
        yield
    except RuntimeError as error:
        os.dup2(stderr, 2)
        lines = os.read(said, 1 << 16).decode(errors="replace").splitlines()
        raise Refusal(path, printable(lines[-1]) if lines else str(error)) from error
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(said)
