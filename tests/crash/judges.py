"""Who looks at an upper after a crash: the core in a fresh view, and the kernel's own overlay."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from pyoverlay.core.calls import Calls
from pyoverlay.core.policy import Fsync
from pyoverlay.core.stack import open_view
from pyoverlay.testing import make_tree, snapshot
from tests.crash.cases import ALL, BELOW, LOWER, Case
from tests.crash.victim import policy_of
from tests.posix.kernel_overlay import KernelOverlay
from tests.unit.merged import Faulty, Merged, TreeSeen, timeless


def unlinked(tree: TreeSeen) -> TreeSeen:
    """Without times, and without what ties the names of one file together: a copy-up that was killed may have given a file's second name
    its copy first, and without an index the kernel knows of no link between a copy and a lower name.
    """
    return {path: replace(entry, nlink=0, first_name=b"") for path, entry in timeless(tree).items()}


def difference(seen: TreeSeen, old: TreeSeen, new: TreeSeen) -> dict[bytes, object]:
    """What is at the paths where the three are not all the same."""
    return {
        path: (seen.get(path), old.get(path), new.get(path))
        for path in seen.keys() | old.keys() | new.keys()
        if not seen.get(path) == old.get(path) == new.get(path)
    }


@dataclass(slots=True)
class Bed:
    """Layers in a directory, made anew for each crash but for the lowers, which nothing changes.

    below: where the lowers are, if not beside the upper. case: whose options count.
    """

    base: Path
    below: Path | None = None
    case: Case = Case(lambda _: None)

    def __post_init__(self) -> None:
        for lower, tree in zip(self.lowers, (LOWER, BELOW), strict=True):
            lower.mkdir()
            make_tree(lower, tree)
        (self.base / "merged").mkdir()

    @property
    def lowers(self) -> tuple[Path, Path]:
        below = self.below or self.base
        return below / "lower1", below / "lower2"

    def renew(self) -> None:
        """An empty upper and an empty work directory."""
        for name in ("upper", "work"):
            shutil.rmtree(self.base / name, ignore_errors=True)
            (self.base / name).mkdir()

    def view(self, calls: Calls | None = None) -> Merged:
        lowers = [os.fsencode(lower) for lower in self.lowers]
        policy = self.case.policy(policy_of(Fsync.ORDERED))
        return Merged(open_view(lowers, os.fsencode(self.base / "upper"), os.fsencode(self.base / "work"), policy, calls))

    def by_us(self) -> TreeSeen:
        """The tree that a new view shows. It has cleared the work directory."""
        merged = self.view()
        try:
            assert os.listdir(self.base / "work" / "work") == []
            return unlinked(merged.tree())
        finally:
            merged.view.close()

    def by_the_kernel(self) -> TreeSeen:
        """The tree that the kernel shows, over the same work directory."""
        overlay = KernelOverlay(
            self.lowers, self.base / "upper", self.base / "merged",
            self.case.kernel_options(), work_directory=self.base / "work",
        )  # fmt: skip
        overlay.mount()
        try:
            return unlinked(snapshot(overlay.merged))
        finally:
            overlay.umount()

    def old_and_new(self, name: str, faulty: type[Faulty] = Faulty) -> tuple[TreeSeen, TreeSeen, list[str]]:
        """The tree before and after a case in which nothing fails, and the calls in between."""
        case = self.case = ALL[name]
        self.renew()
        merged = self.view()
        case.prepare(merged)
        old = unlinked(merged.tree())
        counted = merged.view.upper.calls = faulty(0, AssertionError())
        case.act(merged)
        made = list(counted.made)
        merged.view.close()
        return old, self.by_us(), made
