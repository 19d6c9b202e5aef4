"""What the writer writes, as read by Python's tarfile and by GNU tar."""

from __future__ import annotations

import io
import subprocess
import tarfile
from pathlib import Path

import pytest

from pyoverlay.image.tar_member import Kind, Member
from pyoverlay.image.tar_writer import TarWriter


def archive(*members: tuple[Member, bytes]) -> bytes:
    written = io.BytesIO()
    writer = TarWriter(written.write)
    for member, content in members:
        writer.add(member, [content] if content else [])
    writer.close()
    return written.getvalue()


def read(data: bytes) -> list[tarfile.TarInfo]:
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
        return tar.getmembers()


def read_one(member: Member, content: bytes = b"") -> tarfile.TarInfo:
    (info,) = read(archive((member, content)))
    return info


@pytest.mark.parametrize(
    ("kind", "check"),
    [
        (Kind.DIRECTORY, "isdir"),
        (Kind.SYMLINK, "issym"),
        (Kind.LINK, "islnk"),
        (Kind.CHARACTER_DEVICE, "ischr"),
        (Kind.BLOCK_DEVICE, "isblk"),
        (Kind.FIFO, "isfifo"),
    ],
)
def test_each_kind_is_read_as_what_it_is(kind: Kind, check: str) -> None:
    info = read_one(Member(b"d/name", kind, 0o1751, 3, 4, 5_000_000_000, target=b"target", device=(259, 70000)))
    assert getattr(info, check)()
    assert (info.name, info.mode, info.uid, info.gid, info.mtime) == ("d/name", 0o1751, 3, 4, 5)
    assert not kind.is_device or (info.devmajor, info.devminor) == (259, 70000)


@pytest.mark.parametrize("length", [99, 100, 101, 155, 255, 256, 4095])
def test_names_and_targets_of_any_length_are_kept(length: int) -> None:
    name = (b"n" * 50 + b"/") * (length // 51) + b"x" * (length % 51 or 1)
    info = read_one(Member(name, Kind.SYMLINK, target=b"t" * length))
    assert (info.name, info.linkname) == (name.decode(), "t" * length)


@pytest.mark.parametrize("number", [0o7777777, 0o10000000, 2**32 - 2])
def test_owners_of_any_number_are_kept(number: int) -> None:
    info = read_one(Member(b"f", Kind.FILE, uid=number, gid=number))
    assert (info.uid, info.gid) == (number, number)


@pytest.mark.parametrize(
    ("time_ns", "text"),
    [
        (1_577_836_800_123_456_789, "1577836800.123456789"),
        (1_500_000_000, "1.5"),
        (-500_000_000, "-0.5"),
        (-3_000_000_000, "-3"),
        (9_000_000_000 * 10**9, "9000000000"),
    ],
)
def test_times_keep_every_nanosecond(time_ns: int, text: str) -> None:
    assert read_one(Member(b"f", Kind.FILE, mtime_ns=time_ns)).pax_headers["mtime"] == text


def test_a_plain_member_has_no_extended_header() -> None:
    data = archive((Member(b"f", Kind.FILE, mtime_ns=10**9, size=1), b"x"))
    assert len(data) == 4 * 512  # header, content, end
    assert read(data)[0].pax_headers == {}


@pytest.mark.parametrize("length", [*range(70, 100), 980, 990, 9970])
def test_attributes_are_kept_byte_for_byte(length: int) -> None:
    """Each length near those where the record's own length gains a digit."""
    value = bytes(range(256)) * 40
    info = read_one(Member(b"f", Kind.FILE, xattrs=((b"user.a", value[:length]), (b"user.b", b"=\n\0"))))
    found = {key: value.encode(errors="surrogateescape") for key, value in info.pax_headers.items()}
    assert found == {"SCHILY.xattr.user.a": value[:length], "SCHILY.xattr.user.b": b"=\n\0"}


@pytest.mark.parametrize("extents", [((4096, 3), (8192, 4)), (), ((0, 5),), ((1 << 40, 7),)])
def test_holes_are_kept(extents: tuple[tuple[int, int], ...]) -> None:
    size = (1 << 40) + 7
    content = b"".join(b"d" * length for _, length in extents)
    data = archive((Member(b"d/sparse", Kind.FILE, size=size, extents=extents), content), (Member(b"next", Kind.FIFO), b""))
    assert len(data) < 8192
    info, following = read(data)
    assert (info.name, info.size, following.name) == ("d/sparse", size, "next")
    assert info.sparse is not None
    found: list[tuple[int, int]] = list(info.sparse)  # type: ignore[arg-type]  # typeshed has it as bytes
    assert tuple(extent for extent in found if extent[1]) == extents


def test_content_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="1 bytes where 2 were announced"):
        archive((Member(b"f", Kind.FILE, size=2), b"x"))


def test_gnu_tar_unpacks_it_without_a_word(tmp_path: Path) -> None:
    name = b"long-" * 40 + b"\xff\xe4"
    members = [
        (Member(b"d", Kind.DIRECTORY, 0o750, mtime_ns=1_500_000_000), b""),
        (Member(b"d/" + name, Kind.FILE, 0o640, mtime_ns=1_577_836_800_123_456_789, size=3, xattrs=((b"user.x", b"\0\xff"),)), b"abc"),
        (Member(b"d/link", Kind.LINK, target=b"d/" + name), b""),
        (Member(b"d/sparse", Kind.FILE, size=1 << 30, extents=((1 << 20, 2),)), b"xy"),
    ]
    (tmp_path / "a.tar").write_bytes(archive(*members))
    (tmp_path / "out").mkdir()
    tar = ["tar", "--xattrs", "-xf", "a.tar", "-C", "out"]
    result = subprocess.run(tar, cwd=tmp_path, check=False, capture_output=True, text=True)
    assert (result.returncode, result.stdout + result.stderr) == (0, "")
    found = tmp_path / "out" / "d" / name.decode(errors="surrogateescape")
    assert found.read_bytes() == b"abc"
    assert found.stat().st_mtime_ns == 1_577_836_800_123_456_789
    assert found.samefile(tmp_path / "out/d/link")
    sparse = (tmp_path / "out/d/sparse").stat()
    assert (sparse.st_size, sparse.st_blocks * 512 < 1 << 20) == (1 << 30, True)
