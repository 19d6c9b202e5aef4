"""The kernel's own overlayfs, mounted as the tests' Overlay is: the reference for what ext4 cannot judge."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from tests.posix.system_calls import mount, umount

# What makes the kernel's overlay keep hard links, inode numbers and renamed directories; its defaults differ by design.
FULL = ("redirect_dir=on", "index=on", "xino=on")


@dataclass(slots=True)
class KernelOverlay:
    """Layers as in pyoverlay.testing.Overlay; `work` is a directory of its own, since `index=on` ties it to one upper."""

    lowers: tuple[Path, ...]
    upper: Path
    merged: Path
    options: tuple[str, ...] = FULL
    work_directory: Path | None = None

    @property
    def lower(self) -> Path:
        return self.lowers[0]

    @property
    def writable(self) -> Path:
        return self.upper

    @property
    def work(self) -> Path:
        return self.work_directory or self.upper.with_name(f".{self.upper.name}.kernel-work")

    def mount(self) -> None:
        self.work.mkdir(exist_ok=True)
        layers = ":".join(re.sub(r"([\\:,])", r"\\\1", str(lower)) for lower in self.lowers)
        data = ",".join((f"lowerdir={layers}", f"upperdir={self.upper}", f"workdir={self.work}", *self.options))
        mount("overlay", self.merged, "overlay", data=data)

    def umount(self) -> None:
        umount(self.merged)

    def remount(self) -> None:
        self.umount()
        self.mount()

    def mounted(self) -> bool:
        return os.path.ismount(self.merged)

    def close(self) -> None:
        if self.mounted():
            self.umount()
