"""Whatever is done, in whatever order: the same answers and the same trees as the kernel's overlay, and uppers that the other can read.

PYOVERLAY_SEQUENCES=N runs N sequences, drawn at random; without it a fixed choice runs that fits into a minute.
"""

from __future__ import annotations

import faulthandler
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.property.arena import TEMPLATES, arena
from tests.property.strategies import Paths, operations

SEQUENCES = int(os.environ.get("PYOVERLAY_SEQUENCES", "150"))
LONGEST = 30  # operations in a sequence


@pytest.mark.root
@pytest.mark.timeout(60 + SEQUENCES)
def test_random_sequences_do_the_same_on_both_overlays_and_each_reads_the_others_upper(tmp_path: Path) -> None:
    # The timer that prints stacks after a fixed time is for what hangs: it looks at running frames from outside, and in a run that is
    # merely long it ended the interpreter itself (Python 3.11, segmentation fault).
    faulthandler.cancel_dump_traceback_later()
    with arena(tmp_path) as both:

        @settings(
            max_examples=SEQUENCES,
            derandomize="PYOVERLAY_SEQUENCES" not in os.environ,
            database=None,
            deadline=None,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
            report_multiple_bugs=False,
            print_blob=False,
        )
        @given(start=st.sampled_from(TEMPLATES), length=st.integers(1, LONGEST), data=st.data())
        def do_the_same(start: str, length: int, data: st.DataObject) -> None:
            left = iter(range(length))
            both.run(start, lambda tree: None if next(left, None) is None else data.draw(operations(Paths.of(tree))))

        do_the_same()
        both.judge_the_disks()
