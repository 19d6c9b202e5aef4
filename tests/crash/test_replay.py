"""A power cut at any moment of a run, as the disk sees it: after each flush, and in between with some of the writes lost that no flush had
confirmed. The log of the run is replayed up to there, the file system mounted, and judged by both overlays and by fsck.
"""

from __future__ import annotations

import errno
import filecmp
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest

from pyoverlay.core.calls import Calls
from pyoverlay.fuse.binding import wire
from pyoverlay.fuse.wired_calls import WiredCalls
from pyoverlay.testing import Connection, mounts_below
from tests.crash.cases import ALL, AT_ONCE, DURABLE, IN_PLACE, RUNNABLE
from tests.crash.images import place_for_images
from tests.crash.judges import Bed, difference
from tests.crash.replay import SEED, Cut, Recorder, Recording, recorded
from tests.posix.check import opened
from tests.unit.merged import Faulty, Merged, TreeSeen
from tests.unit.wired import WiredFaulty

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("own_mounts"), pytest.mark.timeout(600)]

Commit = Callable[[], None]
Tell = Callable[[str, str], None]


class Committing(Faulty):
    """After each call that changes something somebody else's fsync puts on disk what the journal has."""

    def __init__(self, commit: Commit) -> None:
        super().__init__(0, AssertionError())
        self.commit = commit

    def _call(self, call: Callable[..., object], *arguments: object) -> object:
        result = super()._call(call, *arguments)
        self.commit()
        return result


class WiredCommitting(Committing, WiredFaulty):
    """After each call that the extension makes, too."""

    def __init__(self, commit: Commit) -> None:
        WiredFaulty.__init__(self, 0, AssertionError())
        self.commit = commit

    def _about_to_call(self, name: str) -> int:
        self.commit()
        return super()._about_to_call(name)


class Unordered(Calls):
    """A copy-up's data has no place before its name. A size that is set after the data has xfs write it out too."""

    def sync_file_range(self, fd: int) -> None:
        """Not made."""

    def ftruncate(self, fd: int, size: int) -> None:
        """Not made."""


class Unsynced(Calls):
    """What is asked to be durable is not."""

    def fsync(self, fd: int) -> None:
        """Not made."""


class Staged(NamedTuple):
    """A case that is ready to run, in a directory of its own. old, new: the tree before and after it."""

    name: str
    bed: Bed
    merged: Merged
    old: TreeSeen
    new: TreeSeen


class Loss(NamedTuple):
    """What a judge saw that must not be, and what it could have been."""

    cut: Cut
    case: str
    judge: str
    seen: TreeSeen
    allowed: list[TreeSeen]

    def __str__(self) -> str:
        what = difference(self.seen, self.allowed[0], self.allowed[-1])
        return f"{self.case} after {self.cut.at} records, without those of {sorted(self.cut.lost)}, {self.judge}: {what}"


def staged(name: str, base: Path, below: Path) -> Staged:
    base.mkdir()
    below.mkdir(exist_ok=True)
    bed = Bed(base, below)
    old, new, _ = bed.old_and_new(name)
    bed.renew()
    merged = bed.view()
    ALL[name].prepare(merged)
    return Staged(name, bed, merged, old, new)


def run(recorder: Recorder, names: Sequence[str], below: Path | None, calls: Callable[[Commit], Calls]) -> list[Staged]:
    """The cases one after the other. After each somebody else's fsync puts on disk what the journal has, and then our sync all of it: the
    new tree is confirmed. A DURABLE case has done that itself.

    below: where the lowers are, if not on the disk. calls: by which the cases change the upper.
    """
    point = recorder.image.point
    with ExitStack() as at_the_end:
        other = at_the_end.enter_context(opened(point / "other", os.O_CREAT | os.O_WRONLY))

        def commit() -> None:
            os.pwrite(other, b"x", 0)
            os.fsync(other)

        stage = []
        for name in names:
            stage.append(staged(name, point / name, (below or point / name) / name))
            at_the_end.callback(stage[-1].merged.view.close)
        recorder.start()
        for case in stage:
            recorder.begin(case.name)
            case.merged.view.upper.calls = calls(commit)
            ALL[case.name].act(case.merged)
            if case.name not in DURABLE:
                commit()
                case.merged.view.sync()
            recorder.confirm(case.name)
    return stage


def losses(recording: Recording, stage: Sequence[Staged], cuts: Sequence[Cut]) -> list[Loss]:
    """At each cut the case under way, or just confirmed, is judged; at the last one all are."""
    found: list[Loss] = []
    for cut in cuts:
        progress = recording.progress(cut)
        judged = stage if cut is cuts[-1] else stage[max(0, len(progress) - 1) : len(progress)]
        with recording.after(cut):
            for case in judged:
                found += _losses(cut, case, is_confirmed=progress[case.name])
    return found


def _losses(cut: Cut, case: Staged, *, is_confirmed: bool) -> Iterator[Loss]:
    allowed = [case.new] if is_confirmed else [case.old, case.new]
    for judge in (case.bed.by_us, case.bed.by_the_kernel):
        seen = judge()
        if seen not in allowed and (is_confirmed or case.name not in IN_PLACE):
            yield Loss(cut, case.name, judge.__name__, seen, allowed)


def single(_: Commit) -> Calls:
    return Calls()


def at_once(_: Commit) -> Calls:
    assert wire is not None
    return WiredCalls(wire)


SLOW = [pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.mark.parametrize(
    ("names", "calls", "in_between"),
    [
        pytest.param((*RUNNABLE, *DURABLE), single, 40, id="each"),
        pytest.param(AT_ONCE, at_once, 20, id="at once", marks=pytest.mark.wire),
        pytest.param((*RUNNABLE, *DURABLE), Committing, 500, id="each, at each call", marks=SLOW),
        pytest.param(AT_ONCE, WiredCommitting, 200, id="at once, at each call", marks=[*SLOW, pytest.mark.wire]),
    ],
)
@pytest.mark.parametrize(
    ("kind", "is_cloned"),
    [pytest.param("ext4", False, id="ext4"), pytest.param("xfs", False, id="xfs"), pytest.param("xfs", True, id="xfs, cloned", marks=SLOW)],
)
def test_at_each_flush_the_tree_is_the_old_or_the_new_one(
    tmp_path: Path, kind: str, is_cloned: bool, names: Sequence[str], calls: Callable[[Commit], Calls], in_between: int, tell: Tell
) -> None:
    """With what was confirmed it is the new one. With lowers beside the upper copies share blocks, on xfs."""
    with place_for_images(tmp_path) as place:
        with recorded(kind, tmp_path, place) as recorder:
            stage = run(recorder, names, None if is_cloned else tmp_path, calls)
        recording = recorder.recording()
        cuts = recording.cuts(SEED, in_between)
        found = losses(recording, stage, cuts)
    tell(f"replayed, {kind}, {'cloned, ' * is_cloned}{calls.__name__}, seed {SEED}", recording.figures(cuts, len(found)))
    assert [str(loss) for loss in found] == []


UNORDERED = ["chmod_of_a_lower_file", "write_to_a_lower_file", "rename_of_a_lower_file", "link_over_a_whiteout"]


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_without_an_order_a_flush_has_files_without_their_content(tmp_path: Path, kind: str) -> None:
    """That a replay finds what `ordered` orders is what makes the others say something."""
    with place_for_images(tmp_path) as place:
        with recorded(kind, tmp_path, place) as recorder:
            stage = run(recorder, UNORDERED, tmp_path, lambda _: Unordered())
            assert all(case.merged.view.upper.keeps_order for case in stage)
        recording = recorder.recording()
        found = losses(recording, stage, recording.cuts(1, 0))
    whole = {entry.digest for case in stage for tree in (case.old, case.new) for entry in tree.values()}
    torn = {loss.case for loss in found if any(entry.digest not in whole for entry in loss.seen.values())}
    assert torn == set(UNORDERED)


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_without_fsync_what_was_confirmed_is_not_there(tmp_path: Path, kind: str) -> None:
    with place_for_images(tmp_path) as place:
        with recorded(kind, tmp_path, place) as recorder:
            stage = run(recorder, list(DURABLE), tmp_path, lambda _: Unsynced())
        recording = recorder.recording()
        found = losses(recording, stage, recording.cuts(1, 0))
    assert {loss.case for loss in found} == set(DURABLE)


def test_a_log_has_all_that_a_disk_was_told(tmp_path: Path) -> None:
    with place_for_images(tmp_path) as place:
        with recorded("ext4", tmp_path, place) as recorder:
            recorder.start()
            (recorder.image.point / "file").write_bytes(os.urandom(3 << 20))
        recording = recorder.recording()
        recording.restore(Cut(len(recording.log)), place / "replayed")
        assert filecmp.cmp(place / "replayed", place / "disk", shallow=False)


def test_a_disk_that_hangs_is_ended_and_leaves_nothing(tmp_path: Path) -> None:
    """As by the time limit of a test: its connection is aborted, who waits for it has EIO, and everything can be unmounted."""
    answers = []

    def sync(fd: int) -> None:
        try:
            os.fsync(fd)
        except OSError as error:
            answers.append(error.errno)

    with place_for_images(tmp_path) as place, recorded("ext4", tmp_path, place) as recorder:
        (connection,) = [Connection.of(mounted) for mounted in mounts_below(recorder.disk.file)]
        (loop,) = [Path("/sys/block", Path(mounted.source).name) for mounted in mounts_below(recorder.image.point)]
        backing = (loop / "loop/backing_file").read_text()
        with opened(recorder.image.point / "file", os.O_CREAT | os.O_WRONLY) as fd:
            os.kill(recorder.disk.process.pid, signal.SIGSTOP)
            os.write(fd, b"never on disk")
            waits = threading.Thread(target=sync, args=(fd,))
            waits.start()
            connection.abort()
            waits.join()
        os.kill(recorder.disk.process.pid, signal.SIGCONT)
    assert answers == [errno.EIO]
    assert mounts_below(tmp_path) == []
    assert not (loop / "loop").exists() or (loop / "loop/backing_file").read_text() != backing
