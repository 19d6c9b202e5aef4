"""A page that cannot be read is an error for who reads it, at the place where it is."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.looks import litter
from tests.integration.test_data_integrity import WRITEBACK, extension
from tests.integration.test_lower_that_hangs import Hung
from tests.posix.check import fails, opened

pytestmark = pytest.mark.root

CONTENT = b"0123456789abcdef" * (1 << 16)
SPOILT = 500_000
END = SPOILT // 4096 * 4096


@pytest.fixture(params=WRITEBACK)
def options(request: pytest.FixtureRequest) -> tuple[str, ...]:
    chosen: tuple[str, ...] = request.param
    return chosen


@pytest.fixture(params=[True, False], ids=["wire", "no-wire"])
def failing(request: pytest.FixtureRequest, options: tuple[str, ...], tmp_path: Path) -> Iterator[Hung]:
    """An overlay over a lower that cannot read one byte of `huge`."""
    with extension(loaded=request.param):
        made = Hung(tmp_path, *options)
    try:
        made.spoil(SPOILT)
        yield made
        assert litter(made.overlay) == []
    finally:
        made.close()


def test_a_file_does_not_end_where_it_cannot_be_read(failing: Hung) -> None:
    """Its size would be that from then on, and a copy of it no error; with writeback the rest would be zeros."""
    found = b""
    with opened(failing.merged / "huge", os.O_RDONLY) as fd:
        with fails(errno.EIO):
            while chunk := os.read(fd, 1 << 16):
                found += chunk
        assert found == CONTENT[:END]
        assert os.fstat(fd).st_size == len(CONTENT)
        assert os.pread(fd, 1 << 20, END + 4096) == CONTENT[END + 4096 :]
        failing.spoil(-1)
        assert os.pread(fd, 1 << 20, 0) == CONTENT
