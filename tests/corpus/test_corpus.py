"""Layers that others made are read right: as what was written says, and as the kernel's overlay reads them where it can."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pyoverlay.testing import Overlay, snapshot
from tests.corpus.builders import Layers, by_hand, by_tar, by_the_kernel, nested_in_the_kernels
from tests.integration.looks import Opaque, Shape, shape
from tests.posix.kernel_overlay import KernelOverlay

pytestmark = pytest.mark.root

BIG = b"data" * 5000

EXPECTED: dict[Callable[[Path], Layers], Shape] = {
    by_the_kernel: {
        "bin": {"tool": b"tool", "link": b"both"},  # a lower's names are together in the index, which belongs to an upper
        "etc": {"conf": b"conf", "keep.d": {}, "doc": {"a": b"a", "b": b"b", "big": BIG, "deeper": {"c": b"changed"}}},
        "var": {"log": b"a file now"},
    },
    nested_in_the_kernels: {"d": Opaque({"below": b"below"}), "f": b"f"},  # who made it inside sees that mark, and it hides nothing
    by_tar: {
        "bin": {"tool": b"tool", "link": b"tool"},
        "doc": {"new": b"new"},
        "etc": {"conf": b"conf", "keep.d": {"1": b"1", "2": b"2"}, "mine": b"mine"},
        "not.wh.a": b"is shown",
        ".wh.full": b"a file that is not empty is no whiteout",
    },
    by_hand: {
        "a": {"b": {"below": b"below\n", "symlink": "-> /nowhere"}},
        "copy": b"d" * 4096,
        "data": {"file": b"d" * 4096},
        "moved": {"deep": {"file": b"deep\n"}, "own": b"own\n"},
        "opaque": {},
        "x": {"empty": b""},
    },
}
READ_BY_THE_KERNEL = [builder for builder in EXPECTED if builder is not by_tar]


@pytest.fixture
def merged(tmp_path: Path) -> Path:
    (tmp_path / "view").mkdir()
    return tmp_path / "view"


@pytest.mark.parametrize("place", ["as lowers", "under an upper", "as the upper"])
@pytest.mark.parametrize("builder", EXPECTED, ids=lambda builder: str(builder.__name__))
def test_what_others_made_is_read_right(builder: Callable[[Path], Layers], place: str, tmp_path: Path, merged: Path) -> None:
    layers = builder(tmp_path)
    if place == "as the upper" and builder is by_tar:
        layers = (_empty(tmp_path), *layers)  # `.wh.` names are ordinary in an upper
    upper = {"as lowers": None, "under an upper": tmp_path / "upper", "as the upper": layers[0]}[place]
    if place == "under an upper":
        (tmp_path / "upper").mkdir()
    overlay = Overlay(layers[1:] if place == "as the upper" else layers, upper, merged)
    overlay.mount()
    try:
        assert shape(merged) == EXPECTED[builder]
    finally:
        overlay.close()


def _empty(base: Path) -> Path:
    (base / "empty").mkdir()
    return base / "empty"


@pytest.mark.parametrize("builder", READ_BY_THE_KERNEL, ids=lambda builder: str(builder.__name__))
def test_the_kernel_reads_them_the_same(builder: Callable[[Path], Layers], tmp_path: Path, merged: Path) -> None:
    layers = builder(tmp_path)
    seen = []
    (tmp_path / "upper").mkdir()
    for overlay in (Overlay(layers, None, merged), KernelOverlay(layers, tmp_path / "upper", merged, ("metacopy=on", "redirect_dir=on"))):
        overlay.mount()
        try:
            seen.append(snapshot(merged))
            seen[-1].pop(b".")
        finally:
            overlay.close()
    assert seen[0] == seen[1]


def test_marks_of_a_nested_overlay_show_unescaped_and_mean_nothing(tmp_path: Path, merged: Path) -> None:
    overlay = Overlay(nested_in_the_kernels(tmp_path), None, merged)
    overlay.mount()
    try:
        assert os.getxattr(merged / "d", "trusted.overlay.opaque") == b"y"
        assert os.listxattr(merged / "f") == ["trusted.overlay.metacopy"]
    finally:
        overlay.close()
