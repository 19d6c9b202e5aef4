"""The extension against a kernel that we play ourselves: exact bytes of INIT, and requests that no kernel would send.

libfuse takes `/dev/fd/N` for a device that is mounted already; here N is a socket.
"""

from __future__ import annotations

import errno
import os
import random
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyoverlay.fuse.capabilities import DEFAULT, InitFlag, agreed

pytestmark = [pytest.mark.wire]

GETATTR, SETATTR, READ, WRITE, GETXATTR, INIT, INTERRUPT, IOCTL = 3, 4, 15, 16, 22, 26, 36, 39
EVERYTHING = (1 << 43) - 1 & ~InitFlag.OVER_IO_URING
FILE = 7
WRITE_CACHE = 1  # FUSE_WRITE_CACHE

SERVER = """
import errno, os, sys, tempfile
import trio
from pyoverlay.fuse import loop
from pyoverlay.fuse.binding import pyfuse3, wire
from pyoverlay.fuse.capabilities import Wanted
from pyoverlay.fuse.opcodes import attach

class Operations(pyfuse3.Operations):
    async def getattr(self, inode, ctx):
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        return entry
    async def setattr(self, inode, attr, fields, fh, ctx):
        raise pyfuse3.FUSEError(errno.EPERM if fh in (None, inode) else errno.EBADF)
    async def read(self, fh, off, size):
        return b"python"[:size]
    async def write(self, fh, off, data):
        return len(data)
    async def getxattr(self, inode, name, ctx):
        raise pyfuse3.FUSEError(errno.ENODATA)
    async def fallocate(self, ino, mode, offset, length): ...
    async def ioctl(self, ino, cmd, arg, out_size, ctx):
        return arg[:out_size]

operations = Operations()
attach(operations, wire, Wanted())
loop.install(wire)
file = tempfile.TemporaryFile()
file.write(b"lane")
file.flush()
wire.lane(7, file.fileno(), file.fileno())
wire.no_xattr(7, True)
pyfuse3.init(operations, f"/dev/fd/{sys.argv[1]}", {"fsname=raw"})
trio.run(pyfuse3.main)
pyfuse3.close(unmount=False)
assert wire.counts() == ({}, dict.fromkeys(wire.counts()[1], 0))
"""


class Kernel:
    """Our end of the socket."""

    def __init__(self, program: str = SERVER, file: int = 0, *arguments: object) -> None:
        self.socket, device = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(10)
        self.unique = 0
        with device:
            argv = [sys.executable, "-W", "ignore", "-c", program, *map(str, (device.fileno(), file, *arguments))]
            self.server = subprocess.Popen(argv, pass_fds=[device.fileno(), file])

    def send(self, opcode: int, body: bytes, node: int = 1, length: int | None = None) -> int:
        self.unique += 2
        size = 40 + len(body) if length is None else length
        self.socket.send(struct.pack("<IIQQIIII", size, opcode, self.unique, node, 0, 0, 0, 0) + body)
        return self.unique

    def receive(self) -> tuple[int, int, bytes]:
        """Unique, errno and body of the next reply."""
        reply = self.socket.recv(1 << 20)
        length, error, unique = struct.unpack_from("<IiQ", reply)
        assert length == len(reply)
        return unique, -error, reply[16:]

    def ask(self, opcode: int, body: bytes, node: int = 1, length: int | None = None) -> tuple[int, bytes]:
        unique = self.send(opcode, body, node, length)
        answered, error, answer = self.receive()
        assert answered == unique
        return error, answer

    def init(self, flags: int = EVERYTHING) -> bytes:
        error, body = self.ask(INIT, struct.pack("<5I44x", 7, 45, 131072, flags & 0xFFFFFFFF, flags >> 32))
        assert error == 0
        return bytes(16) + body

    def end(self) -> int:
        self.socket.close()
        return self.server.wait(timeout=10)

    def __enter__(self) -> Kernel:
        return self

    def __exit__(self, *raised: object) -> None:
        self.socket.close()
        if self.server.poll() is None:
            self.server.kill()
        self.server.wait(timeout=10)


@pytest.fixture
def kernel() -> Iterator[Kernel]:
    with Kernel() as made:
        yield made


UNCACHED = """
import os, sys
import trio
from pyoverlay.fuse import loop
from pyoverlay.fuse.binding import pyfuse3, wire
from pyoverlay.fuse.capabilities import Wanted
from pyoverlay.fuse.opcodes import attach

file, waits = int(sys.argv[2]), int(sys.argv[3])
operations = pyfuse3.Operations()
attach(operations, wire, Wanted())
loop.install(wire)
wire.lane(7, file, -1, -1, waits)
pyfuse3.init(operations, f"/dev/fd/{sys.argv[1]}", {"fsname=raw"})
trio.run(pyfuse3.main)
counts = wire.counts()[1]
pyfuse3.close(unmount=False)
raise SystemExit(10 * counts["reads"] + counts["queued_reads"])
"""


@pytest.mark.parametrize(("waits", "together", "counted"), [(0, 1, 1), (1, 1, 10), (1, 2, 11)])
def test_a_disk_is_waited_for_by_the_receiver_while_nobody_else_asks(tmp_path: Path, waits: int, together: int, counted: int) -> None:
    """What may wait for longer is a thread's; so is a first READ with another behind it, which then nobody is behind."""
    path = tmp_path / "file"
    path.write_bytes(b"lane")
    with path.open("r+b") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        kernel = Kernel(UNCACHED, file.fileno(), waits)
        kernel.init()
        kernel.server.send_signal(signal.SIGSTOP)
        for _ in range(together):
            kernel.send(READ, struct.pack("<QQIIQII", 0, 0, 100, 0, 0, 0, 0), FILE)
        kernel.server.send_signal(signal.SIGCONT)
        assert [kernel.receive()[1:] for _ in range(together)] == [(0, b"lane")] * together
        assert kernel.end() == counted


LIMITED = UNCACHED.replace("wire.lane(7, file, -1, -1, waits)", """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
wire.lane(7, file, file)
""")


@pytest.mark.parametrize(
    ("flags", "answer"), [(0, (0, struct.pack("<II", 65536, 0))), (WRITE_CACHE, (errno.EFBIG, b""))], ids=["write", "page"]
)
def test_write_2_is_told_how_much_there_was_room_for_and_a_page_that_there_was_not(
    tmp_path: Path, flags: int, answer: tuple[int, bytes]
) -> None:
    """Of the pages of a map the kernel takes no count: they are clean when the answer is no error."""
    with (tmp_path / "file").open("w+b") as file, Kernel(LIMITED, file.fileno(), 0) as kernel:
        kernel.init()
        assert kernel.ask(WRITE, struct.pack("<QQIIQII", 0, 0, 100_000, flags, 0, 0, 0) + bytes(100_000), FILE) == answer
        assert kernel.end() == 0


LATENCY = UNCACHED.replace("wire.lane(7, file, -1, -1, waits)", "wire.latency(file)").replace("raise SystemExit", "counts and")


def test_processors_are_kept_awake_from_the_sixteenth_request_until_there_are_no_more() -> None:
    """What is written is what /dev/cpu_dma_latency takes: microseconds that waking up may take, and its own default, which is any."""
    told, device = os.pipe()
    with open(told, "rb", buffering=0) as told_file:
        kernel = Kernel(LATENCY, device, 0)
        os.close(device)
        kernel.init()
        kernel.server.send_signal(signal.SIGSTOP)
        for _ in range(16):
            kernel.send(GETATTR, bytes(16))
        kernel.server.send_signal(signal.SIGCONT)
        assert [struct.unpack("<i", told_file.read(4)) for _ in range(2)] == [(0,), (2_000_000_000,)]
        assert [kernel.receive()[1] for _ in range(16)] == [errno.ENOSYS] * 16
        assert kernel.end() == 0
        assert told_file.read() == b""  # it slept again, and asked for nothing more


def test_init_asks_for_all_that_is_wanted(kernel: Kernel) -> None:
    reply = kernel.init()
    assert agreed(reply) & DEFAULT == DEFAULT
    assert not agreed(reply) & (InitFlag.ATOMIC_O_TRUNC | InitFlag.SETXATTR_EXT | InitFlag.SECURITY_CTX | InitFlag.WRITEBACK_CACHE)
    background, congestion, max_write = struct.unpack_from("<HHI", reply, 16 + 16)
    assert (background, congestion) == (65535, 49151)
    assert max_write >= 1 << 20
    assert kernel.end() == 0


def test_init_asks_for_nothing_that_is_not_offered(kernel: Kernel) -> None:
    offer = InitFlag.DONT_MASK | 1 << 13  # READDIRPLUS, without which pyfuse3 refuses
    assert not agreed(kernel.init(offer)) & ~offer
    assert kernel.end() == 0


def test_each_request_is_answered_by_whom_it_is_for(kernel: Kernel) -> None:
    kernel.init()
    read = struct.pack("<QQIIQII", 0, 0, 100, 0, 0, 0, 0)
    assert kernel.ask(READ, read, FILE) == (0, b"lane")
    assert kernel.ask(READ, read, FILE + 1) == (0, b"python")
    assert kernel.ask(GETXATTR, bytes(8) + b"security.capability\0", FILE) == (errno.ENODATA, b"")
    assert kernel.ask(SETATTR, struct.pack("<IIQ72x", 1 << 6, 0, 12345), FILE) == (errno.EPERM, b"")
    assert kernel.ask(IOCTL, struct.pack("<QIIQII", 0, 0, 0x5401, 0, 0, 0)) == (errno.ENOTTY, b"")
    assert kernel.ask(IOCTL, struct.pack("<QIIQII", 0, 0, 1, 0, 3, 3) + b"abc") == (0, bytes(16) + b"abc")
    assert kernel.ask(63, b"") == (errno.ENOSYS, b"")
    assert kernel.ask(99, b"") == (errno.ENOSYS, b"")
    assert kernel.end() == 0


def test_a_write_that_is_shorter_than_it_says_writes_nothing(kernel: Kernel) -> None:
    kernel.init()
    error, _ = kernel.ask(WRITE, struct.pack("<QQIIQII", 0, 0, 5000, 0, 0, 0, 0) + b"few", FILE)
    assert error == errno.EIO
    assert kernel.ask(READ, struct.pack("<QQIIQII", 0, 0, 100, 0, 0, 0, 0), FILE) == (0, b"lane")
    assert kernel.end() == 0


def test_a_header_that_lies_about_the_length_is_refused(kernel: Kernel) -> None:
    kernel.init()
    for length in (0, 39, 41, 1 << 31):
        assert kernel.ask(GETATTR, b"", length=length) == (errno.EIO, b"")
    kernel.socket.send(b"no request at all")
    assert kernel.ask(GETATTR, bytes(16))[0] == 0
    assert kernel.end() == 0


BODIES = {
    READ: struct.pack("<QQIIQII", 0, 0, 100, 0, 0, 0, 0),
    WRITE: struct.pack("<QQIIQII", 0, 0, 4, 0, 0, 0, 0) + b"data",
    GETXATTR: struct.pack("<II", 100, 0) + b"security.capability\0",
    SETATTR: struct.pack("<IIQ72x", 1 << 6, 0, 12345),
    IOCTL: struct.pack("<QIIQII", 0, 0, 0x5401, 0, 0, 4),
    43: struct.pack("<QQQII", 0, 0, 1, 0, 0),
}


@pytest.mark.parametrize("node", [FILE, FILE + 1], ids=["lane", "python"])
@pytest.mark.parametrize("opcode", BODIES)
def test_a_body_cut_short_anywhere_is_answered_and_the_session_goes_on(kernel: Kernel, opcode: int, node: int) -> None:
    kernel.init()
    for size in range(len(BODIES[opcode]) + 1):
        kernel.ask(opcode, BODIES[opcode][:size], node)
    assert kernel.ask(GETATTR, bytes(16), FILE)[0] == 0
    assert kernel.end() == 0


def test_noise_never_ends_the_session(kernel: Kernel) -> None:
    seed = random.randrange(1 << 32)
    noise = random.Random(seed)
    kernel.init()
    for _ in range(2000):
        opcode = noise.choice([READ, IOCTL, GETXATTR, 43, 44 + 20, 200, 1 << 31])
        body = noise.randbytes(noise.randrange(60))
        kernel.ask(opcode, body, noise.choice([0, 1, FILE, 1 << 63]))
    assert kernel.ask(GETATTR, bytes(16))[0] == 0, f"seed {seed}"
    assert kernel.end() == 0


def test_interrupts_without_a_body_or_a_request_are_survived(kernel: Kernel) -> None:
    kernel.init()
    kernel.send(INTERRUPT, b"")
    kernel.send(INTERRUPT, b"1234")
    kernel.send(INTERRUPT, struct.pack("<Q", 12345))
    assert kernel.ask(GETATTR, bytes(16))[0] == 0  # and nobody asks for them once more
    assert kernel.end() == 0


def test_init_leaves_no_descriptor_open(kernel: Kernel) -> None:

    def descriptors() -> int:
        kernel.ask(GETATTR, bytes(16))  # INIT is answered a moment before it is done
        return len(os.listdir(f"/proc/{kernel.server.pid}/fd"))

    kernel.init()
    before = descriptors()
    for _ in range(3):
        assert kernel.ask(INIT, struct.pack("<5I44x", 7, 45, 131072, 0, 0))[0] == errno.EIO  # libfuse's answer to a second one
    assert descriptors() == before
    assert kernel.end() == 0
