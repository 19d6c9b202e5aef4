"""A directory of unpacked layers, each there once however many images have it, and what is known of the images.

    layers/HEX                the layer whose uncompressed archive has this SHA-256 (its diff_id): a directory that can be a lower
    blobs/sha256/HEX          the layer as it came, compressed or not, by the SHA-256 of that
    origins/HEX.json          which blob a layer came from, kept or not
    images/HEX.json           an image: its names, its configuration, its layers' diff_ids; HEX is the SHA-256 of its configuration
    unpacking/HEX             a layer on its way, locked (flock) by whoever unpacks it

Everything is for its owner alone, mode 0700: layers hold set-id programs that nobody else should run. A layer gets its final name by one
rename, when all of it was verified and is on disk.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO

from pyoverlay.core import syscalls
from pyoverlay.core.calls import Calls, remove_tree
from pyoverlay.errors import Refusal
from pyoverlay.image.publishing import replacing
from pyoverlay.image.sources import HEAD, Layer, blob_name
from pyoverlay.image.streams import Measured, is_compressed, uncompressed
from pyoverlay.image.tar_reader import MalformedArchive, TarReader
from pyoverlay.image.unpacking import Terms, unpack

_OPEN_DIR = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_PARTS = (b"layers", b"blobs", b"blobs/sha256", b"origins", b"images", b"unpacking")


@dataclass(frozen=True, slots=True)
class StoredLayer:
    """diff_id: of the archive. digest, size in bytes: of the blob it came from, which may or may not have been kept."""

    diff_id: str
    digest: str
    size: int


@dataclass(frozen=True, slots=True)
class StoredImage:
    """An image whose layers were unpacked; the lowest first."""

    names: tuple[str, ...]
    config: dict[str, Any]
    diff_ids: tuple[str, ...]


@dataclass(slots=True)
class Added:
    """What became of a layer. disarmed: see unpacking.Unpacked."""

    stored: StoredLayer
    path: bytes
    disarmed: int = 0


class Store:
    """The store in the directory `path`, which must exist."""

    def __init__(self, path: bytes) -> None:
        self.path = path

    @classmethod
    def create(cls, path: bytes) -> Store:
        """The store at `path`, made where there is none. Raises Refusal."""
        try:
            with suppress(FileExistsError):
                os.mkdir(path)
            for part in _PARTS:
                _make_part(os.path.join(path, part))
        except OSError as error:
            named = error.filename if isinstance(error.filename, bytes) else path
            raise Refusal(named, "cannot hold layers", error.errno, "name a directory of your own, or a new one") from error
        store = cls(os.path.realpath(path))
        store._clear_abandoned()
        return store

    @classmethod
    def of_lower(cls, lower: bytes) -> tuple[Store, str] | None:
        """(store, diff_id) of a lower that was imported; None for any other directory."""
        layers, name = os.path.split(lower)
        path, part = os.path.split(layers)
        if part != b"layers" or not os.path.isdir(os.path.join(path, b"images")):
            return None
        return cls(path), f"sha256:{name.decode(errors='replace')}"

    @property
    def scratch(self) -> bytes:
        """A directory on the store's file system for files without a name."""
        return os.path.join(self.path, b"unpacking")

    def layer(self, diff_id: str) -> bytes:
        """Where a layer lies, or would lie."""
        return os.path.join(self.path, b"layers", _hex(diff_id))

    def blob(self, digest: str) -> bytes:
        """Where a layer's blob lies, or would lie."""
        return os.path.join(self.path, os.fsencode(blob_name(digest)))

    # -- layers

    def add(
        self, source: Layer, terms: Terms, limit: int, *, keeps_blob: bool, progress: Callable[[int], object] = lambda _: None
    ) -> Added:
        """Unpack a layer, unless it is there.

        limit: bytes that its archive may have. keeps_blob: it is kept as it came too. progress: told of each piece of the blob read.
        Raises MalformedArchive, Unacceptable, TooLarge, OSError; the store is then as it was.
        """
        path = self.layer(source.diff_id)
        with self._locked(source.diff_id) as place:
            is_there = os.path.isdir(path)
            if is_there and source.digest is not None and (not keeps_blob or os.path.exists(self.blob(source.digest))):
                progress(source.blob.size)
                return Added(StoredLayer(source.diff_id, source.digest, source.blob.size), path)
            copy = os.path.join(place, b"blob") if keeps_blob else None
            with _copied(copy) as kept, source.blob.open() as blob:
                raw, archive = _streams(source, blob, lambda data: (kept(data), progress(len(data))), limit)
                disarmed = 0 if is_there else _unpack(archive, os.path.join(place, b"tree"), terms)
                archive.drain()
                raw.drain()
            _verify(source.diff_id, archive.digest)
            _verify(source.digest, raw.digest)
            if copy is not None:
                os.rename(copy, self.blob(raw.digest))
            stored = StoredLayer(source.diff_id, raw.digest, raw.size)
            self._write("origins", _hex(source.diff_id), asdict(stored))
            if not is_there:
                os.rename(os.path.join(place, b"tree"), path)
            return Added(stored, path, disarmed)

    def origin(self, diff_id: str) -> StoredLayer | None:
        """What a layer came from; None where that is not known."""
        path = os.path.join(self.path, b"origins", _hex(diff_id) + b".json")
        return StoredLayer(**_read(path)) if os.path.exists(path) else None

    @contextmanager
    def _locked(self, diff_id: str) -> Iterator[bytes]:
        """A directory for one layer on its way, empty and ours alone; gone at the end. Whoever comes second waits."""
        place = os.path.join(self.scratch, _hex(diff_id))
        fd = _lock(place)
        try:
            with os.scandir(fd) as entries:
                left = [os.fsencode(entry.name) for entry in entries]
            for name in left:
                remove_tree(Calls(), fd, name)
            yield place
        finally:
            _remove(place)
            os.close(fd)

    def _clear_abandoned(self) -> None:
        """Remove what interrupted imports left."""
        for name in os.listdir(self.scratch):
            place = os.path.join(self.scratch, name)
            with suppress(FileNotFoundError, NotADirectoryError, BlockingIOError):
                fd = os.open(place, _OPEN_DIR)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    _remove(place)
                finally:
                    os.close(fd)

    # -- images

    def add_image(self, names: Sequence[str], config: dict[str, Any], diff_ids: Sequence[str]) -> None:
        """Remember what an image consists of; what was known of one with this configuration is replaced."""
        name = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
        self._write("images", name.encode(), {"names": [*names], "config": config, "diff_ids": [*diff_ids]})

    def images(self) -> list[StoredImage]:
        """Every image that is known, the latest first."""
        directory = os.path.join(self.path, b"images")
        files = [os.path.join(directory, name) for name in os.listdir(directory) if name.endswith(b".json")]
        records = [_read(file) for file in sorted(files, key=lambda file: os.stat(file).st_mtime_ns, reverse=True)]
        return [StoredImage(tuple(record["names"]), record["config"], tuple(record["diff_ids"])) for record in records]

    def _write(self, part: str, name: bytes, record: dict[str, Any]) -> None:
        with replacing(os.path.join(self.path, os.fsencode(part), name + b".json"), 0o600) as file:
            file.write(json.dumps(record, indent=1).encode())


def _make_part(path: bytes) -> None:
    """A directory of ours. Somebody else's, or a symlink, would lead to where somebody else wants it: PermissionError."""
    with suppress(FileExistsError):
        os.mkdir(path, 0o700)
    st = os.lstat(path)
    if not stat.S_ISDIR(st.st_mode) or st.st_uid != os.geteuid():
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), path)


def _read(path: bytes) -> Any:
    with open(path, "rb") as file:
        return json.load(file)


def _hex(digest: str) -> bytes:
    return os.fsencode(blob_name(digest)).rpartition(b"/")[2]


def _lock(place: bytes) -> int:
    """A descriptor of the directory, made if missing, that holds its lock."""
    while True:
        with suppress(FileExistsError):
            os.mkdir(place, 0o700)
        try:
            fd = os.open(place, _OPEN_DIR)
        except FileNotFoundError:  # whoever had it has just removed it
            continue
        fcntl.flock(fd, fcntl.LOCK_EX)
        try:
            if os.path.samestat(os.stat(place), os.fstat(fd)):
                return fd
        except FileNotFoundError:
            pass
        os.close(fd)


def _remove(path: bytes) -> None:
    above, name = os.path.split(path)
    fd = os.open(above, _OPEN_DIR)
    try:
        remove_tree(Calls(), fd, name)
    finally:
        os.close(fd)


@contextmanager
def _copied(path: bytes | None) -> Iterator[Callable[[bytes], object]]:
    """What writes to a new file, on disk at the end; to nowhere for None."""
    if path is None:
        yield lambda _: None
        return
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        yield file.write
        file.flush()
        os.fsync(file.fileno())


def _streams(source: Layer, blob: BinaryIO, copy: Callable[[bytes], object], limit: int) -> tuple[Measured, Measured]:
    """(the blob as it is stored, the archive in it); they are one where it is not compressed."""
    with source.blob.open() as beginning:
        head = beginning.read(HEAD)
    if not is_compressed(head):
        raw = Measured(blob.read, limit, copy)
        uncompressed(raw, head)  # refuses what is compressed in other ways
        return raw, raw
    raw = Measured(blob.read, copy=copy)
    return raw, Measured(uncompressed(raw, head), limit)


def _unpack(archive: Measured, tree: bytes, terms: Terms) -> int:
    """Unpack an archive into the new directory `tree`; all of it is on disk then. How many objects were disarmed."""
    os.mkdir(tree, 0o700)
    root = os.open(tree, _OPEN_DIR)
    try:
        done = unpack(TarReader(archive.read), root, terms)
        syscalls.syncfs(root)
    finally:
        os.close(root)
    return done.disarmed


def _verify(expected: str | None, found: str) -> None:
    if expected is not None and expected != found:
        raise MalformedArchive(f"a layer that should have the digest {expected} has {found}: it is damaged")
