"""Which daemon serves a mount that is in no list."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from pyoverlay.daemon import holders

RUNNING = (os.getpid(), os.getppid())


@pytest.fixture
def proc(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """/proc, where two processes run that may be daemons."""
    monkeypatch.setattr(holders, "_serves", lambda proc, pid, uid: pid in RUNNING)
    with holders.open_proc() as fd:
        yield fd


def opened(monkeypatch: pytest.MonkeyPatch, said: dict[int, list[bytes]]) -> None:
    monkeypatch.setattr(holders, "_descriptors", lambda proc, pid: iter(said[int(pid)]))


def test_a_descriptor_says_of_which_mount_it_is(proc: int, monkeypatch: pytest.MonkeyPatch) -> None:
    own, other = RUNNING
    opened(monkeypatch, {own: [b"pos:\t0\n", b"ino:\t90\nfuse_connection:\t42\n"], other: [b"fuse_connection:\t421\n"]})
    assert holders.daemons(proc, "0:42", 0) == [own]
    assert holders.daemons(proc, "0:421", 0) == [other]
    assert holders.daemons(proc, "0:4", 0) == [], "one that cannot be seen from here is none of these"


def test_before_linux_6_16_it_is_one_of_all(proc: int, monkeypatch: pytest.MonkeyPatch) -> None:
    opened(monkeypatch, {key: [b"pos:\t0\n", b"ino:\t90\n"] for key in RUNNING})
    assert sorted(holders.daemons(proc, "0:42", 0)) == sorted(RUNNING)
