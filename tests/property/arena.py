"""Two overlays over equal layers, the kernel's and ours, and a supply of directories in them that start out the same.

A mount takes as long as hundreds of operations. So one pair of mounts serves many sequences, each in a directory of its own; what is
on disk in the end is judged for all of them at once.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from pyoverlay.testing import Directory, Entry, Fifo, File, HardLink, Overlay, Symlink, Tree, Whiteout, make_tree, snapshot
from tests.integration.looks import OPAQUE, litter
from tests.posix.check import NOBODY, opened
from tests.posix.kernel_overlay import FULL, KernelOverlay
from tests.property.operations import Operation, Remount, outcome

# What a sequence begins with: (upper lower, bottom lower, upper). Names are those of the strategies.
# Objects of lowers have one name each: without an index on disk links of a lower part at a remount, by design.
LAYERS: dict[str, tuple[Tree, Tree, Tree]] = {
    "nothing": ({}, {}, {}),
    "lowers": (
        {"a": {"a": b"a/a", "b": {"c": b"a/b/c", "d": Symlink("c")}}, "b": File(b"b", mode=0o4755, uid=NOBODY)},
        {"a": {"b": {"a": b"a/b/a"}, "c": Fifo()}, "c": Directory({"a": b"c/a"}, uid=NOBODY, gid=NOBODY), "d": Symlink("a/a")},
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
SUPPLY = 60  # directories of each kind in one pair of mounts

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
    """The two mounts, and which sequence ran in which of their directories."""

    base: Path
    kernel: KernelOverlay = field(init=False)
    ours: Overlay = field(init=False)
    since_ns: int = field(default_factory=time.time_ns)
    ran: dict[str, tuple[str, Sequence[Operation]]] = field(default_factory=dict)
    taken: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for side in ("kernel", "ours"):
            (self.base / side).mkdir()
            for name in ("top", "bottom", "upper", "merged"):
                (self.base / side / name).mkdir()
            self._fill(self.base / side)
        self.kernel = KernelOverlay(self._lowers("kernel"), self.base / "kernel/upper", self.base / "kernel/merged", FULL)
        self.ours = Overlay(self._lowers("ours"), self.base / "ours/upper", self.base / "ours/merged")
        self.kernel.mount()
        self.ours.mount()

    def _lowers(self, side: str) -> tuple[Path, Path]:
        return self.base / side / "top", self.base / side / "bottom"

    def _fill(self, side: Path) -> None:
        for start, trees in LAYERS.items():
            for number in range(SUPPLY):
                for name, tree in zip(("top", "bottom", "upper"), trees, strict=True):
                    directory = side / name / f"{start}{number}"
                    directory.mkdir()
                    directory.chmod(0o777)
                    make_tree(directory, tree)

    def is_exhausted(self, start: str) -> bool:
        return self.taken.get(start, 0) == SUPPLY

    def run(self, start: str, choose: Choice) -> None:
        """Run operations on both sides, comparing each outcome, then the trees. Raises Difference."""
        number = self.taken[start] = self.taken.get(start, 0) + 1
        name = f"{start}{number - 1}"
        sequence: list[Operation] = []
        self.ran[name] = (start, sequence)
        while (operation := choose(self.kernel.merged / name)) is not None:
            sequence.append(operation)
            if isinstance(operation, Remount):
                # Ours alone: the kernel is the reference, and refuses an upper again (EBUSY) for as long as any mount namespace on
                # the machine, which somebody may just have made, still holds the mount.
                self.ours.remount()
                continue
            expected, got = (self._outcome(side / name, operation) for side in (self.kernel.merged, self.ours.merged))
            if expected != got:
                raise Difference(f"{operation}:\n  kernel: {expected}\n  ours:   {got}", start, sequence)
        expected_state, got_state = (state(side / name, self.since_ns) for side in (self.kernel.merged, self.ours.merged))
        _forgive_touched_directories(expected_state, got_state)
        if found := difference(expected_state, got_state):
            raise Difference(f"the trees differ:\n{found}", start, sequence)

    def _outcome(self, directory: Path, operation: Operation) -> object:
        # The directories above are closed to the ordinary user that an operation may run as.
        with opened(".", os.O_PATH) as before:
            os.chdir(directory)
            try:
                return outcome(operation)
            finally:
                os.fchdir(before)

    def judge_the_disks(self) -> None:
        """Mount each upper by the other side: both must show every tree as its maker did. Raises Difference for the first that differs."""
        kernels, ours = ({name: state(side / name, self.since_ns) for name in self.ran} for side in (self.kernel.merged, self.ours.merged))
        self.close()
        assert litter(self.ours) == []
        swapped = KernelOverlay(self.ours.lowers, self.ours.writable, self.kernel.merged, FULL)
        swapped.mount()
        try:
            self._compare(ours, swapped.merged, "the kernel shows our upper otherwise than we did (here we are the reference)")
        finally:
            swapped.umount()
        read_back = Overlay(self.kernel.lowers, self.kernel.upper, self.ours.merged)
        read_back.mount()
        try:
            self._compare(kernels, read_back.merged, "we show the kernel's upper otherwise than it did")
        finally:
            read_back.close()

    def _compare(self, expected: dict[str, State], merged: Path, what: str) -> None:
        for name, (start, sequence) in self.ran.items():
            if found := difference(expected[name], state(merged / name, self.since_ns)):
                raise Difference(f"{what}:\n{found}", start, sequence)

    def close(self) -> None:
        self.kernel.close()
        self.ours.close()


@dataclass(slots=True)
class Arena:
    """Pairs of mounts, a new one when the directories of the last are used up."""

    base: Path
    pairs: list[Pair] = field(default_factory=list)

    def run(self, start: str, choose: Choice) -> None:
        if not self.pairs or self.pairs[-1].is_exhausted(start):
            self.judge_the_disks()
            directory = self.base / f"pair{len(self.pairs)}"
            directory.mkdir()
            self.pairs.append(Pair(directory))
        self.pairs[-1].run(start, choose)

    def judge_the_disks(self) -> None:
        if self.pairs and self.pairs[-1].kernel.mounted():
            self.pairs[-1].judge_the_disks()

    def close(self) -> None:
        for pair in self.pairs:
            pair.close()


@contextmanager
def arena(base: Path) -> Iterator[Arena]:
    """An Arena whose mounts are gone afterwards."""
    made = Arena(base)
    umask = os.umask(0o022)
    try:
        yield made
    finally:
        os.umask(umask)
        made.close()
