"""One measurement: layers mounted afresh, prepared, the clock, checked, unmounted, and nothing left behind."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from bench.filesystems import FileSystem, Place, serving
from bench.layers import LayerSets
from bench.results import Results
from bench.workload import Caches, Stage, Workload
from pyoverlay.core import syscalls

_IMAGE_BYTES = 24 << 30  # more than any set of workloads writes; the file is sparse

Report = Callable[[Workload, FileSystem, float], None]


@contextmanager
def scratch(parent: Path) -> Iterator[Path]:
    """A directory for everything a run makes; removed at the end, whatever happened."""
    directory = Path(tempfile.mkdtemp(prefix="pyoverlay-bench-", dir=parent))
    directory.chmod(0o755)  # some workloads run as an ordinary user
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


@contextmanager
def fresh_filesystem(parent: Path, kind: str) -> Iterator[Path]:
    """A directory that is a file system of its own, ext4 or xfs with its journal, in a sparse file.

    What the machine's own file system is and has been through shows in the times: on a used ext4 without a journal a create took 1.3 ms,
    on a fresh one with a journal, in a file on the first, 0.04 ms.
    """
    image, directory = parent / "image", parent / "layers"
    directory.mkdir()
    with image.open("wb") as file:
        file.truncate(_IMAGE_BYTES)
    subprocess.run([f"mkfs.{kind}", "-q", image], check=True, stdin=subprocess.DEVNULL)
    subprocess.run(["mount", "-o", "loop", image, directory], check=True)
    try:
        directory.chmod(0o755)
        yield directory
    finally:
        subprocess.run(["umount", directory], check=True)


def write_back(directory: Path) -> None:
    """Write what is dirty on the file system of a directory: nobody shall pay for what another one left."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        syscalls.syncfs(fd)
    finally:
        os.close(fd)


def drop_caches() -> None:
    """Empty the page cache and the caches of names and inodes, apart from what is dirty."""
    Path("/proc/sys/vm/drop_caches").write_text("3")


@contextmanager
def staged(filesystem: FileSystem, workload: Workload, layers: LayerSets) -> Iterator[Stage]:
    """A stage for one run of a workload, mounted."""
    with tempfile.TemporaryDirectory(prefix="stage-", dir=layers.directory) as name, ExitStack() as stack:
        directory = Path(name)
        directory.chmod(0o755)
        place = Place(_lowers(workload, layers, directory, stack), directory / "upper", directory / "work", directory / "merged")
        for path in (place.upper, place.work, place.merged, directory / "outside"):
            path.mkdir()
        stack.enter_context(filesystem.mounted(place))
        yield Stage(place.merged, directory / "outside", layers.facts, workload.user)


def _lowers(workload: Workload, layers: LayerSets, directory: Path, stack: ExitStack) -> list[Path]:
    """The workload's lowers; the slow one is served for the length of `stack`."""
    lowers = layers.lowers(workload.layers)
    if workload.layers != "slow":
        return lowers
    slow = directory / "slow"
    slow.mkdir()
    stack.enter_context(serving([sys.executable, "-m", "bench.slow_lower", os.fspath(lowers[-1]), os.fspath(slow)], slow))
    return [*lowers[:-1], slow]


def settle(workload: Workload, layers: LayerSets) -> None:
    """Bring the caches into the state that the workload begins with."""
    write_back(layers.directory)
    if workload.caches is Caches.COLD:
        drop_caches()


def measure(filesystem: FileSystem, workload: Workload, layers: LayerSets) -> float:
    """Seconds that the workload took. WrongResult if it did something else than it should."""
    with staged(filesystem, workload, layers) as stage:
        workload.prepare(stage)
        settle(workload, layers)
        begin = time.perf_counter()
        workload.run(stage)
        seconds = time.perf_counter() - begin
        workload.check(stage)
    return seconds


def compare(filesystems: Sequence[FileSystem], workloads: Sequence[Workload], layers: LayerSets, rounds: int, report: Report) -> Results:
    """Every workload on every file system, `rounds` times. In each round the file systems take turns, and another one begins: what else
    the machine does falls on all of them.
    """
    results = Results([filesystem.name for filesystem in filesystems])
    for number in range(rounds):
        for workload in workloads:
            first = number % len(filesystems)
            for filesystem in [*filesystems[first:], *filesystems[:first]]:
                seconds = measure(filesystem, workload, layers)
                results.add(workload, filesystem.name, seconds)
                report(workload, filesystem, seconds)
    return results

