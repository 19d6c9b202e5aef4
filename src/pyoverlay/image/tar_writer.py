"""Writing a tar archive: the same members give the same bytes, on every machine.

POSIX pax: a plain ustar header, and before it an extended one for what does not fit: long names, large numbers, fractions of a second,
extended attributes. The records are put together here, as bytes: Python's tarfile would take attributes through text and mark the archive
`hdrcharset=BINARY`, at which GNU tar warns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from pyoverlay.image.tar_member import BLOCK, HEADER, XATTR_PREFIX, Kind, Member, checksum, padding

_NAME_MAX = 100
_ID_MAX = 8**7 - 1
_LONG_MAX = 8**11 - 1  # of the size and mtime fields
_NS = 1_000_000_000


class TarWriter:
    """Members, one after the other, to `write`."""

    def __init__(self, write: Callable[[bytes], object]) -> None:
        self._write = write

    def add(self, member: Member, content: Iterable[bytes] = ()) -> None:
        """One member. `content` is a file's data, of a sparse file the data of its extents; ValueError: it is not of the size announced."""
        if member.kind is not Kind.FILE:
            self._write(encode(member, 0))
            return
        sparse_map = b"" if member.extents is None else _sparse_map(member)
        size = member.size if member.extents is None else sum(length for _, length in member.extents)
        self._write(encode(member, len(sparse_map) + size))
        self._write(sparse_map)
        written = 0
        for data in content:
            written += len(data)
            self._write(data)
        if written != size:
            raise ValueError(f"{written} bytes where {size} were announced")
        self._write(bytes(padding(size)))

    def close(self) -> None:
        """The end of the archive: two empty blocks."""
        self._write(bytes(2 * BLOCK))


def encode(member: Member, stored: int) -> bytes:
    """The header blocks of a member that `stored` bytes of content follow."""
    name = member.name + b"/" if member.kind is Kind.DIRECTORY else member.name
    records = _records(member, name, stored)
    blocks = _extended(name, records) if records else b""
    shown = b"GNUSparseFile.0/" + name.rpartition(b"/")[2] if member.extents is not None else name
    return blocks + _ustar(member, shown, stored, member.kind.value)


def _records(member: Member, name: bytes, stored: int) -> list[tuple[bytes, bytes]]:
    """What the plain header cannot say."""
    records: list[tuple[bytes, bytes]] = []
    if member.extents is not None:
        records += [(b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0"), (b"GNU.sparse.name", name)]
        records.append((b"GNU.sparse.realsize", b"%d" % member.size))
    elif len(name) > _NAME_MAX:
        records.append((b"path", name))
    if len(member.target) > _NAME_MAX:
        records.append((b"linkpath", member.target))
    records += [(key, b"%d" % number) for key, number in ((b"uid", member.uid), (b"gid", member.gid)) if number > _ID_MAX]
    if stored > _LONG_MAX:
        records.append((b"size", b"%d" % stored))
    if member.mtime_ns % _NS or not 0 <= member.mtime_ns // _NS <= _LONG_MAX:
        records.append((b"mtime", _seconds(member.mtime_ns)))
    return records + [(XATTR_PREFIX + attribute, value) for attribute, value in member.xattrs]


def _seconds(time_ns: int) -> bytes:
    """A time as decimal seconds, with as much of a fraction as it has."""
    whole, fraction = divmod(abs(time_ns), _NS)
    text = b"%d.%09d" % (whole, fraction)
    return (b"-" if time_ns < 0 else b"") + text.rstrip(b"0").rstrip(b".")


def _extended(name: bytes, records: list[tuple[bytes, bytes]]) -> bytes:
    content = b"".join(_record(key, value) for key, value in records)
    label = b"PaxHeaders/" + name.rstrip(b"/").rpartition(b"/")[2]
    header = _ustar(Member(label, Kind.FILE), label, len(content), b"x")
    return header + content + bytes(padding(len(content)))


def _record(key: bytes, value: bytes) -> bytes:
    """A line `LENGTH KEY=VALUE`, where LENGTH counts itself and the newline."""
    rest = len(key) + len(value) + 3
    length = rest + len(b"%d" % rest)
    if len(b"%d" % length) > len(b"%d" % rest):
        length += 1
    return b"%d %s=%s\n" % (length, key, value)


def _ustar(member: Member, name: bytes, stored: int, flag: bytes) -> bytes:
    major, minor = member.device
    seconds = min(max(member.mtime_ns // _NS, 0), _LONG_MAX)
    header = HEADER.pack(
        name[:_NAME_MAX],
        _octal(member.mode, 8),
        _octal(min(member.uid, _ID_MAX), 8),
        _octal(min(member.gid, _ID_MAX), 8),
        _octal(min(stored, _LONG_MAX), 12),
        _octal(seconds, 12),
        b" " * 8,
        flag,
        member.target[:_NAME_MAX],
        b"ustar",
        b"00",
        b"",
        b"",
        _octal(major, 8),
        _octal(minor, 8),
        b"",
    )
    return header[:148] + b"%06o\0 " % checksum(header) + header[156:]


def _octal(number: int, width: int) -> bytes:
    return b"%0*o" % (width - 1, number)


def _sparse_map(member: Member) -> bytes:
    """Where the data of a sparse file goes: GNU's format 1.0, numbers in lines before the data, padded to a whole block."""
    assert member.extents is not None
    extents = [*member.extents]
    if not extents or sum(extents[-1]) < member.size:
        extents.append((member.size, 0))  # a hole at the end
    text = b"%d\n" % len(extents) + b"".join(b"%d\n%d\n" % extent for extent in extents)
    return text + bytes(padding(len(text)))
