"""The file systems that are compared: each mounts layers at a directory, and unmounts them whatever state they are in."""

from __future__ import annotations

import os
import select
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pyoverlay.testing import Connection, mounts_below
from pyoverlay.testing.mounts import command

MOUNT_SECONDS = 30.0
_EXIT_SECONDS = 120.0  # a daemon may have a GiB to write first


@dataclass(frozen=True, slots=True)
class Place:
    """What to mount, and where. lowers: from the top."""

    lowers: Sequence[Path]
    upper: Path
    work: Path
    merged: Path

    def options(self, start: Path) -> str:
        """As the kernel's overlay spells them, relative to `start`: a hundred absolute paths do not fit in the page mount(2) takes."""
        lowers = ":".join(os.path.relpath(lower, start) for lower in self.lowers)
        return f"lowerdir={lowers},upperdir={os.path.relpath(self.upper, start)},workdir={os.path.relpath(self.work, start)}"


class FileSystem(Protocol):
    """Something that merges layers. `mounted` mounts for the length of a with statement; OSError or CalledProcessError if it cannot."""

    name: str

    def mounted(self, place: Place) -> AbstractContextManager[None]: ...


class Kernel:
    """The kernel's overlayfs, with its defaults."""

    name = "kernel"

    @contextmanager
    def mounted(self, place: Place) -> Iterator[None]:
        start = place.upper.parent
        # The kernel takes lowerdir as the caller's path: so the caller goes there.
        subprocess.run(["mount", "-t", "overlay", "overlay", "-o", place.options(start), place.merged], check=True, cwd=start)
        with _unmounted(place.merged):
            yield


class FuseOverlayfs:
    """fuse-overlayfs, serving all users as a container engine has it."""

    name = "fuse-overlayfs"

    def __init__(self, program: str = "fuse-overlayfs") -> None:
        self.program = program

    @contextmanager
    def mounted(self, place: Place) -> Iterator[None]:
        start = place.upper.parent
        options = place.options(start) + ("" if os.geteuid() else ",allow_other")
        argv = [self.program, "-f", "-o", options, os.fspath(place.merged)]
        with serving(argv, place.merged, cwd=start):
            yield


class Pyoverlay:
    """This project, through its command line.

    In the foreground like fuse-overlayfs, so that both daemons are in the session of the benchmark: where sched_autogroup is on, one in
    a session of its own would be scheduled as a group apart from its clients, and its peer would not.
    """

    name = "pyoverlay"

    def __init__(self, options: Sequence[str] = ()) -> None:
        self.options = tuple(options)

    @contextmanager
    def mounted(self, place: Place) -> Iterator[None]:
        lowers = ":".join(map(os.fspath, place.lowers))
        argv = [*command("mount", "-f", "-q", *self.options, "--workdir", place.work), lowers, *map(os.fspath, (place.upper, place.merged))]
        with serving(argv, place.merged):
            yield


@contextmanager
def serving(argv: Sequence[str], mount_point: Path, cwd: Path | None = None, pass_fds: Sequence[int] = ()) -> Iterator[None]:
    """Run a FUSE daemon in the foreground until the end of the with statement; begins when it has mounted.

    Raises OSError with what it said if it does not mount.
    """
    with tempfile.TemporaryFile("w+b") as said:
        daemon = subprocess.Popen(argv, cwd=cwd, stdin=subprocess.DEVNULL, stdout=said, stderr=said, pass_fds=pass_fds)
        try:
            if not _mounts(daemon, mount_point):
                said.seek(0)
                raise OSError(f"{argv[0]} did not mount {mount_point}: {said.read().decode(errors='replace').strip()}")
            with _unmounted(mount_point):
                yield
            daemon.wait(_EXIT_SECONDS)
        finally:
            if daemon.poll() is None:
                daemon.kill()
                daemon.wait()


def _mounts(daemon: subprocess.Popen[bytes], mount_point: Path) -> bool:
    pidfd = os.pidfd_open(daemon.pid)
    try:
        with open("/proc/self/mountinfo", "rb") as table:
            poll = select.poll()
            poll.register(table, select.POLLPRI)  # the mount table has changed, proc_pid_mountinfo(5)
            poll.register(pidfd, select.POLLIN)
            while not mounts_below(mount_point):
                events = poll.poll(MOUNT_SECONDS * 1000)
                if not events or any(fd == pidfd for fd, _ in events):
                    return False
            return True
    finally:
        os.close(pidfd)


@contextmanager
def _unmounted(mount_point: Path) -> Iterator[None]:
    """Unmount at the end; by force if it is busy or hangs, and then say so."""
    try:
        yield
        subprocess.run(["umount", mount_point], check=True, timeout=_EXIT_SECONDS)
    finally:
        for mount in reversed(mounts_below(mount_point)):
            if mount.fs_type.startswith("fuse"):
                Connection.of(mount).detach()
            else:
                subprocess.run(["umount", "-l", mount.mount_point], check=True)
