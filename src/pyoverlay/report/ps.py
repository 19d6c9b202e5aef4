"""`pyoverlay ps`: the mounts as rows, filtered, with their sizes."""

from __future__ import annotations

import fnmatch
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from pyoverlay.core.policy import Policy
from pyoverlay.errors import UsageError, printable
from pyoverlay.report.changes import masked
from pyoverlay.report.inspect import Inspection, joined
from pyoverlay.report.mounts import Mount, State, policy_of
from pyoverlay.report.sizes import Usage, human, usage
from pyoverlay.report.target import may_clone
from pyoverlay.report.times import duration, stamp

# What a template of --format can name, and the head of its column.
HEADS = {
    "ID": "MOUNT ID",
    "Merged": "MERGED",
    "Upper": "UPPER",
    "Lowers": "LOWERS",
    "Work": "WORK",
    "Pid": "PID",
    "CreatedAt": "CREATED AT",
    "RunningFor": "CREATED",
    "Status": "STATUS",
    "Options": "OPTIONS",
    "Size": "SIZE",
}
COLUMNS = ("ID", "Merged", "Upper", "Lowers", "Pid", "Status")

_WIDEST = 38  # of a path, unless nothing is to be cut


@dataclass(frozen=True, slots=True)
class Size:
    """What an upper holds, and with the lowers; bytes. unreadable: directories that this user may not read, not counted."""

    upper: int
    virtual: int
    unreadable: int

    def __str__(self) -> str:
        return f"{human(self.upper)} (virtual {human(self.virtual)})"


class Sizes:
    """Sizes of mounts; a lower that several of them share is counted once and remembered, whatever paths lead to it."""

    def __init__(self) -> None:
        self._lowers: dict[tuple[int, int, frozenset[tuple[int, int]]], Usage] = {}

    def of(self, mount: Mount) -> Size:
        """Raises OSError with the layer's path as its filename, Refusal where another release made the mount."""
        record = mount.record
        policy = policy_of(record, record.merged)
        empty = frozenset() if record.upper is None else masked(record.upper, record.work)
        upper = Usage() if record.upper is None else _usage(record.upper, policy, frozenset())
        below = Usage()
        for lower in (*record.lowers, *record.data_lowers):
            is_around = record.upper is not None and record.upper.startswith(lower.rstrip(b"/") + b"/")
            below += self._lower(lower, policy, empty if is_around else frozenset())
        return Size(upper.size, upper.size + below.size, upper.unreadable + below.unreadable)

    def _lower(self, lower: bytes, policy: Policy, empty: frozenset[tuple[int, int]]) -> Usage:
        st = os.stat(lower)
        key = st.st_dev, st.st_ino, empty
        if key not in self._lowers:
            self._lowers[key] = _usage(lower, policy, empty)
        return self._lowers[key]


def _usage(layer: bytes, policy: Policy, empty: frozenset[tuple[int, int]]) -> Usage:
    try:
        return usage(layer, replace(policy, privileged=may_clone(layer)), empty)
    except OSError as error:
        raise OSError(error.errno, error.strerror, os.fsdecode(layer)) from error


def row(mount: Mount, size: Size | None, *, is_cut: bool) -> dict[str, str]:
    """The texts of a mount by their names in HEADS. is_cut: paths are shortened, and of the lowers only the top one is named."""
    record, known = mount.record, Inspection.of(mount)
    cut = _cut if is_cut else printable
    return {
        "ID": record.id,
        "Merged": cut(record.merged),
        "Upper": cut(record.upper or b""),
        "Lowers": _top(record.lowers) if is_cut else printable(joined(known.lowers, known.data_lowers)),
        "Work": cut(record.work or b""),
        "Pid": str(record.pid),
        "CreatedAt": stamp(known.started),
        "RunningFor": f"{_age(mount)} ago",
        "Status": status(mount),
        "Options": printable(",".join(record.options)),
        "Size": "" if size is None else str(size),
    }


def _age(mount: Mount) -> str:
    return duration(max(0.0, time.time() - mount.record.started))


def status(mount: Mount) -> str:
    """`Up 5 minutes`, `Up 5 minutes (not answering)`, `Dead`."""
    if mount.state is State.DEAD:
        return "Dead"
    return f"Up {_age(mount)}" + (" (not answering)" if mount.state is State.SILENT else "")


def _cut(path: bytes) -> str:
    text = printable(path)
    return text if len(text) <= _WIDEST else "…" + text[-_WIDEST + 1 :]


def _top(lowers: Sequence[bytes]) -> str:
    more = f" (+{len(lowers) - 1})" if len(lowers) > 1 else ""
    return _cut(lowers[0]) + more


_FILTERS: dict[str, Callable[[Mount], Iterable[str]]] = {
    "id": lambda mount: [mount.record.id],
    "pid": lambda mount: [str(mount.record.pid)],
    "status": lambda mount: [mount.state.value, mount.state.name.lower()],
    "merged": lambda mount: [os.fsdecode(mount.record.merged)],
    "upper": lambda mount: [os.fsdecode(mount.record.upper)] if mount.record.upper is not None else [],
    "lower": lambda mount: map(os.fsdecode, mount.record.lowers),
}


def chosen(found: Iterable[Mount], filters: Iterable[str]) -> list[Mount]:
    """The mounts that `KEY=PATTERN` filters let through: one of those with the same key, and each key. Patterns are fnmatch's.

    Raises UsageError for a filter that is none.
    """
    wanted: dict[str, list[str]] = {}
    for text in filters:
        key, equals, pattern = text.partition("=")
        if not equals or key not in _FILTERS:
            raise UsageError(f"--filter {text}: wants KEY=PATTERN, with a key of {', '.join(_FILTERS)}")
        wanted.setdefault(key, []).append(pattern)
    return [mount for mount in found if all(_matches(mount, key, patterns) for key, patterns in wanted.items())]


def _matches(mount: Mount, key: str, patterns: list[str]) -> bool:
    return any(fnmatch.fnmatchcase(value, pattern) for value in _FILTERS[key](mount) for pattern in patterns)
