"""Random operations on one file, each made on a file of the file system under test and on its twin on a plain one, as fsx does.

An operation is a tuple of a name and numbers, so that it can be printed, repeated, and sent to another process: `python -m
tests.integration.exerciser PATH` makes what it reads from its stdin and answers on its stdout. What an operation returns, or the errno
that it fails with, must be the same on both files, and so must size and content afterwards. Nothing is left to chance but the seed.
"""

from __future__ import annotations

import errno
import mmap
import os
import pickle
import random
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

from tests.posix.system_calls import fallocate

KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 1, 2, 16
BLOCK = 4096
LARGEST = 400_000
"""Bytes that a file grows to: past the 256 KiB up to which a copy-up takes place on the daemon's loop."""

Operation = tuple[Any, ...]
Result = bytes | int | str | None


class Maker(Protocol):
    """Makes operations on a file, here or in another process."""

    def __call__(self, operation: Operation) -> Result: ...

    def close(self) -> None: ...


class OpenFile:
    """The descriptors and the shared map through which one process makes operations on the file at `path`."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._fds = ExitStack()
        self._map: mmap.mmap | None = None
        self._open()

    def _open(self) -> None:
        self._fd, self._appending, self._direct = (
            self._opened(flags) for flags in (os.O_RDWR, os.O_WRONLY | os.O_APPEND, os.O_RDWR | os.O_DIRECT)
        )

    def _opened(self, flags: int) -> int:
        fd = os.open(self._path, flags)
        self._fds.callback(os.close, fd)
        return fd

    def __call__(self, operation: Operation) -> Result:
        """What the operation returns; the name of the errno if it fails."""
        make: Callable[..., Result] = getattr(self, operation[0])
        try:
            return make(*operation[1:])
        except OSError as error:
            return errno.errorcode[error.errno or 0]

    def close(self) -> None:
        self.unmap()
        self._fds.close()

    # -- the operations

    def reopen(self) -> None:
        self._fds.close()
        self._open()

    def size(self) -> int:
        return os.fstat(self._fd).st_size

    def content(self) -> bytes:
        """Through a descriptor of its own, as another program would read it."""
        return Path(self._path).read_bytes()

    def read(self, offset: int, length: int) -> bytes:
        return os.pread(self._fd, length, offset)

    def write(self, offset: int, data: bytes) -> int:
        return os.pwrite(self._fd, data, offset)

    def append(self, data: bytes) -> int:
        return os.write(self._appending, data)

    def truncate(self, size: int) -> None:
        os.ftruncate(self._fd, size)

    def truncate_path(self, size: int) -> None:
        os.truncate(self._path, size)

    def truncate_at_open(self) -> None:
        os.close(os.open(self._path, os.O_WRONLY | os.O_TRUNC))

    def fallocate(self, mode: int, offset: int, length: int) -> None:
        fallocate(self._fd, mode, offset, length)

    def copy_range(self, source: int, target: int, length: int) -> int:
        return os.copy_file_range(self._fd, self._fd, length, source, target)

    def seek(self, offset: int, whence: int) -> int:
        return os.lseek(self._fd, offset, whence)

    def sync(self) -> None:
        os.fsync(self._fd)

    def drop_pages(self) -> None:
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def direct_write(self, offset: int, data: bytes) -> int:
        with _aligned(len(data)) as buffer:
            buffer.write(data)
            return os.pwritev(self._direct, [buffer], offset)

    def direct_read(self, offset: int, length: int) -> bytes:
        with _aligned(length) as buffer:
            return buffer[: os.preadv(self._direct, [buffer], offset)]

    def map_read(self, offset: int, length: int) -> bytes:
        return self._mapped()[offset : offset + length]

    def map_write(self, offset: int, data: bytes) -> None:
        """Nothing is synced: whoever reads next has to see it all the same."""
        self._mapped()[offset : offset + len(data)] = data

    def map_sync(self) -> None:
        self._mapped().flush()

    def unmap(self) -> None:
        if self._map is not None:
            self._map.close()
            self._map = None

    def _mapped(self) -> mmap.mmap:
        """Kept from one operation to the next, so that there are dirty pages; made anew when the file has another size."""
        if self._map is None or len(self._map) != self.size():
            self.unmap()
            self._map = mmap.mmap(self._fd, 0)
        return self._map


def _aligned(length: int) -> mmap.mmap:
    return mmap.mmap(-1, length)


@dataclass(slots=True)
class OtherProcess:
    """An OpenFile in a process of its own."""

    path: str
    _process: subprocess.Popen[bytes] = field(init=False)

    def __post_init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.integration.exerciser", self.path],
            cwd=Path(__file__).parents[2],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def __call__(self, operation: Operation) -> Result:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        pickle.dump(operation, self._process.stdin)
        self._process.stdin.flush()
        result: Result = pickle.load(self._process.stdout)
        return result

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        assert self._process.wait(timeout=10) == 0


def obey(path: str, orders: IO[bytes], answers: IO[bytes]) -> None:
    """Make the operations that are read from `orders` until there are no more."""
    file = OpenFile(path)
    while True:
        try:
            operation = pickle.load(orders)
        except EOFError:
            break
        pickle.dump(file(operation), answers)
        answers.flush()
    file.close()


@dataclass(slots=True)
class Chooser:
    """Chooses the next operation for a file of a size. allocates: also what needs an FALLOCATE of the file system."""

    random: random.Random
    allocates: bool

    def __call__(self, size: int) -> Operation:
        while True:
            operation = self._one(size)
            if operation is not None:
                return operation

    def _one(self, size: int) -> Operation | None:
        choose = self.random
        kinds = ["read", "write", "append", "truncate", "map_read", "map_write", "copy_range", "seek", "direct", "keep"]
        kind = choose.choice(kinds + ["fallocate"] * 2 * self.allocates)
        offset, length = choose.randrange(LARGEST), choose.choice((1, 100, BLOCK, 9_000, 70_000, 150_000))
        if kind == "read":
            return "read", offset, length
        if kind == "write":
            return "write", offset, self._data(min(length, LARGEST - offset))
        if kind == "append":
            return ("append", self._data(length)) if size + length <= LARGEST else None
        if kind == "truncate":
            how = choose.choice(("truncate", "truncate", "truncate_path", "truncate_at_open"))
            return (how,) if how == "truncate_at_open" else (how, choose.randrange(LARGEST))
        if kind == "seek":
            return "seek", offset, choose.choice((os.SEEK_DATA, os.SEEK_HOLE))
        if kind == "direct":
            at, blocks = offset // BLOCK * BLOCK, choose.randrange(1, 20) * BLOCK
            return choose.choice((("direct_read", at, blocks), ("direct_write", at, self._data(blocks))))
        if kind == "keep":
            return (choose.choice(("sync", "drop_pages", "reopen", "map_sync" if size else "sync", "unmap")),)
        if kind == "fallocate":
            return self._fallocate(offset, length)
        return self._within(kind, size, length)

    def _within(self, kind: str, size: int, length: int) -> Operation | None:
        """What must not leave the file."""
        if not size:
            return None
        offset = self.random.randrange(size)
        length = min(length, size - offset)
        if kind == "copy_range":
            target = self.random.randrange(LARGEST)
            return None if target < offset + length and offset < target + length else ("copy_range", offset, target, length)
        return ("map_write", offset, self._data(length)) if kind == "map_write" else ("map_read", offset, length)

    def _fallocate(self, offset: int, length: int) -> Operation:
        mode = self.random.choice((0, KEEP_SIZE, PUNCH_HOLE | KEEP_SIZE, ZERO_RANGE, ZERO_RANGE | KEEP_SIZE, PUNCH_HOLE))
        return "fallocate", mode, offset, length

    def _data(self, length: int) -> bytes:
        return self.random.randbytes(length)


@dataclass(slots=True)
class Exerciser:
    """Operations on `files`, taken in turns, and on their one twin. history: what was done, for the report of a failure."""

    files: list[Maker]
    twin: OpenFile
    chooser: Chooser
    history: list[Operation] = field(default_factory=list)

    def run(self, operations: int) -> None:
        """AssertionError with the last operations where the two files part."""
        for number in range(operations):
            file = self.chooser.random.choice(self.files)
            self._step(file)
            if number % 10 == 9:
                self.compare(self.chooser.random.choice(self.files))

    def _step(self, file: Maker) -> None:
        operation = self.chooser(self.twin.size())
        self.history.append(tuple(len(part) if isinstance(part, bytes) else part for part in operation))
        if operation[0] == "seek":
            self._check_seek(file, operation)
            return
        found, expected = file(operation), self.twin(operation)
        if operation[0] == "copy_range":
            found, expected = self._finished(file, operation, found), self._finished(self.twin, operation, expected)
        assert found == expected, self._story(f"{_shown(found)} where the twin says {_shown(expected)}")
        assert file(("size",)) == self.twin.size(), self._story(f"size {file(('size',))!r}, of the twin {self.twin.size()}")

    def _finished(self, file: Maker, operation: Operation, copied: Result) -> Result:
        """copy_file_range may copy less than it was asked for."""
        _, source, target, length = operation
        done = copied
        while isinstance(done, int) and isinstance(copied, int) and copied > 0 and done < length:
            copied = file(("copy_range", source + done, target + done, length - done))
            done = done + copied if isinstance(copied, int) else copied
        return done

    def _check_seek(self, file: Maker, operation: Operation) -> None:
        """Where holes are is each file system's own affair, as long as they read as zeros and nothing is taken for one that is not."""
        _, offset, whence = operation
        found, content = file(operation), self.twin.content()
        if offset >= len(content):
            assert found == "ENXIO", self._story(f"{found!r} past the end")
            return
        if whence == os.SEEK_HOLE:
            assert isinstance(found, int), self._story(f"{found!r} though each file ends in a hole")
            assert offset <= found <= len(content), self._story(f"hole at {found}")
            return
        end = len(content) if found == "ENXIO" else found
        assert isinstance(end, int), self._story(repr(found))
        assert not any(content[offset:end]), self._story(f"data from {offset} to {end} are said to be a hole")

    def compare(self, file: Maker) -> None:
        """The whole content, byte by byte."""
        found, expected = file(("content",)), self.twin.content()
        assert isinstance(found, bytes), self._story(repr(found))
        if found != expected:
            shorter = min(len(found), len(expected))
            where = next((at for at in range(shorter) if found[at] != expected[at]), shorter)
            raise AssertionError(self._story(f"content differs from byte {where} on; {len(found)} bytes, of the twin {len(expected)}"))

    def _story(self, what: str) -> str:
        return "\n".join((what, f"after {len(self.history)} operations, the last of them:", *map(repr, self.history[-12:])))


def _shown(result: Result) -> str:
    return f"{len(result)} bytes" if isinstance(result, bytes) else repr(result)


if __name__ == "__main__":
    obey(sys.argv[1], sys.stdin.buffer, sys.stdout.buffer)
