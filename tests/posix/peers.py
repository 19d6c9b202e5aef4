"""The other overlays: PYOVERLAY_TESTS_OVER=kernel or fuse-overlayfs runs tests over one of them, to see what it does with the same claims.

docs/semantics.md was filled so.
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from pyoverlay.testing import Overlay
from tests.posix.kernel_overlay import FULL, KernelOverlay


@dataclass(slots=True)
class FuseOverlayfs(KernelOverlay):
    """fuse-overlayfs over the same layers, mounted as root, for all users."""

    options: tuple[str, ...] = ("allow_other",)

    def mount(self) -> None:
        self.work.mkdir(exist_ok=True)
        lowers = ":".join(map(str, self.lowers))
        options = ",".join((f"lowerdir={lowers}", f"upperdir={self.upper}", f"workdir={self.work}", *self.options))
        subprocess.run(["fuse-overlayfs", "-o", options, self.merged], check=True, capture_output=True, timeout=30)

    def mounted(self) -> bool:
        """Whether it answers: it may have crashed, and what is left then is taken away."""
        try:
            os.statvfs(self.merged)  # lstat(2) may be answered from the kernel's cache
            return os.path.ismount(self.merged)
        except OSError:
            subprocess.run(["umount", "-l", self.merged], check=True)
            return False


def overlay_under_test(lowers: tuple[Path, ...], upper: Path, merged: Path) -> Overlay | KernelOverlay:
    """Ours, unless the environment names another."""
    match os.environ.get("PYOVERLAY_TESTS_OVER"):
        case None:
            return Overlay(lowers, upper, merged)
        case "kernel":
            return KernelOverlay(lowers, upper, merged, FULL)
        case "fuse-overlayfs":
            return FuseOverlayfs(lowers, upper, merged)
        case other:
            raise ValueError(f"PYOVERLAY_TESTS_OVER={other}: kernel or fuse-overlayfs")
