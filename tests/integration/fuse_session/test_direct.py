"""Requests that the receiver answers by one plain call: what the function gets, and what the kernel gets of what it returns.

The kernel is played by the test; the functions keep their arguments, which GETXATTR of "calls" shows.
"""

from __future__ import annotations

import ast
import errno
import os
import random
import struct
from collections.abc import Iterator
from typing import Any

import pytest

from tests.integration.fuse_session.test_raw_protocol import Kernel

pytestmark = [pytest.mark.wire]

LOOKUP, FORGET, GETATTR, SETATTR, READLINK, SYMLINK, MKNOD, MKDIR, UNLINK, RMDIR, RENAME, LINK = 1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12, 13
READ, WRITE, FSYNC, SETXATTR, GETXATTR, LISTXATTR, REMOVEXATTR = 15, 16, 20, 21, 22, 23, 24
FSYNCDIR, BATCH_FORGET, READDIRPLUS, RENAME2 = 30, 42, 44, 45
FOREVER = 1_000_000_000

SERVER = """
import errno, os, sys, tempfile
import trio
from pyoverlay.fuse import loop
from pyoverlay.fuse.binding import pyfuse3, wire
from pyoverlay.fuse.capabilities import Wanted
from pyoverlay.fuse.opcodes import attach

fields = [0o100644, 5, 0, 1, 0, 0, 6, 0, 0, 0, 0.0, 0.0, 0.0, -1, 3 * 10**9 + 4, 10**30, 4096, 8, 0x1234]
st = os.stat_result(fields[:10] + fields[10:])
shown = (77, st, 2, 1000, 1001, 8)
calls = []
file = tempfile.TemporaryFile()
file.write(b"lane")
file.flush()

directory = os.open("/", os.O_PATH)
wire.lane(900, directory, -1, 3)
wire.lane(901, file.fileno(), file.fileno(), 0)
wire.lane(902, file.fileno(), -1)
wire.no_xattr(900, True, True)
wire.no_xattr(901, True)

def recording(result):
    def function(*arguments):
        calls.append(arguments)
        return result(*arguments) if callable(result) else result
    return function

def lookup(parent, name):
    if name == b"raise":
        raise RuntimeError("a bug")
    if name == b"exit":
        raise SystemExit(3)
    return {b"missing": None, b"denied": -errno.EACCES, b"later": NotImplemented, b"nonsense": "text", b"pair": (1, 2)}.get(name, shown)

def getxattr(node, name):
    return repr(calls).encode() if name == b"calls" else b"value"

def read(node):
    wire.lane(node, file.fileno(), -1)

def fsync(node, datasync):
    calls.append((node, datasync))
    return os.dup(file.fileno()) if node == 1 else None if node == 2 else -errno.EDQUOT

class Operations(pyfuse3.Operations):
    direct = {
        1: lookup, 2: recording(None), 3: recording(shown), 4: recording(shown), 5: recording(b"target"), 6: recording(shown),
        8: recording(shown), 9: recording(shown), 10: recording(None), 11: recording(-errno.ENOTEMPTY), 12: recording(None),
        13: recording(shown), 15: read, 16: recording(NotImplemented), 20: fsync, 21: recording(None), 22: getxattr,
        23: recording(b"user.a\\0user.b\\0"), 24: recording(None), 30: fsync, 45: recording(None), 47: recording(12345),
        53: recording(12345),
        44: recording(lambda node, offset, room: [(1, b".", shown), (3, b"name", shown), (9, b"x" * 255, shown)]),
    }
    async def lookup(self, parent, name, ctx):
        raise pyfuse3.FUSEError(errno.EXDEV)
    async def write(self, fh, off, data):
        return len(data)

operations = Operations()
attach(operations, wire, Wanted())
loop.install(wire)
pyfuse3.init(operations, f"/dev/fd/{sys.argv[1]}", {"fsname=raw"})
trio.run(pyfuse3.main)
pyfuse3.close(unmount=False)
"""

ATTR = struct.pack("<QQQqqQIIIIIIIIII", 77, 6, 8, -1, 3, 9223372036, 999_999_999, 4, 854_775_807, 0o100644, 2, 1000, 1001, 0x1234, 4096, 0)
ENTRY = struct.pack("<QQQQII", 77, 0, FOREVER, FOREVER, 0, 0) + ATTR
ATTRIBUTES = struct.pack("<QII", FOREVER, 0, 0) + ATTR


@pytest.fixture
def kernel() -> Iterator[Kernel]:
    made = Kernel(SERVER)
    made.init()
    yield made
    made.socket.close()
    if made.server.poll() is None:
        made.server.kill()
    made.server.wait(timeout=10)


def calls(kernel: Kernel) -> list[tuple[Any, ...]]:
    error, text = kernel.ask(GETXATTR, struct.pack("<II", 1 << 20, 0) + b"calls\0")
    assert error == 0
    found: list[tuple[Any, ...]] = ast.literal_eval(text.decode())
    return found


REQUESTS: list[tuple[int, bytes, tuple[Any, ...], int, bytes]] = [
    (GETATTR, bytes(16), (5,), 0, ATTRIBUTES),
    (
        SETATTR,
        struct.pack("<II3Q3Q3IIIIII", 0x31, 0, 0, 11, 0, 21, (1 << 64) - 22, 23, 31, 32, 33, 0o755, 0, 41, 42, 0),
        (5, 0x31, 0o755, 41, 42, 11, 21, 31, -22, 32),
        0,
        ATTRIBUTES,
    ),
    (READLINK, b"", (5,), 0, b"target"),
    (SYMLINK, b"name\0to/there\0", (5, b"name", b"to/there", 0, 0), 0, ENTRY),
    (MKNOD, struct.pack("<4I", 0o20600, 0x102, 0o22, 0) + b"name\0", (5, b"name", 0o20600, 0x102, 0, 0, 0o22), 0, ENTRY),
    (MKDIR, struct.pack("<2I", 0o755, 0o27) + b"name\0", (5, b"name", 0o755, 0, 0, 0o27), 0, ENTRY),
    (UNLINK, b"name\0", (5, b"name"), 0, b""),
    (RMDIR, b"name\0", (5, b"name"), errno.ENOTEMPTY, b""),
    (RENAME, struct.pack("<Q", 6) + b"old\0new\0", (5, b"old", 6, b"new", 0), 0, b""),
    (RENAME2, struct.pack("<QII", 6, 2, 0) + b"old\0new\0", (5, b"old", 6, b"new", 2), 0, b""),
    (LINK, struct.pack("<Q", 6) + b"name\0", (6, 5, b"name"), 0, ENTRY),
    (SETXATTR, struct.pack("<II", 3, 1) + b"user.a\0a\0b", (5, b"user.a", b"a\0b", 1, 0, 0), 0, b""),
    (SETXATTR, struct.pack("<II", 300, 0) + b"user.a\0abc", (5, b"user.a", b"abc", 0, 0, 0), 0, b""),
    (LISTXATTR, struct.pack("<II", 100, 0), (5, 0), 0, b"user.a\0user.b\0"),
    (LISTXATTR, struct.pack("<II", 0, 0), (5, 0), 0, struct.pack("<II", 14, 0)),
    (LISTXATTR, struct.pack("<II", 13, 0), (5, 0), errno.ERANGE, b""),
    (REMOVEXATTR, b"user.a\0", (5, b"user.a"), 0, b""),
    *((opcode, struct.pack("<7Q", 1, 2, 3, 4, 5, 6, 0), (5, 2, 3, 5, 6, 0, 0), 0, struct.pack("<Q", 12345)) for opcode in (47, 53)),
]


@pytest.mark.parametrize(("opcode", "body", "arguments", "error", "answer"), REQUESTS)
def test_a_request_is_one_call_and_its_result_the_reply(
    kernel: Kernel, opcode: int, body: bytes, arguments: tuple[Any, ...], error: int, answer: bytes
) -> None:
    assert kernel.ask(opcode, body, 5) == (error, answer)
    assert calls(kernel) == [arguments]
    assert kernel.end() == 0


def test_a_name_that_is_not_there_is_an_entry_without_a_node(kernel: Kernel) -> None:
    assert kernel.ask(LOOKUP, b"there\0") == (0, ENTRY)
    assert kernel.ask(LOOKUP, b"missing\0") == (0, struct.pack("<QQQQII88x", 0, 0, FOREVER, FOREVER, 0, 0))
    assert kernel.ask(LOOKUP, b"denied\0") == (errno.EACCES, b"")
    assert kernel.end() == 0


def test_what_is_not_answered_at_once_goes_to_pyfuse3(kernel: Kernel) -> None:
    assert kernel.ask(LOOKUP, b"later\0") == (errno.EXDEV, b"")
    assert kernel.ask(WRITE, struct.pack("<QQIIQII", 0, 0, 4, 0, 0, 0, 0) + b"data", 9) == (0, struct.pack("<II", 4, 0))
    assert kernel.end() == 0


@pytest.mark.parametrize("name", [b"raise", b"exit", b"nonsense", b"pair"])
def test_a_function_that_fails_costs_its_caller_one_eio(kernel: Kernel, name: bytes) -> None:
    assert kernel.ask(LOOKUP, name + b"\0") == (errno.EIO, b"")
    assert kernel.ask(LOOKUP, b"there\0") == (0, ENTRY)
    assert kernel.end() == 0


def test_a_read_that_gets_a_descriptor_is_answered_from_it(kernel: Kernel) -> None:
    assert kernel.ask(READ, struct.pack("<QQIIQII", 0, 0, 100, 0, 0, 0, 0), 9) == (0, b"lane")
    assert kernel.end() == 0


@pytest.mark.parametrize("opcode", [FSYNC, FSYNCDIR])
def test_a_sync_answers_when_it_is_done_and_leaves_no_descriptor(kernel: Kernel, opcode: int) -> None:
    for node, error in ((1, 0), (2, 0), (3, errno.EDQUOT)):
        assert kernel.ask(opcode, struct.pack("<QII", 0, 1, 0), node) == (error, b"")
    assert calls(kernel) == [(1, 1), (2, 1), (3, 1)]
    assert kernel.end() == 0


def test_entries_are_packed_as_far_as_they_fit(kernel: Kernel) -> None:
    def dirent(offset: int, name: bytes) -> bytes:
        return ENTRY + struct.pack("<QQII", 77, offset, len(name), 8) + name + bytes(-len(name) % 8)

    whole = dirent(1, b".") + dirent(3, b"name") + dirent(9, b"x" * 255)
    for room, answer in ((4096, whole), (len(whole), whole), (len(whole) - 1, whole[:320]), (100, b"")):
        assert kernel.ask(READDIRPLUS, struct.pack("<QQIIQII", 0, 7, room, 0, 0, 0, 0), 5) == (0, answer)
        assert calls(kernel)[-1] == (5, 7, room)
    assert kernel.end() == 0


@pytest.mark.parametrize(("node", "links"), [(900, 3), (901, 0), (902, 2)], ids=["given", "counted", "function"])
def test_attributes_come_from_the_descriptor_with_the_links_that_it_was_given(kernel: Kernel, node: int, links: int) -> None:
    """Of a file without a name fstat counts none; of the last node no links are known, so the function is asked."""
    error, answer = kernel.ask(GETATTR, bytes(16), node)
    ino, mode, shown_links = (*struct.unpack_from("<16xQ", answer), *struct.unpack_from("<76xII", answer))
    assert (error, ino, shown_links) == (0, node if node != 902 else 77, links)
    assert mode == (os.stat("/").st_mode if node == 900 else 0o100600 if node == 901 else 0o100644)
    assert len(calls(kernel)) == (node == 902)
    assert kernel.end() == 0


def test_attributes_are_changed_through_a_descriptor_that_writes_and_by_the_function_else(kernel: Kernel) -> None:
    wanted = struct.pack("<II60xI16x", 1, 0, 0o640)
    for node, asked in ((901, 0), (900, 1), (902, 2)):
        error, answer = kernel.ask(SETATTR, wanted, node)
        assert (error, len(answer)) == (0, len(ATTRIBUTES))
        assert len(calls(kernel)) == asked
    assert struct.unpack_from("<76xI", kernel.ask(GETATTR, bytes(16), 901)[1]) == (0o100640,)
    assert kernel.end() == 0


def test_a_list_that_is_known_to_be_empty_is_not_asked_for(kernel: Kernel) -> None:
    for size, answer in ((0, bytes(8)), (100, b"")):
        assert kernel.ask(LISTXATTR, struct.pack("<II", size, 0), 900) == (0, answer)
    assert kernel.ask(GETXATTR, bytes(8) + b"system.posix_acl_access\0", 900) == (errno.ENODATA, b"")
    assert kernel.ask(LISTXATTR, struct.pack("<II", 100, 0), 901) == (0, b"user.a\0user.b\0")
    assert calls(kernel) == [(901, 0)]
    assert kernel.end() == 0


def test_forgets_are_taken_and_not_answered(kernel: Kernel) -> None:
    kernel.send(FORGET, struct.pack("<Q", 3), 5)
    kernel.send(FORGET, b"", 5)
    kernel.send(BATCH_FORGET, struct.pack("<II4Q", 2, 0, 6, 1, 7, 2))
    kernel.send(BATCH_FORGET, struct.pack("<II2Q", 1 << 31, 0, 8, 1))  # more than there are
    kernel.send(BATCH_FORGET, b"")
    assert kernel.ask(GETATTR, bytes(16), 5) == (0, ATTRIBUTES)
    assert calls(kernel)[:4] == [(5, 3), (6, 1), (7, 2), (8, 1)]
    assert kernel.end() == 0


def test_noise_is_answered_once_each_and_never_ends_the_session(kernel: Kernel) -> None:
    seed = random.randrange(1 << 32)
    noise = random.Random(seed)
    answered = [LOOKUP, GETATTR, READLINK, SYMLINK, UNLINK, RMDIR, REMOVEXATTR]
    for _ in range(2000):
        size = noise.randrange(200)
        opcodes = answered if size < 100 else [*answered, SETATTR, MKNOD, MKDIR, RENAME2, LINK, SETXATTR, LISTXATTR, READDIRPLUS]
        kernel.ask(noise.choice(opcodes), noise.randbytes(size), noise.choice([0, 1, 7, (1 << 64) - 1]))
    assert kernel.ask(GETATTR, bytes(16)) == (0, ATTRIBUTES), f"seed {seed}"
    assert kernel.end() == 0
