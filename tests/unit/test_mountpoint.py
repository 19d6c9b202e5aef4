"""The mount point of an ordinary user, with a program in fusermount3's place."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest

from pyoverlay.fuse import mountpoint
from pyoverlay.fuse.mountpoint import UserMountPoint


@pytest.fixture
def point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[UserMountPoint]:
    monkeypatch.setattr(mountpoint, "fusermount", lambda: "/bin/true")
    with closing(UserMountPoint(os.fsencode(tmp_path))) as made:
        yield made


def test_each_of_two_threads_that_unmount_gets_its_answer(point: UserMountPoint) -> None:
    """A second signal unmounts lazily while the thread that the first one began may still wait for fusermount3: its answer was lost."""
    for _ in range(300):
        asks = [partial(point._unmount, b"m", None, lazily=lazily) for lazily in (False, True)]
        threads = [threading.Thread(target=ask, daemon=True) for ask in asks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert not any(thread.is_alive() for thread in threads)
