"""The adaptive loop: trio for pyfuse3, without a trip through trio's scheduler for each request.

pyfuse3 reaches trio through its module attribute `trio`, which `pyfuse3.asyncio` replaces to run on asyncio. The same seam is used here to
replace two things and pass on the rest:

- `Lock`, under which pyfuse3's tasks take turns at the device. Ours has no checkpoint when it is free, and a task that comes back before
  anybody else has run takes it again; so one task serves request after request, and another one wakes only when that task suspends.
- `lowlevel.wait_readable`. With the extension, C has polled already: unless it found nothing, the task goes straight on. Without it, the
  polling is done here.

Other tasks run at least every `TURN` seconds; an idle mount sleeps in trio's epoll and costs nothing. On an otherwise idle machine of two
processors a stock pyfuse3 answers a getattr in about 40 µs, of which two thirds are the lock, epoll_ctl, epoll_wait and a task switch.
"""

import select
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

import trio

from pyoverlay.fuse.binding import Idle, Wire, pyfuse3

SPIN = 60e-6
"""Seconds to poll before sleeping: longer than a client needs from a reply to its next request."""
BUSY = 5e-3
"""Seconds without a request after which a client is no longer at work, and polling for it no longer worth it."""
TURN = 1e-3
"""Seconds that other tasks may have to wait while requests come without a pause. One pass of trio's scheduler costs about 2 % of it."""


class ReadLock:
    """Mutual exclusion of pyfuse3's reading tasks, in place of `trio.Lock`.

    Leaving the lock wakes one waiting task but does not hand the lock over: whoever runs first takes it. A task that answers its request
    without suspending therefore comes back to a free lock, with no switch; the woken one finds it taken, or gets it once this one suspends.
    """

    def __init__(self) -> None:
        self._is_held = False
        self._is_waking = False  # a task was woken and has not run yet: no need to wake another
        self._waiting = trio.lowlevel.ParkingLot()

    async def __aenter__(self) -> None:
        while self._is_held:
            await self._waiting.park()
            self._is_waking = False
        self._is_held = True

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None) -> None:
        self._is_held = False
        if self._waiting and not self._is_waking:
            self._is_waking = True
            self._waiting.unpark()


class Turns:
    """Says when the task that serves has had its turn and must let the others run."""

    def __init__(self) -> None:
        self._end = 0.0

    async def take(self) -> None:
        """Run the other tasks if the turn is over; else return without a checkpoint."""
        if time.perf_counter() >= self._end:
            await trio.lowlevel.checkpoint()
            self.begin()

    def begin(self) -> None:
        self._end = time.perf_counter() + TURN


class WireDevice:
    """Waits for a device that the extension receives from."""

    def __init__(self, wire: Idle) -> None:
        self._is_idle = wire.is_idle
        self._turns = Turns()

    async def wait_readable(self, fd: int) -> None:
        if self._is_idle():
            await trio.lowlevel.wait_readable(fd)
            self._turns.begin()
        else:
            await self._turns.take()


class PolledDevice:
    """Waits for a device that libfuse receives from: polls it a little before it sleeps. on_end: called when the mount is gone."""

    def __init__(self, on_end: Callable[[], None] = lambda: None) -> None:
        self._on_end = on_end
        self._polls: dict[int, select.poll] = {}
        self._turns = Turns()
        self._last = 0.0

    async def wait_readable(self, fd: int) -> None:
        if self._is_readable(fd):
            await self._turns.take()
        else:
            await trio.lowlevel.wait_readable(fd)
            self._is_readable(fd)  # or gone
            self._turns.begin()
        self._last = time.perf_counter()

    def _is_readable(self, fd: int) -> bool:
        poll = self._poll_of(fd).poll
        now = time.perf_counter()
        end = now + SPIN if now - self._last < BUSY else now
        while not (found := poll(0)):
            if time.perf_counter() >= end:
                return False
        if found[0][1] & select.POLLERR:
            self._on_end()
        return True

    def _poll_of(self, fd: int) -> select.poll:
        if fd not in self._polls:
            self._polls[fd] = select.poll()
            self._polls[fd].register(fd, select.POLLIN)
        return self._polls[fd]


class _Replaced:
    """A module with some names replaced."""

    def __init__(self, module: object, **names: object) -> None:
        self._module = module
        self.__dict__.update(names)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def install(wire: Wire | None, on_end: Callable[[], None] = lambda: None) -> None:
    """Make pyfuse3 use this loop. Call it before `pyfuse3.main`, once a session. on_end: see PolledDevice; the extension has a way of
    its own.
    """
    device = PolledDevice(on_end) if wire is None else WireDevice(wire)
    lowlevel = _Replaced(trio.lowlevel, wait_readable=device.wait_readable)
    pyfuse3.trio = _Replaced(trio, Lock=ReadLock, lowlevel=lowlevel)


def uninstall() -> None:
    """Give pyfuse3 the plain trio back."""
    pyfuse3.trio = trio
