"""Many at work at once, much, and for long. The daemon never needs a restart, and is as it was when the work is gone."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pyoverlay.testing import Connection, Overlay
from pyoverlay.testing.mounts import DAEMON_EXIT_SECONDS, wait_for_end
from tests.crash.images import Image, mounted_image
from tests.load.client import check_record, initial, make, seen
from tests.posix.check import opened
from tests.posix.system_calls import private_mounts

CHECKOUT = Path(__file__).parents[2]


class Work:
    """Clients and what they work in."""

    def __init__(self, directory: Path, clients: int, *options: str) -> None:
        for name in ("lower", "upper", "merged", "lower/shared"):
            (directory / name).mkdir()
        for number in range(clients):
            make(directory / "lower" / str(number), initial(number))
        self.clients = clients
        self.overlay = Overlay((directory / "lower",), directory / "upper", directory / "merged", options)
        self.overlay.mount()

    def start(self, number: int, seed: int, limit: str, *victim: str) -> subprocess.Popen[str]:
        arguments = [str(self.overlay.merged), str(number), str(seed), limit, *victim]
        return subprocess.Popen([sys.executable, "-m", "tests.load.client", *arguments], cwd=CHECKOUT, stdout=subprocess.PIPE, text=True)

    @property
    def daemon(self) -> int:
        (pid,) = self.overlay.daemons()
        return pid

    def check_shared(self) -> None:
        shared = self.overlay.merged / "shared"
        for name in os.listdir(shared):
            if (shared / name).is_file():
                check_record(shared / name)


def outcome(client: subprocess.Popen[str]) -> dict[str, Any]:
    with client:
        output, _ = client.communicate()
    assert client.returncode == 0
    told: dict[str, Any] = json.loads(output)
    return told


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def resident(pid: int) -> int:
    """Bytes of memory."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) << 10


def forget_all(directory: Path, is_done: Callable[[], bool]) -> bool:
    """Have the kernel forget what it may, and wait for the daemon to have heard of it: FORGETs are delivered between other requests."""
    Path("/proc/sys/vm/drop_caches").write_text("2")
    return any(is_done() for _ in range(20_000) if os.statvfs(directory))


@pytest.fixture
def own_mounts() -> Iterator[None]:
    """What is mounted here nobody else holds: a container that somebody starts would keep each mount, and its daemon, for as long."""
    with private_mounts():
        yield


@pytest.fixture
def image(own_mounts: None, tmp_path: Path) -> Iterator[Image]:
    """A file system of its own, so that unmounting waits for nobody else's data."""
    with mounted_image("ext4", tmp_path, 1 << 30) as made:
        yield made


@pytest.mark.root
@pytest.mark.parametrize(
    "limit",
    [
        pytest.param("60 s", id="one minute", marks=pytest.mark.timeout(240)),
        pytest.param("600 s", id="ten minutes", marks=[pytest.mark.slow, pytest.mark.timeout(1500)]),
    ],
)
def test_eight_clients_at_random(image: Image, limit: str, record_testsuite_property: Callable[[str, object], None]) -> None:
    """What each did is what is there, live and after a remount; then all of it can be removed."""
    work = Work(image.point, 8)
    try:
        overlay, daemon = work.overlay, work.daemon
        before, memory = descriptors(daemon), resident(daemon)
        clients = [work.start(number, 1, limit) for number in range(work.clients)]
        outcomes = [outcome(client) for client in clients]
        assert [told["error"] for told in outcomes if "error" in told] == []
        record_testsuite_property(f"operations in {limit}", sum(told["operations"] for told in outcomes))
        for number, told in enumerate(outcomes):
            assert seen(overlay.merged / str(number)) == told["nodes"]
        work.check_shared()
        assert work.daemon == daemon
        overlay.remount()
        for number, told in enumerate(outcomes):
            assert seen(overlay.merged / str(number)) == told["nodes"]
        work.check_shared()
        for path in overlay.merged.iterdir():
            shutil.rmtree(path)
        assert os.listdir(overlay.merged) == []
        daemon = work.daemon
        assert forget_all(overlay.merged, lambda: descriptors(daemon) <= before + 2), f"{before} descriptors grew to {descriptors(daemon)}"
        assert resident(daemon) < memory + (32 << 20)
    finally:
        work.overlay.close()


@pytest.mark.root
@pytest.mark.parametrize(
    "rounds", [pytest.param(5, marks=pytest.mark.timeout(180)), pytest.param(200, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])]
)
def test_a_daemon_killed_at_work_has_lost_nothing_that_it_answered(image: Image, rounds: int) -> None:
    """kill -9 while four clients work; the tree that a new mount shows is each client's model, but for the one operation under way."""
    for number in range(rounds):
        directory = image.point / str(number)
        directory.mkdir()
        work = Work(directory, 4)
        try:
            kill_at_work(work, number)
        finally:
            work.overlay.close()
        shutil.rmtree(directory)


def kill_at_work(work: Work, seed: int) -> None:
    overlay, daemon = work.overlay, work.daemon
    killer = work.start(0, seed, str(random.Random(seed).randrange(100, 600)), str(daemon))
    clients = [killer, *(work.start(number, seed, "100000") for number in range(1, work.clients))]
    outcomes = [outcome(client) for client in clients]
    assert {told["errno"] for told in outcomes} <= {errno.ENOTCONN, errno.ECONNABORTED}, [told["error"] for told in outcomes]
    assert wait_for_end([daemon], DAEMON_EXIT_SECONDS) == []
    mount = overlay.mounted()
    assert mount is not None
    Connection.of(mount).detach()
    overlay.mount()
    for number, told in enumerate(outcomes):
        found = seen(overlay.merged / str(number))
        old, new = told["nodes"], told["coming"] or told["nodes"]
        if found not in (old, new):
            differing = [path for path in found.keys() | old.keys() | new.keys() if not found.get(path) == old.get(path) == new.get(path)]
            shown = {path: (found.get(path), old.get(path), new.get(path)) for path in differing}
            pytest.fail(f"client {number}, after {told['operations']} operations: seen, before, after: {shown}")
    work.check_shared()


@pytest.mark.root
@pytest.mark.usefixtures("own_mounts")
@pytest.mark.parametrize(
    "number",
    [pytest.param(20_000, marks=pytest.mark.timeout(120)), pytest.param(1_000_000, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])],
)
def test_many_files_in_one_directory_made_listed_and_removed(
    tmp_path: Path, number: int, record_testsuite_property: Callable[[str, object], None]
) -> None:
    """By one client each; what it took is told in the report."""
    work = Work(tmp_path, 0, "-o", "volatile")  # unmounting would wait for every other program's data on this disk
    try:
        merged = work.overlay.merged / "many"
        merged.mkdir()
        daemon = work.daemon
        before, memory = descriptors(daemon), resident(daemon)
        started = time.monotonic()

        def record(what: str) -> None:
            record_testsuite_property(f"{number} files {what} after", f"{time.monotonic() - started:.0f} s, {resident(daemon) >> 20} MiB")

        with opened(merged, os.O_RDONLY | os.O_DIRECTORY) as fd:
            for count in range(number):
                os.close(os.open(f"{count}", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644, dir_fd=fd))
            record("made")
            assert {int(name) for name in os.listdir(fd)} == set(range(number))
            record("listed")
        subprocess.run(["rm", "-rf", merged], check=True)
        record("removed")
        assert os.listdir(work.overlay.merged) == ["shared"]
        assert forget_all(work.overlay.merged, lambda: descriptors(daemon) <= before + 2)
        record("forgotten")
        assert resident(daemon) < memory + (64 << 20)  # what Python keeps of its heap for later
    finally:
        work.overlay.close()


@pytest.mark.root
@pytest.mark.usefixtures("own_mounts")
@pytest.mark.parametrize(
    "number", [pytest.param(12, marks=pytest.mark.timeout(120)), pytest.param(100, marks=[pytest.mark.slow, pytest.mark.timeout(600)])]
)
def test_many_mounts_at_once(tmp_path: Path, number: int) -> None:
    """All over one lower, all in use; each has what was written to it and nothing of the others'."""
    lower = tmp_path / "lower"
    make(lower, initial(0))
    overlays = []
    try:
        for count in range(number):
            for name in ("upper", "merged"):
                (tmp_path / f"{name}{count}").mkdir()
            overlays.append(Overlay((lower,), tmp_path / f"upper{count}", tmp_path / f"merged{count}"))
            overlays[-1].mount()
        for count, overlay in enumerate(overlays):
            (overlay.merged / "n0").write_text(f"mount {count}")
            (overlay.merged / f"new{count}").touch()
        for count, overlay in enumerate(overlays):
            assert (overlay.merged / "n0").read_text() == f"mount {count}"
            assert {name for name in os.listdir(overlay.merged) if name.startswith("new")} == {f"new{count}"}
    finally:
        for overlay in overlays:
            overlay.close()
