"""What each step may cost: system calls, counted as the kernel sees them, memory, and time where a figure was promised.

Times are asserted with room to spare, since machines are noisy; what was measured is logged (`--log-level=info -rP`).
"""

from __future__ import annotations

import logging
import mmap
import os
import re
import shutil
import signal
import subprocess
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import NoReturn

import pytest

from pyoverlay.core.policy import Policy
from pyoverlay.core.stack import open_view
from pyoverlay.testing import Overlay, OverlayFactory, Tree, rests
from tests.posix.check import opened

pytestmark = [pytest.mark.root]

ByHand = Callable[[int], Overlay]
log = logging.getLogger(__name__)

needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")

# What the loop does whatever is asked: it waits, polls a little before it sleeps, and asks whether it is preempted while it does.
_WAITING = {"epoll_wait", "epoll_ctl", "poll", "ppoll", "futex", "getrusage", "restart_syscall"}
_CALL = re.compile(r"\d+\s+(\w+)\((\d*)")  # where it begins: what another thread interrupts is resumed on a line of its own

# Some other program that has the machine's caches dropped makes the kernel forget, and then ask again what a name's owner and mode are.
_FORGETTING = {2, 42, 3}  # FORGET, BATCH_FORGET, GETATTR


class Calls:
    """The system calls of a daemon, apart from waiting: requests taken, replies, and everything else in between."""

    def __init__(self, trace: list[str], device: int, latency: set[str]) -> None:
        # The second word of a request is its opcode, whose lowest byte says all.
        taken = re.compile(rf'\d+\s+(?:read\({device}, |<\.\.\. read resumed>)"(?:\\x..){{4}}\\x(..)')
        self.requests = self.replies = 0
        self.others: list[str] = []
        is_forgetting = False
        for line in trace:
            if request := taken.match(line):
                is_forgetting = int(request[1], 16) in _FORGETTING
                self.requests += not is_forgetting
            call = _CALL.match(line)
            if call is None or is_forgetting or call[1] in _WAITING or (call[1] == "write" and call[2] in latency):
                continue
            is_reply = call[1] in ("write", "writev") and call[2] == str(device)
            self.replies += is_reply
            if not is_reply and not (call[1] == "read" and call[2] == str(device)):
                self.others.append(call[1])

    def count(self, *names: str) -> int:
        return sum(name in names for name in self.others)


def calls_of(overlay: Overlay, act: Callable[[], object]) -> Calls:
    """What the daemon does while `act` runs: strace has attached before, and each reply is in the trace before `act` goes on."""
    (daemon,) = overlay.daemons()
    targets = {fd: _target(daemon, fd) for fd in os.listdir(f"/proc/{daemon}/fd")}
    (device,) = (int(fd) for fd, target in targets.items() if target == "/dev/fuse")
    latency = {fd for fd, target in targets.items() if target == "/dev/cpu_dma_latency"}  # written when clients come and go
    trace = overlay.merged.with_name("trace")
    strace = subprocess.Popen(["strace", "-f", "-xx", "-o", trace, "-p", str(daemon)], stderr=subprocess.PIPE, text=True)
    assert strace.stderr is not None
    with strace.stderr:
        assert "attached" in strace.stderr.readline()
        act()
        strace.send_signal(signal.SIGINT)
        strace.wait(timeout=10)
    return Calls(trace.read_text().splitlines(), device, latency)


def _target(pid: int, fd: str) -> str:
    try:
        return os.readlink(f"/proc/{pid}/fd/{fd}")
    except FileNotFoundError:
        return ""


def look_up(directory: Path | int, *names: str) -> None:
    """stat(2) of names in a directory. By a descriptor of it nothing but the names is walked, even if caches are dropped meanwhile."""
    fd = directory if isinstance(directory, int) else os.open(directory, os.O_PATH)
    try:
        for name in names:
            with suppress(FileNotFoundError):
                os.stat(name, dir_fd=fd, follow_symlinks=False)
    finally:
        if fd is not directory:
            os.close(fd)


def numbered(name: str, first: int, end: int) -> list[str]:
    return [f"{name}{number}" for number in range(first, end)]


def calls_of_lookups(overlay: Overlay, directory: str, *names: str) -> Calls:
    with opened(overlay.merged / directory, os.O_PATH) as fd:
        return calls_of(overlay, lambda: look_up(fd, *names))


# ── system calls ────────────────────────────────────────────────────────────────────────────────────────────────────────────

LOWERS: tuple[Tree, ...] = (
    {"d": {f"top{number}": b"t" for number in range(10)}},
    {"d": {f"middle{number}": b"m" for number in range(10)}},
    {"d": {f"bottom{number}": b"b" for number in range(10)}, "alone": {f"f{number}": b"f" for number in range(10)}},
)
UPPER: Tree = {"d": {f"upper{number}": b"u" for number in range(10)}, "pure": {f"x{number}": b"x" for number in range(10)}}


@pytest.fixture
def stack(overlay: OverlayFactory) -> Overlay:
    """Three lowers and an upper."""
    return overlay(*LOWERS, upper=UPPER)


@needs_strace
@pytest.mark.parametrize("directory", ["d", "alone", "pure"])
def test_a_complete_listing_answers_for_what_is_not_there(stack: Overlay, directory: str) -> None:
    os.listdir(stack.merged / directory)
    look_up(stack.merged / directory, "absent")  # listing it moved the directory's atime: the kernel asks for that once
    calls = calls_of_lookups(stack, directory, *numbered("absent", 0, 20))
    assert (calls.requests, calls.replies, calls.others) == (20, 20, [])


@needs_strace
def test_what_is_made_and_removed_is_looked_at_once_and_opened_once(stack: Overlay) -> None:
    """The descriptor of a new file's data is also what holds it when its name goes."""
    with opened(stack.merged / "pure", os.O_PATH) as fd:

        def make_and_remove() -> None:
            for name in numbered("new", 0, 10):
                os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, dir_fd=fd))
            for name in numbered("new", 0, 10):
                os.unlink(name, dir_fd=fd)

        make_and_remove()
        calls = calls_of(stack, make_and_remove)
    assert calls.count("open", "openat", "openat2") == 10
    assert calls.count("unlink", "unlinkat") == 10
    assert calls.count("umask") == 20
    # A look-up of each name before it is made, if the directory has not been listed, and one of the file before it goes.
    assert calls.count("newfstatat", "fstat", "statx") == 10 + 10 + 10


@needs_strace
def test_a_directory_made_in_the_mount_is_never_asked_for_what_is_not_there(stack: Overlay) -> None:
    os.mkdir(stack.merged / "new")
    calls = calls_of_lookups(stack, "new", *numbered("absent", 0, 20))
    assert (calls.requests, calls.replies, calls.others) == (20, 20, [])


@needs_strace
@pytest.mark.parametrize(("name", "stats"), [("upper", 1), ("top", 2), ("middle", 2), ("bottom", 2)])
def test_a_lookup_is_one_stat_in_each_layer_that_can_hold_the_name(stack: Overlay, name: str, stats: int) -> None:
    """The upper, and one lower: those above the bottom one have been listed once, and say by themselves which names they have."""
    look_up(stack.merged / "d", *(f"{other}0" for other in ("upper", "top", "middle", "bottom")))
    calls = calls_of_lookups(stack, "d", *numbered(name, 1, 10))
    assert (calls.requests, calls.replies) == (9, 9)
    assert calls.others == ["newfstatat"] * stats * 9


@needs_strace
@pytest.mark.parametrize(("directory", "name"), [("alone", "f"), ("pure", "x")])
def test_a_lookup_where_one_layer_holds_the_directory_is_one_stat(stack: Overlay, directory: str, name: str) -> None:
    look_up(stack.merged / directory, f"{name}0")
    calls = calls_of_lookups(stack, directory, *numbered(name, 1, 10))
    assert calls.others == ["newfstatat"] * 9


# The last ones as strace calls what is newer than itself: listxattrat(2), getxattrat(2).
LISTING = ("llistxattr", "listxattr", "flistxattr", "listxattrat", "syscall_0x1d1")
GETTING = ("lgetxattr", "getxattr", "fgetxattr", "getxattrat", "syscall_0x1d0")


@needs_strace
def test_marks_are_asked_for_once_where_they_can_change_the_answer(overlay: OverlayFactory) -> None:
    """A directory of the upper over a lower's: one listing of its attributes. What lies in a pure directory is not asked."""
    names = numbered("n", 0, 10)
    trees: Tree = {"merged": {name: {"f": b""} for name in names}, "pure": {}}
    made = overlay(trees, upper=trees)
    calls = calls_of_lookups(made, "merged", *names)
    assert calls.count(*LISTING) == len(names)
    assert calls.count(*GETTING) == 0
    os.mkdir(made.merged / "pure" / "new")
    (made.merged / "pure" / "new" / "f").touch()
    calls = calls_of_lookups(made, "pure/new", "f", "absent")
    assert calls.count(*LISTING, *GETTING) == 0


@needs_strace
@pytest.mark.parametrize(("directory", "entries"), [("d", 40), ("alone", 10), ("pure", 10)])
def test_readdirplus_stats_each_entry_once(stack: Overlay, directory: str, entries: int) -> None:
    """And itself and the directory above; the upper also for what it has not."""
    look_up(stack.merged / directory, "absent")
    calls = calls_of(stack, lambda: os.listdir(stack.merged / directory))
    missed_in_upper = 30 if directory == "d" else 0
    assert calls.count("newfstatat", "fstat", "statx") == entries + missed_in_upper + 2


@needs_strace
def test_data_that_lies_in_the_page_cache_is_one_call(overlay: OverlayFactory) -> None:
    """Read from a registered descriptor into the reply, with nothing opened and nobody asked. O_DIRECT, so that each read gets here."""
    made = overlay({}, upper={"f": bytes(1 << 20)})
    with opened(made.merged / "f", os.O_RDONLY | os.O_DIRECT) as fd, mmap.mmap(-1, 4096) as page:
        os.preadv(fd, [page], 0)
        calls = calls_of(made, lambda: [os.preadv(fd, [page], 4096 * number) for number in range(20)])
    assert (calls.requests, calls.replies, calls.others) == (20, 20, ["preadv2"] * 20)


@needs_strace
@pytest.mark.wire
def test_opening_and_closing_a_known_file_is_no_request(stack: Overlay) -> None:
    path = stack.merged / "alone" / "f0"
    os.close(os.open(path, os.O_RDONLY))  # the first OPEN of a mount is answered ENOSYS

    def act() -> None:
        for _ in range(20):
            os.close(os.open(path, os.O_RDONLY))

    calls = calls_of(stack, act)
    assert (calls.requests, calls.others) == (0, [])


# ── big directories, many layers ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def by_hand(tmp_path: Path) -> Iterator[ByHand]:
    """An overlay of so many lowers, made but not mounted; what is put into them is not recorded as `overlay` would."""
    made: list[Overlay] = []

    def make(lowers: int) -> Overlay:
        place = tmp_path / str(len(made))
        paths = tuple(place / f"lower{number}" for number in range(lowers))
        for path in (*paths, place / "upper", place / "merged"):
            path.mkdir(parents=True)
        made.append(Overlay(paths, place / "upper", place / "merged"))
        return made[-1]

    yield make
    for overlay in made:
        overlay.close()


def fill(directory: Path, count: int) -> None:
    directory.mkdir()
    dirfd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for number in range(count):
            os.mknod(f"file{number:06}", 0o100644, dir_fd=dirfd)
    finally:
        os.close(dirfd)


@pytest.mark.timeout(180)
@needs_strace
@pytest.mark.wire
def test_a_directory_of_a_hundred_thousand_entries_is_listed_once(by_hand: ByHand) -> None:
    """Cold in less than 1.5 s on a machine of its own; then from the kernel's cache.

    The kernel may drop a page of that at any time, for want of memory or because another suite asks it to. If it does while the listing
    is still being made it caches no listing of that inode any more (fuse_add_dirent_to_cache waits for a page that nobody makes again), so
    that what begins anew is a mount.
    """
    overlay = by_hand(1)
    fill(overlay.lower / "d", 100_000)
    asked = list[Calls]()
    while len(asked) < 20 and not (asked and asked[-1].requests == 0):
        if asked:
            overlay.umount()
        overlay.mount()
        begin = time.perf_counter()
        assert len(os.listdir(overlay.merged / "d")) == 100_000
        cold = time.perf_counter() - begin
        log.info("100,000 entries listed in %.2f s", cold)
        os.listdir(overlay.merged / "d")  # listing it moved the atime, which is one GETATTR
        asked.append(calls_of(overlay, lambda: os.listdir(overlay.merged / "d")))
    assert (asked[-1].requests, asked[-1].others) == (0, [])


@pytest.mark.timeout(180)
def test_a_layer_more_costs_a_lookup_nothing_that_counts(by_hand: ByHand) -> None:
    """Less than 2 µs for each of a hundred layers: they have said once which names they hold."""
    costs = {}
    for layers in (2, 100):
        overlay = by_hand(layers)
        for number, lower in enumerate(overlay.lowers[:-1]):
            fill(lower / "d", 1)
            (lower / "d" / f"own{number}").touch()
        fill(overlay.lowers[-1] / "d", 3_000)
        overlay.mount()
        look_up(overlay.merged / "d", "file000000")
        begin = time.perf_counter()
        look_up(overlay.merged / "d", *(f"file{number:06}" for number in range(1, 3_000)))
        costs[layers] = (time.perf_counter() - begin) / 2_999
    each = (costs[100] - costs[2]) / 98
    log.info("a lookup takes %.1f µs in 2 layers, %.2f µs more for each of 98", costs[2] * 1e6, each * 1e6)
    assert each < costs[2] / 5


# ── memory, and a mount that does nothing ───────────────────────────────────────────────────────────────────────────────────


def private_bytes(pid: int) -> int:
    """Memory that is this process's alone."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return sum(int(size) * 1024 for size in re.findall(r"^Private_\w+: +(\d+) kB", text, re.MULTILINE))


def test_an_idle_mount_takes_thirty_mib_and_no_processor(overlay: OverlayFactory) -> None:
    made = overlay({"f": b"f"})
    (daemon,) = made.daemons()
    assert (made.merged / "f").read_bytes() == b"f"
    assert rests(daemon, seconds=3)
    log.info("an idle mount: %.1f MiB private", private_bytes(daemon) / 2**20)
    assert private_bytes(daemon) < 30 << 20


@pytest.mark.timeout(300)
@pytest.mark.parametrize("count", [20_000, pytest.param(200_000, marks=pytest.mark.slow)])
def test_an_inode_that_the_kernel_knows_takes_less_than_700_bytes(by_hand: ByHand, count: int) -> None:
    overlay = by_hand(1)
    for number in range(20):
        fill(overlay.lower / f"d{number}", count // 20)
    overlay.mount()
    (daemon,) = overlay.daemons()
    idle = private_bytes(daemon)
    for path in overlay.merged.iterdir():
        for entry in os.scandir(path):
            entry.stat(follow_symlinks=False)
    each = (private_bytes(daemon) - idle) / count
    log.info("%d inodes: %.0f bytes each", count, each)
    assert each < 700


def test_what_the_kernel_forgets_is_given_back(tmp_path: Path) -> None:
    """All of it but what a dict keeps for the next ones; to the allocator, which returns what pages it can."""
    for name in ("upper", "work"):
        (tmp_path / name).mkdir()
    fill(tmp_path / "lower", count := 5_000)
    paths = [os.fsencode(tmp_path / name) for name in ("lower", "upper", "work")]
    with closing(open_view([paths[0]], paths[1], paths[2], Policy())) as view:
        tracemalloc.start()
        try:
            taken = []
            for _ in range(2):
                numbers = [known.ino for known, _ in (view.lookup(view.root, name) or absent(name) for name in view.listing(view.root))]
                for ino in numbers:
                    view.inode(ino).nlookup += 1
                assert len(view.table) == count + 1
                for ino in numbers:
                    view.forget(ino, 1)
                assert len(view.table) == 1
                del numbers
                taken.append(tracemalloc.get_traced_memory()[0])
        finally:
            tracemalloc.stop()
    assert taken[1] - taken[0] < 10 * count


def absent(name: bytes) -> NoReturn:
    raise AssertionError(f"{name!r} is listed and cannot be looked up")
