"""Power cuts at any moment of a real mount's life, as test_replay.py has them: what fsync or `pyoverlay umount` confirmed is there."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import pytest

from pyoverlay.core.policy import Fsync
from pyoverlay.core.stack import open_view
from pyoverlay.testing import File, Overlay, make_tree
from pyoverlay.testing.mounts import end
from tests.crash.images import place_for_images
from tests.crash.replay import SEED, Recorder, Recording, recorded
from tests.crash.victim import policy_of
from tests.posix.check import opened
from tests.posix.kernel_overlay import KernelOverlay
from tests.posix.system_calls import RENAME_EXCHANGE, renameat2
from tests.unit.merged import Merged

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("own_mounts"), pytest.mark.timeout(600)]

Contents = dict[str, bytes]
FILES = {f"file{number}": random.Random(number).randbytes(1 + 3777 * number) for number in range(8)}
_TEMPORARY = "being written"


class Step(NamedTuple):
    """One operation. before, after: what every file has. file, start, end: what is written in place, where nothing is certain before the
    fsync.
    """

    before: Contents
    after: Contents
    file: str = ""
    start: int = 0
    end: int = 0

    def allows(self, seen: Contents, *, is_confirmed: bool) -> bool:
        if is_confirmed or not self.file:
            return seen in ([self.after] if is_confirmed else [self.before, self.after])
        others = seen.keys() == self.before.keys() and all(seen[name] == self.before[name] for name in seen if name != self.file)
        return others and self._keeps(seen[self.file], self.before[self.file])

    def _keeps(self, seen: bytes, before: bytes) -> bool:
        """What fsync confirmed before this is there."""
        return seen[: self.start] == before[: self.start] and seen[self.end : len(before)] == before[self.end :]


@dataclass(slots=True)
class Client:
    """A program that works in `merged` at random, and hears of each operation that it is durable. other: in the file system below."""

    recorder: Recorder
    merged: Path
    other: Path
    draw: random.Random
    contents: Contents = field(default_factory=lambda: dict(FILES))
    steps: list[Step] = field(default_factory=list)

    def work(self, count: int) -> None:
        acts = [self.overwrite, self.append, self.replace, self.remove, self.rename, self.exchange, self.change_mode]
        for _ in range(count):
            self.draw.choice(acts)()

    @contextmanager
    def step(self, after: Contents, file: str = "", start: int = 0, end: int = 0) -> Iterator[None]:
        self.steps.append(Step(self.contents, after, file, start, end))
        self.recorder.begin(str(len(self.steps)))
        yield
        self.recorder.confirm(str(len(self.steps)))
        self.contents = after

    def one(self) -> str:
        return self.draw.choice(sorted(self.contents))

    def overwrite(self) -> None:
        name = self.one()
        old = self.contents[name]
        start = self.draw.randrange(len(old))
        self._write(name, start, self.draw.randbytes(self.draw.randint(1, 9000))[: len(old) - start])

    def append(self) -> None:
        name = self.one()
        self._write(name, len(self.contents[name]), self.draw.randbytes(self.draw.randint(1, 9000)))

    def _write(self, name: str, start: int, data: bytes) -> None:
        old, end = self.contents[name], start + len(data)
        with self.step(self.contents | {name: old[:start] + data + old[end:]}, name, start, end):
            with opened(self.merged / name, os.O_WRONLY) as fd:
                assert os.pwrite(fd, data, start) == len(data)
                os.fsync(fd)

    def replace(self) -> None:
        name = self.draw.choice([*FILES, "new", "newer"])
        data = self.draw.randbytes(self.draw.randint(1, 20_000))
        with self.step(self.contents | {name: data}):
            with opened(self.merged / _TEMPORARY, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as fd:
                os.write(fd, data)
                os.fsync(fd)
            os.rename(self.merged / _TEMPORARY, self.merged / name)
            self.sync_directory()

    def remove(self) -> None:
        name = self.one()
        with self.step({other: data for other, data in self.contents.items() if other != name}):
            os.unlink(self.merged / name)
            self.sync_directory()
        self.replace()  # so that there are always some

    def rename(self) -> None:
        old, new = self.one(), self.draw.choice([*FILES, "new", "newer"])
        if old == new:
            return
        with self.step({name: data for name, data in self.contents.items() if name != old} | {new: self.contents[old]}):
            os.rename(self.merged / old, self.merged / new)
            self.sync_directory()

    def exchange(self) -> None:
        one, two = self.draw.sample(sorted(self.contents), 2)
        with self.step(self.contents | {one: self.contents[two], two: self.contents[one]}):
            renameat2(self.merged / one, self.merged / two, RENAME_EXCHANGE)
            self.sync_directory()

    def change_mode(self) -> None:
        """A copy-up, or none. Its data is never synced, but its name is, by somebody else's fsync."""
        with self.step(self.contents):
            (self.merged / self.one()).chmod(0o600 | self.draw.randrange(0o100))
            self.sync_other()

    def sync_directory(self) -> None:
        with opened(self.merged, os.O_RDONLY | os.O_DIRECTORY) as fd:
            os.fsync(fd)

    def sync_other(self) -> None:
        with opened(self.other, os.O_WRONLY | os.O_CREAT) as fd:
            os.write(fd, b"x")
            os.fsync(fd)

    def last_change(self, overlay: Overlay, *, is_killed: bool = False) -> None:
        """A write in place that nobody has synced when `pyoverlay umount` says that all is on disk. is_killed: the daemon was, before."""
        name = self.one()
        data = bytes(len(self.contents[name]))
        self._write(name, 0, data)
        with self.step(self.contents | {name: data[:-1] + b"!"}, name, len(data) - 1, len(data)):
            with opened(self.merged / name, os.O_WRONLY) as fd:
                os.pwrite(fd, b"!", len(data) - 1)
            self.sync_other()
            if is_killed:
                end(overlay.daemons())
            overlay.umount()


@contextmanager
def mounted(directory: Path, point: Path, *options: str) -> Iterator[Overlay]:
    """An overlay of a lower in `directory` and an upper on the disk."""
    for place in (directory / "lower", directory / "merged", point / "upper"):
        place.mkdir()
    make_tree(directory / "lower", {name: File(content) for name, content in FILES.items()})
    overlay = Overlay((directory / "lower",), point / "upper", directory / "merged", options)
    overlay.mount()
    try:
        yield overlay
    finally:
        overlay.close()


def by_us(overlay: Overlay) -> Contents:
    lowers, upper, work = [os.fsencode(overlay.lower)], os.fsencode(overlay.writable), os.fsencode(overlay.work)
    merged = Merged(open_view(lowers, upper, work, policy_of(Fsync.ORDERED)))
    try:
        return {name: merged.read(name) for name in merged.listdir() if name != _TEMPORARY}
    finally:
        merged.view.close()


def by_the_kernel(overlay: Overlay) -> Contents:
    kernel = KernelOverlay(overlay.lowers, overlay.writable, overlay.merged, ("redirect_dir=on", "metacopy=on"), overlay.work)
    kernel.mount()
    try:
        return {path.name: path.read_bytes() for path in kernel.merged.iterdir() if path.name != _TEMPORARY}
    finally:
        kernel.umount()


Judge = Callable[[Overlay], Contents]
BOTH = (by_us, by_the_kernel)


def losses(
    recording: Recording, overlay: Overlay, steps: list[Step], in_between: int, judges: tuple[Judge, ...] = BOTH
) -> tuple[list[str], str]:
    """What must not be, and the figures."""
    found = []
    cuts = recording.cuts(SEED, in_between)
    for cut in cuts:
        progress = recording.progress(cut)
        if not progress:
            continue
        step, is_confirmed = steps[len(progress) - 1], progress[str(len(progress))]
        with recording.after(cut):
            for judge in judges:
                if not step.allows(judge(overlay), is_confirmed=is_confirmed):
                    found.append(f"step {len(progress)} after {cut.at} records, without {sorted(cut.lost)}, {judge.__name__}")
    return found, recording.figures(cuts, len(found))


@contextmanager
def recorded_client(kind: str, directory: Path, place: Path, *options: str) -> Iterator[tuple[Client, Overlay]]:
    """At its start. Everything is unmounted at the end."""
    with recorded(kind, directory, place) as recorder, mounted(directory, recorder.image.point, *options) as overlay:
        client = Client(recorder, overlay.merged, recorder.image.point / "other", random.Random(SEED))
        recorder.start()
        yield client, overlay


@pytest.mark.parametrize(
    ("count", "in_between"),
    [
        pytest.param(20, 20, id="short"),
        pytest.param(300, 600, id="long", marks=[pytest.mark.slow, pytest.mark.timeout(3600)]),
    ],
)
@pytest.mark.parametrize("options", [(), ("-o", "writeback")], ids=["write-through", "writeback"])
@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_at_each_flush_what_a_mount_confirmed_is_there(
    tmp_path: Path, kind: str, options: tuple[str, ...], count: int, in_between: int, tell: Callable[[str, str], None]
) -> None:
    """And no name is without its content, whoever gave it and whatever was synced."""
    with place_for_images(tmp_path) as place:
        with recorded_client(kind, tmp_path, place, *options) as (client, overlay):
            client.work(count)
            client.last_change(overlay)
        found, figures = losses(client.recorder.recording(), overlay, client.steps, in_between)
    tell(f"replayed mount, {kind} {' '.join(options)}, seed {SEED}", figures)
    assert found == []


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_at_each_flush_what_umount_made_durable_for_a_daemon_that_was_killed_is_there(tmp_path: Path, kind: str) -> None:
    """Of a mount on xfs, what had been written in place was in the disk's cache yet."""
    with place_for_images(tmp_path) as place:
        with recorded_client(kind, tmp_path, place) as (client, overlay):
            client.append()
            client.last_change(overlay, is_killed=True)
        found, _ = losses(client.recorder.recording(), overlay, client.steps, 20)
    assert found == []


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_with_volatile_what_a_mount_confirmed_is_not_there(tmp_path: Path, kind: str) -> None:
    """The kernel's overlay mounts no such upper, so that we judge alone."""
    with place_for_images(tmp_path) as place:
        with recorded_client(kind, tmp_path, place, "-o", "fsync=volatile") as (client, overlay):
            client.append()
            client.replace()
            client.sync_other()
            client.last_change(overlay)
        found, _ = losses(client.recorder.recording(), overlay, client.steps, 0, (by_us,))
    assert found != []
