"""What the caller hands to the daemon: requests for mounts, one JSON document over an inherited descriptor.

Never by argv: 500 layers with long names are megabytes, past what execve(2) takes. A memory file rather than a pipe, so that
nobody has to stay and feed it: in the foreground the caller's process itself becomes the daemon.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

from pyoverlay.core.policy import Fsync, IdRange, Override, RedirectDir, Uuid, Verity, Whiteouts
from pyoverlay.daemon.options import Options


@dataclass(frozen=True, slots=True)
class Request:
    """One mount to make. merged is absolute or relative to the caller's directory, like the paths of `options`.

    foreground: the daemon stays the caller's process, logs to its stderr and ends with its terminal.
    log_file: absolute path, None: stderr in the foreground, else syslog. log_level: a number of the logging module.
    log_format: a value of `logs.Format`.
    """

    options: Options
    merged: bytes
    foreground: bool = False
    log_file: str | None = None
    log_level: int = 20
    log_format: str = "text"


def to_memory(requests: Sequence[Request]) -> int:
    """An inheritable descriptor from which `from_memory` reads these requests."""
    fd = os.memfd_create("pyoverlay requests", 0)
    with open(fd, "wb", closefd=False) as file:
        file.write(json.dumps([_plain(asdict(request)) for request in requests]).encode())
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def from_memory(fd: int) -> list[Request]:
    """The requests in a descriptor, which is closed."""
    with open(fd, "rb") as file:
        return [_request(document) for document in json.load(file)]


def _request(document: dict[str, Any]) -> Request:
    options = document.pop("options")
    merged = os.fsencode(document.pop("merged"))
    return Request(options=Options(**{name: _field(name, value) for name, value in options.items()}), merged=merged, **document)


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return os.fsdecode(value)
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


_ENUMS = {
    "redirect_dir": RedirectDir, "fsync": Fsync, "whiteouts": Whiteouts, "verity": Verity, "uuid": Uuid, "override": Override,
}  # fmt: skip


def _field(name: str, value: Any) -> Any:
    if value is None:
        return None
    if name in ("upper", "work"):
        return os.fsencode(value)
    if name in ("lowers", "data_lowers"):
        return tuple(map(os.fsencode, value))
    if name in ("uid_map", "gid_map"):
        return tuple(IdRange(*triple) for triple in value)
    if name == "given":
        return tuple(value)
    return _ENUMS[name](value) if name in _ENUMS else value
