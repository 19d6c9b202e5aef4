"""`python -m bench.profiled_daemon REQUEST-FD CONTROL-FD`: pyoverlay's daemon in the foreground, measured from inside on demand.

On the control socket a line is a command and a line of JSON its answer: `begin` counts requests from now on and, with `profile`, has
cProfile watch the loop's thread; `end` answers with requests by opcode, what the lane answered without Python, and the profile's entries.
The main thread does both, between two requests: a thread reads the socket and sends it a signal.
"""

from __future__ import annotations

import cProfile
import json
import pstats
import signal
import socket
import sys
import threading
import time
from types import FrameType
from typing import Any

from pyoverlay.daemon import logs, mounting
from pyoverlay.daemon.request import from_memory
from pyoverlay.fuse.binding import wire

ENTRIES = 40


class Measurement:
    """What happened in the daemon between `begin` and `end`."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._lines = control.makefile("r")
        self._profile = cProfile.Profile()
        self._is_profiling = False
        self._before: tuple[dict[int, int], dict[str, int]] = ({}, {})
        self._cpu = 0.0
        self._command = ""

    def listen(self) -> None:
        """Pass each command to the main thread; ends with the socket."""
        for line in self._lines:
            self._command = line.strip()
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGRTMIN)

    def obey(self, number: int, frame: FrameType | None) -> None:
        """The signal's action."""
        answer: dict[str, Any] = {}
        if self._command == "end":
            answer = self._end()
        self._control.sendall(json.dumps(answer).encode() + b"\n")
        if self._command.startswith("begin"):
            self._begin()

    def _begin(self) -> None:
        self._before = _counts()
        self._cpu = time.process_time()
        self._is_profiling = self._command == "begin profile"
        if self._is_profiling:
            self._profile.enable()

    def _end(self) -> dict[str, Any]:
        cpu = time.process_time() - self._cpu
        if self._is_profiling:
            self._profile.disable()
        requests, lane = _counts()
        before, lane_before = self._before
        return {
            "cpu": cpu,
            "requests": {opcode: count - before.get(opcode, 0) for opcode, count in requests.items() if count != before.get(opcode, 0)},
            "lane": {what: count - lane_before.get(what, 0) for what, count in lane.items() if what != "nodes"},
            "profile": self._entries() if self._is_profiling else [],
        }

    def _entries(self) -> list[tuple[str, int, float, float]]:
        """(where, calls, seconds in it, seconds with what it calls), the most expensive first."""
        stats: dict[tuple[str, int, str], tuple[int, int, float, float, object]] = pstats.Stats(self._profile).stats  # type: ignore[attr-defined] # not in typeshed
        found = [
            (f"{'/'.join(path.split('/')[-2:])}:{line} {name}" if line else name, calls, own, whole)
            for (path, line, name), (_, calls, own, whole, _) in stats.items()
        ]
        return sorted(found, key=lambda entry: -entry[2])[:ENTRIES]


def _counts() -> tuple[dict[int, int], dict[str, int]]:
    if wire is None:
        return {}, {}
    requests, lane = wire.counts()
    return requests, dict(lane)  # type: ignore[arg-type] # every value is an int


def main() -> None:
    """Serve until unmounted."""
    request_fd, control_fd = map(int, sys.argv[1:])
    control = socket.socket(fileno=control_fd)
    measurement = Measurement(control)
    signal.signal(signal.SIGRTMIN, measurement.obey)
    (request,) = from_memory(request_fd)
    logs.set_up(foreground=True, file=None, level=request.log_level)
    threading.Thread(target=measurement.listen, daemon=True).start()
    mounting.serve(request, lambda: control.sendall(b"{}\n"))


if __name__ == "__main__":
    main()
