"""What commands make of a standard output that is full, closed, or no longer read, and of streams that the caller closed."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyoverlay.testing import Overlay, OverlayFactory
from pyoverlay.testing.mounts import MARK, command, mounts_below
from tests.unit.archives import archive, file

pytestmark = pytest.mark.root

# Each command, by what makes it print; MERGED and PLACE stand for paths.
PRINTING = {
    "help": ["--help"],
    "version": ["--version"],
    "ps": ["ps"],
    "ps -q": ["ps", "-q"],
    "ps --json": ["ps", "--json"],
    "inspect": ["inspect", "MERGED"],
    "inspect -f": ["inspect", "-f", "{{.Id}}", "MERGED"],
    "diff": ["diff", "MERGED"],
    "diff --stat": ["diff", "--stat", "MERGED"],
    "which": ["which", "MERGED/f"],
    "export": ["export", "MERGED"],
    "import": ["import", "PLACE/layer.tar", "PLACE/store"],
    "commit": ["commit", "-n", "MERGED", "PLACE/image"],
    "doctor": ["doctor"],
    "completion": ["completion", "zsh"],
}


@pytest.fixture(autouse=True)
def list_of_our_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other mounts of this machine are none of these tests' business."""
    monkeypatch.setenv("PYOVERLAY_RUNTIME_DIR", str(tmp_path / "run"))


@pytest.fixture
def mounted(overlay: OverlayFactory, tmp_path: Path) -> Overlay:
    made = overlay({"f": "lower"})
    (made.merged / "small").write_text("added")
    (tmp_path / "layer.tar").write_bytes(archive(file(b"f", b"content")))
    return made


def words(name: str, mounted: Overlay, place: Path) -> list[str]:
    return [word.replace("MERGED", str(mounted.merged)).replace("PLACE", str(place)) for word in PRINTING[name]]


@pytest.mark.parametrize("name", PRINTING)
def test_a_full_standard_output_is_refused_in_one_line(mounted: Overlay, tmp_path: Path, name: str) -> None:
    with open("/dev/full", "wb") as full:
        result = subprocess.run(
            command(*words(name, mounted, tmp_path)), check=False, stdout=full, stderr=subprocess.PIPE, text=True, timeout=30
        )
    assert (result.returncode, result.stderr) == (1, "pyoverlay: standard output: cannot be written (No space left on device)\n")


@pytest.mark.parametrize("name", PRINTING)
def test_a_closed_standard_output_is_refused_in_one_line(mounted: Overlay, tmp_path: Path, name: str) -> None:
    result = with_closed(">&-", *command(*words(name, mounted, tmp_path)))
    assert (result.returncode, result.stderr) == (1, "pyoverlay: standard output: cannot be written (Bad file descriptor)\n")


@pytest.mark.parametrize("name", PRINTING)
def test_a_reader_who_has_seen_enough_is_told_nothing(mounted: Overlay, tmp_path: Path, name: str) -> None:
    here, there = os.pipe()
    os.close(here)
    with subprocess.Popen(command(*words(name, mounted, tmp_path)), stdout=there, stderr=subprocess.PIPE, text=True) as process:
        os.close(there)
        _, said = process.communicate(timeout=30)
    assert (process.returncode, said) == (1, "")


def with_closed(streams: str, *argv: str) -> subprocess.CompletedProcess[str]:
    """Run a command with some of its streams closed, as the shell spells that."""
    script = f"exec {shlex.join(argv)} {streams}"
    return subprocess.run(["sh", "-c", script], check=False, capture_output=True, text=True, timeout=30)


@pytest.mark.parametrize("streams", ["<&-", "<&- >&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize("program", ["pyoverlay", "--from", "mount.fuse.pyoverlay", "library"])
def test_a_mount_does_not_need_the_streams_that_are_closed(overlay: OverlayFactory, tmp_path: Path, streams: str, program: str) -> None:
    """What is opened gets the lowest number that is free: the end of a pipe to the daemon would be taken for its standard input."""
    made = overlay({"f": "lower"}, mount=False)
    options = f"lowerdir={made.lower}"
    (tmp_path / "list").write_text(f"-o {options} {made.merged}\n")
    called = f"from pyoverlay import mount; mount(lowers=[{str(made.lower)!r}], merged={str(made.merged)!r})"
    argv = {
        "pyoverlay": command("mount", "-o", options, made.merged),
        "--from": command("mount", "--from", tmp_path / "list"),
        "mount.fuse.pyoverlay": [sys.executable, "-P", "-m", "pyoverlay.daemon.mount_program", "-o", options, str(made.merged)],
        "library": [sys.executable, "-P", "-c", called],
    }[program]
    result = with_closed(streams, "env", f"{MARK}={made.mark}", *argv)
    assert (result.returncode, result.stderr) == (0, "")
    assert (made.merged / "f").read_text() == "lower"


def test_standard_error_may_be_closed(mounted: Overlay, tmp_path: Path) -> None:
    """Where progress would be shown, and errors."""
    result = with_closed("2>&-", *command("export", mounted.merged, "-o", tmp_path / "new.tar"))
    assert (result.returncode, (tmp_path / "new.tar").exists()) == (0, True)
    assert with_closed("2>&-", *command("diff", tmp_path / "none")).returncode == 1


def test_standard_input_may_be_closed(tmp_path: Path) -> None:
    result = with_closed("<&-", *command("import", "-", tmp_path / "store"))
    assert (result.returncode, result.stderr) == (
        1, "pyoverlay: -: no image or layer that can be imported: it is neither an image nor a tar archive\n"
    )  # fmt: skip


# ── files that cannot take what is written to them ──────────────────────────────────────────────────────────────────────────


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A place with room for 64 KiB, and 16 files."""
    (tmp_path / "disk").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k,nr_inodes=16", "tmpfs", tmp_path / "disk"], check=True)
    return tmp_path / "disk"


@pytest.fixture(autouse=True)
def without_disks(tmp_path: Path) -> Iterator[None]:
    yield
    for mount in mounts_below(tmp_path / "disk"):
        subprocess.run(["umount", mount.mount_point], check=True)


def test_an_export_to_a_full_disk_names_the_file_and_leaves_none(mounted: Overlay, disk: Path) -> None:
    """Whether the last of it is refused, that was held back in a buffer, or all of it."""
    for size in (100 << 10, 64 << 10):
        (mounted.merged / "large").write_bytes(bytes(size))
        result = subprocess.run(command("export", mounted.merged, "-o", disk / "layer.tar"), check=False, capture_output=True, text=True)
        assert (result.returncode, result.stderr) == (1, f"pyoverlay: {disk}/layer.tar: cannot be written (No space left on device)\n")
        assert os.listdir(disk) == []


def test_an_export_to_a_device_that_is_full_names_it(mounted: Overlay) -> None:
    result = subprocess.run(command("export", mounted.merged, "-o", "/dev/full"), check=False, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (1, "pyoverlay: /dev/full: cannot be written (No space left on device)\n")


def test_an_import_to_a_full_disk_names_what_and_where(disk: Path, tmp_path: Path) -> None:
    (tmp_path / "layer.tar").write_bytes(archive(file(b"d/large", bytes(100 << 10))))
    argv = command("import", "--discard-blobs", tmp_path / "layer.tar", disk / "store")
    result = subprocess.run(argv, check=False, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (
        1, f"pyoverlay: {tmp_path}/layer.tar: d/large: cannot be unpacked in {disk}/store (No space left on device)\n"
    )  # fmt: skip
    assert os.listdir(disk / "store/layers") == []
