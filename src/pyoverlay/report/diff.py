"""`pyoverlay diff`: what an upper changes, as lines, as a sum by directory, and for programs."""

from __future__ import annotations

import os
import posixpath
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from pyoverlay import __version__
from pyoverlay.report.changes import Change, Kind
from pyoverlay.report.sizes import human
from pyoverlay.report.tables import table
from pyoverlay.report.target import Target

_TYPES = {
    stat.S_IFREG: "file", stat.S_IFDIR: "directory", stat.S_IFLNK: "symlink", stat.S_IFIFO: "fifo", stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "character device", stat.S_IFBLK: "block device",
}  # fmt: skip


def changes(target: Target, *, copy_ups: bool = False) -> Iterator[Change]:
    """What a target's upper changes; see Comparison.changes. Raises Refusal, OSError with a path in the merged tree as its filename."""
    with target.compare() as comparison:
        yield from comparison.changes(copy_ups=copy_ups)


def line(change: Change) -> bytes:
    """`A /path`, the name's bytes as they are."""
    return change.kind.value.encode() + b" /" + change.path


def as_podman(found: Iterable[Change]) -> dict[str, list[str]]:
    """`podman diff --format json`: paths by kind."""
    by_kind: dict[Kind, list[str]] = {kind: [] for kind in Kind}
    for change in found:
        by_kind[change.kind].append("/" + os.fsdecode(change.path))
    return {name: by_kind[kind] for name, kind in (("changed", Kind.CHANGED), ("added", Kind.ADDED), ("deleted", Kind.DELETED))}


def as_json(target: Target, found: Iterable[Change]) -> dict[str, Any]:
    """Schema 1. Bytes of names that are no UTF-8 are lone surrogates, as os.fsdecode gives them; size is absent of what was deleted."""
    return {
        "schema": 1,
        "pyoverlay": __version__,
        "upper": os.fsdecode(target.upper),
        "lowers": [os.fsdecode(lower) for lower in target.lowers],
        "changes": [_as_json(change) for change in found],
    }


def _as_json(change: Change) -> dict[str, Any]:
    said: dict[str, Any] = {
        "kind": change.kind.value, "path": "/" + os.fsdecode(change.path), "type": _TYPES[stat.S_IFMT(change.st.st_mode)],
    }  # fmt: skip
    if change.kind is not Kind.DELETED:
        said |= {"size": change.st.st_size, "in_upper": change.in_upper, "opaque": change.is_opaque}
    return said


@dataclass(slots=True)
class Sum:
    """What changed among the entries of one directory. size: bytes in the upper, apparent, of what is no directory."""

    size: int = 0
    kinds: dict[Kind, int] = field(default_factory=lambda: dict.fromkeys(Kind, 0))

    def add(self, kind: Kind, size: int) -> None:
        self.size += size
        self.kinds[kind] += 1


def by_directory(found: Iterable[Change]) -> dict[str, Sum]:
    """The sums by directory, in the order of their paths, which begin with a slash; each hard link counts once, where it is first.

    A directory that is only on the way to a change is no change of its own here.
    """
    sums: dict[str, Sum] = {}
    seen: set[tuple[int, int]] = set()
    for change in found:
        path = "/" + os.fsdecode(change.path)
        if change.is_directory and change.kind is Kind.CHANGED:
            continue
        identity = (change.st.st_dev, change.st.st_ino)
        counts = change.in_upper and not change.is_directory and (change.st.st_nlink == 1 or identity not in seen)
        if change.st.st_nlink > 1:
            seen.add(identity)
        sums.setdefault(posixpath.dirname(path), Sum()).add(change.kind, change.st.st_size if counts else 0)
    return dict(sorted(sums.items()))


def stat_lines(sums: dict[str, Sum]) -> list[str]:
    """A table with one line a directory, and the total."""
    total = Sum(sum(one.size for one in sums.values()), {kind: sum(one.kinds[kind] for one in sums.values()) for kind in Kind})
    shown = [kind for kind in Kind if kind is not Kind.COPIED_UP or total.kinds[kind]]
    rows = [["SIZE", *(kind.name.replace("_", " ") for kind in shown), "DIRECTORY"]]
    for directory, one in (*sums.items(), ("total", total)):
        rows.append([human(one.size), *(str(one.kinds[kind]) for kind in shown), directory])
    return table(rows)


def stat_json(target: Target, sums: dict[str, Sum]) -> dict[str, Any]:
    """Schema 1."""
    directories = [
        {"path": path, "size": one.size, **{kind.name.lower(): count for kind, count in one.kinds.items()}} for path, one in sums.items()
    ]
    return {"schema": 1, "pyoverlay": __version__, "upper": os.fsdecode(target.upper), "directories": directories}
