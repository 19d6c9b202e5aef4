"""Inode numbers: one for each object, the same for as long as it lives, and never another's while somebody may still mean the first."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyoverlay.testing import Overlay, OverlayFactory, Symlink, Tree, make_tree
from tests.integration.looks import Here, layers, shape
from tests.integration.test_hardlinks import drop_caches
from tests.posix.check import opened
from tests.posix.system_calls import DirectoryStream, mount, umount


def numbers(directory: Path) -> dict[str, int]:
    """Path to inode number of everything below, from stat; and each listing says the same."""
    found = {}
    for parent, directories, files in os.walk(directory):
        with DirectoryStream(parent) as stream:
            listed = {name: number for name, number, _ in stream}
        for name in directories + files:
            path = Path(parent, name)
            found[str(path.relative_to(directory))] = os.lstat(path).st_ino
            assert listed[name] == os.lstat(path).st_ino, path
    return found


TREE: Tree = {"f": b"f", "d": {"g": b"g", "e": {"h": b"h"}}, "s": Symlink("f")}


@layers(TREE, {"low": b"low", "d": {"low": b"low"}}, upper={"up": b"up", "d": {"up": b"up"}})
def test_every_object_has_a_number_of_its_own_on_one_device(here: Here) -> None:
    found = numbers(here.merged)
    assert len(set(found.values())) == len(found) == 10
    devices = {os.lstat(here.merged / path).st_dev for path in found} | {os.lstat(here.merged).st_dev}
    assert len(devices) == 1


@layers(TREE, {"low": b"low", "d": {"low": b"low"}}, upper={"up": b"up", "d": {"up": b"up"}})
@pytest.mark.root  # only root drops caches
def test_numbers_last_over_copy_up_rename_forgetting_and_remount(alone: Here) -> None:
    before = numbers(alone.merged)
    drop_caches()
    assert numbers(alone.merged) == before
    for path in ("f", "d/g", "d/e/h", "low", "d/low"):
        os.chmod(alone.merged / path, 0o600)
    os.lchown(alone.merged / "s", 3, 3)
    assert numbers(alone.merged) == before
    drop_caches()
    assert numbers(alone.merged) == before
    alone.remount()
    assert numbers(alone.merged) == before
    os.rename(alone.merged / "d" / "e", alone.merged / "moved")
    os.rename(alone.merged / "f", alone.merged / "d" / "f")
    after = numbers(alone.merged)
    renamed = {"d/e": "moved", "d/e/h": "moved/h", "f": "d/f"}
    assert after == {renamed.get(path, path): number for path, number in before.items()}
    alone.remount()
    assert numbers(alone.merged) == after


@layers({"f": b"f"})
def test_two_clients_that_remove_and_make_files_never_read_each_others(alone: Here) -> None:
    """ext4 gives a freed number to the next file at once; the kernel must not take that for the file it still knows."""
    for round_ in range(300):
        for client in ("a", "b"):
            path = alone.merged / f"{client}{round_ % 3}"
            if path.exists():
                path.unlink()
            content = f"{path.name} of round {round_} " * (round_ % 7 + 1)
            path.write_text(content)
            assert path.read_text() == content
            other = alone.merged / f"{'b' if client == 'a' else 'a'}{round_ % 3}"
            if other.exists():
                assert other.read_text().startswith(other.name)


@layers({"f": b"f"})
def test_a_number_does_not_come_back_while_the_old_file_is_open(here: Here) -> None:
    (here.merged / "old").write_bytes(b"old content")
    with opened(here.merged / "old", os.O_RDONLY) as fd:
        os.unlink(here.merged / "old")
        for number in range(50):
            (here.merged / f"new{number}").write_bytes(b"new content %d" % number)
        assert os.fstat(fd).st_ino not in {os.lstat(here.merged / f"new{number}").st_ino for number in range(50)}
        assert os.pread(fd, 20, 0) == b"old content"
    for number in range(50):
        assert (here.merged / f"new{number}").read_bytes() == b"new content %d" % number


@layers({"d": {}})
def test_numbers_of_removed_directories_fifos_and_symlinks_are_safe_too(here: Here) -> None:
    """Each kind is kept open by O_PATH, removed, and made again many times: the descriptor goes on meaning the first."""
    for kind in ("directory", "fifo", "symlink"):
        path = here.merged / kind
        _make(kind, path, "first")
        with opened(path, os.O_PATH | os.O_NOFOLLOW) as fd:
            first = os.fstat(fd)
            for number in range(30):
                _remove(kind, path)
                _make(kind, path, f"{number}")
            assert os.lstat(path).st_ino != first.st_ino
            assert (os.fstat(fd).st_ino, os.fstat(fd).st_mode) == (first.st_ino, first.st_mode)


def _make(kind: str, path: Path, target: str) -> None:
    match kind:
        case "directory":
            path.mkdir()
        case "fifo":
            os.mkfifo(path)
        case _:
            os.symlink(target, path)


def _remove(kind: str, path: Path) -> None:
    if kind == "directory":
        path.rmdir()
    else:
        path.unlink()


@layers({"f": b"content of f"})
def test_a_copy_inside_the_upper_by_cp_a_claims_no_other_number(alone: Here) -> None:
    """`cp -a` run on the upper itself copies the `origin` mark: two files then claim to be one (the kernel answers ESTALE)."""
    os.chmod(alone.merged / "f", 0o600)
    alone.overlay.umount()
    subprocess.run(["cp", "-a", alone.upper / "f", alone.upper / "copy"], check=True)
    (alone.upper / "copy").write_bytes(b"content of copy")
    alone.overlay.mount()
    assert shape(alone.merged) == {"f": b"content of f", "copy": b"content of copy"}
    found = numbers(alone.merged)
    assert found["f"] != found["copy"]
    (alone.merged / "copy").write_bytes(b"changed")
    assert shape(alone.merged) == {"f": b"content of f", "copy": b"changed"}


def test_one_lower_listed_with_its_own_subdirectory(tmp_path: Path) -> None:
    lower, upper, merged = (tmp_path / name for name in ("lower", "upper", "merged"))
    for directory in (lower, upper, merged):
        directory.mkdir()
    make_tree(lower, {"sub": {"f": b"f", "sub": {"f": b"deeper"}}, "top": b"top"})
    overlay = Overlay((lower / "sub", lower), upper, merged)
    overlay.mount()
    try:
        expected = {"f": b"f", "sub": {"f": b"deeper", "sub": {"f": b"deeper"}}, "top": b"top"}
        assert shape(merged) == expected
        found = numbers(merged)
        assert found["f"] != found["sub/f"]
        (merged / "sub" / "f").write_bytes(b"changed")
        assert (merged / "f").read_bytes() == b"f"
        assert (merged / "sub" / "sub" / "f").read_bytes() == b"deeper"
        assert shape(upper) == {"sub": {"f": b"changed"}}
    finally:
        overlay.close()
    assert shape(lower) == {"sub": {"f": b"f", "sub": {"f": b"deeper"}}, "top": b"top"}


def test_three_nested_mounts_keep_all_numbers_apart(tmp_path: Path) -> None:
    """Each mount is the lower of the next, so numbers that are already wide must be made unique again."""
    first = tmp_path / "first"
    first.mkdir()
    make_tree(first, {"f": b"f", "d": {"g": b"g"}})
    overlays = []
    lower = first
    try:
        for level in range(3):
            upper, merged = tmp_path / f"upper{level}", tmp_path / f"merged{level}"
            upper.mkdir()
            merged.mkdir()
            overlay = Overlay((lower,), upper, merged)
            overlay.mount()
            overlays.append(overlay)
            (merged / f"level{level}").write_bytes(b"%d" % level)
            (merged / "d" / f"level{level}").write_bytes(b"%d" % level)
            os.chmod(merged / "f", 0o600 + level)
            lower = merged
        found = numbers(lower)
        assert len(set(found.values())) == len(found) == 9
        assert (lower / "f").read_bytes() == b"f"
        assert shape(lower)["d"] == {"g": b"g", "level0": b"0", "level1": b"1", "level2": b"2"}
    finally:
        for overlay in reversed(overlays):
            overlay.close()


@pytest.mark.root
def test_lowers_on_two_file_systems_share_no_number(overlay: OverlayFactory, tmp_path: Path) -> None:
    """tmpfs numbers its files from a small number on, as a fresh ext4 does: most of these coincide."""
    places = [tmp_path / name for name in ("one", "two")]
    for place in places:
        place.mkdir()
        mount("tmpfs", place, "tmpfs")
    try:
        for place in places:
            make_tree(place, {f"{place.name}{number}": b"%d" % number for number in range(50)})
            make_tree(place, {"d": {f"{place.name}{number}": b"" for number in range(50)}})
        upper, merged = tmp_path / "upper", tmp_path / "merged"
        upper.mkdir()
        merged.mkdir()
        made = Overlay(tuple(places), upper, merged)
        made.mount()
        try:
            before = numbers(merged)
            assert len(set(before.values())) == len(before) == 201
            assert len({os.lstat(merged / path).st_dev for path in before}) == 1
            for path in list(before)[:40]:
                os.chmod(merged / path, 0o700)
            assert numbers(merged) == before
        finally:
            made.close()
    finally:
        for place in places:
            umount(place)


@pytest.fixture
def disks(tmp_path: Path) -> Iterator[dict[str, Path]]:
    """An ext4, an xfs and a tmpfs of their own, all empty."""
    made = {}
    try:
        for kind, size in (("ext4", 64), ("xfs", 320)):
            image, made[kind] = tmp_path / f"{kind}.image", tmp_path / kind
            made[kind].mkdir()
            with image.open("wb") as file:
                file.truncate(size << 20)
            subprocess.run([f"mkfs.{kind}", "-q", image], check=True)
            subprocess.run(["mount", "-o", "loop", image, made[kind]], check=True)
        made["tmpfs"] = tmp_path / "tmpfs"
        made["tmpfs"].mkdir()
        mount("tmpfs", made["tmpfs"], "tmpfs")
        yield made
    finally:
        for place in made.values():
            umount(place)


@pytest.mark.root  # mounts file systems of its own
def test_numbers_of_layers_on_four_file_systems_last_over_copy_up_rename_and_remount(disks: dict[str, Path], tmp_path: Path) -> None:
    """Which of them a number is from is said by its high bits; after a copy-up to another one only the mark `origin` knows it."""
    lowers = [place / "lower" for place in disks.values()]
    for place, lower in zip(disks, lowers, strict=True):
        lower.mkdir()
        own: Tree = {f"{place}{number}": b"%d" % number for number in range(20)}
        make_tree(lower, {**own, "d": {**own, place: own}})
    upper, merged = tmp_path / "upper", tmp_path / "merged"
    for directory in (upper, merged):
        directory.mkdir()
    made = Overlay(tuple(lowers), upper, merged)
    made.mount()
    try:
        before = numbers(merged)
        assert len(set(before.values())) == len(before) == 3 * 20 * 3 + 4
        assert len({os.lstat(merged / path).st_dev for path in before}) == 1
        assert len({number >> 52 for number in before.values()}) >= 3
        for path in before:
            os.chmod(merged / path, 0o700)
        assert numbers(merged) == before
        drop_caches()
        assert numbers(merged) == before
        made.remount()
        assert numbers(merged) == before
        for place in disks:
            os.rename(merged / "d" / place, merged / f"moved {place}")
        after = {_moved(path): number for path, number in before.items()}
        assert {path: number for path, number in numbers(merged).items() if path in after} == after
        made.remount()
        assert {path: number for path, number in numbers(merged).items() if path in after} == after
    finally:
        made.close()


def _moved(path: str) -> str:
    """Where the test above has moved `d/ext4/f` to."""
    rest = path.partition("/")[2]
    return f"moved {rest}" if rest and (rest in ("ext4", "xfs", "tmpfs") or "/" in rest) else path


@layers({"low": {"sub": {}, "sub2": {}}, "both": {"sub": {}}}, upper={"up": {"sub": {}, "sub2": {}, "sub3": {}}, "both": {"sub2": {}}})
def test_a_directory_has_the_links_of_its_one_layer_or_one_if_it_is_merged(here: Here) -> None:
    """find(1) takes 1 for "look for yourself", and any other number less 2 for the number of subdirectories."""
    assert {name: os.lstat(here.merged / name).st_nlink for name in os.listdir(here.merged)} == {"low": 4, "up": 5, "both": 1}
