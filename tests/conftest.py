"""What every test gets: overlays by `overlay`, and guards that fail the run when a test leaves something behind.

Guarded are mounts below the session's temporary directory, processes that a test started (and what they started), descriptors of this
process, and lowers (tests/README.md says how to look into one). A test that hangs in a mount has the mount's connection aborted.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import tempfile
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyoverlay.testing import Connection, OverlayFactory, mounts_below, processes_marked
from pyoverlay.testing.mounts import MARK, end, wait_for_end
from tests.whoami import IS_ROOT, WHO

# What tests share and assert in, whichever directory imports it first.
pytest.register_assert_rewrite("tests.integration.looks", "tests.posix.check", "tests.posix.checks")

# Everything that this session starts inherits it.
SESSION = uuid.uuid4().hex
os.environ[MARK] = SESSION


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too")


def pytest_report_header(config: pytest.Config) -> list[str]:
    return [
        f"pyoverlay: from {_origin('pyoverlay')}, extension {'loaded' if _has_wire() else 'missing: tests marked wire must fail'}",
        f"pyoverlay: as {WHO}, uid {os.geteuid()}, kernel {os.uname().release}, /dev/fuse {_state_of_fuse()}, {_state_of_atimes()}",
    ]


def _origin(module: str) -> str:
    spec = importlib.util.find_spec(module)
    return str(spec.origin) if spec else "nowhere"


def _has_wire() -> bool:
    """Whether mounts made here have the extension; PYOVERLAY_WIRE=0 in the environment has reached their daemons too."""
    return os.environ.get("PYOVERLAY_WIRE") != "0" and importlib.util.find_spec("pyoverlay.fuse._wire") is not None


def _state_of_fuse() -> str:
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return f"unusable ({error.strerror})"
    return "usable"


def _state_of_atimes() -> str:
    has_none = os.statvfs(tempfile.gettempdir()).f_flag & os.ST_NOATIME
    return "TMPDIR is mounted noatime: reads of lowers go unnoticed" if has_none else "reads of lowers are noticed"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("slow") and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow: runs with --slow"))
        if item.get_closest_marker("root") and not IS_ROOT:
            item.add_marker(pytest.mark.skip(reason="needs root"))
        if item.get_closest_marker("wire") and not _has_wire():
            item.add_marker(pytest.mark.xfail(reason="needs the extension pyoverlay.fuse._wire", strict=True))


@pytest.fixture(scope="session", autouse=True)
def nothing_left(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """At the end of the session no mount and no process of it is left; what is left is ended, and the session fails."""
    yield
    base = tmp_path_factory.getbasetemp()
    mounts = mounts_below(base)
    for mount in reversed(mounts):
        Connection.of(mount).detach()
    processes = wait_for_end(processes_marked(SESSION), 2)  # a daemon needs a moment after a plain umount
    commands = [_command_line(pid) for pid in processes]
    end(processes)
    assert not mounts, f"mounts left at the end of the session: {[mount.mount_point for mount in mounts]}"
    assert not processes, f"processes left at the end of the session: {commands}"


def _command_line(pid: int) -> str:
    try:
        return f"{pid}: {Path(f'/proc/{pid}/cmdline').read_bytes().replace(bytes(1), b' ').decode(errors='replace')}"
    except OSError:
        return f"{pid}: ended meanwhile"


@pytest.fixture(autouse=True)
def nothing_left_by_this_test(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """After each test there are the mounts and the descriptors that were there before it."""
    base = tmp_path_factory.getbasetemp()
    mounts_before, descriptors_before = mounts_below(base), _descriptors()
    yield
    places_before = {mount.mount_point for mount in mounts_before}  # what a module shares may have been mounted anew
    mounts = [mount for mount in mounts_below(base) if mount.mount_point not in places_before]
    for mount in reversed(mounts):
        Connection.of(mount).detach()
    assert not mounts, f"this test left mounts: {[mount.mount_point for mount in mounts]}"
    assert (left := _new_descriptors(descriptors_before)) == {}, f"this test left descriptors open: {left}"


def _descriptors() -> dict[str, str]:
    """Number to what it is open on, of this process."""
    found = {}
    for number in os.listdir("/proc/self/fd"):
        try:
            found[number] = os.readlink(f"/proc/self/fd/{number}")
        except FileNotFoundError:  # the listing's own
            continue
    return found


def _new_descriptors(before: dict[str, str]) -> dict[str, str]:
    if _descriptors() != before:
        gc.collect()  # a generator or a traceback may still hold one: that is no leak
    return dict(_descriptors().items() - before.items())


@pytest.fixture(autouse=True)
def abort_if_hung(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A system call on a mount whose daemon is stuck ends by nothing but the end of the connection, so a thread ends it in time."""
    base = tmp_path_factory.getbasetemp()

    def abort() -> None:
        for mount in mounts_below(base):
            if mount.fs_type.startswith("fuse"):
                Connection.of(mount).abort()
        aborted.set()

    aborted = threading.Event()
    watchdog = threading.Timer(0.75 * _time_limit(request), abort)
    watchdog.daemon = True
    watchdog.start()
    yield
    watchdog.cancel()
    watchdog.join()  # it shares this thread's root directory: setns(2) to another mount namespace would be refused
    assert not aborted.is_set(), "this test hung; its mounts were aborted"


def _time_limit(request: pytest.FixtureRequest) -> float:
    marker = request.node.get_closest_marker("timeout")
    return float(marker.args[0] if marker and marker.args else request.config.getini("timeout"))


def _require_fuse() -> None:
    if (state := _state_of_fuse()) != "usable":
        pytest.skip(f"/dev/fuse is {state}")


@pytest.fixture
def overlay(tmp_path: Path) -> Iterator[OverlayFactory]:
    """Makes overlays for one test: `overlay({"file": "lower"}, options=["-o", "userxattr"])`; see OverlayFactory."""
    _require_fuse()
    factory = OverlayFactory(tmp_path, f"{SESSION}/{uuid.uuid4().hex}")
    yield factory
    factory.close()


@pytest.fixture(scope="module")
def module_overlay(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OverlayFactory]:
    """The same for a mount that the tests of a module share, each in a directory of its own."""
    _require_fuse()
    factory = OverlayFactory(tmp_path_factory.mktemp("module"), f"{SESSION}/{uuid.uuid4().hex}")
    yield factory
    factory.close()
