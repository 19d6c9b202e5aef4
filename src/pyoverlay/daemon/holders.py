"""Who keeps a mount busy: the processes with a file, a working directory, a root, a program or a map on it.

Only /proc is read, and only through one directory descriptor: the daemon asks while it serves, when no path may lead through its
own mount, and a dead mount must not block whoever asks. A descriptor is told by the mount id of its fdinfo, a map by its device,
the rest by where its link points.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

from pyoverlay.errors import printable

_MOUNT_ID = re.compile(rb"^mnt_id:\s*(\d+)$", re.MULTILINE)
_LINKS = ("cwd", "root", "exe")


@dataclass(frozen=True, slots=True)
class Holder:
    """A process that has something open on a mount, and what it calls itself."""

    pid: int
    command: str

    def __str__(self) -> str:
        return f"{self.command} (pid {self.pid})"


def open_proc() -> int:
    """A descriptor of /proc, to be taken before anything is mounted."""
    return os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)


def holders(proc: int, *, point: bytes, mount_id: int, device: str) -> list[Holder]:
    """The processes that hold the mount, as far as this user may look. `device` is mountinfo's `major:minor`."""
    major, minor = map(int, device.split(":"))
    on_map = b" %02x:%02x " % (major, minor)
    found = []
    for name in os.listdir(proc):
        if name.isdigit() and _holds(proc, name, point, mount_id, on_map):
            found.append(Holder(int(name), _command(proc, name)))
    return sorted(found, key=lambda holder: holder.pid)


def described(found: list[Holder]) -> str:
    """`bash (pid 12), less (pid 14) and 3 more`, for one line of text."""
    if not found:
        return "a process that cannot be seen from here"
    shown = ", ".join(str(holder) for holder in found[:5])
    return shown if len(found) <= 5 else f"{shown} and {len(found) - 5} more"


def _holds(proc: int, pid: str, point: bytes, mount_id: int, on_map: bytes) -> bool:
    links = (_link(proc, f"{pid}/{name}") for name in _LINKS)
    if any(link == point or link.startswith(point + b"/") for link in links):
        return True
    if any(match and int(match[1]) == mount_id for match in map(_MOUNT_ID.search, _descriptors(proc, pid))):
        return True
    return on_map in _content(proc, f"{pid}/maps")


def _descriptors(proc: int, pid: str) -> Iterator[bytes]:
    try:
        directory = os.open(f"{pid}/fdinfo", os.O_RDONLY | os.O_DIRECTORY, dir_fd=proc)
    except OSError:  # gone, or another user's
        return
    try:
        for name in os.listdir(directory):
            yield _content(directory, name)
    except ProcessLookupError:
        return
    finally:
        os.close(directory)


def _command(proc: int, pid: str) -> str:
    return printable(_content(proc, f"{pid}/comm").rstrip(b"\n")) or "?"


def _link(proc: int, name: str) -> bytes:
    try:
        return os.readlink(os.fsencode(name), dir_fd=proc)
    except OSError:  # gone, or another user's
        return b""


def _content(dirfd: int, name: str) -> bytes:
    try:
        fd = os.open(name, os.O_RDONLY, dir_fd=dirfd)
    except OSError:  # gone, or another user's
        return b""
    try:
        chunks = iter(lambda: os.read(fd, 1 << 16), b"")
        return b"".join(chunks)
    except OSError:
        return b""
    finally:
        os.close(fd)
