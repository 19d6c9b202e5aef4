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
from tests.crash.cases import BELOW, CASES, LOWER
from tests.crash.victim import policy_of
from tests.posix.kernel_overlay import KernelOverlay
from tests.unit.merged import Faulty, Merged, TreeSeen, timeless

LOWERS = ("lower1", "lower2")


def unlinked(tree: TreeSeen) -> TreeSeen:
    """Without times, and without what ties the names of one file together: a copy-up that was killed may have given a file's second name
    its copy first, and without an index the kernel knows of no link between a copy and a lower name.
    """
    return {path: replace(entry, nlink=0, first_name=b"") for path, entry in timeless(tree).items()}


@dataclass(slots=True)
class Bed:
    """Layers in a directory, made anew for each crash but for the lowers, which nothing changes."""

    base: Path

    def __post_init__(self) -> None:
        for name, tree in zip(LOWERS, (LOWER, BELOW), strict=True):
            (self.base / name).mkdir()
            make_tree(self.base / name, tree)
        (self.base / "merged").mkdir()

    def renew(self) -> None:
        """An empty upper and an empty work directory."""
        for name in ("upper", "work"):
            shutil.rmtree(self.base / name, ignore_errors=True)
            (self.base / name).mkdir()

    def view(self, calls: Calls | None = None, *, metacopy: bool = False) -> Merged:
        lowers = [os.fsencode(self.base / name) for name in LOWERS]
        policy = policy_of(Fsync.ORDERED, metacopy=metacopy)
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
            tuple(self.base / name for name in LOWERS), self.base / "upper", self.base / "merged",
            ("redirect_dir=on", "index=off", "metacopy=on"), work_directory=self.base / "work",
        )  # fmt: skip
        overlay.mount()
        try:
            return unlinked(snapshot(overlay.merged))
        finally:
            overlay.umount()

    def old_and_new(self, name: str) -> tuple[TreeSeen, TreeSeen, list[str]]:
        """The tree before and after a case in which nothing fails, and the calls in between."""
        case = CASES[name]
        self.renew()
        merged = self.view(metacopy=case.metacopy)
        case.prepare(merged)
        old = unlinked(merged.tree())
        counted = merged.view.upper.calls = Faulty(0, AssertionError())
        case.act(merged)
        made = list(counted.made)
        merged.view.close()
        return old, self.by_us(), made
