"""Two overlays over equal layers, the kernel's and ours: the same operations on both, then each reads what the other left on disk."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from pyoverlay.testing import Directory, Entry, Fifo, File, HardLink, Symlink, Tree, Whiteout, make_tree, snapshot
from tests.integration.looks import OPAQUE, litter
from tests.posix.check import NOBODY, opened
from tests.posix.kernel_overlay import FULL, KernelOverlay
from tests.posix.system_calls import remount
from tests.property.disks import disk_difference
from tests.property.forked import ForkedOverlay, Forker, forker
from tests.property.operations import OfTheMount, Operation, Remount, outcome

# What a sequence begins with: (upper lower, bottom lower, upper). Names are those of the strategies.
LAYERS: dict[str, tuple[Tree, Tree, Tree]] = {
    "nothing": ({}, {}, {}),
    "lowers": (
        {"a": {"a": b"a/a", "b": {"c": b"a/b/c", "d": Symlink("c")}}, "b": File(b"b", mode=0o4755, uid=NOBODY)},
        {"a": {"b": {"a": b"a/b/a"}, "c": Fifo()}, "c": Directory({"a": b"c/a"}, uid=NOBODY, gid=NOBODY), "d": Symlink("a/a")},
        {},
    ),
    "linked": (
        {"a": {"a": b"shared", "b": HardLink("a/a")}, "b": HardLink("a/a"), "c": {"a": Symlink("b"), "b": HardLink("c/a")}},
        {"a": {"c": b"low", "d": HardLink("a/c")}, "d": HardLink("a/c")},
        {},
    ),
    "all": (
        {"a": {"a": b"a/a", "b": {"c": b"a/b/c"}}, "b": b"b", "c": {"d": Whiteout()}},
        {"a": {"b": {"a": b"a/b/a", "b": b"hidden"}}, "b": {"a": b"hidden"}, "c": {"d": b"hidden", "a": {"a": b"c/a/a"}}},
        {"a": {"b": {"b": Whiteout(), "d": b"upper"}, "d": b"upper"}, "d": {"a": b"d/a", "b": HardLink("d/a")}},
    ),
    "opaque": (
        {"a": Directory({"a": {"b": b"a/a/b"}}, xattrs={OPAQUE: b"y"}), "c": Directory({"a": b"c/a"}, mode=0o2777)},
        {"a": {"b": b"hidden"}, "b": {"a": {"a": b"hidden"}}, "d": {"c": {"b": b"d/c/b"}}},
        {"b": Directory({"b": b"b/b"}, xattrs={OPAQUE: b"y"}), "c": Whiteout()},
    ),
}
TEMPLATES = tuple(LAYERS)

State = dict[bytes, Entry]

# The next operation for the tree that is in this directory; None ends the sequence.
Choice = Callable[[Path], Operation | None]


def in_turn(sequence: Sequence[Operation]) -> Choice:
    """These operations, whatever the tree."""
    following = iter(sequence)
    return lambda _: next(following, None)


def state(directory: Path, since_ns: int) -> State:
    """The tree, with every time that a clock gave since `since_ns` made equal."""
    return {
        name: replace(entry, mtime_ns=min(entry.mtime_ns, since_ns), size=0 if entry.kind == "d" else entry.size)
        for name, entry in snapshot(directory).items()
    }


def difference(kernel: State, ours: State) -> str:
    """What differs, a line a path; empty if nothing does."""
    lines = []
    for name in sorted(kernel.keys() | ours.keys()):
        one, two = kernel.get(name), ours.get(name)
        if one is None or two is None:
            lines.append(f"{os.fsdecode(name)}: {'only in ours' if one is None else 'only in the kernel'}")
        elif one != two:
            fields = [each for each in Entry.__slots__ if getattr(one, each) != getattr(two, each)]
            lines += [f"{os.fsdecode(name)}: {each}: kernel {getattr(one, each)!r}, ours {getattr(two, each)!r}" for each in fields]
    return "\n".join(lines)


def _forgive_touched_directories(kernel: State, ours: State) -> None:
    """The kernel moves a directory's mtime also when a rename in it fails late (ENOTEMPTY), as ext4 does not and we do not."""
    for name, entry in kernel.items():
        if entry.kind == "d" and name in ours and entry.mtime_ns > ours[name].mtime_ns:
            kernel[name] = replace(entry, mtime_ns=ours[name].mtime_ns)


def template(start: str, sequence: Sequence[Operation]) -> str:
    """The sequence as a regression test: an entry for tests/property/test_regressions.py, which still wants a name."""
    steps = "".join(f"            op.{operation!r},\n" for operation in sequence).replace("operation=", "operation=op.")
    return f'    "name_the_claim": (\n        "{start}",\n        [\n{steps}        ],\n    ),\n'


class Difference(AssertionError):
    """The kernel and we disagree; the text is a regression test."""

    def __init__(self, what: str, start: str, sequence: Sequence[Operation]) -> None:
        super().__init__(f"{what}\n\nAs a regression test:\n{template(start, sequence)}")


@dataclass(slots=True)
class Pair:
    """The two mounts of one sequence."""

    base: Path
    start: str
    forker: Forker
    kernel: KernelOverlay = field(init=False)
    ours: ForkedOverlay = field(init=False)
    sequence: list[Operation] = field(default_factory=list)
    since_ns: int = field(default_factory=time.time_ns)

    def __post_init__(self) -> None:
        for side in ("kernel", "ours"):
            for name, tree in zip(("top", "bottom", "upper", "merged"), (*LAYERS[self.start], {}), strict=True):
                directory = self.base / side / name
                directory.mkdir(parents=True)
                make_tree(directory, tree)
                directory.chmod(0o777)
        self.kernel = KernelOverlay(self._lowers("kernel"), self.base / "kernel/upper", self.base / "kernel/merged", FULL)
        self.ours = ForkedOverlay(self._lowers("ours"), self.base / "ours/upper", self.base / "ours/merged", forker=self.forker)

    def _lowers(self, side: str) -> tuple[Path, Path]:
        return self.base / side / "top", self.base / side / "bottom"

    def run(self, choose: Choice) -> None:
        """Run operations on both sides, comparing each outcome, then the trees. Raises Difference."""
        self.kernel.mount()
        self.ours.mount()
        while (operation := choose(self.kernel.merged)) is not None:
            self.sequence.append(operation)
            if isinstance(operation, OfTheMount):
                self._serve(operation)
                continue
            expected, got = (_outcome(side.merged, operation) for side in (self.kernel, self.ours))
            if expected != got:
                raise self._differ(f"{operation}:\n  kernel: {expected}\n  ours:   {got}")
        expected_state, got_state = (state(side.merged, self.since_ns) for side in (self.kernel, self.ours))
        _forgive_touched_directories(expected_state, got_state)
        if found := difference(expected_state, got_state):
            raise self._differ(f"the trees differ:\n{found}")

    def _serve(self, operation: OfTheMount) -> None:
        if isinstance(operation, Remount):
            self.kernel.remount()
            self.ours.remount()
        else:
            remount(self.ours.merged)

    def judge_the_disks(self) -> None:
        """Mount each upper by the other side: both must show the tree as its maker did; then look at the uppers. Raises Difference."""
        kernels, ours = (state(side.merged, self.since_ns) for side in (self.kernel, self.ours))
        self.close()
        assert [path for path in litter(self.ours) if not path.startswith("index/")] == []
        assert self.ours.log.read_text() == ""
        swapped = KernelOverlay(self.ours.lowers, self.ours.writable, self.kernel.merged, FULL)
        read_back = ForkedOverlay(self.kernel.lowers, self.kernel.upper, self.ours.merged, forker=self.forker)
        # The index of hard links lies in the work directory, and so belongs to the upper.
        self.ours.work.rename(swapped.work)
        self.kernel.work.rename(read_back.work)
        self._compare(ours, swapped, "the kernel shows our upper otherwise than we did (here we are the reference)")
        self._compare(kernels, read_back, "we show the kernel's upper otherwise than it did")
        if found := disk_difference(self.kernel.upper, self.ours.writable):
            raise self._differ(f"the uppers differ:\n{found}")

    def _compare(self, expected: State, overlay: KernelOverlay | ForkedOverlay, what: str) -> None:
        overlay.mount()
        try:
            if found := difference(expected, state(overlay.merged, self.since_ns)):
                raise self._differ(f"{what}:\n{found}")
        finally:
            overlay.close()

    def _differ(self, what: str) -> Difference:
        return Difference(what, self.start, self.sequence)

    def close(self) -> None:
        self.kernel.close()
        self.ours.close()


def _outcome(directory: Path, operation: Operation) -> object:
    # The directories above are closed to the ordinary user that an operation may run as.
    with opened(".", os.O_PATH) as before:
        os.chdir(directory)
        try:
            return outcome(operation)
        finally:
            os.fchdir(before)


@dataclass(slots=True)
class Arena:
    """Runs sequences, each in mounts of its own."""

    base: Path
    forker: Forker
    count: int = 0

    def run(self, start: str, choose: Choice) -> None:
        """A whole sequence, down to what is on disk in the end. Raises Difference."""
        self.count += 1
        directory = self.base / str(self.count)
        pair = Pair(directory, start, self.forker)
        try:
            pair.run(choose)
            pair.judge_the_disks()
        finally:
            pair.close()
            shutil.rmtree(directory)


@contextmanager
def arena(base: Path) -> Iterator[Arena]:
    """An Arena of which nothing is left afterwards."""
    umask = os.umask(0o022)
    try:
        with forker() as forks:
            yield Arena(base, forks)
    finally:
        os.umask(umask)
