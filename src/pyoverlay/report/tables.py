"""Tables as Docker prints them: columns three blanks apart, each at least ten wide with them, no borders, nothing wrapped."""

from __future__ import annotations

from collections.abc import Sequence

_LEAST = 10
_GAP = 3


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines; a row's last cell is not padded, nor is a column as wide as it (text/tabwriter, minimum width 10, padding 3)."""
    padded: dict[int, int] = {}
    for row in rows:
        for column, cell in enumerate(row[:-1]):
            padded[column] = max(padded.get(column, _LEAST), len(cell) + _GAP)
    return ["".join([*(f"{cell:<{padded[column]}}" for column, cell in enumerate(row[:-1])), row[-1]]).rstrip() for row in rows]
