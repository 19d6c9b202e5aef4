"""What a user has closed to everybody, by its mode, is the user's all the same: it can be looked at, opened again, moved and removed.

A daemon with no more rights than its user must manage what the kernel has allowed.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.integration.unprivileged import USER, as_user

pytestmark = pytest.mark.root

SCRIPT = """
$po mount lower upper merged
cd merged
mkdir new new/inside
chmod 0 new empty lower
chmod 0300 full
touch full/more
mv full/file full/moved
cd ..
$po umount merged
$po mount lower upper merged
cd merged
stat -c '%n %a' *
chmod 700 lower
ls lower
chmod 0 lower
getfattr -d -m - empty full
rmdir empty
mv new moved
chmod 700 moved full
ls moved full
touch -d @1 moved
rm -r moved full
chmod 700 lower
rm -r lower
mkdir -m 555 lower
chmod 700 readonly
rm -r readonly
ls -A
cd ..
$po umount merged
"""

SHOWN = """empty 0
full 300
lower 0
new 0
readonly 555
file
full:
more
moved

moved:
inside
lower
"""


@pytest.fixture
def closed(home: Path) -> Path:
    for name, mode in (("empty", 0o755), ("full", 0o755), ("lower", 0o755), ("readonly", 0o555)):
        directory = home / "lower" / name
        directory.mkdir()
        os.chown(directory, USER, USER)
        if name != "empty":
            (directory / "file").write_text("lower")
            os.chown(directory / "file", USER, USER)
        os.chmod(directory, mode)
    return home


def test_a_closed_directory_is_still_its_owners(closed: Path) -> None:
    result = as_user(closed, SCRIPT)
    assert (result.stdout, result.stderr) == (SHOWN, "")


def test_a_directory_that_is_closed_in_the_lower_can_be_looked_at(closed: Path) -> None:
    os.chmod(closed / "lower" / "full", 0)
    result = as_user(closed, "$po mount lower upper merged; stat -c %a merged/full; ls merged/full || true; $po umount merged")
    assert (result.stdout, result.stderr) == ("0\n", "ls: cannot open directory 'merged/full': Permission denied\n")
