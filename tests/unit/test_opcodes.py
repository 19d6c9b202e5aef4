"""The extra opcodes: bytes to a method call and back, and errors to errnos. No kernel, no mount."""

import errno
import logging
import struct
from collections.abc import Iterable
from typing import Any

import pytest
import trio

from pyoverlay.fuse.binding import pyfuse3
from pyoverlay.fuse.capabilities import Wanted
from pyoverlay.fuse.opcodes import Caller, Opcode, Statx, attach, opcodes_of, pack_entry, pack_statx

NODE = 42


class FakeWire:
    """Holds one request."""

    def __init__(self) -> None:
        self.current: tuple[int, int, int, int, int, int, bytes] = (0, 0, 0, 0, 0, 0, b"")
        self.opcodes: set[int] = set()
        self.interrupt: Any = None

    def serve(self, init: Any, interrupt: Any, opcodes: Iterable[int], direct: Any = None, failed_page: Any = None, /) -> None:
        self.opcodes, self.interrupt = set(opcodes), interrupt

    def whole_request(self) -> tuple[int, int, int, int, int, int, bytes]:
        return self.current


class Recorded(pyfuse3.Operations):  # type: ignore[misc,unused-ignore]  # untyped in pyfuse3 3.2
    """Answers each operation with `answer`, or raises it."""

    def __init__(self, answer: Any = None) -> None:
        super().__init__()
        self.answer = answer
        self.calls: list[tuple[Any, ...]] = []

    async def read(self, fh: int, off: int, size: int) -> bytes:
        return b"plain"

    async def _called(self, *call: Any) -> Any:
        self.calls.append(call)
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer

    async def fallocate(self, *arguments: Any) -> Any:
        return await self._called(*arguments)

    lseek = copy_file_range = tmpfile = ioctl = statx = syncfs = fallocate

    def interrupt(self, unique: int) -> None:
        self.calls.append((unique,))
        if isinstance(self.answer, BaseException):
            raise self.answer


def ask(operations: Recorded, opcode: Opcode, body: bytes) -> bytes:
    wire = FakeWire()
    attach(operations, wire, Wanted())
    wire.current = (opcode, 7, NODE, 1000, 100, 99, body)
    answer: bytes = trio.run(operations.read, 0, 0, 0)
    return answer


def attributes() -> Any:
    entry = pyfuse3.EntryAttributes()
    entry.st_ino, entry.st_mode, entry.st_size, entry.st_nlink = 5, 0o100640, 3 << 32, 2
    entry.st_mtime_ns, entry.st_atime_ns, entry.st_ctime_ns = -1, 2_000_000_003, 4
    entry.entry_timeout, entry.attr_timeout = 1.5, 1e30
    return entry


@pytest.mark.parametrize(
    ("opcode", "body", "answer", "call", "reply"),
    [
        (Opcode.FALLOCATE, struct.pack("<QQQII", 9, 100, 200, 3, 0), None, (NODE, 3, 100, 200), b""),
        (Opcode.LSEEK, struct.pack("<QQII", 9, 100, 4, 0), 4096, (NODE, 100, 4), struct.pack("<Q", 4096)),
        (Opcode.COPY_FILE_RANGE, struct.pack("<7Q", 9, 1, 43, 9, 2, 3, 0), 3, (NODE, 1, 43, 2, 3, 0), struct.pack("<II", 3, 0)),
        (
            Opcode.COPY_FILE_RANGE_64,
            struct.pack("<7Q", 9, 1, 43, 9, 2, 1 << 33, 0),
            1 << 33,
            (NODE, 1, 43, 2, 1 << 33, 0),
            struct.pack("<Q", 1 << 33),
        ),
        (Opcode.SYNCFS, bytes(8), None, (NODE,), b""),
        (
            Opcode.IOCTL,
            struct.pack("<QIIQII", 9, 0, 0x1234, 0, 3, 4) + b"abcrest",
            b"out",
            (NODE, 0x1234, b"abc", 4, Caller(1000, 100, 99, 0)),
            struct.pack("<iIII", 0, 0, 0, 0) + b"out",
        ),
    ],
    ids=lambda value: value.name if isinstance(value, Opcode) else None,
)
def test_a_request_becomes_a_call_and_its_result_the_reply(opcode: Opcode, body: bytes, answer: Any, call: Any, reply: bytes) -> None:
    operations = Recorded(answer)
    assert ask(operations, opcode, body) == reply
    assert operations.calls == [call]


def test_tmpfile_answers_an_entry_and_an_open_file() -> None:
    info = pyfuse3.FileInfo(fh=5, keep_cache=True)
    operations = Recorded((info, attributes()))
    reply = ask(operations, Opcode.TMPFILE, struct.pack("<4I", 0o100002, 0o100666, 0o22, 0) + b"/\0")
    assert operations.calls == [(NODE, 0o100666, 0o100002, Caller(1000, 100, 99, 0o22))]
    assert reply == pack_entry(attributes()) + struct.pack("<QIi", 5, 2, 0)


def test_an_entry_has_the_kernels_layout() -> None:
    packed = pack_entry(attributes())
    assert len(packed) == 128
    assert struct.unpack_from("<4Q2I", packed) == (5, 0, 1, (1 << 64) - 1, 500_000_000, 0)
    ino, size, _, atime, mtime, ctime, atime_ns, mtime_ns, ctime_ns, mode, nlink = struct.unpack_from("<6Q5I", packed, 40)
    assert (ino, size, mode, nlink) == (5, 3 << 32, 0o100640, 2)
    assert (atime, atime_ns, ctime, ctime_ns) == (2, 3, 0, 4)
    assert (mtime, mtime_ns) == ((1 << 64) - 1, 999_999_999)  # a nanosecond before 1970


def test_statx_has_the_kernels_layout() -> None:
    packed = pack_statx(Statx(attributes(), btime_ns=7_000_000_009))
    assert len(packed) == 32 + 256
    mask, _, _, nlink, _, _, mode, ino, size = struct.unpack_from("<IIQIIIH2xQQ", packed, 32)
    assert (mask, nlink, mode, ino, size) == (0xFFF, 2, 0o100640, 5, 3 << 32)
    assert struct.unpack_from("<qI", packed, 32 + 64 + 16) == (7, 9)
    assert struct.unpack_from("<I", pack_statx(Statx(attributes())), 32) == (0x7FF,)


def test_statx_passes_mask_and_flags() -> None:
    operations = Recorded(Statx(attributes()))
    ask(operations, Opcode.STATX, struct.pack("<IIQII", 0, 0, 0, 0x2000, 0xFFF))
    assert operations.calls == [(NODE, 0xFFF, 0x2000)]


@pytest.mark.parametrize(
    ("error", "number"),
    [(OSError(errno.ENOSPC, ""), errno.ENOSPC), (OSError("no errno"), errno.EIO), (pyfuse3.FUSEError(errno.EXDEV), errno.EXDEV)],
)
def test_an_error_reaches_the_caller_as_its_errno(error: Exception, number: int, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(pyfuse3.FUSEError) as raised:
        ask(Recorded(error), Opcode.SYNCFS, bytes(8))
    assert raised.value.errno == number
    assert not caplog.records


def test_a_bug_costs_one_eio_and_one_log_entry(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(pyfuse3.FUSEError) as raised:
        ask(Recorded(KeyError("bug")), Opcode.SYNCFS, bytes(8))
    assert raised.value.errno == errno.EIO
    [entry] = caplog.records
    assert (entry.levelno, entry.getMessage()) == (logging.ERROR, "SYNCFS of inode 42 failed")
    assert entry.exc_info is not None


def test_an_ioctl_that_answers_too_much_is_a_bug(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(pyfuse3.FUSEError) as raised:
        ask(Recorded(b"12345"), Opcode.IOCTL, struct.pack("<QIIQII", 9, 0, 0x1234, 0, 0, 4))
    assert raised.value.errno == errno.EIO
    assert len(caplog.records) == 1


@pytest.mark.parametrize("opcode", [o for o in Opcode if o is not Opcode.SYNCFS])
def test_a_request_cut_short_is_invalid(opcode: Opcode) -> None:
    operations = Recorded()
    with pytest.raises(pyfuse3.FUSEError) as raised:
        ask(operations, opcode, bytes(7))
    assert raised.value.errno == errno.EINVAL
    assert operations.calls == []


def test_only_what_the_operations_have_is_asked_for() -> None:
    class One(pyfuse3.Operations):  # type: ignore[misc,unused-ignore]  # untyped in pyfuse3 3.2
        async def lseek(self, ino: int, offset: int, whence: int) -> int:
            return 0

    assert opcodes_of(One()) == {Opcode.LSEEK}
    assert opcodes_of(Recorded()) == set(Opcode)
    wire, operations = FakeWire(), One()
    attach(operations, wire, Wanted())
    assert wire.opcodes == {Opcode.LSEEK}
    assert wire.interrupt is None


def test_a_read_of_a_real_handle_goes_to_the_operations() -> None:
    operations = Recorded()
    attach(operations, FakeWire(), Wanted())
    assert trio.run(operations.read, 3, 0, 10) == b"plain"


def test_interrupt_names_the_request_and_a_bug_in_it_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    wire, operations = FakeWire(), Recorded()
    attach(operations, wire, Wanted())
    wire.interrupt(12)
    operations.answer = ValueError("bug")
    wire.interrupt(13)
    assert operations.calls == [(12,), (13,)]
    assert [entry.getMessage() for entry in caplog.records] == ["INTERRUPT of request 13 failed"]
