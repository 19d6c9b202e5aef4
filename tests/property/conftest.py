"""Where sequences run: in memory, where nothing waits for a disk, and in a mount namespace that nobody copies."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.posix.system_calls import mount, private_mounts, umount


@pytest.fixture
def apart(tmp_path: Path) -> Iterator[Path]:
    """An empty tmpfs that no other process sees. The kernel's overlay refuses an upper again (EBUSY), and a daemon of ours stays, for as
    long as any mount namespace has the mount; each container that starts on the machine makes one.
    """
    with private_mounts():
        mount("tmpfs", tmp_path, "tmpfs")
        try:
            yield tmp_path
        finally:
            umount(tmp_path)
