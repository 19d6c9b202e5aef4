"""What is mounted where, from /proc/self/mountinfo (proc_pid_mountinfo(5)): read once, then asked.

Nothing here touches a mounted file system: a mount whose daemon is dead or hangs must not hold up whoever asks about it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

_OCTAL = re.compile(rb"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class Mount:
    """One line.

    device: `major:minor`. root: the directory of the file system that shows at `point`. options: the super block's, as printed.
    """

    id: int
    device: str
    root: bytes
    point: bytes
    type: str
    source: bytes
    options: bytes

    def option(self, name: bytes) -> bytes | None:
        """The value of a super block option; None where it is not there."""
        return next(iter(self.values(name)), None)

    def values(self, name: bytes) -> tuple[bytes, ...]:
        """The values of a super block option that may be there several times."""
        options = (option.partition(b"=") for option in self.options.split(b","))  # a comma inside a value is printed as an octal escape
        return tuple(_unescaped(value) for key, equals, value in options if key == name and equals)


def open_mountinfo() -> int:
    """A descriptor for `mounts`, for who may not pass an absolute path to the kernel later on.

    It is of /proc/self: the file is opened anew each time, since threads that shared its offset would read each other's halves.
    """
    return os.open("/proc/self", os.O_RDONLY | os.O_DIRECTORY)


def mounts(fd: int | None = None) -> list[Mount]:
    """Every mount of this process's mount namespace, or of that of the process that called `open_mountinfo`, in the order of mounting."""
    with open(os.open("/proc/self/mountinfo" if fd is None else "mountinfo", os.O_RDONLY, dir_fd=fd), "rb") as lines:
        return [_parsed(line) for line in lines]


def topmost(point: bytes, among: list[Mount] | None = None) -> Mount | None:
    """The mount that shows at `point`, an absolute path without symlinks."""
    return next((mount for mount in reversed(mounts() if among is None else among) if mount.point == point), None)


def _parsed(line: bytes) -> Mount:
    before, _, after = line.rstrip(b"\n").partition(b" - ")
    number, _, device, root, point = before.split(b" ")[:5]
    kind, source, options = after.split(b" ", 2)
    return Mount(int(number), device.decode(), _unescaped(root), _unescaped(point), kind.decode(), _unescaped(source), options)


def _unescaped(field: bytes) -> bytes:
    return _OCTAL.sub(lambda match: bytes((int(match[1], 8),)), field) if b"\\" in field else field


@dataclass(frozen=True, slots=True)
class Location:
    """Where a directory lies within its file system, whatever bind mounts lead to it: comparable between paths."""

    device: str
    path: bytes
    mount_id: int

    def is_within(self, other: Location) -> bool:
        """Whether it is the directory `other` or lies below it."""
        prefix = other.path.rstrip(b"/") + b"/"
        return self.device == other.device and (self.path == other.path or self.path.startswith(prefix))


def location(fd: int, among: list[Mount]) -> Location:
    """The location of an open directory."""
    number = mount_id(fd)
    path = os.readlink(b"/proc/self/fd/%d" % fd)
    mount = next((mount for mount in among if mount.id == number), None)
    if mount is None:  # above the root that this process was put into: its paths are all there is
        device = os.fstat(fd).st_dev
        return Location(f"{os.major(device)}:{os.minor(device)}", path, number)
    below = os.path.relpath(path, mount.point) if path != mount.point else b"."
    return Location(mount.device, os.path.normpath(os.path.join(mount.root, below)), number)


def mount_id(fd: int, proc_self: int | None = None) -> int:
    """The id of the mount that a descriptor is of; asks nothing of its file system. proc_self: see `open_mountinfo`."""
    path = f"fdinfo/{fd}" if proc_self is not None else f"/proc/self/fdinfo/{fd}"
    with open(os.open(path, os.O_RDONLY, dir_fd=proc_self), "rb") as lines:
        return next(int(value) for name, _, value in (line.partition(b":") for line in lines) if name == b"mnt_id")


def kernel_overlays(among: list[Mount]) -> Iterator[Mount]:
    """The mounts of the kernel's own overlay."""
    return (mount for mount in among if mount.type == "overlay")
