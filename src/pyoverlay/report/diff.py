"""`pyoverlay diff`: what an upper changes, as lines, as a sum by directory, and for programs."""

from __future__ import annotations

import os
import posixpath
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyoverlay import __version__
from pyoverlay.report.changes import Change, Kind
from pyoverlay.report.sizes import human
from pyoverlay.report.tables import table
from pyoverlay.report.target import Target, find

_TYPES = {
    stat.S_IFREG: "file", stat.S_IFDIR: "directory", stat.S_IFLNK: "symlink", stat.S_IFIFO: "fifo", stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "character device", stat.S_IFBLK: "block device",
}  # fmt: skip


def changes(target: Target, *, copy_ups: bool = False) -> Iterator[Change]:
    """What a target's upper changes; see Comparison.changes. Raises Refusal, OSError with a path in the merged tree as its filename."""
    with target.compare() as comparison:
        yield from comparison.changes(copy_ups=copy_ups)


@dataclass(frozen=True, slots=True)
class Difference:
    """One path that is not in the merged tree as it is in the lowers.

    path: from the root of the merged tree, with a slash in front. type: `file`, `directory`, `symlink`, `fifo`, `socket`, `character
    device`, `block device`. size: in bytes, None of what was deleted. in_upper: the object itself lies in the upper; else it is deleted, or
    shows at a new place by the redirect of a directory above. is_opaque: a directory that hides the one of the lowers.
    """

    kind: Kind
    path: Path
    type: str
    size: int | None
    in_upper: bool
    is_opaque: bool


Named = str | bytes | os.PathLike[str] | os.PathLike[bytes]


def diff(path: Named, *, lowers: Sequence[Named] = (), userxattr: bool = False, copy_ups: bool = False) -> list[Difference]:
    """What changed in a mount, or in the mount that `path` is or was the upper of; by the rules of `docker diff`, in the order of paths.

    lowers, userxattr: the layers below, top first, and the spelling of its marks, of an upper that is not mounted. copy_ups: also what was
    copied up without a change. Only the upper is walked, and no mount is touched whose daemon does not answer. Raises Refusal.
    """
    target = find(os.fsencode(path), lowers=list(map(os.fsencode, lowers)), userxattr=userxattr)
    try:
        target.sync()
        return [_difference(change) for change in changes(target, copy_ups=copy_ups)]
    except OSError as error:
        raise target.refusal(error) from error


def _difference(change: Change) -> Difference:
    return Difference(
        kind=change.kind,
        path=Path("/" + os.fsdecode(change.path)),
        type=_TYPES[stat.S_IFMT(change.st.st_mode)],
        size=None if change.kind is Kind.DELETED else change.st.st_size,
        in_upper=change.in_upper,
        is_opaque=change.is_opaque,
    )


def line(change: Change) -> bytes:
    """`A /path`, the name's bytes as they are."""
    return change.kind.value.encode() + b" /" + change.path


def as_podman(found: Iterable[Change]) -> dict[str, list[str]]:
    """`podman diff --format json`: paths by kind, without the kinds of which there are none."""
    by_kind: dict[Kind, list[str]] = {kind: [] for kind in Kind}
    for change in found:
        by_kind[change.kind].append("/" + os.fsdecode(change.path))
    names = (("changed", Kind.CHANGED), ("added", Kind.ADDED), ("deleted", Kind.DELETED))
    return {name: by_kind[kind] for name, kind in names if by_kind[kind]}


def as_json(target: Target, found: Iterable[Change]) -> dict[str, Any]:
    """Schema 1. Bytes of names that are no UTF-8 are lone surrogates, as os.fsdecode gives them; size is absent of what was deleted."""
    return {
        "schema": 1,
        "pyoverlay": __version__,
        "upper": os.fsdecode(target.upper),
        "lowers": [os.fsdecode(lower) for lower in target.lowers],
        "changes": [_as_json(_difference(change)) for change in found],
    }


def _as_json(one: Difference) -> dict[str, Any]:
    said: dict[str, Any] = {"kind": one.kind.value, "path": str(one.path), "type": one.type}
    return said if one.size is None else said | {"size": one.size, "in_upper": one.in_upper, "opaque": one.is_opaque}


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
