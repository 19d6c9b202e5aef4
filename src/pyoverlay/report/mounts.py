"""The mounts there are, and how each is: from the registry, from mountinfo and from what the daemons tell.

No path of a mount is touched before its daemon has answered.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from pyoverlay import mountinfo, registry
from pyoverlay.core.policy import Policy
from pyoverlay.errors import Refusal
from pyoverlay.report import asking


class State(Enum):
    """How a mount is; the value is what a person reads."""

    UP = "up"
    SILENT = "not answering"  # its daemon runs, and hangs: so does whoever touches the mount
    DEAD = "dead"  # its daemon has gone and left the mount behind: ENOTCONN for everybody


@dataclass(frozen=True, slots=True)
class Mount:
    """A mount that is listed. told: what its daemon says, see daemon/control.py; empty where there was no answer."""

    record: registry.Record
    state: State
    told: Mapping[str, Any] = field(default_factory=dict)


def mounts(*, records: list[registry.Record] | None = None) -> list[Mount]:
    """The mounts this user may know of, oldest first: root all users', a user the own ones. records: of these alone.

    Records of mounts that are gone are cleared away, unless they have a failure to report.
    """
    here = _mounted_here()
    found = [record for record in (registry.records() if records is None else records) if _is_believed(record, here)]
    answers = asking.ask(record for record in found if record.is_alive)
    listed = []
    for record in found:
        if record.is_alive:
            told = answers.get(record.id)
            listed.append(Mount(record, State.SILENT if told is None else State.UP, told or {}))
        elif (record.device, record.merged) in here:
            listed.append(Mount(record, State.DEAD))
        elif record.failure is None:
            registry.clear(record)
    return listed


def believed() -> list[registry.Record]:
    """The records, oldest first, but those of mounts that the kernel says somebody else has made."""
    here = _mounted_here()
    return [record for record in registry.records() if _is_believed(record, here)]


def _mounted_here() -> dict[tuple[str, bytes], mountinfo.Mount]:
    return {(mount.device, mount.point): mount for mount in mountinfo.mounts()}


def _is_believed(record: registry.Record, here: Mapping[tuple[str, bytes], mountinfo.Mount]) -> bool:
    mount = here.get((record.device, record.merged))
    return mount is None or record.may_be_of(mount.option(b"user_id"))


def is_here(record: registry.Record) -> bool:
    """Whether its mount point leads to the mount in this process's mount namespace."""
    topmost = mountinfo.topmost(record.merged)
    return topmost is not None and topmost.device == record.device


def policy_of(record: registry.Record, path: bytes) -> Policy:
    """What the core was told by the mount's daemon. path: what was asked about. Raises Refusal: it is another release's."""
    try:
        return record.policy
    except ValueError as error:
        raise Refusal(path, f"mounted by another release of pyoverlay: {error}", remedy="use that release") from error


def at(path: bytes) -> Mount | None:
    """The mount whose mount point a path names, the topmost of several; None: no mount that is listed."""
    for spelling in (_without_touching, os.path.realpath):
        real = spelling(path)
        found = mounts(records=[record for record in registry.records() if record.merged == real])
        if found:
            return found[-1]
    return None


def over(upper: bytes) -> Mount | None:
    """The mount whose upper a path names; None: no mount that is listed."""
    real = os.path.realpath(upper)
    found = mounts(records=[record for record in registry.records() if record.upper == real])
    return found[-1] if found else None


def _without_touching(path: bytes) -> bytes:
    """The real path of what a path names, unless that is a symlink: its last name is not looked at. A mount may hang."""
    above, name = os.path.split(os.path.abspath(path))
    return os.path.join(os.path.realpath(above), name)
