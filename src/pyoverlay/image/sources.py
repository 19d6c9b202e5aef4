"""What can be imported: `docker save` archives, OCI layouts as directory or archive, and single layers. All of it may be hostile.

An image is read as far as its layers' blobs and its configuration: OCI image specification, image-layout.md, manifest.md, config.md;
Docker image specification v1.2 for `manifest.json`. Nothing is unpacked here.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import posixpath
import re
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, BinaryIO, Protocol

from pyoverlay.core import syscalls
from pyoverlay.errors import Refusal
from pyoverlay.image.streams import Measured, TooLarge, is_compressed, slice_of, uncompressed
from pyoverlay.image.tar_member import Kind
from pyoverlay.image.tar_reader import MalformedArchive, TarReader

_DOCUMENT_MAX = 8 << 20
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
_INDEXES = ("application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json")
_MACHINES = {"x86_64": "amd64", "aarch64": "arm64", "i686": "386", "armv7l": "arm", "armv6l": "arm"}
REF_NAME = "org.opencontainers.image.ref.name"
HEAD = 8  # bytes of a blob that tell how it is compressed

Document = dict[str, Any]


def architecture() -> str:
    """This machine's, as images name it."""
    machine = platform.machine()
    return _MACHINES.get(machine, machine)


@dataclass(frozen=True, slots=True)
class Blob:
    """Bytes of an image. size: as they are stored. open: a new reader from their beginning."""

    size: int
    open: Callable[[], BinaryIO]


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer to be unpacked. diff_id: SHA-256 of its archive, uncompressed. digest: that of the blob, None: not said."""

    diff_id: str
    digest: str | None
    blob: Blob


@dataclass(frozen=True, slots=True)
class Image:
    """Layers, the lowest first; and of an image its configuration and names, None and none of a single layer."""

    layers: tuple[Layer, ...]
    config: Document | None = None
    names: tuple[str, ...] = ()


class Files(Protocol):
    """The files of an image, in a directory or in an archive."""

    def find(self, name: str) -> Blob | None:
        """The file of that name; None: there is no such file."""


@contextmanager
def opened(path: bytes, scratch: bytes, limit: int, wanted: str | None) -> Iterator[Image]:
    """The image or layer at `path`, `-` for standard input, while the block lasts.

    scratch: a directory for a compressed archive that has to be read out of order. limit: bytes that it may have uncompressed. wanted: a
    name or tag, where there are several images; a single layer has none and needs none. Raises Refusal.
    """
    with ExitStack() as held:
        try:
            fd = _standard_input(scratch, limit) if path == b"-" else os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            held.callback(os.close, fd)
            mode = os.fstat(fd).st_mode
            if stat.S_ISDIR(mode):
                directory = _Directory(fd)
                held.callback(directory.close)
                image = _image(directory, path, wanted)
            elif stat.S_ISREG(mode):
                image = _in_archive(path, fd, scratch, limit, wanted, held)
            else:
                raise Refusal(path, "neither an archive nor a directory", errno.EINVAL, "what comes through a pipe is read from -")
        except MalformedArchive as error:
            raise Refusal(path, f"no image or layer that can be imported: {error}") from error
        except TooLarge:
            raise too_large(path, limit) from None
        except OSError as error:
            raise Refusal.of(error, path) from error
        yield image


def _standard_input(scratch: bytes, limit: int) -> int:
    """A descriptor of a copy, since what is imported is read more than once."""
    with tempfile.TemporaryFile(dir=scratch) as file:
        Measured(sys.stdin.buffer.read, limit, file.write).drain()
        file.flush()
        return os.dup(file.fileno())


def too_large(path: bytes, limit: int) -> Refusal:
    """The refusal of a bomb, or of what looks like one."""
    return Refusal(path, f"more than {limit} bytes when unpacked", errno.EFBIG, "if it is to be trusted, raise the limit with --max-size")


# ── where the files of an image lie ─────────────────────────────────────────────────────────────────────────────────────────


class _Directory:
    """An unpacked image. A link in it may lead to another of its files and nowhere else."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._opened: list[int] = []

    def close(self) -> None:
        for fd in self._opened:
            os.close(fd)

    def find(self, name: str) -> Blob | None:
        flags = os.O_RDONLY | os.O_NONBLOCK
        try:
            fd = syscalls.openat2(self._fd, os.fsencode(name), flags, syscalls.RESOLVE_BENEATH | syscalls.RESOLVE_NO_MAGICLINKS)
        except (FileNotFoundError, NotADirectoryError):
            return None
        self._opened.append(fd)
        st = os.fstat(fd)
        return Blob(st.st_size, lambda: slice_of(fd, 0, st.st_size)) if stat.S_ISREG(st.st_mode) else None


@dataclass(slots=True)
class _Archive:
    """An image in an uncompressed archive: where in it each file lies. `docker save` writes a layer once and links to it."""

    fd: int
    places: dict[str, tuple[int, int]] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)

    @property
    def may_be_image(self) -> bool:
        """By the names in it alone."""
        return "manifest.json" in self.places or "index.json" in self.places

    def find(self, name: str) -> Blob | None:
        name = self.links.get(name, name)
        if name not in self.places:
            return None
        start, size = self.places[name]
        return Blob(size, lambda: slice_of(self.fd, start, size))

    def index(self, reader: TarReader) -> None:
        for member in reader:
            name = posixpath.normpath(os.fsdecode(member.name))
            if member.kind is Kind.FILE and member.extents is None:
                self.places[name] = (reader.offset, member.size)
            elif member.kind in (Kind.SYMLINK, Kind.LINK):
                above = posixpath.dirname(name) if member.kind is Kind.SYMLINK else ""
                self.links[name] = posixpath.normpath(posixpath.join(above, os.fsdecode(member.target)))


def _in_archive(path: bytes, fd: int, scratch: bytes, limit: int, wanted: str | None, held: ExitStack) -> Image:
    """An image, or a single layer, in one file. A layer's digest is found in the same pass."""
    size = os.fstat(fd).st_size
    head = os.pread(fd, HEAD, 0)
    content = Measured(uncompressed(Measured(slice_of(fd, 0, size).read), head), limit)
    archive = _Archive(fd)
    try:
        archive.index(TarReader(content.read))
    except MalformedArchive as error:
        if not archive.places and not is_compressed(head):
            raise MalformedArchive("it is neither an image nor a tar archive") from error
        raise
    content.drain()
    if is_compressed(head) and archive.may_be_image:
        file = held.enter_context(tempfile.TemporaryFile(dir=scratch))  # noqa: SIM115  # held closes it
        Measured(uncompressed(Measured(slice_of(fd, 0, size).read), head), limit, file.write).drain()
        file.flush()
        archive.fd = file.fileno()
    if not _is_image(archive):
        return Image((Layer(content.digest, None, Blob(size, lambda: slice_of(fd, 0, size))),))
    return _image(archive, path, wanted)


def _is_image(files: Files) -> bool:
    """A layer may well hold files of these names: what they say decides."""
    if files.find("oci-layout") is not None and files.find("index.json") is not None:
        return True
    if files.find("manifest.json") is None:
        return False
    try:
        entries = _document(files, "manifest.json")
    except MalformedArchive:
        return False
    return isinstance(entries, list) and all(isinstance(entry, dict) and "Layers" in entry for entry in entries)


# ── what its documents say ──────────────────────────────────────────────────────────────────────────────────────────────────


def _image(files: Files, path: bytes, wanted: str | None) -> Image:
    if files.find("manifest.json") is not None:
        saved = _document(files, "manifest.json")
        if isinstance(saved, dict) and files.find("version") is not None:
            raise Refusal(path, "a directory of one image, as skopeo's `dir:` writes it", errno.EINVAL, "copy it to an `oci:` layout")
        found = list(_saved_images(files, saved))
    elif files.find("index.json") is not None:
        found = list(_layout_images(files, _document(files, "index.json")))
    else:
        raise Refusal(path, "neither an image nor a layer: there is no index.json and no manifest.json in it", errno.EINVAL)
    return _choose(found, path, wanted)()


Candidate = tuple[tuple[str, ...], Callable[[], Image]]


def _choose(found: list[Candidate], path: bytes, wanted: str | None) -> Callable[[], Image]:
    if wanted is not None:
        matching = [read for names, read in found if any(name == wanted or name.rpartition(":")[2] == wanted for name in names)]
    else:
        matching = [read for _, read in found]
    if len(matching) == 1:
        return matching[0]
    names = ", ".join(sorted(name for names, _ in found for name in names)) or "without names"
    if not matching:
        raise Refusal(path, f"no image {wanted or ''} for {architecture()} in it", errno.ENOENT, f"it has: {names}")
    raise Refusal(path, f"{len(matching)} images in it", errno.EINVAL, f"choose one with --tag: {names}")


def _saved_images(files: Files, saved: Any) -> Iterator[Candidate]:
    """As `docker save` writes them."""
    for entry in _list(saved, "manifest.json"):
        names = tuple(str(name) for name in _list(_object(entry, "manifest.json").get("RepoTags") or [], "manifest.json"))
        yield names, partial(_saved_image, files, entry, names)


def _saved_image(files: Files, entry: Document, names: tuple[str, ...]) -> Image:
    config_name = _text(entry, "Config")
    config = _object(_document(files, config_name), config_name)
    blobs = [str(name) for name in _list(entry.get("Layers"), "manifest.json")]
    layers = []
    for diff_id, name in zip(_diff_ids(config, len(blobs)), blobs, strict=True):
        digest = f"sha256:{name.rpartition('/')[2]}" if name.startswith("blobs/sha256/") else None
        layers.append(Layer(diff_id, digest, _require(files, name)))
    return Image(tuple(layers), config, names)


def _layout_images(files: Files, index: Any, depth: int = 0) -> Iterator[Candidate]:
    """Those of an OCI layout that are for this machine, or that do not say for which."""
    for descriptor in _list(_object(index, "index.json").get("manifests"), "index.json"):
        descriptor = _object(descriptor, "index.json")
        annotations = _object(descriptor.get("annotations") or {}, "index.json")
        names = tuple(filter(None, [str(annotations.get(REF_NAME) or "")]))
        wanted = _object(descriptor.get("platform") or {}, "index.json")
        if wanted and (wanted.get("os"), wanted.get("architecture")) != ("linux", architecture()):
            continue
        if descriptor.get("mediaType") in _INDEXES:
            if depth > 4:
                raise MalformedArchive("its indexes are nested too deeply")
            below = _layout_images(files, _blob_document(files, descriptor), depth + 1)
            yield from ((inner or names, read) for inner, read in below)
        else:
            yield names, partial(_layout_image, files, descriptor, names)


def _layout_image(files: Files, descriptor: Document, names: tuple[str, ...]) -> Image:
    manifest = _blob_document(files, descriptor)
    config = _blob_document(files, _object(manifest.get("config"), "manifest"))
    descriptors = [_object(layer, "manifest") for layer in _list(manifest.get("layers"), "manifest")]
    layers = []
    for diff_id, layer in zip(_diff_ids(config, len(descriptors)), descriptors, strict=True):
        digest = _text(layer, "digest")
        layers.append(Layer(diff_id, digest, _require(files, blob_name(digest))))
    return Image(tuple(layers), config, names)


def _diff_ids(config: Document, count: int) -> list[str]:
    found = [str(diff_id) for diff_id in _list(_object(config.get("rootfs"), "configuration").get("diff_ids"), "configuration")]
    _list(config.get("history") or [], "configuration")
    if len(found) != count:
        raise MalformedArchive(f"its configuration names {len(found)} layers, its manifest {count}")
    for diff_id in found:
        blob_name(diff_id)
    return found


def blob_name(digest: str) -> str:
    """Where in a layout a blob lies. MalformedArchive: no digest of the kind that is read here."""
    match = _DIGEST.fullmatch(digest)
    if match is None:
        raise MalformedArchive(f"a digest that is not sha256's: {digest[:80]!r}")
    return f"blobs/sha256/{match[1]}"


def _require(files: Files, name: str) -> Blob:
    blob = files.find(posixpath.normpath(name))
    if blob is None:
        raise MalformedArchive(f"{name} is missing")
    return blob


def _blob_document(files: Files, descriptor: Document) -> Document:
    digest = _text(descriptor, "digest")
    content = _read(files, blob_name(digest))
    if f"sha256:{hashlib.sha256(content).hexdigest()}" != digest:
        raise MalformedArchive(f"{digest} is not what its name says: it is damaged")
    return _object(_parsed(content, digest), digest)


def _document(files: Files, name: str) -> Any:
    return _parsed(_read(files, name), name)


def _read(files: Files, name: str) -> bytes:
    blob = _require(files, name)
    if blob.size > _DOCUMENT_MAX:
        raise MalformedArchive(f"{name} is larger than {_DOCUMENT_MAX} bytes")
    with blob.open() as file:
        return file.read()


def _parsed(content: bytes, name: str) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        raise MalformedArchive(f"{name} is no JSON") from None


def _object(value: Any, where: str) -> Document:
    if not isinstance(value, dict):
        raise MalformedArchive(f"{where} has something else where an object belongs")
    return value


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise MalformedArchive(f"{where} has something else where a list belongs")
    return value


def _text(document: Document, key: str) -> str:
    value = document.get(key)
    if not isinstance(value, str):
        raise MalformedArchive(f"{key} is missing")
    return value
