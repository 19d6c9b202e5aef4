"""Whatever is done, in whatever order: the same answers and the same trees as the kernel's overlay, and uppers that the other can read."""

from __future__ import annotations

import faulthandler
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.property.arena import TEMPLATES, arena
from tests.property.draws import SEQUENCES, drawn
from tests.property.strategies import Paths, operations

MOUNTED = SEQUENCES // 10
LONGEST = 50  # operations in a sequence


@pytest.mark.root
@pytest.mark.timeout(60 + 5 * MOUNTED)
def test_random_sequences_do_the_same_on_both_overlays_and_each_reads_the_others_upper(apart: Path) -> None:
    # The timer that prints stacks after a fixed time is for what hangs: it looks at running frames from outside, and in a run that is
    # merely long it ended the interpreter itself (Python 3.11, segmentation fault).
    faulthandler.cancel_dump_traceback_later()
    with arena(apart) as both:

        @drawn(MOUNTED)
        @given(start=st.sampled_from(TEMPLATES), length=st.integers(1, LONGEST), data=st.data())
        def do_the_same(start: str, length: int, data: st.DataObject) -> None:
            left = iter(range(length))
            both.run(start, lambda tree: None if next(left, None) is None else data.draw(operations(Paths.of(tree))))

        do_the_same()
