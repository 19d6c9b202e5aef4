"""Mounting from Python: what `pyoverlay mount` and `umount` do, as a function and an object."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from pyoverlay.daemon import launch
from pyoverlay.daemon.options import Options, parse, with_directories
from pyoverlay.daemon.request import Request
from pyoverlay.errors import OptionRefused

Named = str | bytes | os.PathLike[str] | os.PathLike[bytes]


class Mounted:
    """A live mount made by `mount`. As a context manager it is unmounted at the end.

    merged: its mount point, absolute. pid: of its daemon, which is a child of this process but outlives it.
    """

    def __init__(self, merged: Path, pid: int) -> None:
        self.merged = merged
        self.pid = pid

    def unmount(self, *, lazily: bool = False, wait: float = 60.0) -> None:
        """Unmount it: what was written is on disk, and the daemon gone, when this returns.

        lazily: detach it now, whoever uses it, and wait for nobody. wait: seconds for the daemon's end. Raises Refusal (busy, dead, what
        was written could not be stored), DaemonFailed (it does not end).
        """
        from pyoverlay.daemon.unmounting import unmount

        unmount(os.fsencode(self.merged), lazily=lazily, wait=wait)
        with suppress(ChildProcessError):  # it is another process's child, or was waited for already
            os.waitpid(self.pid, os.WNOHANG if lazily else 0)

    def __enter__(self) -> Mounted:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None) -> None:
        self.unmount()

    def __repr__(self) -> str:
        return f"<pyoverlay mount at {str(self.merged)!r}, pid {self.pid}>"


def mount(
    *,
    lowers: Sequence[Named],
    merged: Named,
    upper: Named | None = None,
    work: Named | None = None,
    options: str = "",
    log_file: str | os.PathLike[str] | None = None,
    wait: float = 60.0,
) -> Mounted:
    """Show `lowers` (the first on top), with what is in `upper` on top of them, at `merged`; return when the mount answers.

    upper: None mounts read-only. work: on the upper's file system; None: beside it, made if missing. options: as `pyoverlay mount -o` takes
    them, without layers. log_file: None: syslog. wait: seconds that it may take. Raises OptionRefused, DaemonFailed, or another
    PyoverlayError with what the daemon says of a mount that it refuses; nothing is left behind then.
    """
    chosen = parse([options])
    if chosen.lowers or chosen.upper is not None or chosen.work is not None:
        raise OptionRefused(options, "layers are arguments of their own")
    layers = _with_layers(chosen, lowers, upper, work)
    point = os.path.abspath(os.fsencode(merged))
    request = Request(layers, point, log_file=None if log_file is None else os.fspath(log_file))
    return Mounted(Path(os.fsdecode(point)), launch.mount(request, wait))


def _with_layers(options: Options, lowers: Sequence[Named], upper: Named | None, work: Named | None) -> Options:
    options = replace(options, lowers=tuple(map(os.fsencode, lowers)))
    return with_directories(options, upper=None if upper is None else os.fsdecode(upper), work=None if work is None else os.fsdecode(work))
