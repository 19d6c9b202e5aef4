"""One mount for the whole list: every check has a directory of its own in each place, made before the mount where it is a layer's.

PYOVERLAY_TESTS_OVER runs the list over another overlay instead (peers.py), to see which checks it passes.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pyoverlay.testing import Overlay, witness
from tests.posix.check import NEW_NAMES, Check, file, folder
from tests.posix.checks import CHECKS
from tests.posix.kernel_overlay import KernelOverlay
from tests.posix.layers import split
from tests.posix.peers import overlay_under_test
from tests.whoami import IS_ROOT

# Without root many checks cannot hold: what does not on ext4 is not asked of the view (test_posix.py).
PLACES = ("ext4", "upper", "lower", "merged") if IS_ROOT else ("lower", "merged")


@dataclass(slots=True)
class Places:
    """Where the checks run: `directory` makes or finds the one of a check in a place."""

    plain: Path
    overlay: Overlay | KernelOverlay
    not_made: frozenset[str]  # checks whose layers this user cannot make

    def directory(self, place: str, check: Check) -> Path:
        if place == "ext4":
            return prepared(self.plain / check.name, check)
        if place == "upper":
            return prepared(self.overlay.merged / "upper" / check.name, check)
        return self.overlay.merged / place / check.name

    def revive(self) -> None:
        """Mount again if a check ended the daemon: the others have their own claim to make."""
        if not self.overlay.mounted():
            self.overlay.mount()


def prepared(directory: Path, check: Check) -> Path:
    """The directory of a check, made."""
    directory.mkdir()
    check.prepare(directory)
    return directory


def _make_layers(lower: Path, upper: Path) -> Iterator[str]:
    """Yields the names of the checks whose layers this user cannot make."""
    for layer in (lower, upper):
        for place in ("lower", "merged", "upper"):
            (layer / place).mkdir()
    for check in CHECKS:
        try:
            _make_layers_of(check, lower, upper)
        except OSError as error:
            if IS_ROOT or error.errno not in (errno.EPERM, errno.EACCES, errno.EINVAL):  # the last: an owner without a mapping
                raise
            yield check.name


def _make_layers_of(check: Check, lower: Path, upper: Path) -> None:
    prepared(lower / "lower" / check.name, check)
    below, above = prepared(lower / "merged" / check.name, check), prepared(upper / "merged" / check.name, check)
    split(below, above)
    for number, name in enumerate(NEW_NAMES):
        (file(name, b"hidden") if number == 1 else folder(name, file("hidden"), folder("below")))(below)
        os.mknod(above / name, 0o020000, 0)


@pytest.fixture(scope="session")
def places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Places]:
    base = tmp_path_factory.mktemp("posix")
    plain, lower, upper, merged = (base / name for name in ("plain", "lower", "upper", "merged"))
    for directory in (plain, lower, upper, merged):
        directory.mkdir()
    before = os.umask(0o022)
    not_made = frozenset(_make_layers(lower, upper))
    overlay = overlay_under_test((lower,), upper, merged)
    untouched = witness_of(lower)
    overlay.mount()
    try:
        yield Places(plain, overlay, not_made)
    finally:
        os.umask(before)
        overlay.close()
        touched = [name for name, state in witness_of(lower).items() if untouched.get(name) != state]
        assert not touched, f"the lower was touched: {touched[:10]}"


def witness_of(lower: Path) -> dict[bytes, tuple[object, ...]]:
    """As `witness`, without the tree that is deeper than a path can say."""
    deep = {check.name.encode() for check in CHECKS if "path_max" in check.name}
    everything: dict[bytes, tuple[object, ...]] = {}
    for place in ("lower", "merged"):
        for name in sorted(os.listdir(os.fsencode(lower / place))):
            if name in deep:
                continue
            try:
                inside = witness(os.fsencode(lower / place) + b"/" + name)
            except PermissionError:
                if IS_ROOT:
                    raise
                continue  # closed to its own owner: only root could have touched it, or can look
            everything |= {place.encode() + b"/" + name + b"/" + path: state for path, state in inside.items()}
    return everything
