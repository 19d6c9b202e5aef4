"""docs/semantics.md and the table of docs/reliability.md: each claim in them about pyoverlay has tests, which exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.posix.checks import CHECKS

ROOT = Path(__file__).parents[2]
HEADER = ["Behaviour", "kernel", "fuse-overlayfs", "pyoverlay", "Shown by"]


def lines() -> list[str]:
    return [line for line in (ROOT / "docs/semantics.md").read_text().splitlines() if line.startswith("|")]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


ROWS = [row for row in map(cells, lines()[2:]) if any(row[1:])]


@pytest.fixture(scope="module")
def known() -> set[str]:
    """Every check of tests/posix and every test there is."""
    found = {check.name for check in CHECKS}
    for path in (ROOT / "tests").rglob("test_*.py"):
        tree = ast.parse(path.read_text())
        found |= {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    return found


def test_there_is_one_table_of_behaviours() -> None:
    assert cells(lines()[0]) == HEADER
    assert [line for line in lines() if set(line) <= set("|-")] == [lines()[1]]
    assert len(ROWS) > 50


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0][:60])
def test_each_behaviour_of_ours_is_shown_by_tests_that_exist(row: list[str], known: set[str]) -> None:
    assert len(row) == len(HEADER)
    assert row[3] not in ("", "—")
    named = re.findall(r"`(\w+)`", row[4])
    assert named
    assert [name for name in named if name not in known] == []


def what_goes_wrong() -> list[list[str]]:
    """The rows of that table of docs/reliability.md."""
    _, section = (ROOT / "docs/reliability.md").read_text().split("## What goes wrong on the way\n")
    table = [line for line in section.split("\n## ")[0].splitlines() if line.startswith("|")]
    return [cells(line) for line in table[2:]]


def functions_of(path: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


@pytest.mark.parametrize("row", what_goes_wrong(), ids=lambda row: row[0][:60])
def test_what_goes_wrong_on_the_way_is_shown_by_tests_that_exist(row: list[str]) -> None:
    assert len(row) == 3
    named = re.findall(r"`([\w/]+\.py)::(test_\w+)`", row[2])
    assert len(named) == row[2].count("::") > 0
    assert [name for path, name in named if name not in functions_of(ROOT / "tests" / path)] == []
