"""Progress on a terminal: on stderr, and nowhere else."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click


@contextmanager
def progress_bar(label: str, total: int) -> Iterator[Callable[[int], object]]:
    """A function to be told of each piece done; `total` is the sum of the pieces. Shows nothing where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    bar: Any  # generic in what it counts, and click's releases differ in what that is where there is only a length
    with click.progressbar(length=total, label=label, file=sys.stderr) as bar:
        yield bar.update
