"""Lowers that may not answer are asked by threads, while everybody else is served.

Each such lower has threads of its own: with one that hangs, that many are lost, and further requests for it queue up; no other lower's
threads, nobody's writes and nobody's syncs are. Nothing waits for a thread: when the caller is killed, or the mount is gone, the request
ends and the thread is left behind.
"""

from __future__ import annotations

import errno
import inspect
import os
import queue
import threading
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import trio

from pyoverlay.core.objects import failure
from pyoverlay.core.remote import Errand, MustAsk, NoReplies, RemoteLower, Replies, Round, close_unheard, replies
from pyoverlay.fuse import threads

THREADS = 8  # a lower
_LOOK = 1.0  # seconds between two looks at a caller that had a signal

# trio 0.22 knows the first, 0.23 and later the second.
ABANDON = "cancellable" if "abandon_on_cancel" not in inspect.signature(trio.to_thread.run_sync).parameters else "abandon_on_cancel"

_SIGKILL = 1 << 8

T = TypeVar("T")

Header = tuple[int, int, int, int, int, int, bytes]
"""Of a request, as the extension tells it; see `binding.Request`."""


class Told(Replies):
    """The replies to one request. header: the request's own, where it is known. scopes: waiting for threads on its behalf."""

    def __init__(self, header: Header | None) -> None:
        super().__init__()
        self.header = header
        self.is_given_up = False
        self.is_over = trio.Event()
        self.scopes: set[trio.CancelScope] = set()

    def give_up(self) -> None:
        """Its handler fails with EINTR instead of waiting any longer."""
        self.is_given_up = True
        for scope in self.scopes:
            scope.cancel()


class Asking:
    """The threads of a mount's remote lowers. hold: told that so many more calls, or fewer, are under way."""

    def __init__(self, remotes: Iterable[RemoteLower], hold: Callable[[int], None]) -> None:
        self._limiters = {layer: trio.CapacityLimiter(THREADS) for layer in remotes}
        self._hold = hold
        self._requests: set[Told] = set()
        self._is_over = False
        self._proc = os.open("/proc", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC) if self._limiters else -1
        for layer in self._limiters:
            layer.close_later = _Closer()

    def close(self) -> None:
        """After the mount is gone."""
        if self._proc >= 0:
            os.close(self._proc)
            self._proc = -1

    def begin(self) -> None:
        """From now on, in this task and those it starts, no remote lower is asked anything but by a thread."""
        if self._limiters:
            replies.set(NoReplies())

    async def until_told(self, header: Header | None, call: Callable[[], Awaitable[T]]) -> T:
        """What a handler returns in the end: it is called, and again after each question that it raises."""
        told = Told(header)
        before = replies.set(told)
        self._requests.add(told)
        try:
            while True:
                try:
                    return await call()
                except MustAsk as must:
                    await self.ask(must)
        finally:
            self._requests.discard(told)
            told.is_over.set()
            replies.reset(before)
            told.close()

    async def step(self, call: Callable[[], T]) -> T:
        """The same of one step of a long request; its replies are dropped when it is done."""
        of_request = replies.get()
        if not isinstance(of_request, Told):
            return call()
        told = Told(of_request.header)
        told.scopes = of_request.scopes
        before = replies.set(told)
        try:
            while True:
                try:
                    return call()
                except MustAsk as must:
                    if of_request.is_given_up:
                        raise failure(errno.EINTR) from None
                    await self.ask(must)
        finally:
            replies.reset(before)
            told.close()

    async def ask(self, must: MustAsk) -> None:
        """Have the question asked."""
        if must.question is None:
            raise RuntimeError("a question that nobody can be asked")
        await self.send(must.question)

    async def ask_all(self, questions: Sequence[Errand]) -> None:
        """Have them asked, by all threads of each layer at once. Who is given up meanwhile hears of it with the next question."""
        async with trio.open_nursery() as nursery:
            for layer in self._limiters:
                of_layer = [question for question in questions if question.layer is layer]
                for start in range(min(THREADS, len(of_layer))):
                    nursery.start_soon(self._sent, Round(of_layer[start::THREADS]))

    async def _sent(self, errands: Round) -> None:
        with suppress(InterruptedError):
            await self.send(errands)

    async def send(self, errand: Errand | Round) -> Any:
        """What the errand returns. EINTR: the caller was killed, or the mount is gone; the thread is left alone with it."""
        told = replies.get()
        if not isinstance(told, Told):
            raise RuntimeError("an errand of no request")
        with trio.CancelScope() as scope:
            told.scopes.add(scope)
            self._hold(1)
            try:
                if not told.is_given_up and not self._is_over:
                    return await threads.run(errand.run, limiter=self._limiters[errand.layer], **{ABANDON: True})
            finally:
                self._hold(-1)
                told.scopes.discard(scope)
                errand.drop()
        raise failure(errno.EINTR)

    async def with_thread_of(self, layer: RemoteLower, call: Callable[[], T]) -> T:
        """A call that cannot be left alone, by one of the layer's threads."""
        self._hold(1)
        try:
            return await threads.run(call, limiter=self._limiters[layer])
        finally:
            self._hold(-1)

    # -- callers that go away

    def interrupt(self, unique: int) -> None:
        """The caller of a request had a signal. Only a killed one does not wait for its answer: stat(2) knows no EINTR."""
        for told in self._requests:
            if told.header is not None and told.header[1] == unique:
                trio.lowlevel.spawn_system_task(self._look_after, told, told.header[5])

    async def _look_after(self, told: Told, thread: int) -> None:
        while not told.is_over.is_set():
            if self._is_killed(thread):
                told.give_up()
                return
            with trio.move_on_after(_LOOK):
                await told.is_over.wait()

    def _is_killed(self, thread: int) -> bool:
        """A fatal signal is pending as SIGKILL, whichever it was (complete_signal). Who cannot be seen is taken for killed."""
        try:
            fd = os.open(f"{thread}/status", os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._proc)
            try:
                status = os.read(fd, 1 << 14)
            finally:
                os.close(fd)
        except OSError:  # it has ended, perhaps between the two
            return True
        return any(int(line.split()[1], 16) & _SIGKILL for line in status.splitlines() if line.startswith((b"SigPnd:", b"ShdPnd:")))

    def give_up(self) -> None:
        """The mount is gone, or is to end: nobody waits for an answer any more."""
        self._is_over = True
        for told in self._requests:
            told.give_up()


class _Closer:
    """Closes descriptors, one after the other, in a thread that begins with the first; where none can be started, with a later one."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._is_running = False

    def __call__(self, fd: int) -> None:
        self._queue.put(fd)
        if not self._is_running:
            with suppress(RuntimeError):  # no more threads may be had
                threading.Thread(target=self._run, name="closer", daemon=True).start()
                self._is_running = True

    def _run(self) -> None:
        while True:
            close_unheard(self._queue.get())
