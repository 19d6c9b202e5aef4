"""File systems in a file, whose power can be cut."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

# xfs makes none smaller than 300 MB. Both are sparse files.
_MAKE = {"ext4": (64 << 20, ["mkfs.ext4", "-q", "-F"]), "xfs": (320 << 20, ["mkfs.xfs", "-q", "-f"])}
# ext4 would by itself write out a file that replaces another by rename: what is proved here must not rest on that.
_OPTIONS = {"ext4": "loop,noauto_da_alloc", "xfs": "loop"}
_MEMORY = Path("/dev/shm")
_CHECK = {"ext4": ["e2fsck", "-f", "-n"], "xfs": ["xfs_repair", "-n"]}


@dataclass(slots=True)
class Image:
    """A mounted file system. `point`: where."""

    kind: str
    file: Path
    point: Path

    def make(self, size: int | None = None, arguments: Sequence[str] = ()) -> None:
        """size: in bytes, if not the smallest that both the kind and its journal allow. arguments: of mkfs."""
        smallest, command = _MAKE[self.kind]
        with self.file.open("xb") as file:
            file.truncate(size or smallest)
        _run(*command, *arguments, str(self.file))

    def mount(self) -> None:
        """After a power cut this is the repair: the log is replayed."""
        _run("mount", "-t", self.kind, "-o", _OPTIONS[self.kind], str(self.file), str(self.point))

    def umount(self) -> None:
        _run("umount", str(self.point))

    def remount(self) -> None:
        self.umount()
        self.mount()

    def check(self) -> None:
        """fsck finds nothing, after the log was replayed. Leaves it mounted."""
        self.umount()
        self.fsck()
        self.mount()

    def fsck(self) -> None:
        """Of what is not mounted: AssertionError if it finds anything."""
        _run(*_CHECK[self.kind], str(self.file))


@contextmanager
def mounted_image(kind: str, directory: Path, size: int | None = None, arguments: Sequence[str] = ()) -> Iterator[Image]:
    """A new file system of that kind, mounted in a directory of its own below this one."""
    with place_for_images(directory, size) as place:
        image = Image(kind, place / f"{kind}.image", directory / kind)
        image.point.mkdir()
        image.make(size, arguments)
        image.mount()
        try:
            yield image
        finally:
            image.umount()


@contextmanager
def place_for_images(directory: Path, size: int | None = None) -> Iterator[Path]:
    """In memory where there is room for it: every sync of these tests would else wait for what others write to the disk."""
    with tempfile.TemporaryDirectory(dir=_MEMORY if _has_room(size) else directory) as place:
        yield Path(place)


def _has_room(size: int | None) -> bool:
    if not _MEMORY.is_dir():
        return False
    room = os.statvfs(_MEMORY)
    return room.f_bavail * room.f_frsize > 2 * (size or 512 << 20)


def _run(*command: str) -> None:
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{' '.join(command)}: {done.returncode}\n{done.stdout}{done.stderr}"
