"""Listings of merged directories: each name once, whiteouts never, places that hold, and the numbers that stat gives."""

from __future__ import annotations

import os
import stat
import subprocess

import pytest

from pyoverlay.testing import Device, Fifo, HardLink, Symlink, Whiteout
from tests.integration.looks import WHITEOUT, Here, layers, shape
from tests.posix.check import opened
from tests.posix.system_calls import DirectoryStream


@layers(
    {"both": b"", "only1": b"", "gone": b"", "d": {}},
    {"both": b"", "only2": b"", "gone2": b"", "d": {"x": b""}},
    upper={"both": b"", "own": b"", "gone": Whiteout(), "gone2": Whiteout(), "nothing": Whiteout()},
)
def test_a_merged_directory_lists_each_name_once_and_no_whiteout(here: Here) -> None:
    with DirectoryStream(here.merged) as stream:
        assert sorted(stream.names()) == ["both", "d", "only1", "only2", "own"]
    shown = subprocess.run(["ls", "-fa", here.merged], check=True, capture_output=True, text=True).stdout.split()
    assert sorted(shown) == [".", "..", "both", "d", "only1", "only2", "own"]


@layers(
    {"f": b"", "s": Symlink("f"), "p": Fifo(), "c": Device("c", 1, 3), "d": {"x": b""}, "h": HardLink("f")},
    {"low": b"", "d": {"y": b""}},
    upper={"up": b"", "d": {"z": b""}},
)
@pytest.mark.root
def test_d_ino_and_d_type_are_those_of_stat_before_and_after_copy_up(here: Here) -> None:
    def listed() -> dict[str, tuple[int, int]]:
        with DirectoryStream(here.merged) as stream:
            return {name: (number, kind) for name, number, kind in stream}

    def by_stat() -> dict[str, tuple[int, int]]:
        found = {}
        for name in os.listdir(here.merged):
            st = os.lstat(here.merged / name)
            found[name] = (st.st_ino, stat.S_IFMT(st.st_mode) >> 12)
        return found

    # Held open: once the kernel has forgotten it (another test drops the caches), a copied-up hard link has a number of its own, as in
    # the kernel's overlay without an index.
    with opened(here.merged / "f", os.O_PATH):
        before = listed()
        assert before == by_stat()
        for name in ("f", "d", "low", "c"):
            os.chmod(here.merged / name, 0o700)
        os.lchown(here.merged / "s", 5, 5)
        os.rename(here.merged / "p", here.merged / "q")
        after = listed()
        assert after == by_stat()
    assert after == {("q" if name == "p" else name): entry for name, entry in before.items()}


@layers(
    {f"low{number:04}": b"" for number in range(1500)},
    upper={f"up{number:04}": b"" for number in range(1500)} | {f"low{number:04}": Whiteout() for number in range(0, 1500, 3)},
)
def test_a_large_merged_directory_is_complete(here: Here) -> None:
    expected = {f"up{number:04}" for number in range(1500)} | {f"low{number:04}" for number in range(1500) if number % 3}
    with DirectoryStream(here.merged) as stream:
        names = stream.names()
    assert len(names) == len(expected)
    assert set(names) == expected


@layers({f"low{number:04}": b"" for number in range(600)}, upper={f"up{number:04}": b"" for number in range(600)})
def test_rm_while_reading_a_merged_directory_loses_nothing(here: Here) -> None:
    seen = []
    with DirectoryStream(here.merged) as stream:
        for name, _, _ in stream:
            os.unlink(here.merged / name)
            seen.append(name)
    assert len(seen) == len(set(seen)) == 1200
    assert shape(here.merged) == {}
    assert shape(here.upper) == {f"low{number:04}": WHITEOUT for number in range(600)}


@layers({f"low{number:03}": b"" for number in range(300)}, upper={f"up{number:03}": b"" for number in range(300)})
def test_copy_up_while_reading_repeats_and_loses_nothing(here: Here) -> None:
    seen = []
    with DirectoryStream(here.merged) as stream:
        for name, _, _ in stream:
            os.chmod(here.merged / name, 0o600)
            seen.append(name)
    assert sorted(seen) == [f"low{number:03}" for number in range(300)] + [f"up{number:03}" for number in range(300)]


@layers({f"low{number:03}": b"" for number in range(300)}, upper={f"up{number:03}": b"" for number in range(300)})
def test_two_readers_by_telldir_and_seekdir_while_entries_come_and_go(here: Here) -> None:
    """Without OPENDIR a place belongs to the directory, not to one reader: both must find theirs again."""
    with DirectoryStream(here.merged) as one, DirectoryStream(here.merged) as two:
        first = [one.read() for _ in range(200)]
        place_of_one = one.tell()
        second = [two.read() for _ in range(350)]
        place_of_two = two.tell()
        names_one = [entry[0] for entry in first if entry is not None]
        names_two = [entry[0] for entry in second if entry is not None]
        gone = set(names_one[:50]) | set(names_two[200:210])
        for name in gone:
            os.unlink(here.merged / name)
        for number in range(100):
            (here.merged / f"made{number:03}").touch()
        one.seek(place_of_one)
        two.seek(place_of_two)
        names_one += one.names()
        names_two += two.names()
    everything = {f"low{number:03}" for number in range(300)} | {f"up{number:03}" for number in range(300)}
    for names in (names_one, names_two):
        assert len(names) == len(set(names))
        assert everything - gone <= set(names)
        assert {name for name in names if not name.startswith("made")} <= everything


@layers({"d": {f"{number}": b"" for number in range(50)}}, upper={"d": {"own": b""}})
@pytest.mark.root  # a redirect is followed with trusted.* marks alone
def test_a_reader_of_a_directory_that_moves_goes_on(here: Here) -> None:
    with DirectoryStream(here.merged / "d") as stream:
        names = [entry[0] for entry in (stream.read() for _ in range(20)) if entry is not None]
        os.rename(here.merged / "d", here.merged / "e")
        names += stream.names()
    assert sorted(names) == sorted([f"{number}" for number in range(50)] + ["own"])


@layers({"d": {"a": b"", "b": {"c": b""}}}, {"d": {"b": {"e": b""}}}, upper={"d": {"b": {"f": b""}}})
def test_find_sees_the_whole_tree(here: Here) -> None:
    shown = subprocess.run(["find", ".", "-printf", "%p %y\\n"], cwd=here.merged, check=True, capture_output=True, text=True).stdout
    assert sorted(shown.splitlines()) == sorted([". d", "./d d", "./d/a f", "./d/b d", "./d/b/c f", "./d/b/e f", "./d/b/f f"])


@layers({"d": {"x": b""}}, upper={"d": {}})
def test_dotdot_of_a_merged_directory_is_its_parent(here: Here) -> None:
    assert os.stat(here.merged / "d" / "..").st_ino == os.stat(here.merged).st_ino
    with opened(here.merged / "d", os.O_RDONLY | os.O_DIRECTORY) as fd:
        assert os.stat("..", dir_fd=fd).st_ino == os.stat(here.merged).st_ino


@layers({"f": b""}, upper={"g": b""})
def test_the_root_of_the_mount_lists_as_any_directory(here: Here) -> None:
    root = here.overlay.merged
    with DirectoryStream(root) as stream:
        listed = {name: number for name, number, _ in stream}
    assert listed[here.name] == os.stat(here.merged).st_ino
    assert os.stat(root / here.name / "..").st_ino == os.stat(root).st_ino
