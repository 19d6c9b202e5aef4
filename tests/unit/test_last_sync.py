"""The sync when a mount has ended: what becomes of it is what `pyoverlay umount` is told."""

from __future__ import annotations

import errno
import os
from types import SimpleNamespace
from typing import Any

import pytest

from pyoverlay.core.policy import Fsync, Policy
from pyoverlay.daemon import mounting


class Ended:
    """A mount that has ended with something to sync, which raises that. entry: its line in the registry."""

    is_dirty = True

    def __init__(self, error: BaseException | None) -> None:
        self.error = error
        self.entry: Any = SimpleNamespace(record=SimpleNamespace(merged=b"/merged"), failure=None)

    def sync(self) -> None:
        if self.error is not None:
            raise self.error

    def end(self) -> None:
        view: Any = self
        mounting._sync(view, Policy(fsync=Fsync.ORDERED), self.entry)


def test_one_that_succeeds_leaves_nothing_to_tell() -> None:
    ended = Ended(None)
    ended.end()
    assert ended.entry.failure is None


def test_one_that_fails_is_told_with_its_reason() -> None:
    ended = Ended(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    ended.end()
    assert ended.entry.failure == "the upper could not be synced (No space left on device): the last changes may be lost"


def test_a_bug_in_it_is_not_taken_for_a_success() -> None:
    ended = Ended(NameError("no such name"))
    with pytest.raises(NameError):
        ended.end()
    assert ended.entry.failure == "the upper was not synced: the last changes may be lost"
