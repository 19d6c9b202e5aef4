"""Layers for the core's tests: plain directories, as root or as anybody."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pyoverlay.core.policy import Policy
from pyoverlay.testing import Tree
from tests.unit.merged import POLICY, Stack

StackFactory = Callable[..., Stack]


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[StackFactory]:
    """Makes layers and a merged view of them: `stack({"a": "lower"}, {"b": "below"}, upper={"c": "new"})`. At the end no lower has
    changed.
    """
    made: list[Stack] = []

    def make(*lowers: Tree, upper: Tree | None = None, policy: Policy = POLICY, limit: int | None = None) -> Stack:
        made.append(Stack(tmp_path / f"stack{len(made)}", lowers, upper, policy, limit))
        return made[-1]

    yield make
    for one in made:
        one.close()
        one.assert_lowers_untouched()
