"""Progress of import, export and commit: on a terminal, and nowhere else."""

from __future__ import annotations

import errno
import os
import pty
import subprocess
from pathlib import Path

import pytest

from pyoverlay.testing import Overlay, OverlayFactory
from pyoverlay.testing.mounts import command
from tests.unit.archives import archive, file


def on_a_terminal(arguments: list[str | Path], stdout: Path) -> str:
    """What a command says whose stderr is a terminal; its results go to a file."""
    here, there = pty.openpty()
    try:
        with stdout.open("wb") as printed:
            process = subprocess.Popen(command(*arguments), stdin=subprocess.DEVNULL, stdout=printed, stderr=there)
        os.close(there)
        said = b"".join(iter(lambda: _read(here), b""))
        assert process.wait(timeout=30) == 0, said
        return said.decode()
    finally:
        os.close(here)


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except OSError as error:
        if error.errno != errno.EIO:  # the last who had it has closed it
            raise
        return b""


def commands(overlay: Overlay, place: Path) -> dict[str, list[str | Path]]:
    (place / "layer.tar").write_bytes(archive(file(b"f", bytes(3 << 20))))
    return {
        "Unpacking layer.tar": ["import", place / "layer.tar", place / "store"],
        "Exporting": ["export", overlay.merged],
        "Committing": ["commit", "-y", overlay.merged, place / "out"],
    }


@pytest.mark.root
def test_progress_is_shown_on_a_terminal_and_nowhere_else(overlay: OverlayFactory, tmp_path: Path) -> None:
    mounted = overlay({"f": "x"})
    (mounted.merged / "large").write_bytes(bytes(3 << 20))
    for label, arguments in commands(mounted, tmp_path).items():
        shown = on_a_terminal(arguments, tmp_path / "stdout")
        assert label in shown
        assert "100%" in shown
        assert label.encode() not in (tmp_path / "stdout").read_bytes()
    for arguments in commands(mounted, tmp_path).values():
        result = subprocess.run(command(*arguments), check=True, stdin=subprocess.DEVNULL, capture_output=True, timeout=30)
        assert result.stderr == b""
