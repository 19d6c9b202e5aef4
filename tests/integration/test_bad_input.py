"""What cannot be mounted: one line that names the path, the reason and the way out; exit 1; nothing mounted, nothing left behind."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from pyoverlay import mountinfo
from pyoverlay.daemon import locks, refusals
from pyoverlay.errors import Refusal
from pyoverlay.testing import mounts_below
from pyoverlay.testing.mounts import command, processes_marked
from tests.posix.check import fails


@dataclass(frozen=True)
class Place:
    """Directories to be mounted, none of which is."""

    top: Path

    @property
    def lower(self) -> Path:
        return self.top / "lower"

    @property
    def upper(self) -> Path:
        return self.top / "upper"

    @property
    def merged(self) -> Path:
        return self.top / "merged"

    @property
    def work(self) -> Path:
        return self.top / ".upper.pyoverlay-work"

    def names(self) -> list[str]:
        return sorted(str(path.relative_to(self.top)) for path in self.top.rglob("*"))


@pytest.fixture
def place(tmp_path: Path) -> Place:
    place = Place(tmp_path)
    for directory in (place.lower, place.upper, place.merged):
        directory.mkdir()
    return place


def mount(*arguments: str | Path, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command("mount", *arguments), check=False, capture_output=True, text=True, timeout=30, env=os.environ | (environment or {})
    )


def refused(place: Place, *arguments: str | Path, code: int | None, **environment: str) -> str:
    """The line that refuses `pyoverlay mount ARGUMENTS`, without the program's name; fails unless it left everything as it was."""
    before, processes = place.names(), processes_marked(os.environ["PYOVERLAY_TEST_MARK"])
    result = mount(*arguments, environment=environment)
    assert (result.returncode, result.stdout) == (1, ""), result.stderr
    assert result.stderr.startswith("pyoverlay: ")
    assert result.stderr.count("\n") == 1
    assert mounts_below(place.top) == []
    assert place.names() == before
    assert set(processes_marked(os.environ["PYOVERLAY_TEST_MARK"])) <= set(processes)
    line = result.stderr.removeprefix("pyoverlay: ").rstrip("\n")
    if code is not None:
        assert f"({os.strerror(code)})" in line
    return line


# ── what is missing ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "role"), [("lower", "lower"), ("upper", "upper"), ("merged", "mount point")], ids=["lower", "upper", "merged"]
)
def test_a_directory_that_does_not_exist(place: Place, name: str, role: str) -> None:
    (place.top / name).rmdir()
    line = refused(place, place.lower, place.upper, place.merged, code=errno.ENOENT)
    assert line.startswith(f"{place.top}/{name}: the {role} does not exist ")
    assert "mkdir" in line


@pytest.mark.parametrize(
    ("name", "role"), [("lower", "lower"), ("upper", "upper"), ("merged", "mount point")], ids=["lower", "upper", "merged"]
)
def test_a_file_in_the_place_of_a_directory(place: Place, name: str, role: str) -> None:
    (place.top / name).rmdir()
    (place.top / name).write_text("")
    line = refused(place, place.lower, place.upper, place.merged, code=errno.ENOTDIR)
    assert line.startswith(f"{place.top}/{name}: the {role} is no directory ")


def test_the_second_of_several_lowers_is_the_one_that_is_named(place: Place) -> None:
    line = refused(place, f"{place.lower}:/nonexistent:{place.lower}", place.upper, place.merged, code=errno.ENOENT)
    assert line.startswith("/nonexistent: the lower does not exist ")


def test_a_work_directory_that_does_not_exist(place: Place) -> None:
    line = refused(place, "--workdir", place.top / "w", place.lower, place.upper, place.merged, code=errno.ENOENT)
    assert line.startswith(f"{place.top}/w: the work directory does not exist ")


def test_a_path_is_printed_in_one_line_whatever_its_name(place: Place) -> None:
    line = refused(place, "/new\nline\x1b[31m\udcff", place.upper, place.merged, code=errno.ENOENT)
    assert line.startswith(r"/new\x0aline\x1b[31m\xff: ")


# ── what cannot be written ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def read_only(place: Place) -> Iterator[Path]:
    """A read-only file system with directories `upper` and `work`."""
    there = place.top / "read-only"
    there.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", there], check=True)
    (there / "upper").mkdir()
    (there / "work").mkdir()
    subprocess.run(["mount", "-o", "remount,ro", there], check=True)
    yield there
    subprocess.run(["umount", there], check=True)


def only_its_own_mount(place: Place, result: subprocess.CompletedProcess[str], there: Path) -> str:
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (1, "", 1)
    assert [mount.mount_point for mount in mounts_below(place.top)] == [str(there)]
    return result.stderr.removeprefix("pyoverlay: ")


@pytest.mark.root
def test_an_upper_on_a_read_only_file_system(place: Place, read_only: Path) -> None:
    line = only_its_own_mount(place, mount(place.lower, read_only / "upper", place.merged), read_only)
    assert line.startswith(f"{read_only}/upper: the upper is on a read-only file system (Read-only file system); ")


@pytest.mark.root
def test_a_work_directory_on_a_read_only_file_system(place: Place, read_only: Path) -> None:
    result = mount("--workdir", read_only / "work", place.lower, place.upper, place.merged)
    line = only_its_own_mount(place, result, read_only)
    assert line.startswith(f"{read_only}/work: the work directory is on a read-only file system (Read-only file system); ")


@pytest.mark.root
def test_an_upper_whose_file_system_has_no_extended_attributes(place: Place) -> None:
    """ext4 without user_xattr is no more; ramfs is in every kernel."""
    there = place.top / "ramfs"
    there.mkdir()
    subprocess.run(["mount", "-t", "ramfs", "none", there], check=True)
    try:
        (there / "upper").mkdir()
        line = only_its_own_mount(place, mount(place.lower, there / "upper", place.merged), there)
        assert os.listdir(there) == ["upper"]
    finally:
        subprocess.run(["umount", there], check=True)
    assert "takes no trusted.* extended attributes (Operation not supported); use ext4" in line


# ── how the directories lie to one another ──────────────────────────────────────────────────────────────────────────────────


def test_a_work_directory_on_another_file_system(place: Place, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = Path("/dev/shm")
    if other.stat().st_dev == place.upper.stat().st_dev:
        pytest.fail("this test wants /dev/shm to be a file system of its own")
    line = refused(place, "--workdir", other, place.lower, place.upper, place.merged, code=errno.EXDEV)
    assert line.startswith("/dev/shm: the work directory is on another file system than the upper ")


@pytest.mark.root
def test_a_work_directory_on_another_mount_of_the_same_file_system(place: Place) -> None:
    for name in ("bound", "plain"):
        (place.top / name).mkdir()
    subprocess.run(["mount", "--bind", place.top / "plain", place.top / "bound"], check=True)
    try:
        line = only_its_own_mount(
            place, mount("--workdir", place.top / "bound", place.lower, place.upper, place.merged), place.top / "bound"
        )
    finally:
        subprocess.run(["umount", place.top / "bound"], check=True)
    assert line.startswith(f"{place.top}/bound: the work directory is on another mount than the upper ")


@pytest.mark.root
def test_an_upper_that_is_the_root_of_its_file_system(place: Place) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "none", place.upper], check=True)
    try:
        line = only_its_own_mount(place, mount(place.lower, place.upper, place.merged), place.upper)
        assert not place.work.exists()
    finally:
        subprocess.run(["umount", place.upper], check=True)
    assert "is the root of its file system: make the upper and the work directory two directories in it" in line


def test_a_work_directory_inside_the_upper(place: Place) -> None:
    (place.upper / "work").mkdir()
    line = refused(place, "--workdir", place.upper / "work", place.lower, place.upper, place.merged, code=errno.EINVAL)
    assert line.startswith(f"{place.upper}/work: the work directory lies inside the upper ")


def test_an_upper_inside_the_work_directory(place: Place) -> None:
    line = refused(place, "--workdir", place.top, place.lower, place.upper, place.merged, code=errno.EINVAL)
    assert line.startswith(f"{place.upper}: the upper lies inside the work directory ")


@pytest.mark.parametrize("below", ["", "sub"])
def test_a_lower_inside_the_upper(place: Place, below: str) -> None:
    (place.upper / below).mkdir(exist_ok=True)
    line = refused(place, place.upper / below, place.upper, place.merged, code=errno.ELOOP)
    assert line.startswith(f"{place.upper / below}: the lower lies inside the upper {place.upper} ")


def test_a_lower_inside_the_work_directory(place: Place) -> None:
    work = place.top / "work"
    (work / "sub").mkdir(parents=True)
    line = refused(place, "--workdir", work, work / "sub", place.upper, place.merged, code=errno.ELOOP)
    assert line.startswith(f"{work}/sub: the lower lies inside the work directory {work} ")


@pytest.mark.root
def test_a_lower_inside_the_upper_by_a_bind_mount(place: Place) -> None:
    (place.upper / "sub").mkdir()
    subprocess.run(["mount", "--bind", place.upper / "sub", place.lower], check=True)
    try:
        line = only_its_own_mount(place, mount(place.lower, place.upper, place.merged), place.lower)
    finally:
        subprocess.run(["umount", place.lower], check=True)
    assert line.startswith(f"{place.lower}: the lower lies inside the upper {place.upper} ")


@pytest.mark.parametrize("inner", ["upper", "upper/sub"])
def test_a_mount_point_inside_the_upper(place: Place, inner: str) -> None:
    (place.top / inner).mkdir(exist_ok=True)
    line = refused(place, place.lower, place.upper, place.top / inner, code=errno.ELOOP)
    assert line.startswith(f"{place.top}/{inner}: the mount point lies inside the upper ")


def test_the_root_directory_as_the_mount_point(place: Place) -> None:
    line = refused(place, place.lower, place.upper, "/", code=errno.EINVAL)
    assert line.startswith("/: the root directory cannot be mounted over ")


# ── what somebody else uses ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def second(place: Place) -> Path:
    path = place.top / "second"
    path.mkdir()
    return path


@pytest.fixture
def mounted(place: Place) -> Iterator[Place]:
    (place.lower / "of_the_lower").touch()
    assert mount(place.lower, place.upper, place.merged).returncode == 0
    yield place
    assert subprocess.run(command("umount", place.merged), check=False, timeout=30).returncode == 0


def daemon_of(merged: Path) -> int:
    from pyoverlay import registry

    return next(record.pid for record in registry.live() if record.merged == os.fsencode(merged))


def test_an_upper_of_a_live_mount(mounted: Place, second: Path) -> None:
    result = mount(mounted.lower, mounted.upper, second)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == (
        f"pyoverlay: {mounted.upper}: the upper is already used by the mount at {mounted.merged} (pid {daemon_of(mounted.merged)})"
        " (Device or resource busy); unmount that first, or choose another directory\n"
    )


def test_a_mount_that_will_not_leave_by_itself_is_not_waited_for(mounted: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def wait(fd: int, patience: float) -> None:
        pytest.fail("it is waited for")

    monkeypatch.setattr(locks, "_wait", wait)
    fd = os.open(mounted.upper, os.O_RDONLY)
    with pytest.raises(locks.InUse, match=f"by the mount at {mounted.merged} "):
        locks.lock(fd)
    os.close(fd)


def test_a_work_directory_of_a_live_mount(mounted: Place, second: Path) -> None:
    other = mounted.top / "other"
    other.mkdir()
    result = mount("--workdir", mounted.work, mounted.lower, other, second)
    assert result.returncode == 1
    assert result.stderr.startswith(f"pyoverlay: {mounted.work}: the work directory is already used by the mount at {mounted.merged} ")


def test_the_upper_of_a_live_mount_may_be_a_lower_of_another(mounted: Place, second: Path) -> None:
    (mounted.merged / "new").write_text("seen")
    assert mount("-o", f"lowerdir={mounted.upper}:{mounted.lower}", second).returncode == 0
    assert (second / "new").read_text() == "seen"
    assert subprocess.run(command("umount", second), check=False, timeout=30).returncode == 0


def locked(path: Path) -> int:
    fd = os.open(path, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    return fd


def test_a_lock_that_is_let_go_in_time_is_waited_for(place: Place) -> None:
    """As of a predecessor that was unmounted and still syncs its upper."""
    fd = locked(place.upper)
    with subprocess.Popen(command("mount", place.lower, place.upper, place.merged), stderr=subprocess.PIPE) as process:
        wait_until_blocked_on_a_lock(place.upper)
        os.close(fd)
        assert process.wait(10) == 0
    assert subprocess.run(command("umount", place.merged), check=False, timeout=30).returncode == 0


def wait_until_blocked_on_a_lock(path: Path) -> None:
    """A waiter shows in /proc/locks as `->`; there is no event for it."""
    waiting = re.compile(rf"-> FLOCK .*:{path.stat().st_ino} ")
    deadline = time.monotonic() + 10
    while not waiting.search(Path("/proc/locks").read_text()):
        assert time.monotonic() < deadline, "nobody waits for the lock"
        os.sched_yield()


def test_a_lock_that_stays_is_not_waited_for_for_ever(place: Place) -> None:
    fd = locked(place.upper)
    line = refused(place, place.lower, place.upper, place.merged, code=errno.EBUSY)
    os.close(fd)
    assert line.startswith(f"{place.upper}: the upper is already used by process {os.getpid()} ")


@pytest.mark.root
@pytest.mark.parametrize("role", ["upper", "work"])
def test_a_directory_of_the_kernels_own_overlay(place: Place, second: Path, role: str) -> None:
    work = place.top / "work"
    work.mkdir()
    options = f"lowerdir={place.lower},upperdir={place.upper},workdir={work}"
    subprocess.run(["mount", "-t", "overlay", "-o", options, "none", place.merged], check=True)
    other = place.top / "other"
    other.mkdir()
    arguments = {"upper": (place.lower, place.upper, second), "work": ("--workdir", work, place.lower, other, second)}[role]
    try:
        line = only_its_own_mount(place, mount(*arguments), place.merged)
        assert not place.work.exists()
    finally:
        subprocess.run(["umount", place.merged], check=True)
    assert line == (
        f"{place.upper if role == 'upper' else work}: already the {role}dir of the kernel's overlay at {place.merged}"
        f" (Device or resource busy); umount {place.merged} first\n"
    )


@pytest.mark.root
@pytest.mark.parametrize("work", ["another", "the same"])
def test_the_kernels_overlay_over_our_live_upper_loses_nothing(mounted: Place, second: Path, work: str) -> None:
    """It looks at no lock of ours, mounts, and clears the work directory that it is given, which may be the one in use. What needs that
    fails from then on; what was written stays, and what needs none goes on.
    """
    for name in ("removed", "changed", "later"):
        (mounted.merged / name).write_text(name)
    workdir = mounted.work if work == "the same" else mounted.top / "work"
    workdir.mkdir(exist_ok=True)
    options = f"lowerdir={mounted.lower},upperdir={mounted.upper},workdir={workdir}"
    subprocess.run(["mount", "-t", "overlay", "-o", options, "none", second], check=True)
    try:
        (mounted.merged / "changed").write_text("once more")
        (mounted.merged / "removed").unlink()
        (mounted.merged / "new").write_text("new")
        if work == "the same":
            with fails(errno.ENOENT):
                (mounted.merged / "of_the_lower").unlink()
        else:
            (mounted.merged / "of_the_lower").unlink()
    finally:
        subprocess.run(["umount", second], check=True)
    assert {name: (mounted.upper / name).read_text() for name in ("changed", "later", "new")} == {
        "changed": "once more", "later": "later", "new": "new"
    }  # fmt: skip
    assert not (mounted.upper / "removed").exists()
    assert os.path.lexists(mounted.upper / "of_the_lower") == (work == "another")


# ── what an earlier mount left ──────────────────────────────────────────────────────────────────────────────────────────────


def test_a_volatile_mount_leaves_a_mark_that_refuses_the_next(place: Place) -> None:
    assert mount("-o", "volatile", place.lower, place.upper, place.merged).returncode == 0
    (place.merged / "file").write_text("x")
    assert subprocess.run(command("umount", place.merged), check=False, timeout=30).returncode == 0
    line = refused(place, place.lower, place.upper, place.merged, code=errno.EINVAL)
    marker = f"{place.work}/work/incompat/volatile"
    assert line.startswith(f"{place.work}: the last mount was volatile ")
    assert line.endswith(f"rm -r {marker}")
    assert os.listdir(marker) == ["dirty"]
    shutil.rmtree(marker)
    assert mount(place.lower, place.upper, place.merged).returncode == 0
    assert subprocess.run(command("umount", place.merged), check=False, timeout=30).returncode == 0


def test_a_volatile_mount_that_was_refused_has_marked_nothing(place: Place) -> None:
    """The mark stayed, and refused the next mount of an upper in which nothing had been volatile."""
    assert mount(place.lower, place.upper, place.merged).returncode == 0
    assert subprocess.run(command("umount", place.merged), check=False, timeout=30).returncode == 0
    line = refused(place, "-o", f"volatile,fsname={'x' * 5000}", place.lower, place.upper, place.merged, code=errno.EINVAL)
    assert line.startswith(f"{place.merged}: cannot be mounted over ")


def test_a_feature_that_nobody_here_knows_refuses_the_mount(place: Place) -> None:
    (place.work / "work/incompat/index2").mkdir(parents=True)
    line = refused(place, place.lower, place.upper, place.merged, code=errno.EINVAL)
    assert "made by an overlay with a feature unknown here: index2" in line


def test_a_symlink_in_the_place_of_the_default_work_directory(place: Place) -> None:
    place.work.symlink_to(place.top)
    line = refused(place, place.lower, place.upper, place.merged, code=errno.ELOOP)
    assert line.startswith(f"{place.work}: a symbolic link is in the place of the work directory ")


def test_a_default_work_directory_that_becomes_a_symlink(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody who may write beside the upper could have had root empty the directory `work` of another place."""
    monkeypatch.setattr(refusals, "_make_default_work", lambda path, undo: os.symlink(place.top, path))
    with ExitStack() as held:
        among = mountinfo.mounts()
        upper = refusals._directory(os.fsencode(place.upper), "upper", held, among)
        with pytest.raises(Refusal, match="the work directory is no directory"):
            refusals._work(None, upper, held, held, among)


@pytest.mark.root
def test_a_default_work_directory_of_somebody_else(place: Place) -> None:
    place.work.mkdir()
    os.chown(place.work, 65534, 65534)
    line = refused(place, place.lower, place.upper, place.merged, code=errno.EPERM)
    assert line.startswith(f"{place.work}: the work directory belongs to another user ")


def test_a_dead_mount_of_ours_says_what_to_do(place: Place) -> None:
    assert mount(place.lower, place.upper, place.merged).returncode == 0
    pid = daemon_of(place.merged)
    pidfd = os.pidfd_open(pid)
    os.kill(pid, signal.SIGKILL)
    try:
        wait_for(pidfd)
        result = mount(place.lower, place.upper, place.merged)
        assert result.returncode == 1
        assert result.stderr == (
            f"pyoverlay: {place.merged}: the mount point is a dead mount: its daemon is gone"
            f" (Transport endpoint is not connected); take it away first: umount -l {place.merged}\n"
        )
    finally:
        result = subprocess.run(command("umount", place.merged), check=False, capture_output=True, text=True, timeout=30)
    assert result.returncode == 0
    assert result.stderr == (
        f"pyoverlay: {place.merged}: its daemon had died before; unmounted, and what it had written is on disk\n"
    )
    assert mounts_below(place.top) == []
    assert mount(place.lower, place.upper, place.merged).returncode == 0
    assert subprocess.run(command("umount", place.merged), check=False, timeout=30).returncode == 0


def wait_for(pidfd: int) -> None:
    import select

    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    assert poll.poll(10_000), "the process did not end"
    os.close(pidfd)


# ── what the machine lacks ──────────────────────────────────────────────────────────────────────────────────────────────────


def without(place: Place, script: str) -> str:
    """As `refused`, in a mount namespace where `script` took something away."""
    words = " ".join(command("mount", place.lower, place.upper, place.merged))
    before = place.names()
    result = subprocess.run(["unshare", "-m", "sh", "-c", f"{script} {words}"], check=False, capture_output=True, text=True, timeout=30)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.count("\n") == 1
    assert place.names() == before
    return result.stderr.removeprefix("pyoverlay: ")


@pytest.mark.root
def test_a_machine_without_dev_fuse(place: Place) -> None:
    """In a container started without it."""
    line = without(place, "mount -t tmpfs none /dev && : > /dev/null &&")
    assert line.startswith("/dev/fuse: no FUSE here (No such file or directory); modprobe fuse; in a container add --device /dev/fuse")


@pytest.mark.root
def test_a_root_without_privilege(place: Place) -> None:
    if shutil.which("setpriv") is None:
        pytest.fail("this test wants setpriv, of util-linux")
    line = without(place, "exec setpriv --bounding-set=-sys_admin --inh-caps=-all --")
    assert line.startswith(f"{place.merged}: no privilege to mount (Operation not permitted); run it as root")


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ("nonsense", "unknown option"),
        ("n=1", "unknown option"),
        ("redirect_dir=maybe", "no such value"),
        ("nfs_export=on", "not implemented"),
    ],
)
def test_an_option_that_is_not_there(place: Place, option: str, reason: str) -> None:
    line = refused(place, "-o", option, place.lower, place.upper, place.merged, code=None)
    assert line.startswith(f"-o {option}: {reason}")


def test_a_log_file_that_cannot_be_written(place: Place) -> None:
    line = refused(place, "--log-file", "/nonexistent/log", place.lower, place.upper, place.merged, code=errno.ENOENT)
    assert line.startswith("/nonexistent/log: the log file cannot be written ")


def test_a_fifo_as_the_log_file_that_nobody_reads(place: Place) -> None:
    os.mkfifo(place.top / "fifo")
    line = refused(place, "--log-file", place.top / "fifo", place.lower, place.upper, place.merged, code=errno.ENXIO)
    assert line.startswith(f"{place.top}/fifo: the log file cannot be written ")


def test_a_daemon_that_cannot_even_start_is_told_in_one_line(place: Place) -> None:
    """A bug, or half an installation: here a pyfuse3 that raises when it is imported."""
    broken = place.top / "broken"
    broken.mkdir()
    (broken / "pyfuse3.py").write_text("raise ZeroDivisionError('broken on purpose')\n")
    path = os.pathsep.join([str(broken), *filter(None, sys.path)])
    line = refused(place, place.lower, place.upper, place.merged, code=None, PYTHONPATH=path, PYTHONDONTWRITEBYTECODE="1")
    assert line == f"{place.merged}: the daemon failed: ZeroDivisionError: broken on purpose"


def test_a_bug_before_the_mount_answers_is_told_in_one_line(place: Place) -> None:
    """It went to the log alone: the caller heard that the daemon had ended, and to try again with -f."""
    bug = "from pyoverlay.fuse.mountpoint import MountPoint\nMountPoint._attach = lambda self, fd, options: 1 / 0\n"
    (place.top / "bug").mkdir()
    (place.top / "bug/sitecustomize.py").write_text(bug)
    path = os.pathsep.join([str(place.top / "bug"), *filter(None, sys.path)])
    line = refused(place, place.lower, place.upper, place.merged, code=None, PYTHONPATH=path, PYTHONDONTWRITEBYTECODE="1")
    assert line == f"{place.merged}: the daemon failed: ZeroDivisionError: division by zero"


def test_a_refusal_in_the_foreground_is_the_same_line(place: Place) -> None:
    line = refused(place, "-f", place.lower, "/nonexistent", place.merged, code=errno.ENOENT)
    assert line.startswith("/nonexistent: the upper does not exist ")


def test_no_refusal_leaves_a_record(place: Place) -> None:
    from pyoverlay import registry

    directory = Path(registry.own_directory())
    refused(place, "/nonexistent", place.upper, place.merged, code=errno.ENOENT)
    records = [json.loads(file.read_text()) for file in directory.glob("*.json")] if directory.exists() else []
    assert [record for record in records if record["merged"] == str(place.merged)] == []
