"""The life of a mount's process: how it starts, what it holds, and that no way of ending it loses what was accepted."""

from __future__ import annotations

import fcntl
import mmap
import os
import re
import select
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pyoverlay import registry
from pyoverlay.registry import Record
from pyoverlay.testing import Overlay, OverlayFactory
from pyoverlay.testing.mounts import MARK, command
from tests.integration.unprivileged import FIND_PID, USER, as_user

MIB = 1 << 20


def record_of(overlay: Overlay) -> Record:
    return next(record for record in registry.live() if record.merged == os.fsencode(overlay.merged))


def daemon_of(overlay: Overlay) -> int:
    return record_of(overlay).pid


@contextmanager
def watched(pid: int) -> Iterator[select.poll]:
    """A poll that is ready once the process has ended."""
    pidfd = os.pidfd_open(pid)
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    try:
        yield poll
    finally:
        os.close(pidfd)


@contextmanager
def using(directory: Path) -> Iterator[int]:
    """A descriptor that keeps the mount busy. Of a directory: closing a file asks the daemon once more."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield fd
    finally:
        os.close(fd)


def end_of(poll: select.poll, seconds: float = 10) -> float:
    """Wait for the process; the seconds it took."""
    begin = time.perf_counter()
    assert poll.poll(seconds * 1000), f"the daemon has not ended within {seconds} s"
    return time.perf_counter() - begin


def logged(overlay: OverlayFactory, *layers: dict[str, object], options: tuple[str, ...] = ()) -> tuple[Overlay, Path]:
    """A mount and its log."""
    made = overlay(*layers, mount=False)  # type: ignore[arg-type]  # a tree literal
    log = made.merged.parent / "log"
    made.options = ("--log-file", str(log), *options)
    made.mount()
    return made, log


def wait_until(is_so: Callable[[], bool], seconds: float = 10) -> None:
    """For what has no event of its own."""
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, f"not so within {seconds} s"
        os.sched_yield()


def wait_for_line(log: Path, pattern: str, seconds: float = 10) -> str:
    """The first line of a log that matches, once it is there."""
    wait_until(lambda: re.search(pattern, log.read_text()) is not None, seconds)
    return next(line for line in log.read_text().splitlines() if re.search(pattern, line))


# ── being a daemon ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_daemon_holds_nothing_of_its_caller(overlay: OverlayFactory) -> None:
    made = overlay({}, mount=False)
    read_end, write_end = os.pipe()
    os.set_inheritable(write_end, True)
    with subprocess.Popen(
        command("mount", made.lower, made.writable, made.merged), cwd=made.merged.parent, close_fds=False,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {MARK: made.mark},
    ) as process:  # fmt: skip
        assert process.communicate(timeout=30) == (b"", b"")
    os.close(write_end)
    assert os.read(read_end, 1) == b"", "the daemon kept a descriptor that it inherited"
    os.close(read_end)
    pid = daemon_of(made)
    assert os.readlink(f"/proc/{pid}/cwd") == "/"
    assert [os.readlink(f"/proc/{pid}/fd/{number}") for number in range(3)] == ["/dev/null"] * 3
    assert os.getsid(pid) == pid


def test_the_daemon_is_not_given_its_layers_by_its_arguments(overlay: OverlayFactory) -> None:
    made = overlay()
    arguments = Path(f"/proc/{daemon_of(made)}/cmdline").read_bytes()
    assert os.fsencode(made.lower) not in arguments
    assert len(arguments) < 200


def test_the_daemon_may_open_as_many_files_as_the_machine_allows_it(overlay: OverlayFactory) -> None:
    made = overlay()
    limits = Path(f"/proc/{daemon_of(made)}/limits").read_text()
    (line,) = [line for line in limits.splitlines() if line.startswith("Max open files")]
    soft, hard = line.split()[3:5]
    assert soft == hard


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        ("pyoverlay.daemon.__main__, pyoverlay.daemon.mounting", {"click", "pyoverlay.cli"}),
        ("pyoverlay.cli.mount, pyoverlay.cli.umount", {"trio", "pyfuse3"}),
        ("pyoverlay.daemon.mount_program", {"trio", "pyfuse3", "click"}),
    ],
)
def test_no_process_loads_what_another_needs(modules: str, absent: set[str]) -> None:
    program = f"import {modules}, sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-P", "-c", program], check=True, capture_output=True, text=True).stdout.split()
    assert absent & set(loaded) == set()


def test_a_mount_is_listed_while_it_lives(overlay: OverlayFactory) -> None:
    made = overlay({}, {}, options=["-o", "noatime,fsname=data"])
    record = record_of(made)
    mount = made.mounted()
    assert mount is not None
    assert record.lowers == tuple(os.fsencode(lower) for lower in made.lowers)
    assert (record.upper, record.work) == (os.fsencode(made.writable), os.fsencode(made.work))
    assert record.options == ("noatime", "fsname=data")
    assert record.device == f"{mount.device[0]}:{mount.device[1]}"
    assert abs(record.started - time.time()) < 60
    made.umount()
    assert [other for other in registry.records() if other.id == record.id] == []


# ── unmounting ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("is_written", [False, True])
def test_after_a_plain_umount_the_daemon_is_gone_within_100_ms(overlay: OverlayFactory, is_written: bool) -> None:
    """The best of three: other work on the machine, and the disk's own time for a sync, are not what is measured."""
    made = overlay({"file": "x"}, mount=False)
    seconds = []
    for _ in range(3):
        made.mount()
        if is_written:
            (made.merged / "new").write_text("y")
        with watched(daemon_of(made)) as poll:
            subprocess.run([*(["umount"] if os.geteuid() == 0 else ["fusermount3", "-u"]), made.merged], check=True)
            seconds.append(end_of(poll))
    assert min(seconds) < 0.1, seconds
    if is_written:
        assert (made.writable / "new").read_text() == "y"


@contextmanager
def loop_ext4(directory: Path) -> Iterator[Path]:
    """An ext4 of its own at `directory`/disk, unmounted at the end unless the test did."""
    image, disk = directory / "image", directory / "disk"
    with image.open("wb") as file:
        file.truncate(64 * MIB)
    disk.mkdir()
    subprocess.run(["/sbin/mkfs.ext4", "-q", "-F", image], check=True)
    subprocess.run(["mount", "-o", "loop", image, disk], check=True)
    try:
        yield disk
    finally:
        if disk.is_mount():
            subprocess.run(["umount", disk], check=True)


@pytest.mark.root
@pytest.mark.parametrize("way", ["pyoverlay", "umount"])
def test_the_layers_file_system_can_be_unmounted_next(tmp_path: Path, way: str) -> None:
    with loop_ext4(tmp_path) as disk:
        for name in ("lower", "upper", "merged"):
            (disk / name).mkdir()
        made = Overlay((disk / "lower",), disk / "upper", disk / "merged")
        made.mount()
        (made.merged / "file").write_bytes(bytes(MIB))
        with watched(daemon_of(made)) as poll:
            if way == "pyoverlay":
                made.umount()
            else:
                subprocess.run(["umount", made.merged], check=True)
                end_of(poll)
        subprocess.run(["umount", disk], check=True)


def shut_down(file_system: Path) -> None:
    """EXT4_IOC_SHUTDOWN without flushing: from here on every write to the disk fails, as of one that was pulled out."""
    fd = os.open(file_system, os.O_RDONLY)
    fcntl.ioctl(fd, 0x8004587D, struct.pack("I", 2))
    os.close(fd)


@pytest.mark.root
def test_umount_reports_that_the_upper_could_not_be_synced(tmp_path: Path) -> None:
    (tmp_path / "lower").mkdir()
    (tmp_path / "merged").mkdir()
    with loop_ext4(tmp_path) as disk:
        (disk / "upper").mkdir()
        made = Overlay((tmp_path / "lower",), disk / "upper", tmp_path / "merged")
        made.mount()
        (made.merged / "file").write_bytes(bytes(MIB))
        shut_down(disk)
        result = subprocess.run(command("umount", made.merged), check=False, capture_output=True, text=True, timeout=30)
        assert made.mounted() is None
        assert result.returncode == 1
        assert result.stderr.startswith(f"pyoverlay: {made.merged}: unmounted, but the upper could not be synced (")
        assert result.stderr.count("\n") == 1
        assert [record for record in registry.records() if record.merged == os.fsencode(made.merged)] == []


# ── signals ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_unmounts_and_loses_no_dirty_write(overlay: OverlayFactory, number: int) -> None:
    """3,000,000 accepted bytes, of which none had reached the upper when the session was simply ended."""
    made = overlay()
    data = os.urandom(3_000_000)
    (made.merged / "file").write_bytes(data)
    with watched(daemon_of(made)) as poll:
        os.kill(daemon_of(made), number)
        end_of(poll)
    assert made.mounted() is None
    assert (made.writable / "file").read_bytes() == data


def test_sigterm_loses_nothing_of_a_shared_map_that_was_never_synced(overlay: OverlayFactory) -> None:
    made = overlay({"file": "x" * MIB})
    data = os.urandom(MIB)
    with (made.merged / "file").open("r+b") as file, mmap.mmap(file.fileno(), MIB) as pages:
        pages[:] = data
    with watched(daemon_of(made)) as poll:
        os.kill(daemon_of(made), signal.SIGTERM)
        end_of(poll)
    assert (made.writable / "file").read_bytes() == data


def test_sigterm_of_a_busy_mount_serves_its_users_until_the_last_has_gone(overlay: OverlayFactory) -> None:
    made, log = logged(overlay, {"file": "x" * MIB, "other": "of the lower"})
    pid = daemon_of(made)
    data = os.urandom(MIB)
    with watched(pid) as poll:
        with using(made.merged) as directory, (made.merged / "file").open("r+b") as file, mmap.mmap(file.fileno(), MIB) as pages:
            pages[:] = data
            os.kill(pid, signal.SIGTERM)
            line = wait_for_line(log, "WARNING")
            assert re.search(rf"{made.merged}: .*busy; held by .*\(pid {os.getpid()}\)", line)
            wait_until(lambda: made.mounted() is None)
            # syncfs(2) has begun to write the map; from Linux 6.18 on it does not wait for a FUSE daemon.
            copy = made.writable / "file"
            wait_until(lambda: copy.exists() and copy.read_bytes() == data)
            fd = os.open("other", os.O_RDONLY, dir_fd=directory)
            assert os.read(fd, 100) == b"of the lower"
            os.close(fd)
            pages[:3] = b"end"
            assert not poll.poll(0), "the daemon left while somebody used its mount"
        end_of(poll)
    assert (made.writable / "file").read_bytes() == b"end" + data[3:]


def test_stop_timeout_ends_a_mount_that_stays_in_use(overlay: OverlayFactory) -> None:
    made, log = logged(overlay, {"file": "x"}, options=("-o", "stop_timeout=0.3"))
    with watched(daemon_of(made)) as poll, using(made.merged):
        os.kill(daemon_of(made), signal.SIGTERM)
        end_of(poll)
    assert "still in use after 0 s" in log.read_text()
    assert made.mounted() is None


def test_a_second_sigterm_ends_a_busy_mount_at_once(overlay: OverlayFactory) -> None:
    made, log = logged(overlay, {"file": "x"})
    pid = daemon_of(made)
    with watched(pid) as poll, using(made.merged) as directory:
        os.kill(pid, signal.SIGTERM)
        wait_for_line(log, "detached")
        os.kill(pid, signal.SIGTERM)
        end_of(poll)
        assert "still in use" not in log.read_text(), "it has waited for the end of --stop-timeout"
        with pytest.raises(OSError, match="not connected"):
            os.statvfs(directory)
    assert made.mounted() is None


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """A daemon that answers nobody."""
    os.kill(pid, signal.SIGSTOP)
    while not registry.is_stopped(pid):  # the signal is sent to another process: it stops when it is scheduled
        os.sched_yield()
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def umount(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command("umount", *arguments), check=False, capture_output=True, text=True, timeout=30)


def test_umount_of_a_mount_whose_daemon_is_stopped_says_so_and_lazily_works_without_it(overlay: OverlayFactory) -> None:
    made = overlay({"file": "x"})
    (made.merged / "new").write_text("x")
    pid = daemon_of(made)
    with watched(pid) as poll:
        with stopped(pid):
            result = umount(made.merged)
            assert result.returncode == 1
            assert result.stderr == (
                f"pyoverlay: {made.merged}: its daemon (pid {pid}) is stopped and cannot sync it (Device or resource busy);"
                f" kill -CONT {pid}, or detach it with --lazy\n"
            )
            assert umount("--lazy", made.merged).returncode == 0
            assert made.mounted() is None
        end_of(poll)
    assert (made.writable / "new").read_text() == "x"


def test_umount_of_a_mount_whose_daemon_was_killed_keeps_what_it_had_written(overlay: OverlayFactory) -> None:
    made = overlay({"file": "x"})
    (made.merged / "new").write_text("written")
    with watched(daemon_of(made)) as poll:
        os.kill(daemon_of(made), signal.SIGKILL)
        end_of(poll)
    result = umount(made.merged)
    assert result.returncode == 0
    assert result.stderr == f"pyoverlay: {made.merged}: its daemon had died before; unmounted, and what it had written is on disk\n"
    assert made.mounted() is None
    assert all(record.merged != os.fsencode(made.merged) for record in registry.records())
    assert (made.writable / "new").read_text() == "written"


def test_the_background_does_not_mind_a_hangup(overlay: OverlayFactory) -> None:
    made = overlay({"file": "x"})
    os.kill(daemon_of(made), signal.SIGHUP)
    assert (made.merged / "file").read_text() == "x"
    assert made.mounted() is not None


def test_given_up_before_it_answers_leaves_nothing(overlay: OverlayFactory) -> None:
    made = overlay({}, mount=False)
    arguments = command("mount", "--wait", "0", made.lower, made.writable, made.merged)
    result = subprocess.run(arguments, check=False, capture_output=True, text=True, timeout=30, env=os.environ | {MARK: made.mark})
    assert result.returncode == 1
    assert result.stderr == f"pyoverlay: {made.merged}: the mount did not answer within 0 s; given up\n"
    assert (made.mounted(), made.daemons(), made.work.exists()) == (None, [], False)


# ── in the foreground ───────────────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def foreground(made: Overlay) -> Iterator[subprocess.Popen[str]]:
    """`pyoverlay mount -f`, once its mount answers."""
    arguments = command("mount", "-f", made.lower, made.writable, made.merged)
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, env=os.environ | {MARK: made.mark}) as process:
        wait_until(lambda: process.poll() is not None or any(record.pid == process.pid for record in registry.live()))
        assert process.poll() is None, process.stderr and process.stderr.read()
        yield process
        process.kill()


def test_in_the_foreground_the_command_is_the_daemon_until_it_is_unmounted(overlay: OverlayFactory) -> None:
    made = overlay({"file": "x"}, mount=False)
    with foreground(made) as process:
        assert (made.merged / "file").read_text() == "x"
        made.umount()
        assert process.wait(10) == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_in_the_foreground_interrupt_and_hangup_unmount(overlay: OverlayFactory, number: int) -> None:
    made = overlay({}, mount=False)
    with foreground(made) as process:
        (made.merged / "file").write_text("kept")
        process.send_signal(number)
        assert process.wait(10) == 0
        assert process.stderr is not None
        assert signal.Signals(number).name in process.stderr.read()
    assert made.mounted() is None
    assert (made.writable / "file").read_text() == "kept"


# ── over itself ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

# An absolute path that the daemon opens once its mount answers could lead through that mount: this ends it at once, with a log line.
NO_PATHS = {"PYOVERLAY_FORBID_PATHS": "1"}


def use(merged: Path) -> None:
    """Some of everything, by a process that may hang."""
    script = (
        "cd {0} && ls -laR . >/dev/null && echo new > new && echo more >> file && cat file && mkdir d && mv new d/ && ln -s x link"
        " && chmod 600 file && rm -r d && df . >/dev/null && find . -type f -exec cat {{}} + >/dev/null"
    )
    subprocess.run(["sh", "-c", script.format(shlex.quote(str(merged)))], check=True, timeout=20, stdout=subprocess.DEVNULL)


def test_no_path_is_opened_once_the_mount_answers(overlay: OverlayFactory) -> None:
    made, log = logged(overlay, {"file": "x"})
    made.umount()
    made.environment = os.environ | NO_PATHS
    made.mount()
    use(made.merged)
    assert made.daemons() != [], log.read_text()
    made.umount()
    assert "after the mount answered" not in log.read_text()


def test_the_seam_that_forbids_paths_does_forbid_them(overlay: OverlayFactory) -> None:
    """Else the test above would prove nothing: busy, the daemon asks /proc who holds it, by an absolute path if that were a bug."""
    program = (
        "import os\n"
        "from pyoverlay.daemon.mounting import forbid_paths\n"
        "os.environ['PYOVERLAY_FORBID_PATHS'] = '1'; forbid_paths()\n"
        "fd = os.open('.', os.O_PATH); os.close(os.open('tmp', os.O_RDONLY, dir_fd=fd)); print('relative', flush=True)\n"
        "open('/proc/self/stat')\n"
        "print('absolute')"
    )
    result = subprocess.run([sys.executable, "-P", "-c", program], check=False, capture_output=True, text=True, cwd="/")
    assert (result.returncode, result.stdout) == (99, "relative\n")


@pytest.mark.root
def test_lowers_whose_paths_are_gone_are_read_on(overlay: OverlayFactory, tmp_path: Path) -> None:
    """podman mounts a container's lowers, idmapped, for as long as its mount_program runs, and no longer."""
    mounted = overlay({}, {"top": "of the lower", "d": {"file": "below"}}, mount=False)
    bound = tmp_path / "bound"
    bound.mkdir()
    subprocess.run(["mount", "--bind", mounted.lowers[1], bound], check=True)
    mounted.lowers = (mounted.lowers[0], bound)
    try:
        mounted.mount()
    finally:
        subprocess.run(["umount", bound], check=True)
    bound.rmdir()
    assert (mounted.merged / "d/file").read_text() == "below"
    (mounted.merged / "top").write_text("changed")
    assert sorted(os.listdir(mounted.merged)) == ["d", "top"]


def test_a_mount_over_its_own_lower(overlay: OverlayFactory) -> None:
    made = overlay({"file": "of the lower\n"}, mount=False)
    itself = Overlay(made.lowers, made.upper, made.lower, environment=os.environ | NO_PATHS, mark=made.mark)
    itself.mount()
    assert (itself.merged / "file").read_text() == "of the lower\n"
    use(itself.merged)
    itself.umount()
    assert (made.writable / "file").read_text() == "of the lower\nmore\n"


@pytest.mark.root  # a user's mount has a second process
@pytest.mark.parametrize("way", ["pyoverlay", "umount", "SIGTERM", "busy SIGTERM"])
def test_a_mount_over_the_daemons_own_code(overlay: OverlayFactory, tmp_path: Path, way: str) -> None:
    """The package, and the interpreter's own library, are loaded from a tree that the daemon then mounts over."""
    made = overlay({}, mount=False)
    code = tmp_path / "code"
    package = Path(registry.__file__).parent
    shutil.copytree(package, code / "pyoverlay", ignore=shutil.ignore_patterns("__pycache__", ".mypy_cache"))
    (code / "file").write_text("x\n")
    environment = os.environ | NO_PATHS | {"PYTHONPATH": str(code), "PYTHONDONTWRITEBYTECODE": "1"}
    itself = Overlay((code,), made.upper, code, options=("--log-file", str(tmp_path / "log")), environment=environment, mark=made.mark)
    itself.mount()
    (pid,) = itself.daemons()
    assert str(code) in Path(f"/proc/{pid}/environ").read_text()
    use(code)
    with watched(pid) as poll:
        if way == "pyoverlay":
            itself.environment = None
            itself.umount()
        elif way == "umount":
            subprocess.run(["umount", code], check=True, timeout=10)
        else:
            with (code / "file").open() if way == "busy SIGTERM" else (tmp_path / "log").open():
                os.kill(pid, signal.SIGTERM)
                wait_for_line(tmp_path / "log", "detached" if way == "busy SIGTERM" else "SIGTERM")
        end_of(poll)
    assert itself.mounted() is None
    assert (made.writable / "file").read_text() == "x\nmore\n"
    assert "after the mount answered" not in (tmp_path / "log").read_text()


def test_a_traceback_reads_no_source_file(tmp_path: Path) -> None:
    """linecache did, through the mount that the same thread had to answer: nobody could kill that."""
    program = (
        "import logging, os, sys, threading, gc\n"
        "from pyoverlay.daemon import logs, mounting\n"
        f"logs.set_up(foreground=False, file={str(tmp_path / 'log')!r}, level=10)\n"
        "logs.stay_off_source_files()\n"
        "os.environ['PYOVERLAY_FORBID_PATHS'] = '1'; mounting.forbid_paths()\n"
        "def fail(): raise KeyError('on purpose')\n"
        "try: fail()\n"
        "except KeyError: logging.getLogger('x').exception('caught')\n"
        "thread = threading.Thread(target=fail); thread.start(); thread.join()\n"
        "class Unraisable:\n"
        "    def __del__(self): fail()\n"
        "Unraisable(); gc.collect()\n"
        "fail()\n"
    )
    result = subprocess.run([sys.executable, "-P", "-c", program], check=False, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (1, "")
    log = (tmp_path / "log").read_text()
    assert "after the mount answered" not in log
    assert log.count("KeyError: 'on purpose'") == 4
    assert log.count("in fail") == 4


# ── without root ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.root
def test_an_ordinary_user_mounts_writes_and_unmounts(home: Path) -> None:
    (home / "lower/file").write_text("of the lower\n")
    result = as_user(
        home,
        "$po mount lower upper merged; cat merged/file; echo new > merged/new; rm merged/file; grep $PWD/merged /proc/mounts;"
        " ls run/pyoverlay/*.json | wc -l; $po umount merged; ls upper; ls run/pyoverlay | wc -l",
    )
    assert result.stderr == ""
    content, mount, listed, *upper, left = result.stdout.splitlines()
    assert (result.returncode, content, listed, left) == (0, "of the lower", "1", "0")
    assert upper == ["file", "new"]
    assert {"nosuid", "nodev", f"user_id={USER}"} <= set(mount.split()[3].split(","))
    assert "allow_other" not in mount


@pytest.mark.root
def test_an_ordinary_user_changes_files_of_root_where_all_is_squashed_to_that_user(home: Path) -> None:
    (home / "lower/file").write_text("roots\n")
    result = as_user(
        home,
        "$po mount -o squash_to_uid=$(id -u),squash_to_gid=$(id -g) lower upper merged; echo users >> merged/file; cat merged/file;"
        " chmod 600 merged/file; $po umount merged; stat -c '%U %a' upper/file",
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines()[:2] == ["roots", "users"]
    assert result.stdout.splitlines()[2].endswith(" 600")


@pytest.mark.root
def test_an_ordinary_user_mounts_many_at_once(home: Path) -> None:
    (home / "lower/file").write_text("of the lower\n")
    result = as_user(
        home,
        "mkdir u1 u2 m1 m2; printf 'lower u1 m1\nlower u2 m2\n' | $po mount --from -; cat m1/file m2/file; echo new > m1/new; ls m2;"
        " ls run/pyoverlay/*.json | wc -l; $po umount m1 m2; ls u1 u2; grep -c $PWD /proc/mounts || true",
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines() == ["of the lower", "of the lower", "file", "2", "u1:", "new", "", "u2:", "0"]


@pytest.mark.root
def test_a_users_daemon_unmounts_on_sigterm(home: Path) -> None:
    """fusermount3 does it, started before the mount: a daemon that gave up set-user-id programs could not."""
    result = as_user(
        home,
        f"$po mount lower upper merged; echo data > merged/file; {FIND_PID}"
        " kill $pid; while kill -0 $pid 2>/dev/null; do :; done; cat upper/file; grep -c $PWD/merged /proc/mounts || true",
    )
    assert (result.returncode, result.stderr, result.stdout) == (0, "", "data\n0\n")


@pytest.mark.root
@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("$po mount lower upper /usr", "/usr: fusermount3: user has no write access to mountpoint /usr"),
        ("$po mount -o suid lower upper merged", "-o suid,dev: only root's mounts may have them (Operation not permitted); leave them out"),
        ("$po mount -o allow_other lower upper merged", "add user_allow_other to /etc/fuse.conf, or leave allow_other out"),
        ("PATH=$PWD $po mount lower upper merged", "fusermount3: not found, and only root mounts without it"),
    ],
)
def test_what_an_ordinary_user_may_not_do_is_refused_in_one_line(home: Path, script: str, message: str) -> None:
    result = as_user(home, script)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr
    assert [path.name for path in home.iterdir() if "pyoverlay-work" in path.name] == []


@pytest.mark.root
def test_root_of_a_user_namespace_mounts_by_itself(home: Path) -> None:
    (home / "lower/file").write_text("of the lower\n")
    os.chown(home / "lower/file", USER, USER)  # what has no owner in the namespace cannot be removed in it
    result = as_user(
        home,
        "unshare -Urm sh -ec '$po mount lower upper merged; cat merged/file; rm merged/file; echo new > merged/new; ls merged;"
        " $po umount merged'; ls upper",
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.split() == ["of", "the", "lower", "new", "file", "new"]
