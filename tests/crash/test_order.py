"""docs/reliability.md says which calls an operation makes, in which order: it must say what they are."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.crash.order import PAGE, table, written


@pytest.mark.root
def test_the_page_has_the_calls_of_each_operation(tmp_path: Path) -> None:
    """`python -m tests.crash.order` writes them anew; whoever does so looks at what has changed."""
    assert written(PAGE.read_text()) == table(tmp_path)
