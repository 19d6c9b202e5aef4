"""A mount as a service of systemd's: it says when it is ready, sd_notify(3)."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from pyoverlay.testing import Overlay, OverlayFactory
from pyoverlay.testing.mounts import MARK, command

SECONDS = 30


@pytest.fixture
def unmounted(overlay: OverlayFactory) -> Overlay:
    return overlay({"file": "of the lower"}, mount=False)


@pytest.fixture
def manager(monkeypatch: pytest.MonkeyPatch) -> socket.socket:
    """What a service manager listens on."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    listener.settimeout(SECONDS)
    return listener


def start(overlay: Overlay, address: str, *options: str) -> subprocess.Popen[bytes]:
    argv = command("mount", *options, overlay.lower, overlay.writable, overlay.merged)
    return subprocess.Popen(argv, env=dict(os.environ) | {MARK: overlay.mark, "NOTIFY_SOCKET": address}, stdin=subprocess.DEVNULL)


@pytest.mark.parametrize("is_abstract", [False, True], ids=["path", "abstract"])
def test_the_manager_is_told_once_the_mount_answers(unmounted: Overlay, manager: socket.socket, tmp_path: Path, is_abstract: bool) -> None:
    name = unmounted.mark[-40:] if is_abstract else os.path.relpath(tmp_path / "notify")
    with manager:
        manager.bind(f"\0{name}" if is_abstract else name)
        with start(unmounted, f"@{name}" if is_abstract else str(tmp_path / "notify"), "-f") as service:
            assert manager.recv(100) == b"READY=1"
            assert (unmounted.merged / "file").read_text() == "of the lower"
            service.send_signal(signal.SIGTERM)
            assert service.wait(SECONDS) == 0
        manager.setblocking(False)
        with pytest.raises(BlockingIOError):
            manager.recv(100)


def test_a_mount_in_the_background_is_no_service(unmounted: Overlay, manager: socket.socket, tmp_path: Path) -> None:
    with manager:
        manager.bind(os.path.relpath(tmp_path / "notify"))
        with start(unmounted, str(tmp_path / "notify")) as launcher:
            assert launcher.wait(SECONDS) == 0
        manager.setblocking(False)
        with pytest.raises(BlockingIOError):
            manager.recv(100)


def test_a_manager_that_does_not_listen_is_no_reason_to_fail(unmounted: Overlay, tmp_path: Path) -> None:
    process = start(unmounted, str(tmp_path / "nobody"), "-f", "-o", "stop_timeout=0")
    with process:
        while unmounted.mounted() is None:
            assert process.poll() is None
            os.sched_yield()
        process.send_signal(signal.SIGTERM)
        assert process.wait(SECONDS) in (0, 1)
