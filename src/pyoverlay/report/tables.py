"""Tables as Docker prints them: columns three blanks apart, each at least ten wide with them, no borders, nothing wrapped."""

from __future__ import annotations

from collections.abc import Sequence

_LEAST = 10
_GAP = 3


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines; the last column is not padded (text/tabwriter, minimum width 10, padding 3)."""
    columns = list(zip(*rows, strict=True))
    widths = [max(_LEAST, max(map(len, column)) + _GAP) for column in columns[:-1]]
    return ["".join([*(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=False)), row[-1]]).rstrip() for row in rows]
