"""One workload on pyoverlay, looked at from inside: which requests it makes, and where the daemon's loop spends its time.

The workload runs twice, on a mount each: once counted and timed, once under cProfile, which makes everything slower and calls of small
functions most of all. So the first gives the figures, the second the order.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from bench.filesystems import Place, serving
from bench.layers import LayerSets
from bench.measure import settle, staged
from bench.workload import Workload
from pyoverlay.daemon.options import parse
from pyoverlay.daemon.request import Request, to_memory

# <linux/fuse.h>, enum fuse_opcode
_NAMES = (
    "other LOOKUP FORGET GETATTR SETATTR READLINK SYMLINK - MKNOD MKDIR UNLINK RMDIR RENAME LINK OPEN READ WRITE STATFS RELEASE - FSYNC "
    "SETXATTR GETXATTR LISTXATTR REMOVEXATTR FLUSH INIT OPENDIR READDIR RELEASEDIR FSYNCDIR GETLK SETLK SETLKW ACCESS CREATE INTERRUPT "
    "BMAP DESTROY IOCTL POLL NOTIFY_REPLY BATCH_FORGET FALLOCATE READDIRPLUS RENAME2 LSEEK COPY_FILE_RANGE SETUPMAPPING REMOVEMAPPING "
    "SYNCFS TMPFILE STATX"
).split()


class ProfiledPyoverlay:
    """pyoverlay with its daemon as a child that answers questions. `ask` sends it a command while it is mounted."""

    name = "pyoverlay"

    def __init__(self, options: Sequence[str] = ()) -> None:
        self._options = tuple(option for option in options if option != "-o")
        self._control: socket.socket | None = None

    @contextmanager
    def mounted(self, place: Place) -> Iterator[None]:
        paths = {"lowerdir": ":".join(map(str, place.lowers)), "upperdir": str(place.upper), "workdir": str(place.work)}
        options = parse([",".join(f"{name}={path}" for name, path in paths.items()), *self._options])
        request_fd = to_memory([Request(options, os.fsencode(place.merged), foreground=True)])
        ours, its = socket.socketpair()
        with ours, its, open(request_fd, "rb"):
            argv = [sys.executable, "-m", "bench.profiled_daemon", str(request_fd), str(its.fileno())]
            with serving(argv, place.merged, pass_fds=(request_fd, its.fileno())):
                self._control = ours
                self._answer()  # that the mount answers
                yield

    def ask(self, command: str) -> dict[str, Any]:
        assert self._control is not None, "not mounted"
        self._control.sendall(command.encode() + b"\n")
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._control is not None, "not mounted"
        line = b""
        while not line.endswith(b"\n"):
            piece = self._control.recv(1 << 16)
            if not piece:
                raise OSError("the profiled daemon ended")
            line += piece
        answer: dict[str, Any] = json.loads(line)
        return answer


@dataclass(frozen=True, slots=True)
class Inside:
    """seconds: of the workload; cpu: of the daemon, all threads. requests: by opcode; lane: how many of them C answered."""

    seconds: float
    cpu: float
    requests: dict[str, int]
    lane: dict[str, int]
    profile: list[tuple[str, int, float, float]]


def look_inside(workload: Workload, layers: LayerSets, options: Sequence[str] = (), *, with_profile: bool) -> Inside:
    """Run the workload once."""
    filesystem = ProfiledPyoverlay(options)
    with staged(filesystem, workload, layers) as stage:
        workload.prepare(stage)
        settle(workload, layers)
        filesystem.ask("begin profile" if with_profile else "begin")
        begin = time.perf_counter()
        workload.run(stage)
        seconds = time.perf_counter() - begin
        found = filesystem.ask("end")
        workload.check(stage)
    requests = {_name(int(opcode)): count for opcode, count in found["requests"].items()}
    return Inside(seconds, found["cpu"], requests, found["lane"], [tuple(entry) for entry in found["profile"]])


def _name(opcode: int) -> str:
    return _NAMES[opcode] if opcode < len(_NAMES) else str(opcode)


def explain(workload: Workload, layers: LayerSets, options: Sequence[str] = ()) -> str:
    """What a person reads."""
    counted = look_inside(workload, layers, options, with_profile=False)
    profiled = look_inside(workload, layers, options, with_profile=True)
    total = sum(counted.requests.values())
    by_count = sorted(counted.requests.items(), key=lambda item: -item[1])
    each = f"{1e6 * counted.seconds / total:.1f} us a request" if total else "no request"
    lines = [
        f"{workload.name}: {workload.title}",
        f"  {counted.seconds:.3f} s, of which the daemon's processor time {counted.cpu:.3f} s; {total} requests, {each}",
        "  requests   " + ", ".join(f"{name} {count}" for name, count in by_count),
        "  in C       " + (", ".join(f"{what} {count}" for what, count in counted.lane.items() if count) or "none"),
        f"  profile    of a second run, {profiled.seconds:.3f} s under cProfile: calls, seconds in it, with what it calls",
        *(f"    {calls:>8} {own:>8.3f} {whole:>8.3f}  {where}" for where, calls, own, whole in profiled.profile),
    ]
    return "\n".join(lines)
