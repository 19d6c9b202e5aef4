"""Overlays mounted for a test through the command line, as people mount them, and everything about them that can be left behind.

A hung FUSE mount hangs whoever touches it, in a sleep that no signal ends. So nothing here looks at a path inside a mount: mounts are
read from mountinfo, daemons are found in /proc by a mark in their environment, and what hangs is ended through its connection.
"""

from __future__ import annotations

import ctypes
import os
import re
import select
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pyoverlay.testing.trees import Tree, make_tree, witness

# In the environment of everything that a test starts; the daemon inherits it.
MARK = "PYOVERLAY_TEST_MARK"

# Far above what any of them takes (a mount: 0.35 s), far below a test's own time limit.
COMMAND_SECONDS = 30.0
DAEMON_EXIT_SECONDS = 10.0

_MNT_FORCE, _MNT_DETACH, _UMOUNT_NOFOLLOW = 1, 2, 8
_libc = ctypes.CDLL(None, use_errno=True)


class MountRefusedError(Exception):
    """`pyoverlay mount` returned something other than 0; the text is what it printed."""


class OverlayHungError(AssertionError):
    """A mount or its daemon did not go when it should have; it has been ended by force."""


@dataclass(frozen=True, slots=True)
class Mount:
    """A line of /proc/self/mountinfo, proc_pid_mountinfo(5)."""

    mount_id: int
    device: tuple[int, int]
    mount_point: str
    options: str
    fs_type: str
    source: str
    super_options: str


def mounts() -> Iterator[Mount]:
    """The mounts of this mount namespace, oldest first."""
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        fields, _, rest = line.partition(" - ")
        mount_id, _, device, _, mount_point, options, *_ = fields.split(" ")
        fs_type, source, super_options = rest.split(" ", 2)
        major, minor = map(int, device.split(":"))
        yield Mount(int(mount_id), (major, minor), _unescape(mount_point), options, fs_type, _unescape(source), super_options)


def _unescape(text: str) -> str:
    """Blank, tab, newline and backslash are written as three octal digits."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def mounts_below(directory: Path) -> list[Mount]:
    """The mounts on `directory` or below it. Touches none of them."""
    top = os.path.abspath(directory)
    return [mount for mount in mounts() if mount.mount_point == top or mount.mount_point.startswith(top + "/")]


@dataclass(frozen=True, slots=True)
class Connection:
    """A FUSE mount as the kernel's side knows it: the way to end it when its daemon does not answer."""

    mount_point: str
    number: int

    @classmethod
    def of(cls, mount: Mount) -> Connection:
        return cls(mount.mount_point, mount.device[1])

    def abort(self) -> None:
        """Fail every request that waits, and all later ones, with ENOTCONN or ECONNABORTED. Without effect once it is gone."""
        try:
            Path(f"/sys/fs/fuse/connections/{self.number}/abort").write_text("1")
        except OSError:  # no fusectl here, or the connection went away meanwhile: umount -f aborts too
            _libc.umount2(os.fsencode(self.mount_point), _MNT_FORCE | _UMOUNT_NOFOLLOW)

    def detach(self) -> None:
        """Abort, then take the mount out of the tree even if somebody uses it."""
        self.abort()
        if _libc.umount2(os.fsencode(self.mount_point), _MNT_DETACH | _UMOUNT_NOFOLLOW) != 0 and os.geteuid() != 0:
            subprocess.run(["fusermount3", "-u", "-z", self.mount_point], check=False, capture_output=True, timeout=COMMAND_SECONDS)


def processes_marked(mark: str) -> list[int]:
    """Pids of the processes, apart from this one, whose environment at their start had MARK set to `mark` or to `mark/...`."""
    wanted = f"{MARK}={mark}".encode()
    return [pid for pid in _pids() if pid != os.getpid() and _has_variable(pid, wanted)]


def _pids() -> Iterator[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdigit())


def _has_variable(pid: int, wanted: bytes) -> bool:
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:  # ended meanwhile, or somebody else's
        return False
    return any(variable == wanted or variable.startswith(wanted + b"/") for variable in environment.split(b"\0"))


def wait_for_end(pids: Iterable[int], seconds: float) -> list[int]:
    """Wait until these processes have ended; return those that are still there after `seconds`."""
    deadline = time.monotonic() + seconds
    return [pid for pid in pids if not _ends(pid, deadline)]


def rests(pid: int, seconds: float) -> bool:
    """Whether a process lets so much time pass without one of its threads having run, which takes none that polls.

    Begins anew up to four times: what was asked of it last may leave something to do, of which nothing tells that it is done.
    """
    for _ in range(5):
        before = _timeslices(pid)
        select.select([], [], [], seconds)  # the one thing that only time shows
        if _timeslices(pid) == before:
            return True
    return False


def _timeslices(pid: int) -> dict[str, int]:
    """How often each thread has been run: the third field of schedstat (Documentation/scheduler/sched-stats.rst)."""
    return {task.name: int((task / "schedstat").read_text().split()[2]) for task in Path(f"/proc/{pid}/task").iterdir()}


def _ends(pid: int, deadline: float) -> bool:
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        return bool(poll.poll(max(0.0, deadline - time.monotonic()) * 1000))
    finally:
        os.close(pidfd)


def end(pids: Iterable[int]) -> None:
    """Kill processes and wait for them."""
    pids = list(pids)
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    wait_for_end(pids, DAEMON_EXIT_SECONDS)


def command(*arguments: str | os.PathLike[str], python: str = sys.executable) -> list[str]:
    """The argv that runs pyoverlay with the given arguments in the given Python; -P keeps the current directory out of sys.path."""
    return [python, "-P", "-m", "pyoverlay", *(os.fspath(argument) for argument in arguments)]


@dataclass(slots=True)
class Overlay:
    """Directories that are, or can be, mounted over one another.

    lowers: top first. upper: None is a read-only mount. options: further arguments of `pyoverlay mount`. python: the interpreter whose
    pyoverlay mounts. environment: what its commands see, None for this process's own.
    """

    lowers: tuple[Path, ...]
    upper: Path | None
    merged: Path
    options: tuple[str, ...] = ()
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)
    python: str = sys.executable
    environment: Mapping[str, str] | None = None

    @property
    def lower(self) -> Path:
        """The topmost lower."""
        return self.lowers[0]

    @property
    def writable(self) -> Path:
        """The upper of a mount that has one."""
        assert self.upper is not None, "a read-only mount has no upper"
        return self.upper

    @property
    def work(self) -> Path:
        """The default work directory."""
        return self.writable.with_name(f".{self.writable.name}.pyoverlay-work")

    def mount(self) -> None:
        """Mount. Raises MountRefusedError, or OverlayHungError if the command does not return."""
        lowers = ":".join(re.sub(r"([\\:])", r"\\\1", str(lower)) for lower in self.lowers)
        if self.upper is None:
            layers = ["-o", "lowerdir=" + lowers.replace(",", r"\,"), str(self.merged)]
        else:
            layers = [lowers, str(self.upper), str(self.merged)]
        result = self._run("mount", *self.options, *layers)
        if result.returncode != 0:
            raise MountRefusedError(result.stderr.strip() or f"exit status {result.returncode} and no message")

    def umount(self) -> None:
        """Unmount with `pyoverlay umount`, which returns when the daemon has gone; AssertionError if it fails or the daemon has not."""
        daemons = self.daemons()
        result = self._run("umount", str(self.merged))
        assert result.returncode == 0, f"pyoverlay umount: {result.stderr.strip() or result.returncode}"
        still_there = wait_for_end(daemons, 0)
        assert not still_there, f"pyoverlay umount returned before its daemon, pid {still_there}, had gone"

    def remount(self) -> None:
        """Unmount and mount again: nothing that was only in memory survives."""
        self.umount()
        self.mount()

    def mounted(self) -> Mount | None:
        """The mount on `merged`, topmost if there are several."""
        here = [mount for mount in mounts_below(self.merged) if mount.mount_point == os.path.abspath(self.merged)]
        return here[-1] if here else None

    def daemons(self) -> list[int]:
        """Pids of what the mount command started and left running: one daemon, as a rule."""
        return processes_marked(self.mark)

    def abort(self) -> None:
        """End a mount that hangs: nobody waits for it after this. Safe to call from another thread and when nothing is mounted."""
        mount = self.mounted()
        if mount is not None:
            Connection.of(mount).abort()

    def close(self) -> None:
        """Unmount if mounted, whatever state the mount is in. Raises AssertionError if it had to be forced."""
        try:
            if self.mounted() is not None:
                self.umount()
            left = wait_for_end(self.daemons(), DAEMON_EXIT_SECONDS)
            if left:
                raise OverlayHungError(f"{self.merged} is not mounted and its daemon, pid {left}, is still there")
        finally:
            self._force()

    def _force(self) -> None:
        while (mount := self.mounted()) is not None:
            Connection.of(mount).detach()
            if self.mounted() == mount:
                raise OverlayHungError(f"{self.merged} cannot be unmounted, not even lazily")
        end(self.daemons())

    def _run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        environment = dict(os.environ if self.environment is None else self.environment) | {MARK: self.mark}
        try:
            # Through pipes: a daemon that kept its caller's stdout or stderr open would be waited for, and found out.
            return subprocess.run(
                command(*arguments, python=self.python),
                check=False,
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=COMMAND_SECONDS,
            )
        except subprocess.TimeoutExpired as expired:
            self._force()
            raise OverlayHungError(
                f"`pyoverlay {' '.join(arguments)}` did not return within {COMMAND_SECONDS:.0f} s (or left its output open); "
                f"it printed: {expired.stderr!r}"
            ) from expired


@dataclass(slots=True)
class OverlayFactory:
    """Makes overlays out of tree literals below `directory`; `close` ends them and checks what they must not have touched."""

    directory: Path
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)
    overlays: list[Overlay] = field(default_factory=list)
    _witnesses: dict[Path, dict[bytes, tuple[object, ...]]] = field(default_factory=dict)

    def __call__(
        self, *lowers: Tree, upper: Tree | None = None, options: Sequence[str] = (), read_only: bool = False, mount: bool = True
    ) -> Overlay:
        """Make the layers and mount them.

        lowers: top first; none is one empty lower. upper: what it holds already. options: arguments of `pyoverlay mount`. read_only:
        without an upper. mount: False leaves mounting to the test. Raises what Overlay.mount does.
        """
        place = self.directory / f"overlay{len(self.overlays)}"
        place.mkdir()
        made = [self._make_layer(place / f"lower{number}", tree) for number, tree in enumerate(lowers or ({},))]
        upper_path = None if read_only else self._make_layer(place / "upper", upper or {})
        merged = place / "merged"
        merged.mkdir()
        overlay = Overlay(tuple(made), upper_path, merged, tuple(options), f"{self.mark}/{len(self.overlays)}")
        self._witnesses |= {lower: witness(lower) for lower in made}
        self.overlays.append(overlay)
        if mount:
            overlay.mount()
        return overlay

    def _make_layer(self, path: Path, tree: Tree) -> Path:
        path.mkdir()
        make_tree(path, tree)
        return path

    def abort(self) -> None:
        """Abort every mount; see Overlay.abort."""
        for overlay in self.overlays:
            overlay.abort()

    def close(self) -> None:
        """Unmount all; then raise an ExceptionGroup of what went wrong with any of them."""
        failures: list[Exception] = []
        for overlay in self.overlays:
            try:
                overlay.close()
            except (AssertionError, OSError, subprocess.SubprocessError) as failure:
                failures.append(failure)
        failures += [AssertionError(difference) for difference in self._differences()]
        if failures:
            raise ExceptionGroup("an overlay left something behind", failures)

    def _differences(self) -> Iterator[str]:
        for lower, before in self._witnesses.items():
            after = witness(lower)
            for name in sorted(before.keys() | after.keys()):
                if before.get(name) != after.get(name):
                    yield (
                        f"a lower was touched: {lower}/{os.fsdecode(name)}\n  before: {before.get(name)}\n  after:  {after.get(name)}\n"
                        "  (if only the atime differs, somebody read it without O_NOATIME: a test looks into a lower with snapshot())"
                    )
