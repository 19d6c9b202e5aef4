"""Standard input, output and error as commands have them: open, whatever the caller closed, and no error of theirs is a traceback."""

from __future__ import annotations

import io
import os
import sys
from typing import Any

from pyoverlay.errors import Refusal


class ReaderHasGone(Exception):  # no error
    """Whoever read standard output has seen enough."""


class _StandardOutput(io.RawIOBase):
    """Descriptor 1. What it does not take is refused in words, once: what is left in a buffer is nobody's concern then."""

    def __init__(self) -> None:
        self._takes_no_more = False

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return 1

    def isatty(self) -> bool:
        return os.isatty(1)

    def write(self, data: Any) -> int:
        """As os.write. Raises ReaderHasGone, Refusal."""
        if self._takes_no_more:
            return memoryview(data).nbytes
        try:
            return os.write(1, data)
        except OSError as error:
            self._takes_no_more = True
            if isinstance(error, BrokenPipeError):
                raise ReaderHasGone from error
            raise Refusal("standard output", "cannot be written", error.errno) from error


def prepare() -> None:
    """To be called once, before anything is opened: a file of the command's would otherwise become the stream that is closed.

    Bytes of names that are no UTF-8 are passed on by standard output as they are.
    """
    # The output that is closed is one that cannot be written.
    for fd, flags in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(os.open(os.devnull, flags), True)
    encoding = sys.stdout.encoding if sys.stdout is not None else "utf-8"
    output = io.BufferedWriter(_StandardOutput())
    sys.stdout = io.TextIOWrapper(output, encoding, "surrogateescape", newline="\n", line_buffering=output.isatty())
    if sys.stdin is None:
        sys.stdin = open(0, encoding="utf-8", errors="surrogateescape", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
