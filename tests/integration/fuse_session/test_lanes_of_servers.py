"""Data that the extension reads from a server, which can fail and can stop answering."""

from __future__ import annotations

import errno
import resource
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.fuse_session.test_raw_protocol import FILE, GETATTR, READ, UNCACHED, Kernel
from tests.integration.test_lower_that_hangs import Hung

pytestmark = [pytest.mark.wire, pytest.mark.root]

REMOTE = UNCACHED.replace("wire.lane(7, file, -1, -1, waits)", "wire.lane(7, file, -1, -1, 0, 1)")
UNLIMITED = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
NO_THREAD = (1 << 20, resource.RLIM_INFINITY)  # bytes of address space: no room for a stack


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Hung]:
    made = Hung(tmp_path)
    yield made
    made.close()


@pytest.mark.parametrize(("waits", "counted"), [(0, 1), (1, 10), (2, 10)], ids=["by a thread", "by the receiver", "in memory"])
def test_what_cannot_be_read_is_not_the_end_of_the_file(server: Hung, waits: int, counted: int) -> None:
    server.spoil(8192)
    with (server.base / "far" / "huge").open("rb") as file, Kernel(UNCACHED, file.fileno(), waits) as kernel:
        kernel.init()
        assert kernel.ask(READ, struct.pack("<QQIIQII", 0, 0, 16384, 0, 0, 0, 0), FILE) == (errno.EIO, b"")
        assert kernel.end() == counted


def test_where_no_thread_is_to_be_had_the_receiver_closes_nothing(server: Hung) -> None:
    """Closing asks the server too, whichever duplicate it is of."""
    with (server.base / "far" / "huge").open("rb") as file, Kernel(REMOTE, file.fileno(), 0) as kernel:
        kernel.init()
        kernel.ask(GETATTR, bytes(16))
        resource.prlimit(kernel.server.pid, resource.RLIMIT_AS, NO_THREAD)
        server.hold("flush")
        try:
            assert kernel.ask(READ, struct.pack("<QQIIQII", 0, 0, 4096, 0, 0, 0, 0), FILE) == (errno.ENOSYS, b"")
        finally:
            server.release()
        resource.prlimit(kernel.server.pid, resource.RLIMIT_AS, UNLIMITED)
        assert kernel.end() == 0
