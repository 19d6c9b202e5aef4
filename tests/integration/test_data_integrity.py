"""No byte is lost, torn or invented: random operations beside a twin on a plain file system, programs that copy what is being written,
and writes that fail.
"""

from __future__ import annotations

import errno
import mmap
import os
import random
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest

from pyoverlay.fuse import binding
from pyoverlay.testing import File, Overlay, OverlayFactory, mounts_below, snapshot
from tests.integration.exerciser import BLOCK, LARGEST, Chooser, Exerciser, Maker, OpenFile, OtherProcess
from tests.integration.test_hardlinks import drop_caches
from tests.posix.check import as_user, fails, fork, opened
from tests.posix.system_calls import fallocate, mount, syncfs

SEEDS = (1, 2, 3)
COLLAPSE_RANGE, INSERT_RANGE = 8, 32
OPERATIONS = 300
WITH_EXTENSION = [pytest.param(True, marks=pytest.mark.wire, id="wire"), pytest.param(False, id="no-wire")]
WRITEBACK = [pytest.param((), id="write-through"), pytest.param(("-o", "writeback"), id="writeback")]


@contextmanager
def extension(*, loaded: bool) -> Iterator[None]:
    """Mounts made inside have it or not, whatever the suite runs with."""
    with pytest.MonkeyPatch.context() as environment:
        if not loaded:
            environment.setenv("PYOVERLAY_WIRE", "0")
        yield


def beginning(seed: int) -> bytes:
    """What a file of a layer holds: with a hole's worth of zeros in it."""
    content = random.Random(seed)
    return content.randbytes(90_000) + bytes(70_000) + content.randbytes(140_000 + seed)


# ── beside a twin ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("wire", WITH_EXTENSION)
@pytest.mark.parametrize("options", WRITEBACK)
@pytest.mark.parametrize("processes", [1, 3])
@pytest.mark.root  # only root drops caches
def test_random_operations_leave_what_they_leave_on_a_plain_file(
    overlay: OverlayFactory, tmp_path: Path, processes: int, options: tuple[str, ...], wire: bool
) -> None:
    """Files that begin in the lower are copied up in the middle. Several processes take turns that the seed decides."""
    files: dict[str, bytes] = {f"lower{seed}": beginning(seed) for seed in SEEDS}
    upper: dict[str, bytes] = {f"upper{seed}": beginning(seed) for seed in SEEDS}
    with extension(loaded=wire):
        made = overlay(files, upper=upper, options=options)
    twins = tmp_path / "twins"
    twins.mkdir()
    for name, content in (files | upper).items():
        (twins / name).write_bytes(content)
        exercise(made.merged / name, twins / name, seed=int(name[-1]), processes=processes, allocates=wire)
    drop_caches()
    for name in files | upper:
        assert (made.merged / name).read_bytes() == (twins / name).read_bytes(), name
    made.remount()
    for name in files | upper:
        assert (made.merged / name).read_bytes() == (made.writable / name).read_bytes() == (twins / name).read_bytes(), name


def test_the_exerciser_finds_a_write_that_was_lost(tmp_path: Path) -> None:
    class Loses(OpenFile):
        """Says that it has written, and has not, once."""

        writes = 0

        def write(self, offset: int, data: bytes) -> int:
            self.writes += 1
            return len(data) if self.writes == 7 else super().write(offset, data)

    for name in ("file", "twin"):
        (tmp_path / name).write_bytes(beginning(1))
    with closing(Loses(str(tmp_path / "file"))) as file, closing(OpenFile(str(tmp_path / "twin"))) as twin:
        exerciser = Exerciser([file], twin, Chooser(random.Random(1), True))
        with pytest.raises(AssertionError, match=r"where the twin says|content differs|of the twin"):
            exerciser.run(OPERATIONS)


def exercise(path: Path, twin: Path, *, seed: int, processes: int, allocates: bool) -> None:
    with ExitStack() as held:
        files: list[Maker] = [OpenFile(str(path)) if processes == 1 else OtherProcess(str(path)) for _ in range(processes)]
        plain = OpenFile(str(twin))
        for file in (*files, plain):
            held.callback(file.close)
        exerciser = Exerciser(files, plain, Chooser(random.Random(seed), allocates))
        exerciser.run(OPERATIONS)
        for file in files:
            exerciser.compare(file)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.wire
@pytest.mark.parametrize("options", WRITEBACK)
@pytest.mark.parametrize("seed", range(100, 140))
def test_many_more_random_operations(overlay: OverlayFactory, tmp_path: Path, seed: int, options: tuple[str, ...]) -> None:
    made = overlay({"file": beginning(seed)}, options=options)
    (tmp_path / "twin").write_bytes(beginning(seed))
    exercise(made.merged / "file", tmp_path / "twin", seed=seed, processes=seed % 3 + 1, allocates=True)


@pytest.mark.parametrize("options", WRITEBACK)
def test_processes_that_write_blocks_at_once_leave_whole_blocks(overlay: OverlayFactory, options: tuple[str, ...]) -> None:
    """A block is somebody's, as it was written, or the lower's: never of two, never of nobody. The first of them copy up."""
    blocks, writers = LARGEST // BLOCK, 4
    path = overlay({"f": block(0, 0) * blocks}, options=options).merged / "f"
    children = [write_blocks(path, writer, blocks) for writer in range(1, writers + 1)]
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * writers
    content = path.read_bytes()
    assert len(content) == blocks * BLOCK
    possible = {block(writer, turn) for writer in range(1, writers + 1) for turn in range(3)} | {block(0, 0)}
    assert {content[at : at + BLOCK] for at in range(0, len(content), BLOCK)} <= possible
    assert len({content[at] for at in range(0, len(content), BLOCK)}) > 1


def block(writer: int, turn: int) -> bytes:
    return b"%c%d" % (ord("a") + writer, turn) * (BLOCK // 2)


def write_blocks(path: Path, writer: int, blocks: int) -> int:
    """A process that writes half of the blocks three times, in an order of its own."""
    child = fork()
    if child:
        return child
    status = 1
    try:
        order = random.Random(writer)
        with opened(path, os.O_RDWR) as fd:
            for turn in range(3):
                for number in order.sample(range(blocks), blocks // 2):
                    os.pwrite(fd, block(writer, turn), number * BLOCK)
        status = 0
    finally:
        os._exit(status)


@pytest.mark.parametrize("mode", [COLLAPSE_RANGE, INSERT_RANGE])
def test_what_moves_data_within_a_file_is_refused_by_the_kernel(overlay: OverlayFactory, mode: int) -> None:
    """FUSE passes on neither of these modes; the file is left as it was, and nothing is copied up."""
    made = overlay({"f": b"x" * 3 * BLOCK})
    with opened(made.merged / "f", os.O_RDWR) as fd, fails(errno.EOPNOTSUPP):
        fallocate(fd, mode, BLOCK, BLOCK)
    assert (made.merged / "f").read_bytes() == b"x" * 3 * BLOCK
    assert os.listdir(made.writable) == []


# ── while somebody writes ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("options", WRITEBACK)
@pytest.mark.parametrize("place", ["lower", "upper"])
@pytest.mark.parametrize(
    "copy", [["cp", "--sparse=auto"], ["cp", "--sparse=always"], ["cp", "-a"], ["rsync", "-aS"], ["tar"]], ids=" ".join
)
def test_what_is_copied_while_its_writer_holds_it_is_whole(
    overlay: OverlayFactory, tmp_path: Path, copy: list[str], place: str, options: tuple[str, ...]
) -> None:
    """The writer has closed nothing and synced nothing; a grown file, a new one, and one that was only a hole."""
    made = overlay({"lower": b"beginning" * 9_000}, upper={"upper": b"beginning" * 9_000}, options=options)
    with ExitStack() as held:
        old, new, hole = (held.enter_context(opened(made.merged / name, os.O_RDWR | os.O_CREAT)) for name in (place, "new", "hole"))
        os.pwrite(old, b"in the middle", 40_000)
        os.pwrite(old, b"the end" * 5_000, 300_000)
        os.write(new, b"new" * 30_000)
        os.ftruncate(hole, 1 << 20)
        os.pwrite(hole, b"data", 500_000)
        expected = {name: (made.merged / name).read_bytes() for name in (place, "new", "hole")}
        assert expected["new"] == b"new" * 30_000
        assert expected["hole"][500_000:500_004] == b"data"
        assert expected[place][300_000:] == b"the end" * 5_000
        (tmp_path / "copies").mkdir()
        if copy == ["tar"]:
            archive = subprocess.run(["tar", "-S", "-c", *expected], cwd=made.merged, check=True, capture_output=True).stdout
            subprocess.run(["tar", "-x"], cwd=tmp_path / "copies", input=archive, check=True)
        else:
            subprocess.run([*copy, *expected, tmp_path / "copies"], cwd=made.merged, check=True)
    for name, content in expected.items():
        assert (tmp_path / "copies" / name).read_bytes() == content, name


# ── writes that fail ────────────────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def small_upper(tmp_path: Path, *options: str, lower: bytes = b"") -> Iterator[Overlay]:
    """An overlay whose upper lies on a file system of 2 MiB."""
    small = tmp_path / "small"
    for name in ("small", "lower", "merged"):
        (tmp_path / name).mkdir()
    mount("tmpfs", small, "tmpfs", data="size=2m")
    try:
        (small / "upper").mkdir()
        if lower:
            (tmp_path / "lower" / "f").write_bytes(lower)
        overlay = Overlay((tmp_path / "lower",), small / "upper", tmp_path / "merged", options)
        overlay.mount()
        try:
            yield overlay
        finally:
            overlay.close()
    finally:
        subprocess.run(["umount", small], check=True)
        assert not mounts_below(small)


@pytest.mark.parametrize("wire", [True, False], ids=["wire", "no-wire"])
@pytest.mark.root  # mounts a small file system
def test_a_write_that_finds_no_space_fails_itself(tmp_path: Path, wire: bool) -> None:
    """At the same place and with the same size as on the file system below."""
    with extension(loaded=wire), small_upper(tmp_path) as overlay, opened(overlay.merged / "f", os.O_RDWR | os.O_CREAT) as fd:
        written = 0
        with fails(errno.ENOSPC):
            while True:
                written += os.write(fd, b"x" * 65_536)
        assert written >= 1 << 20
        assert os.fstat(fd).st_size == os.stat(overlay.writable / "f").st_size == written
        assert os.pread(fd, 4 << 20, 0) == b"x" * written
        with fails(errno.ENOSPC):
            os.write(fd, b"x" * 65_536)
        os.ftruncate(fd, 100_000)
        assert os.pwrite(fd, b"again", 100_000) == 5
        os.fsync(fd)
        assert os.fstat(fd).st_size == 100_005


@pytest.mark.root  # mounts a small file system
def test_a_shell_that_cannot_write_says_so(tmp_path: Path) -> None:
    with small_upper(tmp_path) as overlay:
        with fails(errno.ENOSPC):
            (overlay.merged / "filler").write_bytes(b"x" * (3 << 20))
        shown = subprocess.run(["bash", "-c", "echo hi > f"], cwd=overlay.merged, check=False, capture_output=True, text=True)
        assert shown.returncode != 0
        assert os.strerror(errno.ENOSPC) in shown.stderr
        assert os.stat(overlay.merged / "f").st_size == 0


@pytest.mark.root  # mounts a small file system
def test_a_copy_up_that_finds_no_space_fails_the_write_that_wanted_it(tmp_path: Path) -> None:
    content = random.Random(0).randbytes(3 << 20)
    with small_upper(tmp_path, lower=content) as overlay:
        with opened(overlay.merged / "f", os.O_RDWR) as fd:
            with fails(errno.ENOSPC):
                os.pwrite(fd, b"new", 0)
            assert os.pread(fd, 4 << 20, 0) == content
        assert snapshot(overlay.writable).keys() <= {b"", b"."}
        (overlay.merged / "other").write_bytes(b"there is room again")


@pytest.mark.root  # mounts a small file system
def test_with_writeback_a_write_that_finds_no_space_fails_at_fsync(tmp_path: Path) -> None:
    with small_upper(tmp_path, "-o", "writeback") as overlay:
        with opened(overlay.merged / "f", os.O_RDWR | os.O_CREAT) as fd:
            os.write(fd, b"x" * (3 << 20))
            with fails(errno.ENOSPC):
                os.fsync(fd)
        os.unlink(overlay.merged / "f")
        with fails(errno.ENOSPC):  # which close(2) says: there is nothing after it
            (overlay.merged / "g").write_bytes(b"x" * (3 << 20))
        with opened(overlay.merged, os.O_RDONLY) as fd, fails(errno.ENOSPC):
            syncfs(fd)  # once more, and else at `pyoverlay umount`: an error is told until somebody has heard it


def test_with_writeback_small_writes_gather(overlay: OverlayFactory) -> None:
    """What it is for: until somebody asks, nothing reaches the upper."""
    made = overlay({}, options=["-o", "writeback"])
    with opened(made.merged / "f", os.O_WRONLY | os.O_CREAT) as fd:
        for number in range(100):
            os.pwrite(fd, b"%04d" % number, 4 * number)
        assert (made.writable / "f").read_bytes() == b""
        assert (made.merged / "f").read_bytes() == b"".join(b"%04d" % number for number in range(100))
        os.fsync(fd)
        assert (made.writable / "f").read_bytes() == b"".join(b"%04d" % number for number in range(100))


@pytest.mark.root
def test_with_writeback_an_ordinary_user_reads_back_what_may_only_be_written(overlay: OverlayFactory) -> None:
    """The page around a write of one byte is read first: the descriptor that writes must read, whoever opened it and whatever the mode."""
    made = overlay({"f": File(b"lower content", mode=0o222)}, options=["-o", "writeback"])

    def write() -> None:
        with opened("f", os.O_WRONLY) as fd:
            os.pwrite(fd, b"L", 0)

    as_user(made.merged, write)
    assert (made.merged / "f").read_bytes() == b"Lower content"


# ── what the kernel keeps of it ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("wire", [True, False], ids=["wire", "no-wire"])
def test_a_file_with_data_that_has_no_block_yet_shows_one(overlay: OverlayFactory, wire: bool) -> None:
    """With none `tar -S` takes it for one hole and reads nothing. A file system that allocates late says 0 as it does of a hole."""
    with extension(loaded=wire):
        made = overlay({})
    (made.merged / "empty").touch()
    (made.merged / "hole").touch()
    os.truncate(made.merged / "hole", 1 << 20)
    assert os.stat(made.writable / "hole").st_blocks == 0
    assert os.stat(made.merged / "hole").st_blocks == 1
    assert os.stat(made.merged / "empty").st_blocks == 0
    made.remount()
    assert os.stat(made.merged / "hole").st_blocks == 1


def test_with_writeback_a_file_whose_data_are_on_their_way_shows_a_block(overlay: OverlayFactory) -> None:
    made = overlay({}, options=["-o", "writeback"])
    with opened(made.merged / "f", os.O_WRONLY | os.O_CREAT) as fd:
        os.write(fd, b"not there yet")
        assert os.stat(made.writable / "f").st_blocks == 0
        assert os.stat(made.merged / "f").st_blocks >= 1


@pytest.mark.wire
@pytest.mark.parametrize("options", WRITEBACK)
@pytest.mark.parametrize("of_lower", [False, True])
@pytest.mark.root  # mounts a small file system
def test_after_a_page_of_a_map_that_could_not_be_written_everybody_sees_what_is_on_disk(
    tmp_path: Path, of_lower: bool, options: tuple[str, ...]
) -> None:
    """The page is clean once it was sent, whatever came of it: only we can say that it holds what nobody has."""
    assert binding.wire is not None, "the kernel is not told, and the page stays"
    content = bytes(1 << 20) if not of_lower else b"lower" * 200_000
    with small_upper(tmp_path, *options, lower=content if of_lower else b"") as overlay:
        with opened(overlay.merged / "f", os.O_RDWR | os.O_CREAT) as fd:
            if not of_lower:
                os.ftruncate(fd, len(content))  # a hole, for which there will be no room
            with fails(errno.ENOSPC):
                (overlay.merged / "filler").write_bytes(b"x" * (3 << 20))
            with mmap.mmap(fd, len(content)) as shared:
                shared[5000:5003] = b"new"
                with fails(errno.ENOSPC):
                    shared.flush()
                while shared[5000:5003] == b"new":  # until the kernel has been told; at the latest the test's time ends it
                    pass
                assert shared[:] == content
            assert os.pread(fd, len(content), 0) == content
        with opened(overlay.merged, os.O_RDONLY) as fd, fails(errno.ENOSPC):
            syncfs(fd)  # so that `pyoverlay umount` need not say it once more


@pytest.mark.parametrize("wire", [True, False], ids=["wire", "no-wire"])
@pytest.mark.parametrize("options", WRITEBACK)
@pytest.mark.root  # mounts a small file system
def test_of_a_map_that_finds_room_for_a_part_the_rest_is_an_error(tmp_path: Path, options: tuple[str, ...], wire: bool) -> None:
    """All of it is one WRITE, and of how much of that was written the kernel takes no notice."""
    with extension(loaded=wire), small_upper(tmp_path, *options) as overlay:
        with opened(overlay.merged / "f", os.O_RDWR | os.O_CREAT) as fd:
            os.ftruncate(fd, 1 << 20)
            (overlay.merged / "filler").write_bytes(b"x" * (3 << 19))
            with mmap.mmap(fd, 1 << 20) as shared:
                shared[:] = b"x" * len(shared)
                with fails(errno.ENOSPC):
                    shared.flush()
        with opened(overlay.merged, os.O_RDONLY) as fd, fails(errno.ENOSPC):
            syncfs(fd)  # so that `pyoverlay umount` need not say it once more


@pytest.mark.parametrize("wire", [True, False], ids=["wire", "no-wire"])
@pytest.mark.root  # mounts a small file system
def test_after_a_write_that_failed_a_reader_sees_what_is_on_disk(tmp_path: Path, wire: bool) -> None:
    """The kernel had the page, and put the new bytes into it before it asked us."""
    with extension(loaded=wire), small_upper(tmp_path) as overlay, opened(overlay.merged / "f", os.O_RDWR | os.O_CREAT) as fd:
        os.ftruncate(fd, 1 << 20)  # a hole, for which there will be no room
        assert os.pread(fd, 8192, 0) == bytes(8192)
        with fails(errno.ENOSPC):
            (overlay.merged / "filler").write_bytes(b"x" * (3 << 20))
        with fails(errno.ENOSPC):
            os.pwrite(fd, b"new" * 100, 5000)
        assert os.pread(fd, 1 << 20, 0) == bytes(1 << 20)
        with opened(overlay.merged / "f", os.O_RDONLY) as other:
            assert os.pread(other, 1 << 20, 0) == bytes(1 << 20)
        assert os.fstat(fd).st_size == 1 << 20
