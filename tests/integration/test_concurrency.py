"""Several programs at once, and programs that read what another is still writing."""

from __future__ import annotations

import errno
import os
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pyoverlay.testing import File
from tests.integration.looks import WHITEOUT, Here, layers, shape
from tests.integration.test_hardlinks import drop_caches
from tests.posix.check import fails, opened
from tests.posix.system_calls import linkat_fd, syncfs


def together(*acts: Callable[[], None]) -> None:
    """Run all of these at once, each in a thread that starts when the last is ready; raise what any of them raised."""
    barrier = threading.Barrier(len(acts))

    def run(act: Callable[[], None]) -> None:
        barrier.wait(timeout=10)
        act()

    with ThreadPoolExecutor(len(acts)) as pool:
        for future in [pool.submit(run, act) for act in acts]:
            future.result()


@layers({})
def test_two_clients_removing_and_making_in_one_directory_read_only_what_they_wrote(here: Here) -> None:
    os.makedirs(here.merged, exist_ok=True)

    def client(name: str) -> Callable[[], None]:
        def act() -> None:
            for round_ in range(400):
                path = here.merged / f"{name}{round_ % 5}"
                content = f"{path.name} round {round_}\n".encode() * 20
                with opened(path, os.O_RDWR | os.O_CREAT | os.O_EXCL) as fd:
                    os.write(fd, content)
                assert path.read_bytes() == content
                path.unlink()

        return act

    together(client("a"), client("b"), client("c"))
    assert shape(here.merged) == {}


@layers({f"f{number}": b"%d" % number * 50_000 for number in range(6)})
def test_many_first_writers_of_one_file_make_one_copy(here: Here) -> None:
    for number in range(6):
        path = here.merged / f"f{number}"

        def write(position: int, path: Path = path) -> Callable[[], None]:
            def act() -> None:
                with opened(path, os.O_RDWR) as fd:
                    os.pwrite(fd, b"ABCD"[position : position + 1] * 10, 10_000 * position)

            return act

        together(*(write(position) for position in range(4)))
        expected = bytearray(b"%d" % number * 50_000)
        for position in range(4):
            expected[10_000 * position : 10_000 * position + 10] = b"ABCD"[position : position + 1] * 10
        assert path.read_bytes() == expected
    assert sorted(shape(here.upper)) == [f"f{number}" for number in range(6)]


@layers({f"f{number:02}": b"x" * 500_000 for number in range(30)})
def test_a_file_removed_or_renamed_during_its_copy_up_does_not_come_back(here: Here) -> None:
    for number in range(30):
        path = here.merged / f"f{number:02}"

        def write(path: Path = path) -> None:
            try:
                with opened(path, os.O_WRONLY) as fd:
                    os.write(fd, b"written")
            except FileNotFoundError:
                return

        def remove(path: Path = path, number: int = number) -> None:
            if number % 2:
                os.unlink(path)
            else:
                os.rename(path, path.with_name(f"renamed{number:02}"))

        together(write, remove)
        with fails(errno.ENOENT):
            os.lstat(path)
    expected = {f"renamed{number:02}" for number in range(0, 30, 2)}
    assert set(os.listdir(here.merged)) == expected
    assert {name for name, what in shape(here.upper).items() if what != WHITEOUT} == expected
    for name in expected:
        assert (here.merged / name).read_bytes()[-493_000:] == b"x" * 493_000


@layers({"d": {f"f{number}": b"x" for number in range(40)}})
def test_copy_ups_in_one_directory_at_once(here: Here) -> None:
    def change(start: int) -> Callable[[], None]:
        def act() -> None:
            for number in range(start, 40, 4):
                (here.merged / "d" / f"f{number}").write_bytes(b"%d" % number)

        return act

    together(*(change(start) for start in range(4)))
    assert shape(here.upper) == {"d": {f"f{number}": b"%d" % number for number in range(40)}}


@layers({"d": {"e": {f"f{number}": b"x" for number in range(20)}}})
@pytest.mark.root  # a redirect is followed with trusted.* marks alone
def test_directories_renamed_while_files_in_them_copy_up(here: Here) -> None:
    m = here.merged
    directories = [os.open(m / "d" / "e", os.O_RDONLY | os.O_DIRECTORY)]

    def change() -> None:
        for number in range(20):
            with open(f"f{number}", "wb", opener=lambda path, flags: os.open(path, flags, dir_fd=directories[0])) as file:
                file.write(b"%d" % number)

    def move() -> None:
        for round_ in range(20):
            os.rename(m / ("d" if round_ % 2 == 0 else "x"), m / ("x" if round_ % 2 == 0 else "d"))

    try:
        together(change, move)
    finally:
        os.close(directories[0])
    assert shape(m) == {"d": {"e": {f"f{number}": b"%d" % number for number in range(20)}}}


@layers({"f": File(b"lower content", size=3_000_000), "g": b"g"})
def test_cp_and_tar_of_a_file_whose_writer_holds_it(here: Here, tmp_path: Path) -> None:
    with opened(here.merged / "f", os.O_RDWR) as fd:
        os.pwrite(fd, b"not yet synced", 2_000_000)
        os.pwrite(fd, b"the end", 5_000_000)
        expected = (here.merged / "f").read_bytes()
        assert expected[2_000_000:2_000_014] == b"not yet synced"
        assert len(expected) == 5_000_007
        for number, copy in enumerate((["cp"], ["cp", "--sparse=always"], ["cp", "--reflink=auto", "-a"])):
            subprocess.run([*copy, here.merged / "f", tmp_path / f"copy{number}"], check=True)
            assert (tmp_path / f"copy{number}").read_bytes() == expected, copy
        archive = subprocess.run(["tar", "-C", here.merged, "-S", "-c", "f"], check=True, capture_output=True).stdout
        subprocess.run(["tar", "-C", tmp_path, "-x"], input=archive, check=True)
        assert (tmp_path / "f").read_bytes() == expected


@layers({"f": b"lower content"})
def test_rsync_of_a_file_whose_writer_holds_it(here: Here, tmp_path: Path) -> None:
    import shutil

    if shutil.which("rsync") is None:
        pytest.skip("rsync is not installed")
    with opened(here.merged / "f", os.O_RDWR) as fd:
        os.write(fd, b"written")
        subprocess.run(["rsync", "-aS", here.merged / "f", tmp_path / "copy"], check=True)
        assert (tmp_path / "copy").read_bytes() == b"writtenontent"


@layers({"f": b"lower content", "g": b"lower content", "h": b"lower content"})
@pytest.mark.root  # only root drops caches
def test_an_unlinked_open_lower_file_is_changed_by_way_of_its_descriptor(here: Here) -> None:
    with opened(here.merged / "f", os.O_RDONLY) as fd:
        os.unlink(here.merged / "f")
        with opened(f"/proc/self/fd/{fd}", os.O_WRONLY) as writer:
            os.write(writer, b"LOWER")
        assert os.pread(fd, 20, 0) == b"LOWER content"
        os.chmod(f"/proc/self/fd/{fd}", 0o600)
        assert os.fstat(fd).st_mode & 0o777 == 0o600
        with fails(errno.ENOENT):
            linkat_fd(fd, here.merged / "back")
        drop_caches()
        assert os.pread(fd, 20, 0) == b"LOWER content"
    with opened(here.merged / "g", os.O_RDONLY) as fd:
        os.rename(here.merged / "h", here.merged / "g")
        os.fchmod(fd, 0o600)
        assert os.read(fd, 20) == b"lower content"
        assert os.fstat(fd).st_nlink == 0
    assert shape(here.merged) == {"g": b"lower content"}
    assert shape(here.upper) == {"f": WHITEOUT, "g": b"lower content", "h": WHITEOUT}


@layers({"f": b"x" * 2_000_000})
def test_a_file_unlinked_while_it_copies_up_is_complete_for_its_writer(here: Here) -> None:
    with opened(here.merged / "f", os.O_RDWR) as fd:
        together(lambda: _pwrite(fd), lambda: os.unlink(here.merged / "f"))
        assert os.fstat(fd).st_nlink == 0
        assert os.pread(fd, 12, 999_995) == b"xxxxxWRITTEN"
        assert os.fstat(fd).st_size == 2_000_000
    assert shape(here.upper) == {"f": WHITEOUT}


def _pwrite(fd: int) -> None:
    assert os.pwrite(fd, b"WRITTEN", 1_000_000) == 7


def _many(count: int) -> dict[str, dict[str, bytes]]:
    return {f"d{number // 100:03}": {f"f{inner:02}": b"" for inner in range(100)} for number in range(0, count, 100)}


@layers({"tree": _many(10_000)})
def test_rm_rf_of_ten_thousand_lower_files(here: Here) -> None:
    subprocess.run(["rm", "-rf", here.merged / "tree"], check=True)
    assert shape(here.merged) == {}
    assert shape(here.upper) == {"tree": WHITEOUT}


@pytest.mark.slow
@pytest.mark.timeout(600)
@layers({"flat": {f"f{number}": b"" for number in range(70_000)}})
def test_rm_rf_of_seventy_thousand_lower_files_outlasts_the_links_of_one_whiteout(alone: Here) -> None:
    """65,000 is as many links as ext4 lets one inode have; each of these whiteouts lies beside the others for a while."""
    for name in os.listdir(alone.merged / "flat"):
        os.unlink(alone.merged / "flat" / name)
    assert os.listdir(alone.merged / "flat") == []
    assert len(os.listdir(alone.upper / "flat")) == 70_000
    os.rmdir(alone.merged / "flat")
    assert shape(alone.upper) == {"flat": WHITEOUT}


@layers({"f": b"x" * (8 << 20), "small": b"s", "d": {"g": b"g"}})
def test_other_files_answer_while_one_copies_up_and_syncs(here: Here) -> None:
    done = threading.Event()

    def write() -> None:
        with opened(here.merged / "f", os.O_WRONLY) as fd:
            for _ in range(20):
                os.pwrite(fd, b"y" * 65536, 0)
                os.fsync(fd)
        done.set()

    def look() -> None:
        while not done.is_set():
            assert (here.merged / "small").read_bytes() == b"s"
            assert os.listdir(here.merged / "d") == ["g"]

    together(write, look, look)


@layers({"f": b"f", "d": {}})
def test_syncfs_of_the_view_succeeds(here: Here) -> None:
    (here.merged / "d" / "new").write_bytes(b"new")
    with opened(here.merged / "f", os.O_RDONLY) as fd:
        syncfs(fd)
    assert shape(here.upper) == {"d": {"new": b"new"}}
