"""Who keeps a mount busy: the processes with a file, a working directory, a root, a program or a map on it, or a namespace that has it.

Only /proc is read, and only through one directory descriptor: the daemon asks while it serves, when no path may lead through its
own mount, and a mount that is dead or hangs must not block whoever asks. What is open is told by its mount's id, which no path tells: what
was opened before the mount covered it has the same one. An O_PATH descriptor of a link in /proc asks nothing of the file system behind it.
A map is told by its device.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from pyoverlay.errors import printable

_MOUNT_ID = re.compile(rb"^mnt_id:\s*(\d+)$", re.MULTILINE)
_LINKS = ("cwd", "root", "exe")
_DAEMON = b"\0-m\0pyoverlay.daemon\0"


@dataclass(frozen=True, slots=True)
class Holder:
    """A process that has something open on a mount, and what it calls itself."""

    pid: int
    command: str

    def __str__(self) -> str:
        return f"{self.command} (pid {self.pid})"


@contextmanager
def open_proc() -> Iterator[int]:
    """A descriptor of /proc, to be taken before anything is mounted."""
    fd = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield fd
    finally:
        os.close(fd)


def holders(proc: int, *, mount_id: int, device: str) -> list[Holder]:
    """The processes that hold the mount, as far as this user may look. `device` is mountinfo's `major:minor`."""
    major, minor = map(int, device.split(":"))
    on_map = b" %02x:%02x " % (major, minor)
    found = []
    for name in os.listdir(proc):
        if name.isdigit() and _holds(proc, name, mount_id, on_map):
            found.append(Holder(int(name), _command(proc, name)))
    return sorted(found, key=lambda holder: holder.pid)


def in_other_namespaces(proc: int, device: str) -> list[Holder]:
    """One process, the oldest by its number, of each other mount namespace in which a mount of this device shows, as far as this user may
    look: containers, `unshare -m`, services with mounts of their own. Each keeps a copy of what was mounted when it was made.
    """
    on_device = re.compile(rb"^\d+ \d+ " + re.escape(device.encode()) + rb" ", re.MULTILINE)
    seen = {None, _namespace(proc, "self")}
    found = []
    for name in sorted((name for name in os.listdir(proc) if name.isdigit()), key=int):
        namespace = _namespace(proc, name)
        if namespace in seen:
            continue
        seen.add(namespace)
        if on_device.search(_content(proc, f"{name}/mountinfo")):
            found.append(Holder(int(name), _command(proc, name)))
    return found


def _namespace(proc: int, pid: str) -> str | None:
    try:
        return os.readlink(f"{pid}/ns/mnt", dir_fd=proc)
    except OSError:  # gone, or another user's
        return None


def daemons(proc: int, device: str, uid: int) -> list[int]:
    """The pids of those of a user's daemons that may serve the mount of this device, as far as this user may look.

    From Linux 6.16 on a descriptor of /dev/fuse says of which mount it is. Before, they are all that run.
    """
    connection = re.compile(rb"^fuse_connection:\s*%d$" % int(device.partition(":")[2]), re.MULTILINE)
    running = [pid for pid in map(int, filter(str.isdigit, os.listdir(proc))) if _serves(proc, pid, uid)]
    opened = {pid: b"".join(_descriptors(proc, str(pid))) for pid in running}
    if any(b"fuse_connection:" in content for content in opened.values()):
        return [pid for pid, content in opened.items() if connection.search(content)]
    return running


def _serves(proc: int, pid: int, uid: int) -> bool:
    """By its arguments (`launch`)."""
    try:
        return os.stat(str(pid), dir_fd=proc).st_uid == uid and _DAEMON in _content(proc, f"{pid}/cmdline")
    except (FileNotFoundError, ProcessLookupError):
        return False


def described(found: list[Holder]) -> str:
    """`bash (pid 12), less (pid 14) and 3 more`, for one line of text."""
    if not found:
        return "a process that cannot be seen from here"
    shown = ", ".join(str(holder) for holder in found[:5])
    return shown if len(found) <= 5 else f"{shown} and {len(found) - 5} more"


def _holds(proc: int, pid: str, mount_id: int, on_map: bytes) -> bool:
    if any(_mount_of(proc, f"{pid}/{name}") == mount_id for name in _LINKS):
        return True
    if any(_mount_in(content) == mount_id for content in _descriptors(proc, pid)):
        return True
    return on_map in _content(proc, f"{pid}/maps")


def _mount_of(proc: int, link: str) -> int | None:
    try:
        fd = os.open(link, os.O_PATH, dir_fd=proc)
    except OSError:  # gone, or another user's
        return None
    try:
        return _mount_in(_content(proc, f"self/fdinfo/{fd}"))
    finally:
        os.close(fd)


def _mount_in(fdinfo: bytes) -> int | None:
    match = _MOUNT_ID.search(fdinfo)
    return int(match[1]) if match else None


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
