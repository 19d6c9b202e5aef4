"""`pyoverlay inspect`: all that is known of a mount, in Docker's shape and in a schema of our own."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pyoverlay import __version__
from pyoverlay.errors import Refusal
from pyoverlay.report import mounts
from pyoverlay.report.mounts import Mount, State
from pyoverlay.report.times import stamp


@dataclass(frozen=True, slots=True)
class Inspection:
    """All that is known of a mount. Paths are absolute, lowers from the top.

    upper, work: None of a read-only mount. state: how it is; trouble: what is wrong with it, None if nothing is. features: what is on or
    off, by the option's name. requests: how many of each kind came, None where the daemon gives no answer; inodes, descriptors: how many
    it knows, and has open.
    """

    id: str
    merged: Path
    lowers: tuple[Path, ...]
    data_lowers: tuple[Path, ...]
    upper: Path | None
    work: Path | None
    state: State
    pid: int
    started: datetime
    options: tuple[str, ...]
    features: Mapping[str, Any]
    requests: Mapping[str, int] | None
    inodes: int | None
    descriptors: int | None
    trouble: str | None

    @classmethod
    def of(cls, mount: Mount) -> Inspection:
        """What a listed mount and its daemon tell."""
        record = mount.record
        return cls(
            id=record.id,
            merged=_path(record.merged),
            lowers=tuple(map(_path, record.lowers)),
            data_lowers=tuple(map(_path, record.data_lowers)),
            upper=None if record.upper is None else _path(record.upper),
            work=None if record.work is None else _path(record.work),
            state=mount.state,
            pid=record.pid,
            started=datetime.fromtimestamp(record.started, UTC),
            options=record.options,
            features=record.features,
            requests=mount.told.get("requests"),
            inodes=mount.told.get("inodes"),
            descriptors=mount.told.get("descriptors"),
            trouble=_trouble(mount),
        )


def _path(path: bytes) -> Path:
    return Path(os.fsdecode(path))


def inspect(merged: str | bytes | os.PathLike[str] | os.PathLike[bytes]) -> Inspection:
    """The mount at the mount point `merged`, also if its daemon hangs or died. Raises Refusal where there is none."""
    found = mounts.at(os.fsencode(merged))
    if found is None:
        raise Refusal(os.fsencode(merged), "no mount of pyoverlay", remedy="pyoverlay ps lists those there are")
    return Inspection.of(found)


def joined(lowers: Iterable[Path], data_lowers: Iterable[Path]) -> str:
    r"""Layers as the kernel's `lowerdir=` has them: top first, data-only ones after `::`, a colon in a name as `\:`."""
    return ":".join(map(_escaped, lowers)) + "".join(f"::{_escaped(layer)}" for layer in data_lowers)


def _escaped(layer: Path) -> str:
    return str(layer).replace("\\", "\\\\").replace(":", "\\:")


def as_docker(found: Inspection) -> dict[str, Any]:
    """One element of the array that `docker inspect` prints, as far as a mount has such a thing, and what else there is to tell.

    A mount without an upper has "" for it. Requests is null where the daemon gives no answer.
    """
    is_running = found.state is not State.DEAD
    return {
        "Id": found.id,
        "Name": str(found.merged),
        "Created": stamp(found.started),
        "State": {
            "Status": found.state.value,
            "Running": is_running,
            "Pid": found.pid if is_running else 0,
            "StartedAt": stamp(found.started),
            "Error": found.trouble or "",
        },
        "GraphDriver": {
            "Name": "pyoverlay",
            "Data": {
                "LowerDir": joined(found.lowers, found.data_lowers),
                "MergedDir": str(found.merged),
                "UpperDir": str(found.upper or ""),
                "WorkDir": str(found.work or ""),
            },
        },
        "Options": list(found.options),
        "Features": dict(found.features),
        "Requests": found.requests,
        "Inodes": found.inodes,
        "Descriptors": found.descriptors,
    }


def _trouble(mount: Mount) -> str | None:
    """What is wrong with a mount, for people."""
    if mount.state is State.SILENT:
        return f"its daemon (pid {mount.record.pid}) does not answer"
    if mount.state is State.DEAD:
        return f"its daemon (pid {mount.record.pid}) has ended and left the mount behind"
    return mount.record.failure


def as_json(found: Iterable[Inspection]) -> dict[str, Any]:
    """Schema 1: what `ps --json` and `inspect --json` print. Bytes of names that are no UTF-8 are lone surrogates (os.fsdecode)."""
    return {"schema": 1, "pyoverlay": __version__, "mounts": [_as_json(one) for one in found]}


def _as_json(one: Inspection) -> dict[str, Any]:
    return {
        "id": one.id,
        "merged": str(one.merged),
        "lowers": [str(lower) for lower in one.lowers],
        "data_lowers": [str(lower) for lower in one.data_lowers],
        "upper": None if one.upper is None else str(one.upper),
        "work": None if one.work is None else str(one.work),
        "state": one.state.name.lower(),
        "pid": one.pid,
        "started": one.started.timestamp(),
        "options": list(one.options),
        "features": dict(one.features),
        "requests": one.requests,
        "inodes": one.inodes,
        "descriptors": one.descriptors,
        "trouble": one.trouble,
    }
