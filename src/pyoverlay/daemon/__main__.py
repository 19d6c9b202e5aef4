"""The daemon: `python -m pyoverlay.daemon REQUEST-FD [REPORT-FD]`, started by `launch`, not by people.

Of several requests, which come with `--each`, a process forked for each becomes the daemon. They have everything that is imported from
the first one, which then ends: most of the time that a mount takes to start, and of its memory, are thereby shared.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
from types import FrameType
from typing import NoReturn

from pyoverlay.daemon import report
from pyoverlay.daemon.request import Request, from_memory
from pyoverlay.errors import DaemonFailed, PyoverlayError, printable


def main() -> int:
    """Serve the request, or have each of several served; the exit status."""
    os.chdir("/")  # the caller's directory, and its file system, are not ours to hold
    # Told to end before there is a mount: everything that was begun is taken back on the way out. The session has its own way.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _end)
    # What the log is asked by, later; till then they must not end us.
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    is_each = sys.argv[1] == "--each"
    descriptors = [int(argument) for argument in sys.argv[1 + is_each :]]
    report.close_all_but(*descriptors)
    if is_each:
        return _serve_each(from_memory(descriptors[0]), descriptors[1])
    caller = report.Report(descriptors[1]) if len(descriptors) > 1 else report.ForegroundReport()
    sys.excepthook = caller.uncaught
    (request,) = from_memory(descriptors[0])
    return _serve(request, caller)


# Inodes come by thousands, last, and are in no cycle: to look through them as often as Python does by itself is an eighth of a listing.
_COLLECTED = (10_000, 20, 50)


def _serve_each(requests: list[Request], socket: int) -> int:
    """In this process nothing happens but importing and forking: no thread, nothing opened that a daemon would keep of another."""
    import trio

    import pyoverlay.daemon.mounting  # noqa: F401
    from pyoverlay.daemon import logs

    # What runs here once, a daemon need not have a copy of: of the memory that is a daemon's own this saves a tenth.
    logs.stay_off_source_files()
    trio.run(trio.lowlevel.checkpoint)
    gc.collect()
    gc.freeze()
    for number, request in enumerate(requests):
        if os.fork() == 0:
            os.setsid()
            caller = report.NumberedReport(socket, number)
            sys.excepthook = caller.uncaught
            return _serve(request, caller)
    return 0


def _serve(request: Request, caller: report.Report) -> int:
    try:
        # Late: a request that cannot be read has no need of trio.
        from pyoverlay.daemon import logs, mounting

        logs.set_up(foreground=request.foreground, file=request.log_file, level=request.log_level, form=logs.Format(request.log_format))
        gc.freeze()  # what is imported stays: the collector need not look at it again
        gc.set_threshold(*_COLLECTED)
        mounting.serve(request, caller.ready)
    except PyoverlayError as error:
        caller.refuse(error)
        return error.exit_code
    except SystemExit:
        return 1
    except Exception as error:  # a bug, or what no refusal foresees: told here to the caller, and by the hook to the log
        caller.refuse(DaemonFailed(f"{printable(request.merged)}: the daemon failed: {type(error).__name__}: {error}"))
        raise
    return 0


def _end(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(1)


if __name__ == "__main__":
    status = main()
    logging.shutdown()
    os._exit(status)  # taking the interpreter apart takes longer than the 100 ms in which the layers must be free
