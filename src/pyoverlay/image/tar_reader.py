"""Reading a tar archive that anybody may have made: ustar, pax and GNU members, from a stream, in bounded memory.

What is malformed is refused, never guessed at. Python's tarfile reads an extended header of any size into memory, takes attributes through
text, and before 3.11.10 searches headers with an expression that a hostile one keeps busy for minutes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise

from pyoverlay.image.tar_member import BLOCK, HEADER, XATTR_PREFIX, Kind, Member, checksum, padding

_CHUNK = 1 << 20
_EXTENDED_MAX = 1 << 20  # bytes that describe one member, or all: the kernel takes 64 KiB of attributes, names are shorter
_NUMBER_MAX = (1 << 63) - 1
_ID_MAX = (1 << 32) - 2  # -1 means "no id" to the kernel
_RECORD = re.compile(rb"([0-9]{1,7}) ")
_SECONDS = re.compile(rb"(-?)([0-9]{1,20})(?:\.([0-9]{0,100}))?")
_GNU_MAGIC, _USTAR_MAGIC = b"ustar ", b"ustar\0"
_FILES = (b"0", b"\0", b"7", b"S")

Records = list[tuple[bytes, bytes]]


class MalformedArchive(Exception):
    """The archive does not follow its format; the text says what is wrong."""


class TarReader:
    """The members of an archive, in order: iterate, and after each ask for its content or not.

    read: as BinaryIO.read; may return less than asked for only at the end. Raises MalformedArchive, and whatever `read` raises.
    """

    def __init__(self, read: Callable[[int], bytes]) -> None:
        self._read = read
        self._left = 0  # bytes of the current member's content, as stored
        self._padding = 0  # bytes from there to the next header
        self._member = Member(b"", Kind.FILE)
        self._globals: dict[bytes, bytes] = {}
        self.offset = 0  # of the next byte to be read

    def __iter__(self) -> Iterator[Member]:
        while (member := self._next()) is not None:
            self._member = member
            yield member
            self._skip(self._left + self._padding)

    def content(self) -> Iterator[tuple[int, bytes]]:
        """(offset, data) of the current member's content, in pieces; the holes of a sparse file are left out. To be asked for once."""
        extents = self._member.extents
        for start, length in ((0, self._left),) if extents is None else extents:
            end = start + length
            while start < end:
                data = self._exactly(min(_CHUNK, end - start))
                self._left -= len(data)
                yield start, data
                start += len(data)

    def _skip(self, size: int) -> None:
        while size:
            size -= len(self._exactly(min(_CHUNK, size)))

    def _next(self) -> Member | None:
        """The next member, with what extended headers say of it; None at the end."""
        records: Records = []
        described = 0
        while True:
            header = self._exactly(BLOCK)
            if not any(header):
                return None
            expected = _number(header[148:156], "checksum")
            if expected != checksum(header) and expected != _signed_checksum(header):  # the second is slow, and rare
                raise MalformedArchive("a header's checksum is wrong")
            flag = header[156:157]
            if flag not in b"xgLKV":
                return self._described(header, records)
            size = _size(_number(header[124:136], "size"))
            described += BLOCK + size
            if described > _EXTENDED_MAX:
                raise MalformedArchive(f"more than {_EXTENDED_MAX} bytes of extended header before one member")
            self._extend(flag, self._padded(size), records)

    def _extend(self, flag: bytes, value: bytes, records: Records) -> None:
        if flag == b"g":
            self._globals.update(_parse_records(value))
            if sum(len(key) + len(text) for key, text in self._globals.items()) > _EXTENDED_MAX:
                raise MalformedArchive(f"more than {_EXTENDED_MAX} bytes of global extended headers")
        elif flag == b"x":
            records += _parse_records(value)
        elif flag in b"LK":
            records.append((b"path" if flag == b"L" else b"linkpath", value.rstrip(b"\0")))

    def _described(self, header: bytes, records: Records) -> Member:
        fields = {**self._globals, **dict(records)}
        member, stored = _from_header(header)
        member = _with_records(member, fields)
        if b"size" in fields:
            stored = _decimal(fields[b"size"], "size")
        if member.kind is not Kind.FILE:
            stored = 0  # whatever the header says: these have no content
        self._left, self._padding = stored, padding(stored)
        if member.kind is not Kind.FILE:
            return member
        member = replace(member, size=stored)
        if header[156:157] == b"S":
            return self._checked(replace(member, size=_number(header[483:495], "real size"), extents=self._old_sparse_map(header)))
        return self._sparse(member, fields, records)

    def _sparse(self, member: Member, fields: dict[bytes, bytes], records: Records) -> Member:
        """The same member, if its records say that it has holes: GNU's formats 0.0, 0.1 and 1.0."""
        name = fields.get(b"GNU.sparse.name", member.name)
        if fields.get(b"GNU.sparse.major") == b"1" and fields.get(b"GNU.sparse.minor") == b"0":
            size = _decimal(fields.get(b"GNU.sparse.realsize", b""), "real size")
            return self._checked(replace(member, name=name, size=size, extents=_pairs(self._sparse_map())))
        if b"GNU.sparse.map" in fields:
            numbers = [_decimal(number, "sparse map") for number in fields[b"GNU.sparse.map"].split(b",") if number]
        elif b"GNU.sparse.offset" in fields:
            keys = (b"GNU.sparse.offset", b"GNU.sparse.numbytes")
            numbers = [_decimal(value, "sparse map") for key, value in records if key in keys]
        else:
            return member
        size = _decimal(fields.get(b"GNU.sparse.size", b""), "real size")
        return self._checked(replace(member, name=name, size=size, extents=_pairs(numbers)))

    def _sparse_map(self) -> list[int]:
        """Format 1.0: a count and then that many pairs, a number a line, before the data."""
        text = bytearray()
        lines, wanted = 0, 1
        while lines < wanted:
            if self._left < BLOCK or len(text) > _EXTENDED_MAX:
                raise MalformedArchive("a sparse file's map is cut off or too long")
            block = self._exactly(BLOCK)
            self._left -= BLOCK
            text += block
            lines += block.count(b"\n")
            if wanted == 1 and lines:
                wanted += 2 * _decimal(bytes(text.partition(b"\n")[0]), "sparse map")
        return [_decimal(line, "sparse map") for line in bytes(text).split(b"\n")[1:wanted]]

    def _old_sparse_map(self, header: bytes) -> tuple[tuple[int, int], ...]:
        """GNU's first format: four pairs in the header, the rest in blocks of 21 that follow it."""
        fields, more = header[386:482], header[482]
        numbers: list[bytes] = []
        while True:
            numbers += [fields[place : place + 12] for place in range(0, len(fields), 12)]
            if not more:
                return _pairs([_number(number, "sparse map") for number in numbers if any(number)])
            if len(numbers) * 12 > _EXTENDED_MAX:
                raise MalformedArchive("a sparse file's map is too long")
            block = self._exactly(BLOCK)
            fields, more = block[:504], block[504]

    def _checked(self, member: Member) -> Member:
        """The map of a sparse member has to make sense: in order, within the file, and as much as is stored."""
        extents = tuple(extent for extent in member.extents or () if extent[1])
        ends_before_next = all(sum(one) <= other[0] for one, other in pairwise(extents))
        if not ends_before_next or (extents and sum(extents[-1]) > member.size) or sum(length for _, length in extents) != self._left:
            raise MalformedArchive("a sparse file's map contradicts itself")
        return replace(member, extents=extents)

    def _padded(self, size: int) -> bytes:
        value = self._exactly(size)
        self._exactly(padding(size))
        return value

    def _exactly(self, size: int) -> bytes:
        data = self._read(size) if size else b""
        self.offset += len(data)
        if len(data) != size:
            raise MalformedArchive("it ends in the middle: it was cut off")
        return data


def _from_header(header: bytes) -> tuple[Member, int]:
    """(member, bytes stored) as the plain header has it."""
    name, mode, uid, gid, size, mtime, _, flag, target, magic, _, _, _, major, minor, prefix = HEADER.unpack(header)
    name = _text(name)
    if magic == _USTAR_MAGIC and _text(prefix):
        name = _text(prefix) + b"/" + name
    elif magic not in (_GNU_MAGIC, _USTAR_MAGIC) and any(magic):
        raise MalformedArchive("a header is neither ustar's nor GNU's")
    if flag in _FILES:
        kind = Kind.DIRECTORY if flag == b"\0" and name.endswith(b"/") else Kind.FILE
    else:
        try:
            kind = Kind(flag)
        except ValueError:
            raise MalformedArchive(f"a member of an unknown type, {flag!r}") from None
    device = (_device(major), _device(minor)) if kind.is_device else (0, 0)
    seconds = _number(mtime, "mtime")
    if abs(seconds) > _NUMBER_MAX:
        raise MalformedArchive("a header's mtime is out of range")
    member = Member(
        name,
        kind,
        _number(mode, "mode") & 0o7777,
        _id(_number(uid, "owner")),
        _id(_number(gid, "group")),
        seconds * 10**9,
        target=_text(target),
        device=device,
    )
    return member, _size(_number(size, "size"))


def _with_records(member: Member, fields: dict[bytes, bytes]) -> Member:
    """What extended headers say instead, or in addition."""
    if b"path" in fields:
        member = replace(member, name=fields[b"path"])
    if b"linkpath" in fields:
        member = replace(member, target=fields[b"linkpath"])
    if b"uid" in fields:
        member = replace(member, uid=_id(_decimal(fields[b"uid"], "owner")))
    if b"gid" in fields:
        member = replace(member, gid=_id(_decimal(fields[b"gid"], "group")))
    if b"mtime" in fields:
        member = replace(member, mtime_ns=_time_ns(fields[b"mtime"]))
    attributes = tuple((key[len(XATTR_PREFIX) :], value) for key, value in fields.items() if key.startswith(XATTR_PREFIX))
    return replace(member, xattrs=attributes) if attributes else member


def _parse_records(block: bytes) -> Records:
    records: Records = []
    place = 0
    while place < len(block):
        match = _RECORD.match(block, place)
        end = place + int(match[1]) if match else 0
        key, equals, value = block[match.end() if match else 0 : max(end - 1, 0)].partition(b"=")
        if not match or not match.end() < end <= len(block) or block[end - 1] != ord("\n") or not equals or not key:
            raise MalformedArchive("an extended header is malformed")
        records.append((key, value))
        place = end
    return records


def _text(field: bytes) -> bytes:
    return field.partition(b"\0")[0]


def _number(field: bytes, what: str) -> int:
    """A number of a plain header: octal digits, or a binary one where the first bit is set (GNU's base 256)."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    if field[0] & 0x80:
        return int.from_bytes(field, "big", signed=True)
    digits = field.rstrip(b" \0").lstrip(b" ")
    if digits.strip(b"01234567"):
        raise MalformedArchive(f"a header's {what} is no number")
    return int(digits or b"0", 8)


def _device(field: bytes) -> int:
    number = _number(field, "device")
    if not 0 <= number < 1 << 20:
        raise MalformedArchive("a device number is out of range")
    return number


def _decimal(text: bytes, what: str) -> int:
    if not text.isdigit() or len(text) > 20:
        raise MalformedArchive(f"an extended header's {what} is no number")
    return _size(int(text))


def _time_ns(text: bytes) -> int:
    match = _SECONDS.fullmatch(text)
    if match is None:
        raise MalformedArchive("an extended header's mtime is no number")
    sign, whole, fraction = match.groups(default=b"")
    time_ns = int(whole) * 10**9 + int(fraction[:9].ljust(9, b"0"))
    if time_ns > _NUMBER_MAX * 10**9:
        raise MalformedArchive("an extended header's mtime is out of range")
    return -time_ns if sign else time_ns


def _size(number: int) -> int:
    if not 0 <= number <= _NUMBER_MAX:
        raise MalformedArchive("a size is out of range")
    return number


def _id(number: int) -> int:
    if not 0 <= number <= _ID_MAX:
        raise MalformedArchive("an owner is out of range")
    return number


def _pairs(numbers: list[int]) -> tuple[tuple[int, int], ...]:
    if len(numbers) % 2:
        raise MalformedArchive("a sparse file's map is cut off")
    return tuple(zip(numbers[::2], numbers[1::2], strict=True))


def _signed_checksum(header: bytes) -> int:
    """As some old programs computed it, over signed bytes."""
    return checksum(header) - 256 * sum(byte > 127 for byte in header[:148] + header[156:])
