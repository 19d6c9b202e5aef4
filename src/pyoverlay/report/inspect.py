"""`pyoverlay inspect`: all that is known of a mount, in Docker's shape and in a schema of our own."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from pyoverlay import __version__
from pyoverlay.errors import Refusal
from pyoverlay.registry import Record
from pyoverlay.report import mounts
from pyoverlay.report.mounts import Mount, State
from pyoverlay.report.times import stamp


def mount_at(merged: bytes) -> Mount:
    """The mount at a mount point, also if its daemon hangs or died. Raises Refusal."""
    found = mounts.at(merged)
    if found is None:
        raise Refusal(merged, "no mount of pyoverlay", remedy="pyoverlay ps lists those there are")
    return found


def joined(record: Record) -> str:
    r"""The lowers as the kernel's `lowerdir=` has them: top first, data-only ones after `::`, a colon in a name as `\:`."""
    return ":".join(map(_escaped, record.lowers)) + "".join(f"::{_escaped(layer)}" for layer in record.data_lowers)


def _escaped(layer: bytes) -> str:
    return os.fsdecode(layer).replace("\\", "\\\\").replace(":", "\\:")


def as_docker(mount: Mount) -> dict[str, Any]:
    """One element of the array that `docker inspect` prints, as far as a mount has such a thing, and what else there is to tell.

    A mount without an upper has "" for it. Requests is null where the daemon gives no answer.
    """
    record = mount.record
    return {
        "Id": record.id,
        "Name": os.fsdecode(record.merged),
        "Created": stamp(record.started),
        "State": {
            "Status": mount.state.value,
            "Running": mount.state is not State.DEAD,
            "Pid": record.pid if mount.state is not State.DEAD else 0,
            "StartedAt": stamp(record.started),
            "Error": trouble(mount) or "",
        },
        "GraphDriver": {
            "Name": "pyoverlay",
            "Data": {
                "LowerDir": joined(record),
                "MergedDir": os.fsdecode(record.merged),
                "UpperDir": os.fsdecode(record.upper or b""),
                "WorkDir": os.fsdecode(record.work or b""),
            },
        },
        "Options": list(record.options),
        "Features": dict(record.features),
        "Requests": mount.told.get("requests"),
        "Inodes": mount.told.get("inodes"),
        "Descriptors": mount.told.get("descriptors"),
    }


def trouble(mount: Mount) -> str | None:
    """What is wrong with a mount, for people; None: nothing."""
    if mount.state is State.SILENT:
        return f"its daemon (pid {mount.record.pid}) does not answer"
    if mount.state is State.DEAD:
        return f"its daemon (pid {mount.record.pid}) has ended and left the mount behind"
    return mount.record.failure


def as_json(found: Iterable[Mount]) -> dict[str, Any]:
    """Schema 1: what `ps --json` and `inspect --json` print. Bytes of names that are no UTF-8 are lone surrogates (os.fsdecode)."""
    return {"schema": 1, "pyoverlay": __version__, "mounts": [_as_json(mount) for mount in found]}


def _as_json(mount: Mount) -> dict[str, Any]:
    record = mount.record
    return {
        "id": record.id,
        "merged": os.fsdecode(record.merged),
        "lowers": [os.fsdecode(lower) for lower in record.lowers],
        "data_lowers": [os.fsdecode(lower) for lower in record.data_lowers],
        "upper": None if record.upper is None else os.fsdecode(record.upper),
        "work": None if record.work is None else os.fsdecode(record.work),
        "state": mount.state.name.lower(),
        "pid": record.pid,
        "started": record.started,
        "options": list(record.options),
        "features": dict(record.features),
        "requests": mount.told.get("requests"),
        "inodes": mount.told.get("inodes"),
        "descriptors": mount.told.get("descriptors"),
        "trouble": trouble(mount),
    }
