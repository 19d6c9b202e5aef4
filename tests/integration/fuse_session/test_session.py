"""INIT as the kernel took it, idling, notifications, and everything without the extension."""

import errno
import os
import platform
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pyoverlay.testing import Connection, mounts_below, rests

LOOKUP, FORGET, READLINK, OPEN, READ, WRITE, GETXATTR, OPENDIR, BATCH_FORGET = 1, 2, 5, 14, 15, 16, 22, 27, 42
pytestmark = [pytest.mark.root]
SessionFactory = Callable[..., Any]


@pytest.mark.wire
def test_zero_message_open_asks_once(session: SessionFactory) -> None:
    mounted = session(flags=["NO_OPEN_SUPPORT", "NO_OPENDIR_SUPPORT"])
    (mounted.mountpoint / "file").touch()
    for _ in range(5):
        (mounted.mountpoint / "file").read_bytes()
        os.listdir(mounted.mountpoint)
    assert mounted.opcodes()[OPEN] == 1
    assert mounted.opcodes()[OPENDIR] == 1


@pytest.mark.wire
def test_without_the_flags_each_open_is_a_request(session: SessionFactory) -> None:
    mounted = session(flags=[])
    (mounted.mountpoint / "file").touch()
    for _ in range(5):
        (mounted.mountpoint / "file").read_bytes()
    assert mounted.opcodes()[OPEN] == 5


@pytest.mark.wire
@pytest.mark.parametrize(("flags", "asked"), [(["HANDLE_KILLPRIV_V2"], 1), ([], 20)])
def test_killpriv_spares_each_write_a_question(session: SessionFactory, flags: list[str], asked: int) -> None:
    """The first write asks; then the kernel knows that the file has no capabilities, if it may."""
    mounted = session(flags=flags)
    fd = os.open(mounted.mountpoint / "file", os.O_CREAT | os.O_RDWR)
    for _ in range(20):
        os.write(fd, b"x")
    os.close(fd)
    assert mounted.opcodes()[WRITE] == 20
    assert mounted.opcodes().get(GETXATTR, 0) == asked


@pytest.mark.wire
@pytest.mark.parametrize(("flags", "mode"), [(["DONT_MASK"], 0o666), ([], 0o640)])
def test_dont_mask_leaves_the_umask_to_us(session: SessionFactory, flags: list[str], mode: int) -> None:
    mounted = session(flags=flags)
    before = os.umask(0o027)
    try:
        os.close(os.open(mounted.mountpoint / "file", os.O_CREAT | os.O_WRONLY, 0o666))
    finally:
        os.umask(before)
    assert (mounted.root / "file").stat().st_mode & 0o777 == mode


@pytest.mark.wire
@pytest.mark.parametrize(("flags", "asked"), [(["CACHE_SYMLINKS"], 1), ([], 10)])
def test_symlinks_are_cached(session: SessionFactory, flags: list[str], asked: int) -> None:
    mounted = session(flags=flags)
    (mounted.mountpoint / "link").symlink_to("target")
    assert {os.readlink(mounted.mountpoint / "link") for _ in range(10)} == {"target"}
    assert mounted.opcodes()[READLINK] == asked


@pytest.mark.wire
def test_a_mebibyte_is_one_write(session: SessionFactory) -> None:
    mounted = session(flags=["MAX_PAGES"])
    fd = os.open(mounted.mountpoint / "file", os.O_CREAT | os.O_RDWR)
    assert os.write(fd, bytes(1 << 20)) == 1 << 20
    os.close(fd)
    assert mounted.opcodes()[WRITE] == 1


@pytest.mark.wire
def test_a_slow_lookup_stops_no_other_in_its_directory(session: SessionFactory) -> None:
    mounted = session(flags=["PARALLEL_DIROPS"])
    (mounted.root / "slow").write_bytes(b"at last")
    (mounted.root / "quick").write_bytes(b"at once")
    slow = threading.Thread(target=(mounted.mountpoint / "slow").stat)
    slow.start()
    while mounted.tell("waiting") == 0:
        pass
    assert (mounted.mountpoint / "quick").read_bytes() == b"at once"
    mounted.tell("resume_lookup")
    slow.join()
    assert (mounted.mountpoint / "slow").read_bytes() == b"at last"


@pytest.mark.wire
@pytest.mark.parametrize(("flags", "asks"), [(["POSIX_ACL"], True), ([], False)])
def test_posix_acls_are_the_kernels_to_check(session: SessionFactory, flags: list[str], asks: bool) -> None:
    mounted = session(flags=flags)
    (mounted.mountpoint / "file").touch()
    (mounted.mountpoint / "file").chmod(0o660)
    before = mounted.opcodes().get(GETXATTR, 0)
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    reader = subprocess.run([*nobody, "cat", "file"], cwd=mounted.mountpoint, check=False, capture_output=True)
    assert reader.returncode == 1
    assert (mounted.opcodes().get(GETXATTR, 0) > before) is asks


@pytest.fixture
def connections(tmp_path: Path) -> Iterator[Path]:
    """The kernel's list of FUSE connections, which is not mounted everywhere."""
    directory = tmp_path / "connections"
    directory.mkdir()
    subprocess.run(["mount", "-t", "fusectl", "fusectl", directory], check=True)
    yield directory
    subprocess.run(["umount", directory], check=True)


@pytest.mark.wire
def test_the_kernel_may_have_65535_requests_in_the_background(session: SessionFactory, connections: Path) -> None:
    mounted = session(flags=[])
    connection = connections / str(os.minor(mounted.mountpoint.stat().st_dev))
    assert (connection / "max_background").read_text() == "65535\n"
    assert (connection / "congestion_threshold").read_text() == "49151\n"


@pytest.mark.parametrize("turned_off", [pytest.param({}, marks=pytest.mark.wire), {"PYOVERLAY_WIRE": "0"}], ids=["wire", "no wire"])
def test_an_idle_mount_uses_no_processor(session: SessionFactory, turned_off: dict[str, str]) -> None:
    mounted = session(environment=turned_off, flags=["NO_OPEN_SUPPORT"])
    for i in range(50):
        (mounted.mountpoint / str(i)).write_bytes(b"busy")
    mounted.tell("waiting")
    assert rests(mounted.process.pid, seconds=3)


@pytest.mark.wire
def test_inval_inode_drops_cached_data(session: SessionFactory) -> None:
    mounted = session(flags=["NO_OPEN_SUPPORT"])
    path = mounted.mountpoint / "file"
    path.write_bytes(b"old")
    ino = path.stat().st_ino
    fd = os.open(path, os.O_RDONLY)
    assert os.pread(fd, 3, 0) == b"old"
    (mounted.root / "file").write_bytes(b"new")
    assert os.pread(fd, 3, 0) == b"old"
    assert mounted.tell("inval_inode", ino, 0, 0) == "ok"
    assert os.pread(fd, 3, 0) == b"new"
    os.close(fd)
    assert mounted.tell("inval_inode", 999_999_999, 0, 0) == "ENOENT"


@pytest.mark.wire
def test_inval_entry_drops_a_name(session: SessionFactory) -> None:
    mounted = session(flags=["NO_OPEN_SUPPORT"])
    (mounted.mountpoint / "file").touch()
    held = os.open(mounted.mountpoint / "file", os.O_PATH)  # or a test that drops the caches meanwhile makes the kernel forget the name
    try:
        (mounted.root / "file").unlink()
        assert (mounted.mountpoint / "file").exists()
        assert mounted.tell("inval_entry", 1, "file") == "ok"
    finally:
        os.close(held)
    assert not (mounted.mountpoint / "file").exists()


@pytest.mark.wire
def test_prune_makes_the_kernel_forget(session: SessionFactory) -> None:
    mounted = session(flags=["NO_OPEN_SUPPORT"])
    inos = []
    for i in range(10):
        (mounted.mountpoint / str(i)).touch()
        inos.append((mounted.mountpoint / str(i)).stat().st_ino)
    result = mounted.tell("prune", inos)
    if tuple(int(part) for part in platform.release().split(".")[:2]) < (6, 18):
        assert result == "EINVAL"
        return
    assert result == "ok"
    while not {FORGET, BATCH_FORGET} & mounted.opcodes().keys():
        pass
    lookups = mounted.opcodes()[LOOKUP]
    assert (mounted.mountpoint / "3").exists()
    assert mounted.opcodes()[LOOKUP] == lookups + 1


def test_everything_pyfuse3_knows_works_without_the_extension(session: SessionFactory) -> None:
    mounted = session(environment={"PYOVERLAY_WIRE": "0"})
    assert mounted.wire_reason == "turned off by PYOVERLAY_WIRE=0"
    path = mounted.mountpoint / "file"
    data = os.urandom(500_000)
    path.write_bytes(data)
    assert path.read_bytes() == data
    (mounted.mountpoint / "link").symlink_to("file")
    assert (mounted.mountpoint / "link").read_bytes() == data
    assert sorted(os.listdir(mounted.mountpoint)) == ["file", "link"]
    path.unlink()
    assert not path.exists()
    assert mounted.end() == 0
    assert mounted.log.read_text() == ""


@pytest.mark.wire
def test_the_extension_receives(session: SessionFactory) -> None:
    mounted = session(flags=[])
    assert mounted.wire_reason == ""
    mounted.mountpoint.stat()
    assert mounted.tell("is_active") is True
    assert mounted.end() == 0


def test_an_aborted_connection_ends_the_session_while_a_request_waits(session: SessionFactory, tmp_path: Path) -> None:
    mounted = session(flags=[])
    path = mounted.mountpoint / "file"
    path.touch()
    mounted.tell("pause", [path.stat().st_ino])
    errors: list[int | None] = []
    writer = threading.Thread(target=_errno_of_write, args=(path, errors))
    writer.start()
    while mounted.tell("waiting") == 0:
        pass
    [mount] = mounts_below(tmp_path)
    Connection.of(mount).abort()
    writer.join()
    assert errors == [errno.ECONNABORTED]
    mounted.tell("resume")
    mounted.process.wait(timeout=10)


def _errno_of_write(path: Path, errors: list[int | None]) -> None:
    try:
        path.write_bytes(b"x")
    except OSError as error:
        errors.append(error.errno)


# -- loading --


def _python(code: str, **environment: str) -> str:
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], check=True, capture_output=True, text=True, env={**os.environ, **environment}
    )
    return run.stdout.strip()


def test_pyfuse3_imported_too_early_leaves_it_alone() -> None:
    code = "import pyfuse3\nfrom pyoverlay.fuse.binding import wire, wire_reason\nprint(wire, wire_reason)"
    shown = _python(code, PYOVERLAY_WIRE="1")  # the suite itself may have it turned off
    assert shown == "None pyfuse3 was imported before pyoverlay.fuse.binding"


def test_a_missing_extension_is_a_reason_not_an_error() -> None:
    shown = _python(
        "import sys; sys.modules['pyoverlay.fuse._wire'] = None\n"
        "from pyoverlay.fuse.binding import wire, wire_reason, pyfuse3\nprint(wire, wire_reason, pyfuse3.__name__)",
        PYOVERLAY_WIRE="1",
    )
    assert shown.startswith("None the extension could not be loaded: ")
    assert shown.endswith(" pyfuse3")


@pytest.mark.wire
def test_loading_leaves_the_process_as_it_was() -> None:
    shown = _python(
        "import sys; before = sys.getdlopenflags()\n"
        "from pyoverlay.fuse.binding import wire\nprint(wire.is_interposed(), wire.finds_libfuse(), sys.getdlopenflags() == before)"
    )
    assert shown == "True True True"
