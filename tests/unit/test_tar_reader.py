"""What the reader reads: our own archives, those of GNU tar in each of its formats, and what it does not take for an archive."""

from __future__ import annotations

import io
import os
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from pyoverlay.image.tar_member import BLOCK, Kind, Member, checksum
from pyoverlay.image.tar_reader import MalformedArchive, TarReader
from pyoverlay.testing import Fifo, File, HardLink, Symlink, make_tree
from tests.unit.archives import Item, archive, directory, file, link, symlink


def members(data: bytes) -> Iterator[tuple[Member, bytes]]:
    """Each member and its content, holes filled."""
    reader = TarReader(io.BytesIO(data).read)
    for member in reader:
        content = bytearray(member.size if member.kind is Kind.FILE else 0)
        for offset, piece in reader.content():
            content[offset : offset + len(piece)] = piece
        yield member, bytes(content)


def one(data: bytes) -> tuple[Member, bytes]:
    (found,) = members(data)
    return found


@pytest.mark.parametrize(
    "item",
    [
        directory(b"d", 0o3775, uid=70000, gid=2**32 - 2, mtime_ns=-1_500_000_000),
        file(b"f", b"content", xattrs=((b"user.a", bytes(range(256))), (b"security.capability", b"\n="))),
        file(b"n" * 200, b"", mtime_ns=1_577_836_800_123_456_789),
        symlink(b"l", b"t" * 300),
        link(b"h", b"f"),
        Member(b"c", Kind.CHARACTER_DEVICE, 0o600, device=(259, 70000)),
        Member(b"b", Kind.BLOCK_DEVICE, 0o600, device=(8, 1)),
        Member(b"p", Kind.FIFO),
        (Member(b"s", Kind.FILE, size=1 << 20, extents=((4096, 3), (9000, 2))), b"abcde"),
        (Member(b"s", Kind.FILE, size=1 << 20, extents=()), b""),
        (Member(b"s", Kind.FILE, size=40000, extents=tuple((n * 4, 2) for n in range(5000))), b"ab" * 5000),
    ],
    ids=str,
)
def test_what_the_writer_writes_is_read_back(item: Item) -> None:
    member, _ = item if isinstance(item, tuple) else (item, b"")
    found, _ = one(archive(item))
    name = found.name.rstrip(b"/") if found.kind is Kind.DIRECTORY else found.name
    assert replace(found, name=name, xattrs=tuple(sorted(found.xattrs))) == replace(member, xattrs=tuple(sorted(member.xattrs)))


@pytest.mark.parametrize("form", ["v7", "oldgnu", "gnu", "ustar", "posix"])
def test_gnu_tars_formats_are_read(tmp_path: Path, form: str) -> None:
    make_tree(
        tmp_path,
        {
            "d": {"f": "content", "h": HardLink("d/f"), "l": Symlink("f")},
            **({} if form == "v7" else {"p": Fifo()}),
            **({} if form in ("v7", "ustar") else {"long" * 60: {"name" * 60: "deep", "link": Symlink("t" * 300)}}),
        },
    )
    tar = ["tar", f"--format={form}", "-cf", "-", "--sort=name", "--owner=7", "--group=8", *sorted(os.listdir(tmp_path))]
    made = subprocess.run(tar, cwd=tmp_path, check=True, capture_output=True).stdout
    found = {member.name.rstrip(b"/"): (member, content) for member, content in members(made)}
    assert found[b"d"][0].kind is Kind.DIRECTORY
    assert found[b"d/f"][1] == b"content"
    assert (found[b"d/h"][0].kind, found[b"d/h"][0].target) == (Kind.LINK, b"d/f")
    assert (found[b"d/l"][0].kind, found[b"d/l"][0].target) == (Kind.SYMLINK, b"f")
    assert {(member.uid, member.gid) for member, _ in found.values()} == {(7, 8)}
    if form not in ("v7", "ustar"):
        assert found[b"long" * 60 + b"/" + b"name" * 60][1] == b"deep"
        assert found[b"long" * 60 + b"/link"][0].target == b"t" * 300


@pytest.mark.parametrize("form", [["gnu"], ["posix", "--sparse-version=0.0"], ["posix", "--sparse-version=0.1"], ["posix"]])
def test_gnu_tars_sparse_files_are_read(tmp_path: Path, form: list[str]) -> None:
    make_tree(tmp_path, {"s": File(size=8 << 20)})
    with open(tmp_path / "s", "r+b") as sparse:
        for place in range(30):  # more than the header, and one block after it, can say
            sparse.seek(place * 128 << 10)
            sparse.write(b"%d" % place)
    made = subprocess.run(["tar", f"--format={form[0]}", *form[1:], "-S", "-cf", "-", "s"], cwd=tmp_path, check=True, capture_output=True)
    member, content = one(made.stdout)
    assert (member.name, content) == (b"s", (tmp_path / "s").read_bytes())
    assert member.extents is not None


def test_content_that_nobody_asks_for_is_skipped() -> None:
    data = archive(file(b"a", b"x" * 1000), (Member(b"s", Kind.FILE, size=9999, extents=((5, 600),)), b"y" * 600), file(b"b", b"z"))
    assert [member.name for member in TarReader(io.BytesIO(data).read)] == [b"a", b"s", b"b"]


def header(plain: bytes, place: int, value: bytes) -> bytes:
    """An archive with a field of its first header changed and the checksum put right."""
    block = bytearray(plain[:BLOCK])
    block[place : place + len(value)] = value
    block[148:156] = b"%06o\0 " % checksum(bytes(block))
    return bytes(block) + plain[BLOCK:]


PLAIN = archive(file(b"f", b"content"))
EXTENDED = archive(file(b"f", b"content", xattrs=((b"user.a", b"1"),)))
SPARSE = archive((Member(b"s", Kind.FILE, size=9999, extents=((5, 600), (700, 3))), b"y" * 603))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "cut off"),
        (PLAIN[:100], "cut off"),
        (PLAIN[: BLOCK + 3], "cut off"),
        (PLAIN[: 2 * BLOCK], "cut off"),
        (b"x" * 1024, "checksum is no number"),
        (b"y" + PLAIN[1:], "checksum is wrong"),
        (header(PLAIN, 257, b"other\0"), "neither ustar's nor GNU's"),
        (header(PLAIN, 156, b"M"), "unknown type"),
        (header(PLAIN, 124, b"9" * 11), "size is no number"),
        (header(PLAIN, 124, b"\xff" * 12), "size is out of range"),
        (header(PLAIN, 124, b"\x80" + b"\xff" * 11), "size is out of range"),
        (header(PLAIN, 108, b"\xff" * 8), "owner is out of range"),
        (header(PLAIN, 108, b"\x80\0\0\0\xff\xff\xff\xff"), "owner is out of range"),
        (header(PLAIN, 136, b"\x80" + b"\xff" * 11), "mtime is out of range"),
        (header(header(PLAIN, 156, b"3"), 329, b"7777777"), "device number is out of range"),
        (header(EXTENDED, 124, b"00004000000"), "more than 1048576 bytes of extended header"),
        (header(EXTENDED, 124, b"\xff" * 12), "size is out of range"),
        (EXTENDED.replace(b"\n", b" ", 1), "extended header is malformed"),
        (EXTENDED.replace(b"25 SCHILY", b"99 SCHILY"), "extended header is malformed"),
        (EXTENDED.replace(b"25 SCHILY", b" 2 SCHILY"), "extended header is malformed"),
        (EXTENDED.replace(b"SCHILY.xattr.user.a=1", b"mtime=" + b"x" * 15), "mtime is no number"),
        (EXTENDED.replace(b"SCHILY.xattr.user.a=1", b"mtime=1e9999999999999"), "mtime is no number"),
        (EXTENDED.replace(b"SCHILY.xattr.user.a=1", b"mtime=nan" + b" " * 12), "mtime is no number"),
        (EXTENDED.replace(b"SCHILY.xattr.user.a=1", b"size=-" + b"1" * 15), "size is no number"),
        (EXTENDED.replace(b"SCHILY.xattr.user.a=1", b"uid=" + b"9" * 17), "owner is out of range"),
        (SPARSE.replace(b"3\n5\n600\n", b"3\n5\n603\n"), "contradicts itself"),
        (SPARSE.replace(b"3\n5\n600\n", b"3\n900\n60"), "map"),
        (SPARSE.replace(b"3\n5\n600\n", b"99999999"), "map is"),
        (SPARSE.replace(b"realsize=9999", b"realsize=0099"), "contradicts itself"),
    ],
)
def test_what_is_malformed_is_refused(data: bytes, reason: str) -> None:
    with pytest.raises(MalformedArchive, match=reason):
        list(members(data))


def test_global_headers_without_end_are_not_kept_in_memory() -> None:
    """Each before a member of its own, and with other keys than the ones before."""
    def described(number: int) -> bytes:
        plain = archive(file(b"f", xattrs=((b"user.%07d" % number, b"v" * 60_000),)))
        return header(plain, 156, b"g")[: -2 * BLOCK]

    with pytest.raises(MalformedArchive, match="more than 1048576 bytes of global extended headers"):
        list(members(b"".join(map(described, range(20)))))


def test_headers_without_end_are_not_read_into_memory() -> None:
    """A thousand extended headers before one member, each small."""
    block = archive(file(b"f", xattrs=((b"user.a", b"v" * 4000),)))[: 9 * BLOCK]
    with pytest.raises(MalformedArchive, match="more than 1048576 bytes of extended header"):
        list(members(block * 1000))
