"""A disk that writes down what it is told, in order: each write with its data, each flush, and between them the marks of a test.

It tells what dm-log-writes would, without device-mapper: the disk is one file, a FUSE mount by itself, with a loop device on it. The loop
driver makes a WRITE of each write and waits for its answer before it acknowledges it, for without writeback the kernel's cache of a FUSE
file is written through; of a flush, into which the block layer takes FUA apart too, it makes an FSYNC. Loop devices are buffered, which is
mount(8)'s choice: their driver has one request under way at a time. With `--direct-io` it has many, and the log the order in which they
come in; nothing more would be known, and no run be like another. What stands before an FSYNC was answered before that was read: it is
what the disk must have after the flush. Of what stands after the last FSYNC it may have anything.

Discards, and zeroes without data, are refused as not implemented; the block layer writes zeroes then, so that writes are all there is.

`python -m tests.crash.disk DEVICE IMAGE LOG` serves: the descriptor of a mounted /dev/fuse, and two paths.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

from pyoverlay.testing import Connection, mounts_below
from tests.posix.system_calls import MNT_DETACH, mount, umount

_CHECKOUT = Path(__file__).parents[2]
_MARK = b"user.mark"
_MAX_WRITE = 1 << 20
_SECONDS = 10  # in which a disk that nobody uses any more has ended

# The kernel's protocol, include/uapi/linux/fuse.h: opcodes, and flags of INIT.
_FORGET, _GETATTR, _OPEN, _READ, _WRITE, _STATFS, _RELEASE, _FSYNC, _SETXATTR = 2, 3, 14, 15, 16, 17, 18, 20, 21
_FLUSH, _INIT, _INTERRUPT, _DESTROY, _BATCH_FORGET = 25, 26, 36, 38, 42
_BIG_WRITES, _MAX_PAGES = 1 << 5, 1 << 22
_HEADER = struct.Struct("<IIQQIIII")
_RECORD = struct.Struct("<BQQ")


class Kind(IntEnum):
    WRITE = 1
    FLUSH = 2
    MARK = 3


class Record(NamedTuple):
    """offset: of a write, in bytes. data: what it writes, or a mark's text."""

    kind: Kind
    offset: int = 0
    data: bytes = b""


def read_log(log: Path) -> list[Record]:
    """All that a disk has written down."""
    records, data, at = [], log.read_bytes(), 0
    while at < len(data):
        kind, offset, length = _RECORD.unpack_from(data, at)
        at += _RECORD.size + length
        records.append(Record(Kind(kind), offset, data[at - length : at]))
    return records


@dataclass(slots=True)
class Disk:
    """The side of the tests. file: to mount by a loop device. log: what read_log reads."""

    file: Path
    log: Path
    process: subprocess.Popen[bytes]

    def mark(self, text: bytes) -> None:
        """When this returns the log has the mark, after all that was acknowledged before."""
        os.setxattr(self.file, _MARK, text)


@contextmanager
def recording_disk(image: Path, directory: Path) -> Iterator[Disk]:
    """A disk with the content of `image`, which it changes, in this directory. No loop device may be left on it at the end: AssertionError,
    after it was ended by force.
    """
    file, log = directory / "disk", directory / "log"
    file.touch()
    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    try:
        mount("recording", file, "fuse", data=f"fd={device},rootmode={stat.S_IFREG:o},user_id=0,group_id=0")
        program = [sys.executable, "-m", "tests.crash.disk", str(device), str(image), str(log)]
        process = subprocess.Popen(program, pass_fds=[device], cwd=_CHECKOUT)
    finally:
        os.close(device)  # the process alone holds it: when that ends, whatever the reason, nobody waits for an answer
    try:
        yield Disk(file, log, process)
    finally:
        _end(file, process)


def _end(file: Path, process: subprocess.Popen[bytes]) -> None:
    connections = [Connection.of(mounted) for mounted in mounts_below(file)]
    umount(file, MNT_DETACH)  # a loop device that is being released holds it a moment longer
    try:
        assert process.wait(_SECONDS) == 0, f"the disk {file} ended with {process.returncode}"
    except subprocess.TimeoutExpired:
        for connection in connections:
            connection.abort()
        process.kill()
        process.wait()
        raise AssertionError(f"the disk {file} is in use yet: it was ended") from None


class Server:
    """The side of the kernel."""

    def __init__(self, device: int, image: Path, log: Path) -> None:
        self._device = device
        self._image = os.open(image, os.O_RDWR | os.O_CLOEXEC)
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self._handlers: dict[int, Callable[[memoryview], bytes]] = {
            _INIT: self._init, _GETATTR: self._getattr, _OPEN: lambda _: bytes(16), _READ: self._read, _WRITE: self._write,
            _STATFS: lambda _: bytes(80), _RELEASE: lambda _: b"", _FLUSH: lambda _: b"", _FSYNC: self._fsync, _SETXATTR: self._setxattr,
            _DESTROY: lambda _: b"",
        }  # fmt: skip

    def serve(self) -> None:
        """Until it is unmounted and nobody uses it, or the connection is aborted. One request after the other: order is all."""
        while True:
            try:
                self._serve_one()
            except FileNotFoundError:  # who asked has gone: killed, or the connection is ending
                continue
            except OSError as error:
                if error.errno == errno.ENODEV:
                    return
                raise

    def _serve_one(self) -> None:
        request = os.read(self._device, _MAX_WRITE + 4096)
        _, opcode, unique, *_ = _HEADER.unpack_from(request)
        if opcode not in (_FORGET, _BATCH_FORGET, _INTERRUPT):
            self._reply(unique, self._answer(opcode, memoryview(request)[_HEADER.size :]))

    def _reply(self, unique: int, answer: bytes | None) -> None:
        """None: not implemented. The kernel asks for most of that once, and never again."""
        number, body = (-errno.ENOSYS, b"") if answer is None else (0, answer)
        os.write(self._device, struct.pack("<IiQ", 16 + len(body), number, unique) + body)

    def _answer(self, opcode: int, body: memoryview) -> bytes | None:
        handler = self._handlers.get(opcode)
        return None if handler is None else handler(body)

    def _init(self, _: memoryview) -> bytes:
        return struct.pack("<4I2H2I2H8I", 7, 31, 0, _BIG_WRITES | _MAX_PAGES, 1, 1, _MAX_WRITE, 1, _MAX_WRITE >> 12, 0, *[0] * 8)

    def _getattr(self, _: memoryview) -> bytes:
        size = os.fstat(self._image).st_size
        attributes = struct.pack("<6Q10I", 1, size, size >> 9, 0, 0, 0, 0, 0, 0, stat.S_IFREG | 0o600, 1, 0, 0, 0, 4096, 0)
        return struct.pack("<QII", 1_000_000, 0, 0) + attributes

    def _read(self, body: memoryview) -> bytes:
        _, offset, size = struct.unpack_from("<QQI", body)
        return os.pread(self._image, size, offset)

    def _write(self, body: memoryview) -> bytes:
        _, offset, size = struct.unpack_from("<QQI", body)
        data = body[40 : 40 + size]
        self._record(Record(Kind.WRITE, offset, bytes(data)))
        os.pwrite(self._image, data, offset)
        return struct.pack("<II", size, 0)

    def _fsync(self, _: memoryview) -> bytes:
        self._record(Record(Kind.FLUSH))
        return b""

    def _setxattr(self, body: memoryview) -> bytes:
        (size,) = struct.unpack_from("<I", body)
        name, _, value = bytes(body[8:]).partition(b"\0")
        assert name == _MARK, name
        self._record(Record(Kind.MARK, data=value[:size]))
        return b""

    def _record(self, record: Record) -> None:
        os.write(self._log, _RECORD.pack(record.kind, record.offset, len(record.data)) + record.data)


if __name__ == "__main__":
    Server(int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])).serve()
