"""Bytes on their way from a blob to its reader: counted, hashed, uncompressed, and never more of them than was allowed."""

from __future__ import annotations

import gzip
import hashlib
import importlib
import io
import os
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO, cast

from pyoverlay.image.tar_reader import MalformedArchive

_CHUNK = 1 << 20
_READ = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
_OTHERS = {b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"PK\x03\x04": "zip"}
_NO_ZSTD = (
    "it is compressed with zstd, which Python reads from 3.14 on: unpack an archive with `zstd -d` first, "
    "copy an image with `skopeo copy --dest-compress --dest-compress-format gzip`"
)

Read = Callable[[int], bytes]


class TooLarge(Exception):
    """More bytes came than were allowed."""


class Slice(io.RawIOBase):
    """`size` bytes of a file from `start` on, independent of the descriptor's own position. The descriptor stays its owner's."""

    def __init__(self, fd: int, start: int, size: int) -> None:
        self._fd, self._place, self._end = fd, start, start + size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), self._end - self._place)
        read = os.preadv(self._fd, [memoryview(buffer)[:wanted]], self._place) if wanted > 0 else 0
        self._place += read
        return read


def slice_of(fd: int, start: int, size: int) -> BinaryIO:
    """A buffered Slice."""
    return cast("BinaryIO", io.BufferedReader(Slice(fd, start, size), _CHUNK))


class Measured:
    """A stream that is hashed and counted as it is read.

    limit: bytes after which TooLarge is raised. copy: is given all that passes.
    """

    def __init__(self, read: Read, limit: int | None = None, copy: Callable[[bytes], object] | None = None) -> None:
        self._read = read
        self._limit = limit
        self._copy = copy
        self._sha256 = hashlib.sha256()
        self.size = 0

    def read(self, size: int = -1) -> bytes:
        data = self._read(size)
        self.size += len(data)
        if self._limit is not None and self.size > self._limit:
            raise TooLarge
        self._sha256.update(data)
        if self._copy is not None:
            self._copy(data)
        return data

    def drain(self) -> None:
        """Read to the end."""
        while self.read(_CHUNK):
            pass

    @property
    def digest(self) -> str:
        """Of what was read so far, as images spell it."""
        return f"sha256:{self._sha256.hexdigest()}"


def uncompressed(compressed: Measured, head: bytes) -> Read:
    """How to read what `compressed` holds; head: its first bytes, which say how it is compressed. Raises MalformedArchive.

    The reader returns what was asked for, except at the end.
    """
    if compression(head) == "gzip":
        return _checked(gzip.GzipFile(fileobj=cast("BinaryIO", compressed), mode="rb").read, gzip.BadGzipFile, zlib.error)
    if compression(head) == "zstd":
        return _zstd(compressed)
    for magic, name in _OTHERS.items():
        if head.startswith(magic):
            raise MalformedArchive(f"it is compressed with {name}: unpack it first, or use gzip")
    return compressed.read


def compression(head: bytes) -> str | None:
    """How a blob that begins so is compressed, as media types call it, if it is in a way that is read here."""
    return next((name for magic, name in _READ.items() if head.startswith(magic)), None)


def is_compressed(head: bytes) -> bool:
    """Whether a blob that begins so is compressed in a way that is read here."""
    return compression(head) is not None


def _zstd(compressed: Measured) -> Read:
    """Python has zstd from 3.14 on."""
    try:
        module = importlib.import_module("compression.zstd")
    except ImportError:
        raise MalformedArchive(_NO_ZSTD) from None
    return _checked(module.ZstdFile(compressed, "r").read, module.ZstdError)


def _checked(read: Read, *damages: type[Exception]) -> Read:
    def checked(size: int) -> bytes:
        try:
            return read(size)
        except EOFError:
            raise MalformedArchive("its compressed data is cut off") from None
        except damages as error:
            raise MalformedArchive(f"its compressed data is damaged: {error}") from error

    return checked
