"""The adaptive loop, with a pipe for the device."""

import os
import random
import select
from collections.abc import Awaitable, Callable, Iterator

import pytest
import trio
import trio.testing

from pyoverlay.fuse import loop
from pyoverlay.fuse.binding import pyfuse3

Serve = Callable[[bytes], Awaitable[None]]


class Readable:
    """The part of the extension that the loop asks."""

    def __init__(self, idle: bool) -> None:
        self.idle = idle

    def is_idle(self) -> bool:
        return self.idle


class Device:
    """A pipe whose bytes are requests, and pyfuse3's way of reading it: one task holds the lock while it waits, then reads at once."""

    def __init__(self) -> None:
        self.fd, self.client = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.lock = loop.ReadLock()
        self.wait_readable: Callable[[int], Awaitable[None]] = loop.PolledDevice().wait_readable
        self.waiting = 0
        self.served: list[tuple[str, bytes]] = []

    async def work(self, name: str, serve: Serve) -> None:
        while True:
            async with self.lock:
                self.waiting += 1
                assert self.waiting == 1, "two tasks wait for the device at once"
                try:
                    await self.wait_readable(self.fd)
                finally:
                    self.waiting -= 1
            request = os.read(self.fd, 1)  # BlockingIOError if another task read in between
            if request == b"\0":
                os.write(self.client, request)  # the end, for the next task too
                return
            self.served.append((name, request))
            await serve(request)

    def send(self, requests: bytes) -> None:
        assert os.write(self.client, requests) == len(requests)


@pytest.fixture
def device() -> Iterator[Device]:
    made = Device()
    yield made
    os.close(made.fd)
    os.close(made.client)


async def at_once(request: bytes) -> None:
    """A handler that does not suspend."""


@pytest.mark.trio
async def test_a_free_lock_is_taken_without_a_checkpoint() -> None:
    lock = loop.ReadLock()
    with trio.testing.assert_no_checkpoints():
        async with lock:
            pass


@pytest.mark.trio
async def test_one_task_serves_as_long_as_it_does_not_suspend(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "TURN", 1e9)
    device.send(b"x" * 500 + b"\0")
    async with trio.open_nursery() as nursery:
        for name in "abc":
            nursery.start_soon(device.work, name, at_once)
    assert len(device.served) == 500
    assert len({name for name, _ in device.served}) == 1


@pytest.mark.trio
async def test_a_waiting_request_holds_up_no_other(device: Device) -> None:
    finished = trio.Event()

    async def serve(request: bytes) -> None:
        if request == b"s":
            await finished.wait()
        elif request == b"l":
            finished.set()

    device.send(b"sxxxl\0")
    async with trio.open_nursery() as nursery:
        for name in "ab":
            nursery.start_soon(device.work, name, serve)
    assert [request for _, request in device.served] == [b"s", b"x", b"x", b"x", b"l"]
    assert device.served[0][0] != device.served[1][0]


@pytest.mark.trio
async def test_many_tasks_read_each_request_once(device: Device) -> None:
    seed = random.randrange(1 << 32)
    chance = random.Random(seed)

    async def serve(request: bytes) -> None:
        for _ in range(chance.randrange(4)):
            await trio.lowlevel.checkpoint()

    requests = bytes(chance.randrange(1, 256) for _ in range(3000))
    async with trio.open_nursery() as nursery:
        for i in range(20):
            nursery.start_soon(device.work, str(i), serve)
        for start in range(0, len(requests), 50):
            device.send(requests[start : start + 50])
            await trio.lowlevel.checkpoint()
        device.send(b"\0")
    assert sorted(request for _, request in device.served) == sorted(bytes([b]) for b in requests), f"seed {seed}"
    assert len({name for name, _ in device.served}) > 1


@pytest.mark.trio
async def test_a_task_cancelled_at_the_lock_takes_no_wakeup_with_it() -> None:
    lock = loop.ReadLock()
    taken: list[int] = []

    async def take(i: int, scope: trio.CancelScope) -> None:
        with scope:
            async with lock:
                taken.append(i)
                await trio.lowlevel.checkpoint()

    scopes = [trio.CancelScope() for _ in range(4)]
    async with trio.open_nursery() as nursery:
        async with lock:
            for i, scope in enumerate(scopes):
                nursery.start_soon(take, i, scope)
            await trio.testing.wait_all_tasks_blocked()
            scopes[0].cancel()
        scopes[1].cancel()  # woken by the release above, or still waiting: either way the others must get their turn
    assert {2, 3} <= set(taken) <= {1, 2, 3}


@pytest.mark.trio
@pytest.mark.parametrize("idle_wire", [False, None], ids=["wire", "polled"])
async def test_other_tasks_run_while_requests_come_without_a_pause(
    device: Device, idle_wire: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "TURN", 0)
    if idle_wire is not None:
        device.wait_readable = loop.WireDevice(Readable(idle_wire)).wait_readable
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await trio.lowlevel.checkpoint()

    device.send(b"x" * 100 + b"\0")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        await device.work("a", at_once)
        nursery.cancel_scope.cancel()
    assert turns >= 100


@pytest.mark.trio
async def test_a_turn_costs_no_checkpoint_before_it_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "TURN", 1e9)
    wire = loop.WireDevice(Readable(idle=False))
    await wire.wait_readable(0)  # begins the turn
    with trio.testing.assert_no_checkpoints():
        for _ in range(100):
            await wire.wait_readable(0)


@pytest.mark.trio
async def test_an_idle_wire_sleeps_until_the_device_is_readable(device: Device, autojump_clock: trio.testing.MockClock) -> None:
    wire = loop.WireDevice(Readable(idle=True))
    with trio.move_on_after(3600) as hour:  # a task that polls would keep the clock from jumping
        await wire.wait_readable(device.fd)
    assert hour.cancelled_caught
    device.send(b"x")
    await wire.wait_readable(device.fd)


@pytest.mark.trio
async def test_a_device_long_idle_is_polled_once_and_then_slept_on(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    polled = loop.PolledDevice()
    polls: list[int] = []

    class Poll:
        def register(self, fd: int, events: int) -> None: ...

        def poll(self, timeout: int) -> list[int]:
            polls.append(timeout)
            return []

    monkeypatch.setattr(select, "poll", Poll)
    with trio.move_on_after(0.001):
        await polled.wait_readable(device.fd)
    assert polls == [0]


@pytest.mark.trio
async def test_a_busy_device_is_polled_for_a_while(device: Device) -> None:
    polled = loop.PolledDevice()
    device.send(b"xx")
    await polled.wait_readable(device.fd)
    os.read(device.fd, 1)
    with trio.testing.assert_no_checkpoints():
        await polled.wait_readable(device.fd)  # readable at once, and the turn is not over


def test_pyfuse3_gets_the_lock_and_the_wait_and_trios_everything_else() -> None:
    loop.install(None)
    try:
        assert pyfuse3.trio.Lock is loop.ReadLock
        assert pyfuse3.trio.lowlevel.wait_readable is not trio.lowlevel.wait_readable
        assert pyfuse3.trio.lowlevel.notify_closing is trio.lowlevel.notify_closing
        assert pyfuse3.trio.open_nursery is trio.open_nursery
        assert pyfuse3.trio.ClosedResourceError is trio.ClosedResourceError
    finally:
        loop.uninstall()
    assert pyfuse3.trio is trio
