"""A mount as an image: the layers it stands on, and on top of them what changed in it.

Lowers that were imported give their layers as they came, and the image they belong to its configuration and history. Any other lower
becomes a layer made of it.
"""

from __future__ import annotations

import copy
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from pyoverlay.core.policy import Whiteouts
from pyoverlay.core.view import View
from pyoverlay.errors import Refusal
from pyoverlay.image import exporting
from pyoverlay.image.exporting import Manner, Written
from pyoverlay.image.importing import distinct
from pyoverlay.image.layout import LAYER_TYPE, BlobWriter, Descriptor, Layout, changing
from pyoverlay.image.sources import HEAD, architecture
from pyoverlay.image.store import Store, StoredImage, StoredLayer
from pyoverlay.image.streams import compression
from pyoverlay.report.target import Target

_CHUNK = 1 << 20
_COMMITTED_BY = "pyoverlay commit"
# What Docker's own builder says of the container that an image was made in.
_OF_A_CONTAINER = ("container", "container_config", "docker_version", "id", "parent")
# Names of images, by the grammar of distribution/reference: a registry, which may have a port, and a path.
_HOST = r"[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?"
_STEP = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_NAME = re.compile(rf"(?:{_HOST}(?:\.{_HOST})*(?::[0-9]+)?/)?{_STEP}(?:/{_STEP})*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")

Progress = Callable[[int], object]


@dataclass(frozen=True, slots=True)
class Kept:
    """A layer whose blob the store has. path: where."""

    layer: StoredLayer
    path: bytes

    @property
    def size(self) -> int:
        return self.layer.size


@dataclass(frozen=True, slots=True)
class Made:
    """A layer to be made of a directory. size: of the contents, in bytes."""

    target: Target
    members: int
    size: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What a commit will do. layers: of the base, the lowest first. base: the image that they begin with, None: of no image."""

    change: Made
    layers: tuple[Kept | Made, ...]
    base: StoredImage | None

    @property
    def size(self) -> int:
        """Bytes to be read."""
        return self.change.size + sum(layer.size for layer in self.layers)


@dataclass(frozen=True, slots=True)
class Words:
    """What the image will say of itself.

    created: when it was made, in seconds since 1970, and the time of everything in its new layers; None: now, and each its own.
    """

    author: str | None = None
    message: str | None = None
    created: int | None = None


def plan(target: Target) -> Plan:
    """What committing a mount takes. Raises Refusal; changes nothing."""
    if not target.knows_lowers:
        raise Refusal(target.given, "not mounted: its base is not known", remedy="mount it, or use `pyoverlay export` for the change alone")
    target.sync()
    lowest_first = target.lowers[::-1]
    base, count = _base(lowest_first)
    layers: list[Kept | Made] = []
    if base is not None:
        store, _ = _imported(lowest_first[0])
        layers += [_layer(target, store.layer(diff_id)) for diff_id in base.diff_ids]
    layers += [_layer(target, lower) for lower in lowest_first[count:]]
    return Plan(_made(target), tuple(layers), base)


def _imported(lower: bytes) -> tuple[Store, str]:
    found = Store.of_lower(lower)
    assert found is not None
    return found


def _base(lowest_first: Sequence[bytes]) -> tuple[StoredImage | None, int]:
    """The largest image that the lowers begin with, the latest among equals; and how many of them are its."""
    found = Store.of_lower(lowest_first[0])
    if found is None:
        return None, 0
    store, _ = found
    candidates = [(image, [store.layer(diff_id) for diff_id in distinct(image.diff_ids)]) for image in store.images()]
    fitting = [(image, len(layers)) for image, layers in candidates if layers and layers == list(lowest_first[: len(layers)])]
    return max(fitting, key=lambda one: one[1]) if fitting else (None, 0)


def _layer(target: Target, lower: bytes) -> Kept | Made:
    found = Store.of_lower(lower)
    if found is not None:
        store, diff_id = found
        origin = store.origin(diff_id)
        if origin is not None and os.path.exists(store.blob(origin.digest)):
            return Kept(origin, store.blob(origin.digest))
    below = target.lowers[target.lowers.index(lower) + 1 :]
    policy = target.policy
    if policy.whiteouts is Whiteouts.AUTO:  # in a lower `.wh.NAME` is a whiteout
        policy = replace(policy, whiteouts=Whiteouts.AUFS)
    return _made(Target(lower, lower, below, policy, data_lowers=target.data_lowers, is_lowest=not below))


def _made(target: Target) -> Made:
    try:
        view = target.open()
        try:
            members, size = exporting.measure(view, target)
        finally:
            view.close()
    except OSError as error:
        raise target.refusal(error) from error
    return Made(target, members, size)


# ── doing it ────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def commit(what: Plan, path: bytes, tag: str, name: str, words: Words, progress: Progress = lambda _: None) -> str:
    """Add the image to the layout at `path`, under names that `require_names` let through. Returns its id, the digest of its configuration.

    Raises Refusal; nothing has changed then.
    """
    with changing(path) as layout:
        writer = _Writer(layout, words, progress)
        for layer in (*what.layers, what.change):
            writer.add(layer)
        config = _config(what, writer.diff_ids, words)
        return layout.add_image(config, writer.descriptors, tag, name).digest


def require_names(path: bytes, tag: str, name: str) -> None:
    """Raises Refusal for what no image can be called in a layout, or by Docker."""
    if _TAG.fullmatch(tag) is None:
        raise Refusal(path, f"{tag!r} is no tag: letters, digits, `_`, `.` and `-`")
    repository, _, suffix = name.rpartition(":")
    if _NAME.fullmatch(repository) is None or _TAG.fullmatch(suffix) is None:
        raise Refusal(path, f"Docker takes no image called {name!r}", remedy="say what it shall call it with --name")


@dataclass(slots=True)
class _Writer:
    """Puts layers into a layout, and remembers by what they are known."""

    layout: Layout
    words: Words
    progress: Progress
    descriptors: list[Descriptor] = field(default_factory=list)
    diff_ids: list[str] = field(default_factory=list)

    def add(self, layer: Kept | Made) -> None:
        if isinstance(layer, Kept):
            self._copy(layer)
        else:
            self._make(layer)

    def _copy(self, kept: Kept) -> None:
        """A blob as it came, unless the layout has it; what the store has is not believed to be whole."""
        with open(kept.path, "rb") as source:
            compressed = compression(source.peek(HEAD)[:HEAD])
            media_type = LAYER_TYPE if compressed is None else f"{LAYER_TYPE}+{compressed}"
            if self.layout.has(kept.layer.digest):
                self.progress(kept.layer.size)
            else:
                with self.layout.new_blob() as blob:
                    while data := source.read(_CHUNK):
                        blob.write(data)
                        self.progress(len(data))
                    if blob.digest != kept.layer.digest:
                        raise Refusal(kept.path, "not what its name says: it is damaged", remedy="import the image again")
        self.descriptors.append(Descriptor(media_type, kept.layer.digest, kept.layer.size))
        self.diff_ids.append(kept.layer.diff_id)

    def _make(self, made: Made) -> None:
        view = made.target.open()
        try:
            with self.layout.new_blob() as blob, _gzip(blob) as write:
                written = self._written(view, made.target, write)
        finally:
            view.close()
        self.descriptors.append(Descriptor(LAYER_TYPE + "+gzip", blob.digest, blob.size))
        self.diff_ids.append(f"sha256:{written.digest}")

    def _written(self, view: View, target: Target, write: Callable[[bytes], object]) -> Written:
        """An OSError from here on is one of the mount's layers, not of the layout."""
        try:
            return exporting.write_layer(view, target, write, Manner(self.words.created), self.progress)
        except OSError as error:
            raise target.refusal(error) from error


@contextmanager
def _gzip(blob: BlobWriter) -> Iterator[Callable[[bytes], object]]:
    """What compresses into a blob, without a time or a name in the header: the same data give the same bytes."""
    compressor = zlib.compressobj(6, zlib.DEFLATED, 31)
    yield lambda data: blob.write(compressor.compress(data))
    blob.write(compressor.flush())


def _config(what: Plan, diff_ids: list[str], words: Words) -> dict[str, Any]:
    """The base image's configuration with one layer more; a new one where there is no base image. OCI image specification, config.md."""
    created = _time(words.created)
    config = copy.deepcopy(what.base.config) if what.base is not None else {"architecture": architecture(), "os": "linux", "config": {}}
    for key in _OF_A_CONTAINER:
        config.pop(key, None)
    count = len(what.base.diff_ids) if what.base is not None else 0
    history = [*(config.get("history") or ({"created": created, "created_by": "import"} for _ in range(count)))]
    history += [{"created": created, "created_by": f"{_COMMITTED_BY}: a lower"} for _ in what.layers[count:]]
    change = {"created": created, "created_by": _COMMITTED_BY, "author": words.author, "comment": words.message}
    history.append({key: value for key, value in change.items() if value is not None})
    config |= {"created": created, "history": history, "rootfs": {"type": "layers", "diff_ids": diff_ids}}
    return config | ({"author": words.author} if words.author is not None else {})


def _time(seconds: int | None) -> str:
    moment = datetime.now(UTC) if seconds is None else datetime.fromtimestamp(seconds, UTC)
    return moment.replace(microsecond=0, tzinfo=None).isoformat() + "Z"
