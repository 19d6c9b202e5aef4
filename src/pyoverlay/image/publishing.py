"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO

from pyoverlay.errors import Refusal


def beside(path: bytes) -> bytes:
    """A new hidden name in the same directory, for what is to get the name `path` once it is whole."""
    above, name = os.path.split(path)
    return os.path.join(above, b".%s.%s" % (name[:200], secrets.token_hex(6).encode()))


@contextmanager
def replacing(path: bytes, mode: int = 0o644) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` when the block ends without an error; else nothing has changed.

    What is there and no file, such as /dev/null or a fifo, is written to as it is. A symlink stays. The data is on disk before it has its
    name. Raises Refusal where it cannot be made or not take the data: an OSError in the block is taken for that.
    """
    path = os.path.realpath(path)
    if os.path.exists(path) and not os.path.isfile(path):
        yield from _written_in_place(path)
        return
    temporary = beside(path)
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
    except OSError as error:
        raise Refusal(path, "cannot be written", error.errno) from error
    try:
        with open(fd, "wb") as file:
            yield file
            file.flush()
            os.fsync(fd)
        os.rename(temporary, path)
    except BaseException as error:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        if isinstance(error, OSError):
            raise Refusal(path, "cannot be written", error.errno) from error
        raise


def _written_in_place(path: bytes) -> Iterator[BinaryIO]:
    try:
        with open(path, "wb") as file:
            yield file
    except OSError as error:
        raise Refusal(path, "cannot be written", error.errno) from error


def writing(file: BinaryIO, path: bytes) -> Callable[[bytes], object]:
    """`file.write`, for a block in which other errors are none of the file's: Refusal names it."""

    def write(data: bytes) -> None:
        try:
            file.write(data)
        except OSError as error:
            raise Refusal(path, "cannot be written", error.errno) from error

    return write
