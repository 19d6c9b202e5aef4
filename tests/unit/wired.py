"""Calls that the extension makes several of at once, watched as the single ones are: exactly what needs the extension."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from pyoverlay.core.calls import Caller, Copied, PlainFile
from pyoverlay.core.syscalls import Stat
from pyoverlay.fuse.binding import wire
from pyoverlay.fuse.wired_calls import WiredCalls
from tests.unit.merged import CALLS, Faulty

T = TypeVar("T")


class WiredFaulty(Faulty, WiredCalls):
    """Faulty, with what the extension does in one call done there. at_once: how many such calls did something."""

    def __init__(self, at: int, error: BaseException) -> None:
        Faulty.__init__(self, at, error)
        assert wire is not None
        self.at_once = 0
        WiredCalls.__init__(self, wire)

    def make(
        self, dirfd: int, name: bytes, mode: int, caller: Caller, rdev: int = 0, target: bytes = b""
    ) -> tuple[int, Stat | None]:
        return self._watched(super().make, dirfd, name, mode, caller, rdev, target)

    def copy_up_file(self, file: PlainFile) -> Copied | None:
        return self._watched(super().copy_up_file, file)

    def _watched(self, call: Callable[..., T], *arguments: object) -> T:
        """For the time of the call alone: the extension is the process's, and so is who watches it."""
        before = self.count
        self._wire.watch_calls(self._about_to_call)
        try:
            return call(*arguments)
        finally:
            self._wire.watch_calls(None)
            self.at_once += self.count > before

    def _about_to_call(self, name: str) -> int:
        return self._about_to_change(name) if name in CALLS else self.about_to_read(name)

    def about_to_read(self, name: str) -> int:
        """Returns the errno with which it fails; 0: it does not."""
        return 0

    def _about_to_change(self, name: str) -> int:
        self.made.append(name)
        if self.count == self.at:
            try:
                self.strike()
            except OSError as error:
                return error.errno or 0
        return 0


class FaultyWiredReading(WiredFaulty):
    """Counts what the extension reads in its calls; the one of number `at` fails with that errno. made_to_read: their names."""

    def __init__(self, at: int, error: BaseException) -> None:
        super().__init__(0, error)
        self.made_to_read: list[str] = []
        self.fails_at = at

    def about_to_read(self, name: str) -> int:
        self.made_to_read.append(name)
        if len(self.made_to_read) != self.fails_at or not isinstance(self.error, OSError):
            return 0
        return self.error.errno or 0
