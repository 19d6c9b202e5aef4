"""A daemon that may have few descriptors: what it had open it opens again, and nobody notices."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from pyoverlay.testing import Overlay, OverlayFactory, Tree
from tests.integration.looks import litter
from tests.integration.unprivileged import USER, as_user
from tests.posix.check import opened

pytestmark = pytest.mark.root

FEW, MANY = 256, 600
LOWER: Tree = {f"f{number}": b"x" * 5000 for number in range(MANY)}


@pytest.fixture(params=[FEW, 64])
def few(overlay: OverlayFactory, tmp_path: Path, request: pytest.FixtureRequest) -> Overlay:
    """A mount whose daemon may have so few descriptors, the hard limit included."""
    limited = tmp_path / "python"
    limited.write_text(f'#!/bin/sh\nulimit -n {request.param}\nexec {shlex.quote(sys.executable)} "$@"\n')
    limited.chmod(0o755)
    made = overlay(LOWER, mount=False)
    made.python = str(limited)
    made.mount()
    return made


@pytest.fixture
def descriptors(few: Overlay) -> Iterator[list[int]]:
    found = [os.open(few.merged / name, os.O_RDWR) for name in LOWER]
    yield found
    for fd in found:
        os.close(fd)


def _table(overlay: Overlay) -> tuple[int, int]:
    """How many descriptors the daemon's table has room for, and the highest that is in use."""
    (daemon,) = overlay.daemons()
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{daemon}/status").read_text().splitlines())
    return int(fields["FDSize"]), max(int(entry.name) for entry in Path(f"/proc/{daemon}/fd").iterdir())


def test_the_table_of_descriptors_is_wide_before_anybody_waits_for_it(overlay: OverlayFactory) -> None:
    """A process with threads waits for milliseconds each time that the kernel doubles its table."""
    mounted = overlay(LOWER)
    wide, highest = _table(mounted)
    with ExitStack() as held:  # open, or another suite that drops caches has the kernel forget them, and the daemon close them
        for name in LOWER:
            held.enter_context((mounted.merged / name).open("rb")).read()
        assert highest < MANY < _table(mounted)[1] < wide == _table(mounted)[0]


def test_more_files_are_open_than_the_daemon_may_keep_open(few: Overlay, descriptors: list[int]) -> None:
    for number, fd in enumerate(descriptors):
        os.pwrite(fd, b"%05d" % number, number)
    for number, fd in enumerate(descriptors):
        assert os.pread(fd, 5, number) == b"%05d" % number


def test_more_open_files_are_unlinked_than_the_daemon_may_hold(few: Overlay, descriptors: list[int]) -> None:
    """Each is held until the kernel forgets it, by a descriptor or by a name in the work directory, or its number would be another's."""
    for number, fd in enumerate(descriptors):
        os.pwrite(fd, b"%05d" % number, number)
        os.unlink(few.merged / f"f{number}")
    for number in range(MANY):
        (few.merged / f"new{number}").write_bytes(b"new")
    numbers = {os.stat(few.merged / f"new{number}").st_ino for number in range(MANY)}
    for number, fd in enumerate(descriptors):
        st = os.fstat(fd)
        assert (st.st_nlink, st.st_size) == (0, 5000)
        assert st.st_ino not in numbers
        assert os.pread(fd, 5, number) == b"%05d" % number
        os.pwrite(fd, b"again", 4000)
        assert os.pread(fd, 10, 3999) == b"xagainxxxx"


def test_nothing_of_what_was_held_stays(few: Overlay) -> None:
    for number in range(MANY):
        with opened(few.merged / f"made{number}", os.O_RDWR | os.O_CREAT) as fd:
            os.unlink(few.merged / f"made{number}")
            os.write(fd, b"gone soon")
    few.umount()
    assert litter(few) == []
    assert os.listdir(few.writable) == []


SCRIPT = """
ulimit -n {few}
$po mount lower upper merged
python3 -c '
import os
made = os.open("merged/new", os.O_CREAT | os.O_RDWR, 0o444)
os.write(made, b"one ")
closed = os.open("merged/f0", os.O_RDWR)
os.chmod("merged/f0", 0)
for number in range(1, {many}):
    with open(f"merged/f{{number}}", "r+") as file:
        file.write("other")
os.write(made, b"two")
os.pwrite(closed, b"closed", 0)
print(os.pread(made, 10, 0).decode(), os.pread(closed, 10, 0).decode())
'
$po umount merged
stat -c %a upper/new upper/f0
"""


def test_a_user_writes_what_was_made_read_only_after_the_daemon_let_go_of_it(home: Path) -> None:
    """As git does: open(O_CREAT | O_RDWR, 0444), and then write. A daemon without root opens such a file once, when it makes it."""
    for number in range(MANY):
        path = home / "lower" / f"f{number}"
        path.write_text("lower")
        os.chown(path, USER, USER)
    result = as_user(home, SCRIPT.format(few=FEW, many=MANY))
    assert (result.stdout, result.stderr) == ("one two closed\n444\n0\n", "")
