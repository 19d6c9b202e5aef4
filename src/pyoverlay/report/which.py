"""`pyoverlay which`: the layer that a path of a merged tree comes from, what it hides there, and why.

The merged view decides what shows; beside it every layer is asked for the name by itself, whether it has a say or not. Symbolic links in a
path are not followed: each is an object of its own.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from pyoverlay import __version__, mountinfo, registry
from pyoverlay.core import marks
from pyoverlay.core.inode import Directory, Inode
from pyoverlay.core.layer import Lower, LowerDir
from pyoverlay.core.policy import Policy
from pyoverlay.core.stack import open_probed
from pyoverlay.core.syscalls import Stat
from pyoverlay.core.view import View
from pyoverlay.errors import Refusal, printable
from pyoverlay.report import mounts
from pyoverlay.report.changes import masked
from pyoverlay.report.target import may_clone

_UPPER = 1  # the upper's index, see open_probed


@dataclass(frozen=True, slots=True)
class Piece:
    """An object of one layer. layer: `upper`, or `lower 1` from the top. why: what hides it; None if it shows."""

    layer: str
    path: bytes
    why: str | None = None


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a path comes from. path: as asked for. state: `added`, `copied up`, `replaced`, `merged`, `lower` or `absent`.

    shown: what it is made of, top first: one object, or the directories that are merged. hidden: what the layers have besides. why: what
    takes an absent path away, None where no layer ever had it.
    """

    path: bytes
    state: str
    shown: tuple[Piece, ...]
    hidden: tuple[Piece, ...]
    why: str | None = None


@dataclass(frozen=True, slots=True)
class Layers:
    """The layers of one mount, open. paths: by layer index."""

    merged: bytes
    view: View
    paths: dict[int, bytes]

    def origin(self, path: bytes, names: Iterable[bytes]) -> Origin:
        """Of the object that these names lead to, from the root. Raises OSError."""
        return _Search(self).run(path, list(names))


def mount_of(path: bytes) -> tuple[registry.Record, list[bytes]]:
    """The mount that a path lies in, and its names below the mount point. Nothing in the mount is touched, if it need not be.

    Raises Refusal.
    """
    for spelling in (os.path.abspath, os.path.realpath):
        real = spelling(path)
        above = [record for record in mounts.believed() if (real + b"/").startswith(record.merged.rstrip(b"/") + b"/")]
        if above:
            record = max(above, key=lambda record: (len(record.merged), record.started))
            _require_no_mount_between(path, real, record.merged)
            return record, [name for name in real[len(record.merged) :].split(b"/") if name]
    raise Refusal(path, "in no mount of pyoverlay", remedy="pyoverlay ps lists those there are")


def _require_no_mount_between(path: bytes, real: bytes, merged: bytes) -> None:
    """Raises Refusal for what lies on another mount inside of this one: the layers say nothing of that."""
    inside = [mount.point for mount in mountinfo.mounts() if mount.point.startswith(merged.rstrip(b"/") + b"/")]
    between = [point for point in inside if (real + b"/").startswith(point + b"/")]
    if between:
        place = printable(max(between, key=len))
        raise Refusal(path, f"on another mount, at {place}", remedy="unmount that to see what the layers have there")


def open_layers(record: registry.Record) -> Layers:
    """The layers of a mount, `view` to be closed. Raises OSError with a path as its filename, Refusal."""
    policy = _policy(record)
    empty = frozenset[tuple[int, int]]() if record.upper is None else masked(record.upper, record.work)
    view = open_probed(record.lowers, policy, upper=record.upper, masked=empty, data_layers=record.data_lowers)
    paths = dict(enumerate(record.lowers, start=_UPPER + 1))
    return Layers(record.merged, view, paths if record.upper is None else {_UPPER: record.upper, **paths})


def _policy(record: registry.Record) -> Policy:
    policy = mounts.policy_of(record, record.merged)
    return replace(policy, metacopy=True, privileged=may_clone(record.lowers[0]))


@dataclass(frozen=True, slots=True)
class _Found:
    """A name in one directory of one layer. hidden_by: what hides it, None if it has a say."""

    at: LowerDir
    st: Stat | None
    is_whiteout: bool
    hidden_by: str | None


class _Search:
    def __init__(self, layers: Layers) -> None:
        self._view = layers.view
        self._paths = layers.paths

    def run(self, path: bytes, names: list[bytes]) -> Origin:
        here: Inode | None = self._view.root
        hidden: list[tuple[LowerDir, str]] = []  # directories on the way that have no say, and why
        origin = Origin(path, "merged", tuple(self._piece(lower) for lower in self._view.root.lowers), ())
        for name in names:
            parents = here.lowers if isinstance(here, Directory) else ()
            found = self._found(parents, hidden, name)
            shown = self._view.lookup(here, name) if isinstance(here, Directory) else None
            here = shown[0] if shown is not None else None
            origin, hidden = self._judged(path, name, here, found)
        return origin

    def _found(self, parents: Iterable[LowerDir], hidden: Iterable[tuple[LowerDir, str]], name: bytes) -> list[_Found]:
        """The name in each directory, top first, with what hides it: the first of those above that does."""
        candidates = sorted([*((parent, None) for parent in parents), *hidden], key=lambda pair: pair[0].layer.index)
        found: list[_Found] = []
        why: str | None = None
        for parent, hidden_by in candidates:
            layer = parent.layer
            is_there, hides_below = layer.shows(parent, name)
            st = layer.stat(layer.dirfd(parent), name) if is_there else None
            is_whiteout = not is_there and hides_below
            if is_there or is_whiteout:
                found.append(_Found(parent, st, is_whiteout, hidden_by or why))
            if hidden_by is None and why is None:
                why = self._hides(parent, name, st, is_whiteout=is_whiteout)
        return found

    def _hides(self, parent: LowerDir, name: bytes, st: Stat | None, *, is_whiteout: bool) -> str | None:
        """What hides the name in the layers below, if this layer does."""
        place = printable(self._path(parent, name))
        if is_whiteout:
            return f"whiteout in {place}"
        if st is None:
            return None
        if not stat.S_ISDIR(st.st_mode):
            return f"covered by {place}"
        layer = parent.layer
        found = layer.listmarks(layer.dirfd(parent), name)
        if marks.OPAQUE in found and layer.getmark(layer.dirfd(parent), name, marks.OPAQUE) == b"y":
            return f"opaque at {place}"
        return f"redirect at {place}" if marks.REDIRECT in found else None

    def _judged(self, path: bytes, name: bytes, here: Inode | None, found: list[_Found]) -> tuple[Origin, list[tuple[LowerDir, str]]]:
        parts = self._parts(here)
        shown = {(piece.layer, piece.path) for piece in parts}
        hidden: list[Piece] = []
        below: list[tuple[LowerDir, str]] = []
        for one in found:
            piece = self._piece(one.at, name)
            if one.st is None or (piece.layer, piece.path) in shown:
                continue
            why = one.hidden_by or "no directory, as what covers it is one"
            hidden.append(replace(piece, why=why))
            if stat.S_ISDIR(one.st.st_mode):
                below.append((LowerDir(one.at.layer, one.at, name), why))
        if here is None:
            return Origin(path, "absent", (), tuple(hidden), next(self._takers(found, name, hidden), None)), below
        return Origin(path, self._state(here, parts, hidden), tuple(parts), tuple(hidden)), below

    def _takers(self, found: list[_Found], name: bytes, hidden: list[Piece]) -> Iterator[str]:
        """What takes an absent path away."""
        for one in found:
            if one.is_whiteout and one.hidden_by is None:
                yield f"whiteout in {printable(self._path(one.at, name))}"
        for piece in hidden:
            if piece.why is not None:
                yield piece.why

    def _parts(self, here: Inode | None) -> list[Piece]:
        if here is None:
            return []
        if isinstance(here, Directory):
            return [self._piece(lower) for lower in here.lowers]
        assert here.lower_dir is not None  # in a view without a writable upper everything lies in a layer
        return [self._piece(here.lower_dir, here.lower_name)]

    def _state(self, here: Inode, parts: list[Piece], hidden: list[Piece]) -> str:
        if len(parts) > 1:
            return "merged"
        if parts[0].layer != "upper":
            return "lower"
        place = self._view.lower_place(here)
        if place.layer.getmark(place.dirfd, place.name, marks.ORIGIN) is not None:
            return "copied up"
        return "replaced" if hidden else "added"

    def _piece(self, directory: LowerDir, name: bytes | None = None) -> Piece:
        return Piece(_layer_name(directory.layer), self._path(directory, name))

    def _path(self, directory: LowerDir, name: bytes | None = None) -> bytes:
        names = [] if name is None else [name]
        here = directory
        while here.parent is not None:
            names.append(here.name)
            here = here.parent
        return os.path.join(self._paths[directory.layer.index], *names[::-1])


def _layer_name(layer: Lower) -> str:
    return "upper" if layer.index == _UPPER else f"lower {layer.index - _UPPER}"


_SENTENCES = {
    "added": "upper, added there",
    "copied up": "upper, copied up",
    "replaced": "upper, in place of what it hides",
}


def lines(origin: Origin) -> list[str]:
    """For people: a line that says it, and below it one for each object, shown or hidden."""
    if origin.state == "absent":
        said = f"not there, {origin.why}" if origin.why else "not there, in no layer"
    elif origin.state == "merged":
        said = f"merged of {', '.join(piece.layer for piece in origin.shown)}"
    else:
        said = _SENTENCES.get(origin.state) or origin.shown[0].layer
    found = [f"{printable(origin.path)}: {said}"]
    found += [f"    is     {printable(piece.path)}" for piece in origin.shown]
    found += [f"    hides  {printable(piece.path)} ({piece.why})" for piece in origin.hidden]
    return found


def as_json(origins: Iterable[Origin]) -> dict[str, Any]:
    """Schema 1."""
    return {
        "schema": 1,
        "pyoverlay": __version__,
        "paths": [
            {
                "path": os.fsdecode(origin.path),
                "state": origin.state,
                "why": origin.why,
                "shown": [{"layer": piece.layer, "path": os.fsdecode(piece.path)} for piece in origin.shown],
                "hidden": [{"layer": piece.layer, "path": os.fsdecode(piece.path), "why": piece.why} for piece in origin.hidden],
            }
            for origin in origins
        ],
    }
