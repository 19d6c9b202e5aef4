"""With index=on, and with metacopy=on or without, nothing is forgiven: link counts and which names are one file agree with the kernel's
overlay throughout, over FORGET, in a fresh view, and when each mounts the other's upper and index.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, note
from hypothesis import strategies as st

from pyoverlay.core.stack import open_view
from pyoverlay.testing import snapshot, witness
from tests.posix.kernel_overlay import FULL, KernelOverlay
from tests.property.draws import SEQUENCES, drawn
from tests.property.sequences import Operation, Sequence, sequences
from tests.property.test_core_oracle import POLICY, Bench, difference, side_by_side, told
from tests.unit.merged import Merged, TreeSeen, timeless

pytestmark = pytest.mark.root

COUNT = max(1, SEQUENCES // 4)
OURS, THEIRS = "ours-work", "theirs-work"


class IndexedBench(Bench):
    """As Bench; each upper has a work directory, and with it an index, for good."""

    def __init__(self, base: Path, sequence: Sequence, *, metacopy: bool) -> None:
        super().__init__(base, sequence)
        self.metacopy = metacopy
        for work in (OURS, THEIRS):
            (base / work).mkdir()

    def kernel_over(self, upper: Path, work: str) -> KernelOverlay:
        options = (*FULL, f"metacopy={'on' if self.metacopy else 'off'}")
        return KernelOverlay(tuple(self.lowers), upper, self.mount_point, options, work_directory=self.base / work)

    def core_over(self, upper: Path, work: str, limit: int = 1000) -> Merged:
        policy = replace(POLICY, index=True, metacopy=self.metacopy)
        view = open_view([os.fsencode(lower) for lower in self.lowers], os.fsencode(upper), os.fsencode(self.base / work), policy)
        view.cache.limit = limit
        view.pin_limit = limit // 2
        return Merged(view)

    def seen_by_the_kernel(self, upper: Path, work: str) -> TreeSeen:
        kernel = self.kernel_over(upper, work)
        kernel.mount()
        try:
            return timeless(snapshot(self.mount_point))
        finally:
            kernel.close()

    def seen_by_us(self, upper: Path, work: str) -> TreeSeen:
        merged = self.core_over(upper, work)
        try:
            return timeless(merged.tree())
        finally:
            merged.view.close()


def run(bench: IndexedBench, sequence: Sequence) -> None:
    done: list[Operation] = []
    before = [witness(lower) for lower in bench.lowers]
    merged = bench.core_over(bench.ours, OURS, sequence.limit)
    kernel = bench.kernel_over(bench.theirs, THEIRS)
    our_tree, their_tree = side_by_side(bench, merged, kernel, sequence, done, counts_links=True)
    assert difference(our_tree, their_tree) == [], f"{told(done)}the trees differ (ours, the kernel's)"
    assert [witness(lower) for lower in bench.lowers] == before, "a lower was changed"
    for upper, work, whose in ((bench.ours, OURS, "our"), (bench.theirs, THEIRS, "the kernel's")):
        for look, who in ((bench.seen_by_us, "we see"), (bench.seen_by_the_kernel, "the kernel sees")):
            found = difference(look(upper, work), our_tree)
            assert found == [], f"{told(done)}{who} another tree in {whose} upper (fresh, live): {found}"


@pytest.mark.timeout(60 + SEQUENCES)
@drawn(COUNT)
@given(sequence=sequences, metacopy=st.booleans())
def test_with_an_index_the_core_and_the_kernel_do_the_same(apart: Path, sequence: Sequence, metacopy: bool) -> None:
    note(str(sequence))
    base = apart / "indexed"
    base.mkdir()
    old = os.umask(0o022)
    try:
        run(IndexedBench(base, sequence, metacopy=metacopy), sequence)
    finally:
        os.umask(old)
        shutil.rmtree(base)
