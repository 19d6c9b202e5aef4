"""Sequences that once ended differently on the two overlays. The property test prints an entry for this table; name it after its claim."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.property import operations as op
from tests.property.arena import arena, in_turn

REGRESSIONS: dict[str, tuple[str, Sequence[op.Operation]]] = {
    "a_directory_moved_over_the_whiteout_of_another_stays_apart_from_it": (
        "lowers",
        [op.Remove("a"), op.Mkdir("d/x"), op.Rename("c", "a"), op.Remount("."), op.List("a"), op.List("a/b")],
    ),
    "what_was_removed_below_a_moved_directory_stays_removed": (
        "all",
        [op.Unlink("a/b/c"), op.Rename("a", "e"), op.Remount("."), op.List("e/b"), op.Mkdir("a"), op.List("a")],
    ),
    "exchanged_directories_of_two_layers_keep_their_entries": (
        "all",
        [op.Exchange("a/b", "d"), op.Remount("."), op.List("a/b"), op.List("d"), op.Exchange("a", "c"), op.List("c/b")],
    ),
}


@pytest.mark.root
@pytest.mark.parametrize("name", REGRESSIONS)
def test_once_different(name: str, apart: Path) -> None:
    start, sequence = REGRESSIONS[name]
    with arena(apart) as both:
        both.run(start, in_turn(sequence))
