"""Mounts over trees that hold the mount itself: the whole machine, the lower, the daemon's own code."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pyoverlay.testing import Overlay, make_tree
from pyoverlay.testing.mounts import command
from tests.integration.looks import WHITEOUT, shape
from tests.posix.check import fails
from tests.posix.system_calls import mount, umount

pytestmark = pytest.mark.root


@contextmanager
def mounted(*lowers: Path, upper: Path, merged: Path, options: tuple[str, ...] = ()) -> Iterator[Overlay]:
    overlay = Overlay(lowers, upper, merged, options)
    overlay.mount()
    try:
        yield overlay
    finally:
        overlay.close()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    for name in ("upper", "merged"):
        (tmp_path / name).mkdir()
    return tmp_path


def test_the_root_of_the_machine_as_the_lower_with_upper_and_merged_inside_it(place: Path) -> None:
    if os.stat("/").st_dev != os.stat(place).st_dev:
        pytest.skip("the tests' directory is not on the file system of /")  # then it does not show below / either
    with mounted(Path("/"), upper=place / "upper", merged=place / "merged"):
        view = place / "merged"
        inside = view / str(place).lstrip("/")
        assert sorted(os.listdir(view)) == sorted(os.listdir("/"))
        assert os.listdir(inside / "upper") == []
        assert os.listdir(inside / ".upper.pyoverlay-work") == []
        assert os.listdir(inside / "merged") == []
        assert (view / "etc" / "passwd").read_bytes() == Path("/etc/passwd").read_bytes()
        (view / "etc" / "made-by-a-test").write_bytes(b"in the view only")
        os.chmod(view / "etc" / "hostname", 0o600)
        assert not Path("/etc/made-by-a-test").exists()
        assert sorted(shape(place / "upper")["etc"]) == ["hostname", "made-by-a-test"]
        shown = subprocess.run(["chroot", view, "/bin/cat", "/etc/made-by-a-test"], check=True, capture_output=True).stdout
        assert shown == b"in the view only"


def test_submounts_of_a_lower_do_not_show(place: Path) -> None:
    lower = place / "lower"
    make_tree(_made(lower), {"sub": {"covered": b"covered"}, "f": b"f"})
    mount("tmpfs", lower / "sub", "tmpfs")
    try:
        (lower / "sub" / "on-the-submount").write_bytes(b"")
        with mounted(lower, upper=place / "upper", merged=place / "merged"):
            assert shape(place / "merged") == {"sub": {"covered": b"covered"}, "f": b"f"}
            (place / "merged" / "sub" / "new").write_bytes(b"new")
            assert shape(place / "merged")["sub"] == {"covered": b"covered", "new": b"new"}
            assert shape(place / "upper") == {"sub": {"new": b"new"}}
        assert os.listdir(lower / "sub") == ["on-the-submount"]
    finally:
        umount(lower / "sub")


def _made(directory: Path) -> Path:
    directory.mkdir()
    return directory


def test_proc_and_sys_below_the_root_show_empty(place: Path) -> None:
    with mounted(Path("/"), upper=place / "upper", merged=place / "merged"):
        assert os.listdir(place / "merged" / "proc") == []
        assert os.listdir(place / "merged" / "sys") == []


def test_merged_over_the_lower_itself(place: Path) -> None:
    """`pyoverlay mount D U D` is what people do first."""
    lower = place / "lower"
    make_tree(_made(lower), {"f": b"lower", "gone": b"", "d": {"g": b"g"}})
    with mounted(lower, upper=place / "upper", merged=lower):
        (lower / "f").write_bytes(b"changed")
        os.unlink(lower / "gone")
        (lower / "d" / "new").write_bytes(b"new")
        assert shape(lower) == {"f": b"changed", "d": {"g": b"g", "new": b"new"}}
        assert shape(place / "upper") == {"f": b"changed", "gone": WHITEOUT, "d": {"new": b"new"}}
    assert shape(lower) == {"f": b"lower", "gone": b"", "d": {"g": b"g"}}
    with mounted(lower, upper=place / "upper", merged=lower):
        assert shape(lower) == {"f": b"changed", "d": {"g": b"g", "new": b"new"}}


def test_upper_and_merged_inside_the_lower(place: Path) -> None:
    lower = place / "lower"
    make_tree(_made(lower), {"f": b"f", "upper": {"seen": b"below"}, "merged": {"under": b"under"}, "d": {}})
    with mounted(lower, upper=lower / "upper", merged=lower / "merged"):
        view = lower / "merged"
        # The upper is not to be seen twice; what the mount point covers is.
        assert shape(view)["f"] == b"f"
        assert shape(view)["upper"] == {}
        assert shape(view)["merged"] == {"under": b"under"}
        assert (view / "seen").read_bytes() == b"below"
        (view / "d" / "new").write_bytes(b"new")
        (view / "merged" / "new").write_bytes(b"new")
        assert shape(view)["merged"] == {"under": b"under", "new": b"new"}
        assert shape(lower / "upper") == {"seen": b"below", "d": {"new": b"new"}, "merged": {"new": b"new"}}
    assert shape(lower / "merged") == {"under": b"under"}


def test_a_mount_over_the_code_of_its_own_daemon(place: Path) -> None:
    """The daemon must not read its own modules through itself: a traceback that shows source lines would wait for ever."""
    import shutil

    import pyoverlay

    assert pyoverlay.__file__ is not None
    code = place / "code"
    shutil.copytree(Path(pyoverlay.__file__).parent, code / "pyoverlay", ignore=shutil.ignore_patterns("__pycache__"))
    environment = os.environ | {"PYTHONPATH": str(code), "PYTHONDONTWRITEBYTECODE": "1"}
    overlay = Overlay((code,), place / "upper", code)
    run = [sys.executable, "-P", "-m", "pyoverlay"]
    try:
        subprocess.run([*run, "mount", code, place / "upper", code], env=environment, check=True, timeout=20)
        (code / "new").write_bytes(b"new")
        assert (code / "pyoverlay" / "__init__.py").read_bytes() == Path(pyoverlay.__file__).read_bytes()
        with fails(errno.ENOENT):
            os.stat(code / "missing")
        os.rename(code / "pyoverlay", code / "moved")
        assert shape(place / "upper")["new"] == b"new"
        subprocess.run(command("umount", str(code)), check=True, timeout=20)
    finally:
        overlay.close()
    assert sorted(os.listdir(code)) == ["pyoverlay"]


def test_a_mount_over_the_interpreter_that_runs_it(place: Path) -> None:
    """/usr over itself, in a mount namespace of its own so that the rest of the machine does not see it."""
    script = f"""
set -e
mount --make-rprivate /
{sys.executable} -P -m pyoverlay mount /usr {place}/upper /usr
touch /usr/made-by-a-test
rm /usr/bin/yes
test ! -e /usr/bin/yes
/usr/bin/env true
{sys.executable} -P -m pyoverlay umount --lazy /usr
test -e /usr/bin/yes
test ! -e /usr/made-by-a-test
"""
    subprocess.run(["unshare", "--mount", "sh", "-c", script], check=True, timeout=50)
    assert shape(place / "upper") == {"made-by-a-test": b"", "bin": {"yes": WHITEOUT}}


def test_a_directory_that_is_a_mount_point_inside_the_upper(place: Path) -> None:
    """What is mounted below the upper does not show either: all of a mount's changes are on one file system."""
    make_tree(place / "upper", {"sub": {"covered": b"covered"}})
    mount("tmpfs", place / "upper" / "sub", "tmpfs")
    try:
        (place / "upper" / "sub" / "on-the-submount").write_bytes(b"")
        lower = _made(place / "lower")
        with mounted(lower, upper=place / "upper", merged=place / "merged"):
            assert shape(place / "merged") == {"sub": {"covered": b"covered"}}
    finally:
        umount(place / "upper" / "sub")


def test_the_layers_file_system_can_be_unmounted_right_after_the_view(place: Path) -> None:
    disk = _made(place / "disk")
    mount("tmpfs", disk, "tmpfs")
    try:
        for name in ("lower", "upper", "merged"):
            (disk / name).mkdir()
        (disk / "lower" / "f").write_bytes(b"f")
        with mounted(disk / "lower", upper=disk / "upper", merged=disk / "merged") as overlay:
            (disk / "merged" / "f").write_bytes(b"changed")
            overlay.umount()
    finally:
        umount(disk)
