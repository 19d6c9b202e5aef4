"""An OCI image layout in a directory, to which images are added: each whole, or the layout is as it was.

OCI image specification, image-layout.md. Beside its index lies a `manifest.json` as `docker save` has it: older releases of `docker load`
(20.10 among them) take nothing else. Both lead to the same blobs.

    oci-layout, index.json    what images there are, by tag
    manifest.json             the same for Docker
    blobs/sha256/HEX          layers, configurations, manifests
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, BinaryIO

from pyoverlay.core import syscalls
from pyoverlay.core.calls import Calls, remove_tree
from pyoverlay.errors import Refusal
from pyoverlay.image.publishing import beside, replacing
from pyoverlay.image.sources import REF_NAME, blob_name

_OPEN_DIR = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"
LAYER_TYPE = "application/vnd.oci.image.layer.v1.tar"
_MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
_INDEX_TYPE = "application/vnd.oci.image.index.v1+json"

Document = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Descriptor:
    """A blob, as a manifest names it. size: in bytes."""

    media_type: str
    digest: str
    size: int

    def document(self) -> Document:
        """In a manifest's spelling."""
        return {"mediaType": self.media_type, "digest": self.digest, "size": self.size}


class BlobWriter:
    """A blob on its way: `write`, and its digest is known at the end. path: of the layout, for a refusal."""

    def __init__(self, file: BinaryIO, path: bytes) -> None:
        self._file = file
        self._path = path
        self._sha256 = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> None:
        """Raises Refusal where the layout's file system does not take it."""
        try:
            self._file.write(data)
        except OSError as error:
            raise Refusal.of(error, self._path) from error
        self._sha256.update(data)
        self.size += len(data)

    @property
    def digest(self) -> str:
        """Of what was written so far."""
        return f"sha256:{self._sha256.hexdigest()}"


class Layout:
    """A layout being changed, see `changing`."""

    def __init__(self, path: bytes) -> None:
        self._path = path
        self._added: list[bytes] = []

    @contextmanager
    def new_blob(self) -> Iterator[BlobWriter]:
        """A blob to write; at the end of the block it has its name. One that is there already is not made twice."""
        temporary = self._inside(f"blobs/sha256/.{secrets.token_hex(6)}")
        try:
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:
                blob = BlobWriter(file, self._path)
                yield blob
            final = self._inside(blob_name(blob.digest))
            if not os.path.exists(final):
                os.rename(temporary, final)
                self._added.append(final)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(temporary)

    def has(self, digest: str) -> bool:
        """Is that blob there?"""
        return os.path.exists(self._inside(blob_name(digest)))

    def add_document(self, document: Document, media_type: str) -> Descriptor:
        """A blob of JSON."""
        with self.new_blob() as blob:
            blob.write(_encoded(document))
        return Descriptor(media_type, blob.digest, blob.size)

    def add_image(self, config: Document, layers: Sequence[Descriptor], tag: str, name: str) -> Descriptor:
        """Add an image whose layers are there, in place of any with this tag. Returns what its configuration is known by.

        tag: in the layout. name: what Docker is to call it, `app:1`.
        """
        described = self.add_document(config, CONFIG_TYPE)
        manifest = {
            "schemaVersion": 2,
            "mediaType": _MANIFEST_TYPE,
            "config": described.document(),
            "layers": [layer.document() for layer in layers],
        }
        entry = self.add_document(manifest, _MANIFEST_TYPE).document()
        entry["annotations"] = {REF_NAME: tag}
        entry["platform"] = {key: config[key] for key in ("architecture", "os", "variant") if key in config}
        saved = {
            "Config": blob_name(described.digest),
            "RepoTags": [name],
            "Layers": [blob_name(layer.digest) for layer in layers],
        }
        self._publish(entry, tag, saved, name)
        return described

    def _publish(self, entry: Document, tag: str, saved: Document, name: str) -> None:
        index = read_index(self._path)
        index["manifests"] = [other for other in index["manifests"] if tag_of(other) != tag] + [entry]
        before = _read_saved(self._path)
        images = [*_without(before or [], name), saved]
        fd = os.open(self._path, _OPEN_DIR)
        try:
            syscalls.syncfs(fd)
        finally:
            os.close(fd)
        self._replace("manifest.json", images)
        try:
            self._replace("index.json", index)
        except BaseException:
            if before is None:
                os.unlink(self._inside("manifest.json"))
            else:
                self._replace("manifest.json", before)
            raise

    def _replace(self, name: str, document: Any) -> None:
        with replacing(self._inside(name), 0o666) as file:
            file.write(_encoded(document))

    def undo(self) -> None:
        """Take the blobs away that were added."""
        for path in self._added:
            os.unlink(path)

    def _inside(self, name: str) -> bytes:
        return os.path.join(self._path, os.fsencode(name))


@contextmanager
def changing(path: bytes) -> Iterator[Layout]:
    """The layout at `path`, locked, to add an image to; a new one where there is nothing or an empty directory.

    If the block fails, the layout is as it was, or still not there. Raises Refusal.
    """
    try:
        if os.path.lexists(path) and os.listdir(path):
            with _locked(path):
                yield from _changed(Layout(path))
        else:
            yield from _made(path)
    except OSError as error:
        raise Refusal.of(error, path) from error


def _changed(layout: Layout) -> Iterator[Layout]:
    try:
        yield layout
    except BaseException:
        layout.undo()
        raise


def _made(path: bytes) -> Iterator[Layout]:
    """Built beside its place and moved there by one rename."""
    building = beside(os.path.abspath(path))
    os.mkdir(building)
    try:
        os.makedirs(os.path.join(building, b"blobs/sha256"))
        for file, document in (("oci-layout", {"imageLayoutVersion": "1.0.0"}), ("index.json", _empty_index())):
            with replacing(os.path.join(building, os.fsencode(file)), 0o666) as new:
                new.write(_encoded(document))
        yield Layout(building)
        os.rename(building, path)
    except BaseException:
        above, name = os.path.split(building)
        fd = os.open(above, _OPEN_DIR)
        try:
            remove_tree(Calls(), fd, name)
        finally:
            os.close(fd)
        raise


@contextmanager
def _locked(path: bytes) -> Iterator[None]:
    fd = os.open(path, _OPEN_DIR)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        read_index(path)
        _read_saved(path)
        os.makedirs(os.path.join(path, b"blobs/sha256"), exist_ok=True)
        yield
    finally:
        os.close(fd)


def read_index(path: bytes) -> Document:
    """The index of the layout at `path`; an empty one where there is no such directory. Raises Refusal where it is something else."""
    remedy = "name an OCI layout, or a directory that does not exist yet"
    try:
        if not os.path.lexists(path) or not os.listdir(path):
            return _empty_index()
        with open(os.path.join(path, b"oci-layout"), "rb"), open(os.path.join(path, b"index.json"), "rb") as file:
            index = json.load(file)
    except FileNotFoundError as error:
        raise Refusal(path, "not empty, and no OCI layout", errno.EEXIST, remedy) from error
    except ValueError as error:
        raise Refusal(path, "its index.json is no JSON", errno.EINVAL, remedy) from error
    except OSError as error:
        raise Refusal.of(error, path, remedy) from error
    if not isinstance(index, dict) or not isinstance(index.get("manifests"), list):
        raise Refusal(path, "its index.json is none of an OCI layout's", errno.EINVAL, remedy)
    return index


def _read_saved(path: bytes) -> list[Document] | None:
    """What the layout at `path` says to Docker; None: nothing. Raises Refusal where that is something else than Docker writes."""
    try:
        with open(os.path.join(path, b"manifest.json"), "rb") as file:
            images = json.load(file)
    except FileNotFoundError:
        return None
    except ValueError:
        images = None
    if not isinstance(images, list) or not all(isinstance(image, dict) for image in images):
        raise Refusal(path, "its manifest.json is none of Docker's", errno.EINVAL, "remove it, or name another OCI layout")
    return images


def tag_of(entry: Any) -> str | None:
    """What an entry of an index is called."""
    annotations = entry.get("annotations") if isinstance(entry, dict) else None
    return annotations.get(REF_NAME) if isinstance(annotations, dict) else None


def _without(images: Sequence[Document], name: str) -> Iterator[Document]:
    """The entries of a manifest.json, of which none is called `name` any more. One of several names keeps the others."""
    for image in images:
        names = image.get("RepoTags") or []
        left = [other for other in names if other != name]
        if left or not names:
            yield image | {"RepoTags": left} if names else image


def _empty_index() -> Document:
    return {"schemaVersion": 2, "mediaType": _INDEX_TYPE, "manifests": []}


def _encoded(document: Any) -> bytes:
    """The same document gives the same bytes."""
    return json.dumps(document, indent=1, sort_keys=True).encode() + b"\n"
