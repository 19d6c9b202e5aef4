"""Three looks at an overlay after a system call: what the merged view, the upper and the lowers hold."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pyoverlay.testing import Overlay, Tree, witness
from tests.posix.kernel_overlay import KernelOverlay
from tests.whoami import MARKS

OPAQUE = MARKS + "opaque"
REDIRECT = MARKS + "redirect"

WHITEOUT = "whiteout"

Shape = dict[str, Any]
Test = TypeVar("Test", bound=Callable[..., object])


@dataclass(frozen=True, slots=True)
class Opaque:
    """An opaque directory with these entries."""

    entries: Shape


@dataclass(frozen=True, slots=True)
class Layers:
    """What a test finds in its directory: lowers from the top, and the upper."""

    lowers: tuple[Tree, ...]
    upper: Tree | None


def layers(*lowers: Tree, upper: Tree | None = None) -> Callable[[Test], Test]:
    """Give the decorated test a directory of its own in the mount that its module shares, with these layers below it.

    An `upper` of None has nothing there, not even the directory, if some lower has it.
    """

    def remember(test: Test) -> Test:
        test.layers = Layers(lowers or ({},), upper)  # type: ignore[attr-defined]  # read by the fixture `shared`
        return test

    return remember


@dataclass(slots=True)
class Here:
    """The directory of one test: in the merged view, in the upper and in each lower."""

    overlay: Overlay | KernelOverlay
    name: str
    _untouched: list[dict[bytes, tuple[object, ...]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._untouched = [witness(lower) for lower in self.lowers]

    @property
    def merged(self) -> Path:
        return self.overlay.merged / self.name

    @property
    def upper(self) -> Path:
        return self.overlay.writable / self.name

    @property
    def lowers(self) -> tuple[Path, ...]:
        return tuple(lower / self.name for lower in self.overlay.lowers)

    @property
    def lower(self) -> Path:
        return self.lowers[0]

    def remount(self) -> None:
        """Only what is on disk survives."""
        self.overlay.remount()

    def assert_lowers_untouched(self) -> None:
        """Not a byte, not a time, not even an atime of any lower has moved."""
        for lower, before in zip(self.lowers, self._untouched, strict=True):
            after = witness(lower)
            for name in sorted(before.keys() | after.keys()):
                assert before.get(name) == after.get(name), f"touched: {lower}/{os.fsdecode(name)}"


def shape(directory: Path) -> Shape:
    """The tree below `directory` as a literal: bytes for a file, a dict for a directory, else a word. Moves no atime of files."""
    return {name: _shape_of(directory / name) for name in _names(directory)}


def _names(directory: Path) -> list[str]:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOATIME)
    try:
        return sorted(os.listdir(fd))
    finally:
        os.close(fd)


def _shape_of(path: Path) -> Any:
    st = os.lstat(path)
    if stat.S_ISDIR(st.st_mode):
        return Opaque(shape(path)) if is_opaque(path) else shape(path)
    if stat.S_ISREG(st.st_mode):
        with open(os.open(path, os.O_RDONLY | os.O_NOATIME), "rb") as file:
            return file.read()
    if stat.S_ISLNK(st.st_mode):
        return f"-> {os.readlink(path)}"
    if stat.S_ISCHR(st.st_mode) and st.st_rdev == 0:
        return WHITEOUT
    return stat.filemode(st.st_mode)[0]


def is_opaque(directory: Path) -> bool:
    """Whether `directory` of a layer hides what is below it."""
    return mark(directory, OPAQUE) == b"y"


def mark(path: Path, name: str) -> bytes | None:
    """The value of an overlay's mark on an object of a layer, None where it has none."""
    if name not in os.listxattr(path, follow_symlinks=False):
        return None
    return os.getxattr(path, name, follow_symlinks=False)


def litter(overlay: Overlay | KernelOverlay) -> list[str]:
    """What lies in the work directory apart from its own empty directories and ready whiteouts: nothing, between operations."""
    found = []
    for directory, _, names in os.walk(overlay.work):
        for name in names:
            path = Path(directory, name)
            st = os.lstat(path)
            is_ready_whiteout = stat.S_ISCHR(st.st_mode) and st.st_rdev == 0
            if not is_ready_whiteout and not (stat.S_ISREG(st.st_mode) and st.st_size == 0 and name == "lock"):
                found.append(str(path.relative_to(overlay.work)))
    return found
