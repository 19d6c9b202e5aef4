"""Whatever is done in an overlay: its layers, exported one by one and unpacked again, are lowers that show the same tree.

The overlay is the kernel's, with everything on that makes an upper hard to read (redirects, metacopy files, an index), and so is the one
that shows the unpacked layers.
"""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import given, note
from hypothesis import strategies as st

from pyoverlay.core.policy import Policy
from pyoverlay.image.exporting import Manner, write_layer
from pyoverlay.image.tar_reader import TarReader
from pyoverlay.image.unpacking import Terms, unpack
from pyoverlay.report.target import Target
from pyoverlay.testing import make_tree, snapshot
from tests.posix.check import opened
from tests.posix.kernel_overlay import FULL, KernelOverlay
from tests.property.arena import LAYERS, TEMPLATES, State, difference
from tests.property.draws import SEQUENCES, drawn
from tests.property.operations import OfTheMount, Operation, outcome
from tests.property.strategies import Paths, operations

TREES = SEQUENCES // 5
LONGEST = 25  # operations in a sequence
# Not the one whose lower files have several names: a layer has those that the upper has, and parts them from the others, by design.
STARTS = tuple(start for start in TEMPLATES if start != "linked")


@dataclass(slots=True)
class Made:
    """A kernel overlay over the layers of a template. place: what belongs to one sequence."""

    place: Path
    overlay: KernelOverlay

    @property
    def layers(self) -> tuple[Path, ...]:
        """From the top, the upper first."""
        return self.overlay.upper, *self.overlay.lowers

    def do(self, operation: Operation) -> None:
        if isinstance(operation, OfTheMount):  # what counts here is read from the disk in the end, whoever mounted meanwhile
            return
        with opened(".", os.O_PATH) as before:
            os.chdir(self.overlay.merged)
            try:
                outcome(operation)
            finally:
                os.fchdir(before)


@contextmanager
def made(place: Path, start: str) -> Iterator[Made]:
    """Mounted; nothing is left afterwards."""
    for name, tree in zip(("top", "bottom", "upper", "merged"), (*LAYERS[start], {}), strict=True):
        (place / name).mkdir(parents=True)
        make_tree(place / name, tree)
        (place / name).chmod(0o777)
    overlay = KernelOverlay((place / "top", place / "bottom"), place / "upper", place / "merged", (*FULL, "metacopy=on"))
    overlay.mount()
    try:
        yield Made(place, overlay)
    finally:
        overlay.close()
        shutil.rmtree(place)


def carried(tree: Path) -> State:
    """What layers carry of a tree: not the root's own attributes, and of security.* capabilities alone."""
    seen = snapshot(tree)
    del seen[b"."]
    return {
        name: replace(entry, xattrs=tuple(one for one in entry.xattrs if not one[0].startswith("security.")))
        for name, entry in seen.items()
    }


def through_archives(layers: tuple[Path, ...], place: Path) -> tuple[Path, ...]:
    """Each layer written as an archive and unpacked into a new directory; from the top, like the layers."""
    unpacked = []
    for number, layer in enumerate(layers):
        below = tuple(os.fsencode(lower) for lower in layers[number + 1 :])
        target = Target(b"layer", os.fsencode(layer), below, Policy(metacopy=True), is_lowest=not below)
        archive = io.BytesIO()
        view = target.open()
        try:
            write_layer(view, target, archive.write, Manner())
        finally:
            view.close()
        archive.seek(0)
        unpacked.append(place / f"layer{number}")
        unpacked[-1].mkdir()
        with opened(unpacked[-1], os.O_RDONLY | os.O_DIRECTORY) as root:
            unpack(TarReader(archive.read), root, Terms())
    return tuple(unpacked)


@pytest.mark.root
@pytest.mark.timeout(60 + 5 * TREES)
def test_layers_that_were_exported_and_unpacked_show_the_same_tree(apart: Path) -> None:
    counted = iter(range(10**9))

    @drawn(TREES)
    @given(start=st.sampled_from(STARTS), length=st.integers(1, LONGEST), data=st.data())
    def show_the_same(start: str, length: int, data: st.DataObject) -> None:
        with made(apart / str(next(counted)), start) as maker:
            for _ in range(length):
                operation = data.draw(operations(Paths.of(maker.overlay.merged)))
                note(repr(operation))
                maker.do(operation)
            expected = carried(maker.overlay.merged)
            maker.overlay.close()
            for name in ("again", "merged again"):
                (maker.place / name).mkdir()
            lowers = through_archives(maker.layers, maker.place)
            again = KernelOverlay(lowers, maker.place / "again", maker.place / "merged again", ())
            again.mount()
            try:
                assert difference(expected, carried(again.merged)) == ""
            finally:
                again.close()

    umask = os.umask(0o022)
    try:
        show_the_same()
    finally:
        os.umask(umask)
