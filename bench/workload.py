"""What a workload is, and what it has at hand while it runs."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

# Far above what any workload takes on a slow disk; past it the mount is taken for hung and its connection ended.
COMMAND_SECONDS = 600.0

NOBODY = 65534


class WrongResult(Exception):
    """A workload did not do what it should have; the text says what it found and what it expected."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much of everything. files: of the tree; the others are named after their workloads; _mib: 2^20 bytes.

    rounds: how often each workload runs on each file system where nothing else is asked for.
    """

    name: str
    rounds: int
    files: int
    read_mib: int
    write_mib: int
    small_writes: int
    synced_files: int
    created_files: int
    renamed_files: int
    transactions: int
    wide_entries: int
    layers: int
    slow_files: int
    import_runs: int


QUICK = Sizes("quick", 1, 400, 64, 128, 5_000, 40, 400, 400, 20, 10_000, 100, 2, 1)
FULL = Sizes("full", 3, 8_000, 512, 1024, 50_000, 500, 5_000, 5_000, 500, 100_000, 100, 10, 5)


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of the layers' content, so that each result can be judged: counts of the merged tree, bytes, checksums."""

    sizes: Sizes
    files: int
    directories: int
    bytes: int
    needles: int
    big_crc: int
    modules: str  # Python statement that imports the modules below py/
    tar: Path
    deb: Path


@dataclass(slots=True)
class Stage:
    """A mount that was just made, and what lies beside it. outside: an empty directory that is no overlay, for a workload's own use."""

    merged: Path
    outside: Path
    facts: Facts
    user: int | None = None

    @property
    def tree(self) -> Path:
        return self.merged / "tree"

    def run(self, *argv: str | os.PathLike[str], cwd: Path | None = None) -> str:
        """Run a program, as the stage's user; its stdout. WrongResult if it fails."""
        result = subprocess.run(
            [os.fspath(argument) for argument in argv],
            check=False,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=COMMAND_SECONDS,
            env=ENVIRONMENT,
            user=self.user,
            group=self.user,
            extra_groups=None if self.user is None else (),
        )
        if result.returncode != 0:
            raise WrongResult(f"{argv[0]}: exit status {result.returncode}: {result.stderr.strip()[-300:]}")
        return result.stdout

    def shell(self, script: str, cwd: Path | None = None) -> str:
        """Run a line of shell in a directory, `tree` if none is named; its stdout."""
        return self.run("sh", "-c", script, cwd=cwd or self.tree)

    def together(self, scripts: Sequence[str]) -> list[str]:
        """Run lines of shell side by side in `merged`; the stdout of each."""
        clients = [
            subprocess.Popen(["sh", "-c", script], cwd=self.merged, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True,
            env=ENVIRONMENT) for script in scripts
        ]
        try:
            printed = [client.communicate(timeout=COMMAND_SECONDS)[0] for client in clients]
        finally:
            for client in clients:
                client.kill()
                client.wait()
        failed = [client.returncode for client in clients if client.returncode]
        if failed:
            raise WrongResult(f"of {len(clients)} clients some ended with status {failed}")
        return printed


# One language and no configuration of whoever runs this: `git status` and `ls` then do the same everywhere.
ENVIRONMENT = {
    "PATH": os.environ.get("PATH", "/usr/bin:/bin"),
    "LC_ALL": "C",
    "HOME": "/nonexistent",
    "GIT_CONFIG_NOSYSTEM": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
}

Step = Callable[[Stage], None]


class Kind(Enum):
    """What mostly counts: bytes moved, or calls on names and attributes. The limits of docs/performance.md go by it."""

    DATA = "data"
    METADATA = "metadata"


class Caches(Enum):
    """What is in memory when the clock starts."""

    COLD = "cold"  # nothing: dropped after the mount
    WARM = "warm"  # what `prepare` touched


def _nothing(stage: Stage) -> None:
    """Nothing to prepare."""


@dataclass(frozen=True, slots=True)
class Workload:
    """One line of the table.

    run is timed; prepare comes before it, check after it, both untimed. run and check raise WrongResult. layers: which set of layers
    (layers.py) it runs over. user: the uid its programs run as, None for ours.
    """

    name: str
    title: str
    kind: Kind
    run: Step
    check: Step = _nothing
    prepare: Step = _nothing
    caches: Caches = Caches.WARM
    layers: str = "tree"
    user: int | None = None


def expect(what: str, found: object, expected: object) -> None:
    """Raise WrongResult where the two differ."""
    if found != expected:
        raise WrongResult(f"{what}: found {found}, expected {expected}")
