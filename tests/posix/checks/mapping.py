"""Memory maps, sparse files and large offsets."""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path

from tests.posix.check import check, fails, file, link, opened

PAGE = mmap.PAGESIZE


@check(file("f", b"x" * PAGE + b"y" * 100))
def a_private_map_shows_the_content_and_keeps_its_changes_to_itself(d: Path) -> None:
    with opened(d / "f", os.O_RDONLY) as fd, mmap.mmap(fd, PAGE + 100, mmap.MAP_PRIVATE) as memory:
        assert memory[PAGE - 1 : PAGE + 1] == b"xy"
        memory[0:3] = b"new"
        assert memory[:4] == b"newx"
    assert (d / "f").read_bytes() == b"x" * PAGE + b"y" * 100


@check(file("f", b"x" * (3 * PAGE)))
def a_shared_map_writes_the_file(d: Path) -> None:
    with opened(d / "f", os.O_RDWR) as fd:
        with mmap.mmap(fd, 3 * PAGE) as memory:
            memory[PAGE : PAGE + 5] = b"hello"
            assert os.pread(fd, 5, PAGE) == b"hello"
            memory.flush()
        assert os.pread(fd, 6, PAGE) == b"hellox"
    assert (d / "f").read_bytes() == b"x" * PAGE + b"hello" + b"x" * (2 * PAGE - 5)


@check(file("f", b"x" * (3 * PAGE)))
def a_shared_map_outlives_its_descriptor(d: Path) -> None:
    with opened(d / "f", os.O_RDWR) as fd:
        memory = mmap.mmap(fd, 3 * PAGE)
    memory[:5] = b"hello"
    assert (d / "f").read_bytes()[:6] == b"hellox"
    memory.close()
    assert (d / "f").read_bytes()[:6] == b"hellox"


@check(file("f", b"x" * (2 * PAGE)))
def writes_are_seen_by_maps_and_the_reverse(d: Path) -> None:
    with opened(d / "f", os.O_RDWR) as fd, mmap.mmap(fd, 2 * PAGE) as memory:
        with opened(d / "f", os.O_RDONLY) as reader:
            os.pwrite(fd, b"written", PAGE)
            assert memory[PAGE : PAGE + 7] == b"written"
            memory[:6] = b"mapped"
            assert os.pread(reader, 7, 0) == b"mappedx"
            assert (d / "f").read_bytes()[:7] == b"mappedx"


@check(file("f", b"x" * (2 * PAGE)))
def a_map_opened_before_the_first_write_sees_it(d: Path) -> None:
    with opened(d / "f", os.O_RDONLY) as fd, mmap.mmap(fd, 2 * PAGE, mmap.MAP_SHARED, mmap.PROT_READ) as memory:
        assert memory[:3] == b"xxx"
        with opened(d / "f", os.O_WRONLY) as writer:
            os.write(writer, b"new")
        assert memory[:4] == b"newx"
        with opened(d / "f", os.O_WRONLY) as writer:
            os.pwrite(writer, b"again", PAGE)
        assert memory[PAGE : PAGE + 6] == b"againx"


@check(file("f", b"x" * PAGE), link("f", "g"))
def maps_of_two_hard_links_are_one(d: Path) -> None:
    with opened(d / "f", os.O_RDWR) as one, opened(d / "g", os.O_RDWR) as two:
        with mmap.mmap(one, PAGE) as first, mmap.mmap(two, PAGE) as second:
            first[:5] = b"hello"
            assert second[:6] == b"hellox"


@check(file("f", b"x" * 100))
def a_map_shows_zeros_past_the_end_and_what_is_appended(d: Path) -> None:
    with opened(d / "f", os.O_RDWR) as fd, mmap.mmap(fd, 100) as _, mmap.mmap(fd, 0) as memory:
        assert memory.size() == 100
        os.pwrite(fd, b"more", 100)
        assert os.fstat(fd).st_size == 104
        assert (d / "f").read_bytes() == b"x" * 100 + b"more"


@check(file("f", b"x" * (2 * PAGE)))
def what_was_cut_off_comes_back_as_zeros(d: Path) -> None:
    with opened(d / "f", os.O_RDWR) as fd, mmap.mmap(fd, 2 * PAGE) as memory:
        assert memory[100:103] == b"xxx"
        os.ftruncate(fd, 100)
        os.ftruncate(fd, 2 * PAGE)
        assert memory[99:102] == b"x\0\0"
        assert os.pread(fd, 4, PAGE) == b"\0\0\0\0"


@check(file("f", b"start"))
def data_past_four_gib_is_where_it_was_written(d: Path) -> None:
    far = (4 << 30) + 12345
    with opened(d / "f", os.O_RDWR) as fd:
        os.pwrite(fd, b"far away", far)
        assert os.pread(fd, 20, far) == b"far away"
        assert os.pread(fd, 8, 0) == b"start\0\0\0"
        assert os.pread(fd, 8, far - (1 << 32)) == b"\0" * 8
        assert os.fstat(fd).st_size == far + 8
        assert os.lseek(fd, -8, os.SEEK_END) == far
        assert os.read(fd, 4) == b"far "
    assert os.stat(d / "f").st_blocks * 512 < 1 << 20


def _sparse(d: Path) -> None:
    with opened(d / "sparse", os.O_RDWR | os.O_CREAT, 0o644) as fd:
        os.ftruncate(fd, 64 << 20)
        os.pwrite(fd, b"middle", 32 << 20)


@check(_sparse)
def a_sparse_file_stays_sparse_when_it_is_written(d: Path) -> None:
    with opened(d / "sparse", os.O_RDWR) as fd:
        os.pwrite(fd, b"start", 0)
        assert os.pread(fd, 6, 32 << 20) == b"middle"
        assert os.pread(fd, 6, 16 << 20) == b"\0" * 6
        assert os.pread(fd, 8, (64 << 20) - 4) == b"\0" * 4
    status = os.stat(d / "sparse")
    assert status.st_size == 64 << 20
    assert 0 < status.st_blocks * 512 < 2 << 20


@check(_sparse)
def seek_data_never_passes_over_data(d: Path) -> None:
    """A file system without SEEK_DATA may call it all data; what it may not do is to call data a hole."""
    with opened(d / "sparse", os.O_RDONLY) as fd:
        assert os.lseek(fd, 0, os.SEEK_DATA) <= 32 << 20
        assert os.lseek(fd, 32 << 20, os.SEEK_DATA) == 32 << 20
        assert os.lseek(fd, 32 << 20, os.SEEK_HOLE) > 32 << 20
        assert os.lseek(fd, (64 << 20) - 1, os.SEEK_HOLE) <= 64 << 20


@check(_sparse)
def seek_data_and_seek_hole_before_the_beginning_are_enxio(d: Path) -> None:
    with opened(d / "sparse", os.O_RDONLY) as fd:
        for whence in (os.SEEK_DATA, os.SEEK_HOLE):
            with fails(errno.ENXIO):
                os.lseek(fd, -1, whence)


@check(file("f", os.urandom(0) + bytes(range(256)) * 8192))
def a_large_file_is_read_whole_and_in_pieces(d: Path) -> None:
    expected = bytes(range(256)) * 8192
    assert (d / "f").read_bytes() == expected
    with opened(d / "f", os.O_RDONLY) as fd:
        for offset in (1, 4095, 131071, 131073, 1 << 20, (2 << 20) - 3):
            assert os.pread(fd, 300_000, offset) == expected[offset : offset + 300_000]


@check(file("f", b"x" * 1_000_000))
def a_large_write_arrives_whole(d: Path) -> None:
    content = bytes(range(256)) * 8192
    with opened(d / "f", os.O_RDWR) as fd:
        assert os.pwrite(fd, content, 500_001) == len(content)
        os.fsync(fd)
    assert (d / "f").read_bytes() == b"x" * 500_001 + content


@check(file("f", b"x" * 10))
def scattered_reads_and_writes_meet(d: Path) -> None:
    with opened(d / "f", os.O_RDWR) as fd:
        assert os.pwritev(fd, [b"ab", b"", b"cde"], 3) == 5
        one, two = bytearray(4), bytearray(6)
        assert os.preadv(fd, [one, two], 0) == 10
        assert bytes(one + two) == b"xxxabcdexx"
