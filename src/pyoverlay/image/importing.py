"""From archives and layouts to lowers: the layers of images and single layers, unpacked into a store."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TypeVar

from pyoverlay.errors import Refusal, printable
from pyoverlay.image import sources
from pyoverlay.image.sources import Image
from pyoverlay.image.store import Added, Store
from pyoverlay.image.streams import TooLarge
from pyoverlay.image.tar_reader import MalformedArchive
from pyoverlay.image.unpacking import Terms, Unacceptable

T = TypeVar("T")
Bar = Callable[[str, int], AbstractContextManager[Callable[[int], object]]]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What may be imported, and how. tag: which image, where there are several. max_size: bytes that one layer may have uncompressed."""

    terms: Terms = Terms()
    max_size: int = 64 << 30
    tag: str | None = None
    keeps_blobs: bool = True


@dataclass(frozen=True, slots=True)
class Imported:
    """lowers: directories, top first. disarmed: objects whose set-id bits or capabilities an ordinary user could not keep."""

    lowers: tuple[bytes, ...]
    disarmed: int


def no_bar(_label: str, _total: int) -> AbstractContextManager[Callable[[int], object]]:
    """Shows nothing."""
    return nullcontext(lambda _: None)


def import_into(store: Store, paths: Iterable[bytes], wanted: Wanted, bar: Bar = no_bar) -> Imported:
    """Unpack what lies at `paths`, each on top of the one before it. Raises Refusal; layers that were whole by then stay."""
    added: list[Added] = []
    for path in paths:
        with sources.opened(path, store.scratch, wanted.max_size, wanted.tag) as image:
            added += _add_layers(store, path, image, wanted, bar)
            if image.config is not None:
                store.add_image(image.names, image.config, [layer.diff_id for layer in image.layers])
    return Imported(tuple(reversed(distinct([one.path for one in added]))), sum(one.disarmed for one in added))


def distinct(lowest_first: Sequence[T]) -> list[T]:
    """Each layer once, at its highest place: what it says there it says again, over all that lies between."""
    return list(dict.fromkeys(reversed(lowest_first)))[::-1]


def _add_layers(store: Store, path: bytes, image: Image, wanted: Wanted, bar: Bar) -> list[Added]:
    total = sum(layer.blob.size for layer in image.layers)
    added = []
    with bar(f"Unpacking {os.fsdecode(os.path.basename(path.rstrip(b'/')))}", total) as progress:
        for layer in image.layers:
            try:
                added.append(store.add(layer, wanted.terms, wanted.max_size, keeps_blob=wanted.keeps_blobs, progress=progress))
            except Unacceptable as error:
                raise Refusal(path + b": " + error.name, error.reason, remedy=error.remedy) from error
            except MalformedArchive as error:
                raise Refusal(path, f"a layer in it cannot be unpacked: {error}") from error
            except TooLarge:
                raise sources.too_large(path, wanted.max_size) from None
            except OSError as error:
                raise _not_unpacked(error, path, store) from error
    return added


def _not_unpacked(error: OSError, path: bytes, store: Store) -> Refusal:
    """What the system refused names a member, where it is about one."""
    member = b": " + os.fsencode(error.filename) if isinstance(error.filename, str) else b""
    return Refusal(path + member, f"cannot be unpacked in {printable(store.path)}", error.errno)
