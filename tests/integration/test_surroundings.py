"""What happens around a mount unasked: no room for its record, a directory above it renamed, streams closed, limits inherited."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pyoverlay import registry
from pyoverlay.testing import Overlay, OverlayFactory, mounts_below
from pyoverlay.testing.mounts import MARK, MountRefusedError, command, wait_for_end
from tests.integration.test_process_life import daemon_of, end_of, logged, umount, using, watched
from tests.integration.test_stuck_daemon import namespace
from tests.integration.unprivileged import FIND_PID, as_user


def umounted(made: Overlay, *arguments: str | Path, runtime: Path | None = None) -> tuple[int, str]:
    """What `pyoverlay umount` said, and whose daemon, if it has one, has ended by then."""
    environment = os.environ | ({} if runtime is None else {"PYOVERLAY_RUNTIME_DIR": str(runtime)})
    result = subprocess.run(
        command("umount", *arguments), check=False, capture_output=True, text=True, timeout=30, env=environment
    )
    assert wait_for_end(made.daemons(), 0) == [], "its daemon was not waited for"
    return result.returncode, result.stderr


# ── the list of mounts ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_umount_waits_for_a_daemon_that_is_in_no_list(overlay: OverlayFactory, tmp_path: Path) -> None:
    """It was taken for dead, so that umount returned before the upper was synced: a mount of a job without a session, ended in one."""
    made = overlay({})
    (made.merged / "new").write_text("new")
    (pid,) = made.daemons()
    code, said = umounted(made, made.merged, runtime=tmp_path / "other")
    assert said == (
        f"pyoverlay: {made.merged}: unmounted; its daemon (pid {pid}) was in no list: only its log says if the upper could not be synced\n"
    )
    assert code == 0
    assert (made.writable / "new").read_text() == "new"


def test_a_dead_mount_that_is_in_no_list_is_known_for_it(overlay: OverlayFactory, tmp_path: Path) -> None:
    made = overlay({})
    with watched(daemon_of(made)) as poll:
        os.kill(daemon_of(made), signal.SIGKILL)
        end_of(poll)
    assert umounted(made, made.merged, runtime=tmp_path / "other") == (
        0,
        f"pyoverlay: {made.merged}: its daemon had died before; unmounted\n",
    )


@contextmanager
def full(directory: Path) -> Iterator[Path]:
    """A file system in which nothing more can be made but what is given back."""
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "nr_inodes=64,size=64k,mode=700", "tmpfs", directory], check=True)
    try:
        (directory / "run").mkdir(mode=0o700)
        (directory / "filler").write_bytes(bytes(60 << 10))
        yield directory
    finally:
        subprocess.run(["umount", directory], check=True)


@pytest.mark.root
def test_a_mount_is_made_where_its_record_has_no_room(
    overlay: OverlayFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full /run ended the daemon when its mount had answered, and the caller was told to look for the reason with -f."""
    with full(tmp_path / "full") as directory:
        monkeypatch.setenv("PYOVERLAY_RUNTIME_DIR", str(directory / "run"))
        (directory / "filler").write_bytes(bytes(64 << 10))
        made, log = logged(overlay, {"file": "x"})
        assert (made.merged / "file").read_text() == "x"
        assert "this mount will not be listed: No space left on device" in log.read_text()
        code, said = umounted(made, made.merged)
        assert (code, "was in no list" in said) == (0, True)
        assert os.listdir(directory / "run") == []


@pytest.mark.root
def test_a_users_mount_made_outside_of_a_session_is_listed_in_one(home: Path) -> None:
    """Without XDG_RUNTIME_DIR the list is in /tmp: there nobody looked who had it."""
    result = as_user(
        home,
        "(unset XDG_RUNTIME_DIR; $po mount lower upper merged); $po ps -q; $po umount merged; ls -A /tmp/pyoverlay-$(id -u)",
    )
    assert (result.returncode, result.stderr, result.stdout) == (0, "", f"{home}/merged\n")


def test_umount_puts_on_disk_what_a_daemon_that_dies_meanwhile_had_written(overlay: OverlayFactory) -> None:
    """It ends without its last sync and leaves its record as it was: that was taken for a success."""
    made = overlay({})
    (made.merged / "new").write_text("new")
    pid = daemon_of(made)
    with namespace():  # which keeps the mount, so that the daemon does not end by itself
        process = subprocess.Popen(command("umount", made.merged), stderr=subprocess.PIPE, text=True)
        while made.mounted() is not None:
            os.sched_yield()
        os.kill(pid, signal.SIGKILL)
        _, said = process.communicate(timeout=30)
    assert said == f"pyoverlay: {made.merged}: unmounted; its daemon (pid {pid}) died meanwhile, and what it had written is on disk\n"
    assert process.returncode == 0
    assert [record for record in registry.records() if record.pid == pid] == []


def test_an_upper_of_a_detached_mount_in_use_is_said_to_be_that(overlay: OverlayFactory) -> None:
    """It was said to be of a mount that has to be unmounted first, and there is none to unmount."""
    made = overlay({"file": "x"})
    pid = daemon_of(made)
    with watched(pid) as poll:
        with using(made.merged):
            assert umount("--lazy", made.merged).returncode == 0
            with pytest.raises(MountRefusedError) as refused:
                made.mount()
            assert str(refused.value) == (
                f"pyoverlay: {made.upper}: the upper is still used by the mount at {made.merged} (pid {pid}), which was detached and serves"
                f" its last users (Device or resource busy); end these, or kill {pid}, or choose another directory"
            )
        end_of(poll)


# ── the place ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def renamed(directory: Path) -> Iterator[Path]:
    """The directory under another name, and as it was at the end."""
    other = directory.with_name("renamed")
    directory.rename(other)
    try:
        yield other
    finally:
        other.rename(directory)


@pytest.mark.parametrize("way", ["umount", "signal"])
def test_a_mount_ends_in_a_directory_that_was_renamed(overlay: OverlayFactory, way: str) -> None:
    """umount took its daemon for dead and did not wait for it; the daemon itself took its mount for covered by another."""
    made = overlay({"file": "x"})
    (made.merged / "new").write_text("new")
    pid = daemon_of(made)
    with renamed(made.merged.parent) as place, watched(pid) as poll:
        if way == "umount":
            assert umounted(made, place / "merged") == (0, "")
        else:
            os.kill(pid, signal.SIGTERM)
            end_of(poll)
    assert made.mounted() is None
    assert (made.writable / "new").read_text() == "new"
    assert [record for record in registry.records() if record.pid == pid] == []


@pytest.mark.root
def test_a_users_mount_ends_in_a_directory_that_was_renamed(home: Path) -> None:
    result = as_user(
        home,
        "mkdir above; mkdir above/merged; $po mount lower upper above/merged; echo data > above/merged/file;"
        f" {FIND_PID} mv above other;"
        " kill $pid; while kill -0 $pid 2>/dev/null; do :; done; cat upper/file; grep -c $PWD /proc/mounts || true",
    )
    assert (result.returncode, result.stderr, result.stdout) == (0, "", "data\n0\n")


@contextmanager
def movable(place: Path) -> Iterator[Path]:
    """A mount of its own, private: what is mounted in a shared one cannot be moved."""
    place.mkdir()
    subprocess.run(["mount", "--bind", place, place], check=True)
    subprocess.run(["mount", "--make-private", place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "-R", place], check=True)


@pytest.mark.root
@pytest.mark.parametrize("way", ["umount", "signal"])
def test_a_mount_ends_where_it_was_moved_to(tmp_path: Path, way: str) -> None:
    with movable(tmp_path / "place") as place:
        for name in ("lower", "upper", "merged", "elsewhere"):
            (place / name).mkdir()
        made = Overlay((place / "lower",), place / "upper", place / "merged")
        made.mount()
        (made.merged / "new").write_text("new")
        pid = daemon_of(made)
        with watched(pid) as poll:
            subprocess.run(["mount", "--move", made.merged, place / "elsewhere"], check=True)
            if way == "umount":
                assert umounted(made, place / "elsewhere") == (0, "")
            else:
                os.kill(pid, signal.SIGTERM)
            end_of(poll)
        assert [mount.mount_point for mount in mounts_below(place)] == [str(place)]
        assert (made.writable / "new").read_text() == "new"


@pytest.mark.root
def test_a_mount_that_another_covers_loses_nothing_at_a_signal_and_is_told_of(overlay: OverlayFactory) -> None:
    """No path leads to it, so it cannot be taken away: the daemon ended by a traceback."""
    made, log = logged(overlay, {"file": "x"}, options=("-o", "stop_timeout=0.3"))
    (made.merged / "new").write_text("new")
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", made.merged], check=True)
    try:
        with watched(daemon_of(made)) as poll:
            os.kill(daemon_of(made), signal.SIGTERM)
            end_of(poll)
    finally:
        subprocess.run(["umount", made.merged], check=True)
    assert f"{made.merged}: a dead mount is left, for something else is mounted over it; take it away with umount -l" in log.read_text()
    assert "Traceback" not in log.read_text()
    assert umount(made.merged).returncode == 0
    assert (made.writable / "new").read_text() == "new"


@pytest.mark.root
def test_umount_goes_where_dot_dot_leads(overlay: OverlayFactory, tmp_path: Path) -> None:
    """`link/../merged` is beside what the link leads to: another mount, beside the link, was unmounted."""
    wanted, beside = overlay({}), overlay({})
    link = beside.merged.parent / "link"
    link.symlink_to(wanted.lower)
    assert umount(f"{link}/../merged").returncode == 0
    assert (wanted.mounted(), beside.mounted() is None) == (None, False)
    link.unlink()


# ── what is inherited ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_caller_without_standard_streams_gets_its_mount(overlay: OverlayFactory, closed: str) -> None:
    """What the daemon was to be told of got the number of one of them, and was replaced by /dev/null."""
    made = overlay({"file": "x"}, mount=False)
    script = f'exec "$@" {closed}'
    arguments = command("mount", made.lower, made.writable, made.merged)
    result = subprocess.run(["sh", "-c", script, "sh", *arguments], check=False, timeout=30, env=os.environ | {MARK: made.mark})
    assert result.returncode == 0
    assert (made.merged / "file").read_text() == "x"
    made.umount()


@pytest.mark.parametrize("limit", [resource.RLIMIT_FSIZE, resource.RLIMIT_CPU], ids=["size of files", "processor time"])
def test_limits_for_the_callers_programs_are_not_the_daemons(overlay: OverlayFactory, limit: int) -> None:
    """`ulimit -S -f` of the shell that mounts was EFBIG for everybody, and past `ulimit -S -t` the mount was dead."""
    made = overlay({}, mount=False)
    before = resource.getrlimit(limit)
    resource.setrlimit(limit, (1 << 20, before[1]))
    try:
        made.mount()
    finally:
        resource.setrlimit(limit, before)
    assert resource.prlimit(daemon_of(made), limit)[0] == before[1]
    (made.merged / "file").write_bytes(bytes(3 << 20))


def test_a_mount_in_the_background_can_wait_for_its_children_where_its_caller_ignores_them(home: Path) -> None:
    result = as_user(
        home,
        f"{sys.executable} -c 'import os, signal, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN); os.execvp(sys.argv[1], sys.argv[1:])'"
        " $po mount -o allow_other lower upper merged",
    )
    assert result.returncode == 1
    assert "add user_allow_other to /etc/fuse.conf" in result.stderr


FEW_THREADS = """
import trio

calls = 0
plain = trio.to_thread.run_sync

async def run_sync(call, *arguments, **how):
    global calls
    calls += 1
    if 1 < calls < {until}:
        raise RuntimeError("can't start new thread")
    return await plain(call, *arguments, **how)

run_sync.__signature__ = __import__("inspect").signature(plain)
trio.to_thread.run_sync = run_sync
"""


@pytest.mark.parametrize("wire", ["1", "0"])
def test_where_no_thread_can_be_started_nothing_fails_and_nothing_is_lost(
    overlay: OverlayFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wire: str
) -> None:
    """Past RLIMIT_NPROC of a user, or pids.max of a container: a copy-up was EIO, and SIGTERM ended the daemon before it had synced."""
    (tmp_path / "sitecustomize.py").write_text(FEW_THREADS.format(until=6))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep))
    monkeypatch.setenv("PYOVERLAY_WIRE", wire)
    made, log = logged(overlay, {"file": b"x" * (3 << 20)})
    with (made.merged / "file").open("r+b", buffering=0) as file:
        file.write(b"changed")
        os.fsync(file.fileno())
    with watched(daemon_of(made)) as poll:
        os.kill(daemon_of(made), signal.SIGTERM)
        end_of(poll)
    assert "no thread can be started: trying again until one can be" in log.read_text()
    assert "Traceback" not in log.read_text()
    assert made.mounted() is None
    assert (made.writable / "file").read_bytes() == b"changed" + b"x" * ((3 << 20) - 7)


NO_PROCESS = """
import errno
import subprocess

class Popen(subprocess.Popen):
    def __init__(self, *arguments, **how):
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

subprocess.Popen = Popen
"""


@pytest.mark.root
def test_a_limit_of_processes_is_named(home: Path) -> None:
    """What was missing was told as a bug, or not at all."""
    (home / "sitecustomize.py").write_text(NO_PROCESS)
    result = as_user(home, "PYTHONPATH=$PWD:$PYTHONPATH $po mount lower upper merged")
    assert result.stderr == (
        "pyoverlay: /bin/sh: cannot be started (Resource temporarily unavailable);"
        " raise the limit of processes (ulimit -u; pids.max of a container)\n"
    )
    assert result.returncode == 1
