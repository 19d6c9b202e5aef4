"""A daemon that answers nobody, or does not end: what `pyoverlay ps` and `pyoverlay umount` say and do then."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pyoverlay.testing import Overlay, OverlayFactory
from pyoverlay.testing.mounts import command
from tests.integration.test_process_life import daemon_of, stopped, umount, wait_until, watched
from tests.integration.unprivileged import as_user

pytestmark = pytest.mark.root


def listed(overlay: Overlay) -> str:
    arguments = command("ps", "--filter", f"merged={overlay.merged}", "--format", "{{.Status}}")
    return subprocess.run(arguments, check=True, capture_output=True, text=True, timeout=30).stdout.rstrip("\n")


# ── in an upper that never answers ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def far(overlay: OverlayFactory) -> Overlay:
    """Where the upper lies: another mount of ours, whose daemon can be stopped, and this one's with it."""
    return overlay({"upper": {}})


@pytest.fixture
def over_far(overlay: OverlayFactory, far: Overlay) -> Overlay:
    made = overlay({"near": "near"}, mount=False)
    made.upper = far.merged / "upper"
    made.mount()
    return made


@contextmanager
def waiting_for(far: Overlay, path: Path, daemon: int) -> Iterator[subprocess.Popen[bytes]]:
    """Somebody has asked `daemon` for a name that the upper may have, whose own daemon is stopped: so that waits."""
    stack = Path(f"/proc/{daemon}/stack")
    with stopped(daemon_of(far)):
        client = subprocess.Popen([sys.executable, "-c", "import os, sys; os.path.exists(sys.argv[1])", path])
        wait_until(lambda: "request_wait_answer" in stack.read_text())
        yield client
    client.wait(10)


def test_a_daemon_that_waits_for_its_upper_is_listed_so_and_unmounted_without_it(over_far: Overlay, far: Overlay) -> None:
    (over_far.merged / "new").write_text("new")
    pid = daemon_of(over_far)
    with watched(pid) as poll:
        with waiting_for(far, over_far.merged / "file", pid) as client:
            assert re.fullmatch(r"Up .* \(not answering\)", listed(over_far))
            refused = umount("--wait", "0.3", over_far.merged)
            assert (refused.returncode, refused.stdout) == (1, "")
            assert refused.stderr == (
                f"pyoverlay: {over_far.merged}: its daemon (pid {pid}) has not answered within 0.3 s (Connection timed out);"
                f" kill {pid}, or detach it with --lazy\n"
            )
            assert over_far.mounted() is not None
            detached = umount("--lazy", over_far.merged)
            assert (detached.returncode, detached.stderr) == (0, "")
            assert over_far.mounted() is None
            assert client.poll() is None, "nobody has answered yet"
        assert client.returncode == 0, "who waited is served when the upper answers again"
        assert poll.poll(10_000), "and then the daemon ends"
    assert (over_far.writable / "new").read_text() == "new"


def test_a_daemon_that_waits_for_its_upper_can_be_killed(over_far: Overlay, far: Overlay) -> None:
    """As umount's refusal says; what it had done is there. (With a file of the upper open it ends when that answers: closing asks it.)"""
    (over_far.merged / "new").mkdir()
    pid = daemon_of(over_far)
    with waiting_for(far, over_far.merged / "file", pid) as client, watched(pid) as poll:
        os.kill(pid, signal.SIGKILL)
        assert poll.poll(10_000)
        client.wait(10)
        assert listed(over_far) == "Dead"
    assert umount(over_far.merged).returncode == 0
    assert (over_far.writable / "new").is_dir()


# ── kept by somebody else ───────────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def namespace() -> Iterator[int]:
    """The process in a mount namespace that has got a copy of each mount, as a container that is started has."""
    program = ["unshare", "-m", "sh", "-c", "echo ready; read line"]
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        yield process.pid


def test_umount_says_in_whose_mount_namespace_the_mount_lives_on(overlay: OverlayFactory) -> None:
    made = overlay({})
    pid = daemon_of(made)
    with watched(pid) as poll:
        with namespace() as other:
            result = umount("--wait", "0.3", made.merged)
            assert (result.returncode, result.stdout) == (1, "")
            assert result.stderr == (
                f"pyoverlay: {made.merged}: unmounted, but its daemon (pid {pid}) has not ended within 0.3 s: it is still mounted in"
                f" another mount namespace, of sh (pid {other}); end that, or umount it there (nsenter -m -t PID)\n"
            )
            assert made.mounted() is None
        assert poll.poll(10_000), "the daemon ends with the namespace"


def test_umount_says_where_else_the_mount_shows(overlay: OverlayFactory, tmp_path: Path) -> None:
    made = overlay({})
    pid = daemon_of(made)
    copy = tmp_path / "copy"
    copy.mkdir()
    with watched(pid) as poll:
        subprocess.run(["mount", "--bind", made.merged, copy], check=True)
        try:
            result = umount("--wait", "0.3", made.merged)
        finally:
            subprocess.run(["umount", copy], check=True)
        assert result.returncode == 1
        assert result.stderr == (
            f"pyoverlay: {made.merged}: unmounted, but its daemon (pid {pid}) has not ended within 0.3 s: it is mounted at {copy} as well;"
            " umount that too\n"
        )
        assert poll.poll(10_000)


# ── a user's ────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_fusermount3_that_misses_etc_mtab_is_helped(home: Path) -> None:
    """A Debian that debootstrap has just unpacked has none, and the mount could not be taken away; nobody said how."""
    (home / "bin").mkdir()
    program = home / "bin/fusermount3"
    program.write_text('#!/bin/sh\necho "fusermount3: failed to open /etc/mtab: No such file or directory" >&2\nexit 1\n')
    program.chmod(0o755)
    result = as_user(home, "$po mount lower upper merged; PATH=$PWD/bin:$PATH $po umount merged && exit 1; $po umount merged")
    assert result.returncode == 0
    assert result.stderr == (
        f"pyoverlay: {home}/merged: fusermount3: failed to open /etc/mtab: No such file or directory;"
        " as root: ln -s /proc/self/mounts /etc/mtab\n"
    )


def test_a_fusermount3_that_does_not_end_is_given_up(home: Path) -> None:
    """It waits in the kernel for the daemon, and umount would wait for it for ever."""
    (home / "bin").mkdir()
    stuck = home / "bin/fusermount3"
    stuck.write_text("#!/bin/sh\nexec sleep 1000\n")
    stuck.chmod(0o755)
    result = as_user(
        home,
        "$po mount lower upper merged; for how in --wait=1 --lazy; do PATH=$PWD/bin:$PATH $po umount $how merged && exit 1; done;"
        " grep -c $PWD/merged /proc/mounts; $po umount merged",
    )
    assert (result.returncode, result.stdout) == (0, "1\n")
    refused, given_up = result.stderr.splitlines()
    assert refused == "pyoverlay: merged: not unmounted within 5 s (Connection timed out); end its daemon, or detach it with --lazy"
    assert given_up == "pyoverlay: merged: not unmounted within 5 s (Connection timed out); end its daemon, or have root umount it with -f"
