"""A run on a recording disk, and what the disk has when the power fails, for each moment of it: all that was flushed, and of what was
written since then any part.
"""

from __future__ import annotations

import os
import random
import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tests.crash.disk import Disk, Kind, Record, read_log, recording_disk
from tests.crash.images import Image
from tests.posix.check import opened
from tests.posix.system_calls import data_extents, syncfs

# Another one is other moments, and other operations of a client's: a run says which it was.
SEED = int(os.environ.get("PYOVERLAY_SEED", "1"))

_START, _BEGUN, _CONFIRMED = b"start", b"begun ", b"confirmed "
_PORTIONS = (0.1, 0.5, 0.9)


class Cut(NamedTuple):
    """A moment at which the power fails. at: how many records there had been. lost: those of them that the disk had only in its cache."""

    at: int
    lost: frozenset[int] = frozenset()


@dataclass(slots=True)
class Recording:
    """The log of a run. kind, point: of the file system, and where it was mounted. base: the disk before the log; replaying changes it."""

    kind: str
    point: Path
    base: Path
    log: list[Record]
    _start: int = field(init=False)
    _applied: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self._start = self.log.index(Record(Kind.MARK, data=_START))

    def figures(self, cuts: Sequence[Cut], losses: int) -> str:
        """What the run had the disk do, and what came of it."""
        made = Counter(record.kind for record in self.log[self._start :])
        operations = len(self.progress(cuts[-1]))
        return f"{operations} operations, {made[Kind.WRITE]} writes, {made[Kind.FLUSH]} flushes, {len(cuts)} replays, {losses} losses"

    def progress(self, cut: Cut) -> dict[str, bool]:
        """What the run had begun before the power failed, in that order, and whether it was confirmed."""
        progress = {}
        for record in self.log[self._start : cut.at]:
            if _says(record, _BEGUN):
                progress[record.data.removeprefix(_BEGUN).decode()] = False
            elif _says(record, _CONFIRMED):
                progress[record.data.removeprefix(_CONFIRMED).decode()] = True
        return progress

    def cuts(self, seed: int, in_between: int) -> list[Cut]:
        """Moments of the run in the order of the log: right after each flush; when something was just confirmed, and whatever was written
        since the last flush is lost; and `in_between` drawn ones, at which some of that is lost. Of moments between which nothing was
        begun, and nothing written that is not lost, there is only the last, at which most was confirmed.
        """
        certain: dict[tuple[int, int], Cut] = {}
        since = max(at + 1 for at in range(self._start) if self.log[at].kind is Kind.FLUSH)
        writes, flushed, begun = [], 0, 0
        for at, record in enumerate(self.log[self._start :], self._start + 1):
            begun += _says(record, _BEGUN)
            if record.kind is Kind.WRITE:
                writes.append((since, at))
            elif record.kind is Kind.FLUSH:
                since, flushed = at, len(writes)
            if record.kind is Kind.FLUSH or _says(record, _CONFIRMED):
                certain[flushed, begun] = Cut(at, frozenset(range(since, at)))
        draw = random.Random(seed)
        drawn = [self._some_lost(since, at, draw) for since, at in draw.choices(writes, k=in_between)]
        return sorted([*certain.values(), *drawn], key=lambda cut: cut.at)

    def _some_lost(self, since: int, at: int, draw: random.Random) -> Cut:
        portion = draw.choice(_PORTIONS)
        return Cut(at, frozenset(number for number in range(since, at) if draw.random() < portion))

    @contextmanager
    def after(self, cut: Cut) -> Iterator[None]:
        """The file system that the disk then has, mounted where it was, which repairs it. It goes at the end, and fsck finds nothing in it.

        Cuts come in the order of the log.
        """
        image = Image(self.kind, self.base.with_name("replayed"), self.point)
        self.restore(cut, image.file)
        image.mount()
        try:
            yield
        finally:
            image.umount()
        image.fsck()

    def restore(self, cut: Cut, file: Path) -> None:
        """What the disk then has, into this file."""
        since = max((at + 1 for at in range(self._applied, cut.at) if self.log[at].kind is Kind.FLUSH), default=self._applied)
        self._write(self.base, range(self._applied, since))
        self._applied = since
        _copy(self.base, file)
        self._write(file, [number for number in range(since, cut.at) if number not in cut.lost])

    def _write(self, file: Path, numbers: Sequence[int]) -> None:
        with opened(file, os.O_WRONLY) as fd:
            for number in numbers:
                kind, offset, data = self.log[number]
                if kind is Kind.WRITE:
                    os.pwrite(fd, data, offset)


def _says(record: Record, mark: bytes) -> bool:
    return record.kind is Kind.MARK and record.data.startswith(mark)


def _copy(source: Path, target: Path) -> None:
    """With its holes: most of a small file system is one."""
    target.unlink(missing_ok=True)
    with opened(source, os.O_RDONLY) as old, opened(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as new:
        os.ftruncate(new, os.fstat(old).st_size)
        for start, end in data_extents(source):
            os.lseek(new, start, os.SEEK_SET)
            while start < end:
                start += os.sendfile(new, old, start, end - start)


@dataclass(slots=True)
class Recorder:
    """A file system on a recording disk, mounted. place: for what only matters until the test is over."""

    image: Image
    disk: Disk
    place: Path

    def start(self) -> None:
        """What was done up to now is on disk; the run begins."""
        with opened(self.image.point / "started", os.O_CREAT | os.O_WRONLY) as fd:
            syncfs(fd)
            os.fsync(fd)  # syncfs of xfs may leave what it writes in the disk's cache
        self.disk.mark(_START)

    def begin(self, name: str) -> None:
        """From now on it may be there."""
        self.disk.mark(_BEGUN + name.encode())

    def confirm(self, name: str) -> None:
        """From now on it has to be."""
        self.disk.mark(_CONFIRMED + name.encode())

    def recording(self) -> Recording:
        """When it is unmounted."""
        return Recording(self.image.kind, self.image.point, self.place / "base", read_log(self.disk.log))


@contextmanager
def recorded(kind: str, directory: Path, place: Path) -> Iterator[Recorder]:
    """A new file system of that kind on a disk that records, mounted in a directory of its own below this one."""
    made = Image(kind, place / "made", directory / kind)
    made.point.mkdir()
    made.make()
    for copy in ("base", "disk"):
        subprocess.run(["cp", "--sparse=always", made.file, place / copy], check=True)  # xfs writes its log of 64 MB full of zeroes
    with recording_disk(place / "disk", directory) as disk:
        image = Image(kind, disk.file, made.point)
        image.mount()
        try:
            yield Recorder(image, disk, place)
        finally:
            image.umount()
