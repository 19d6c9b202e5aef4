"""The same layer, made by the kernel's overlay, by tar from an image's layer, and by hand: each reads back as the same tree."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from pyoverlay.testing import Directory, File, Overlay, Symlink, Tree, Whiteout, make_tree
from tests.integration.looks import OPAQUE, Shape, shape
from tests.posix.kernel_overlay import KernelOverlay

pytestmark = pytest.mark.root

BASE: Tree = {
    "kept": b"kept",
    "changed": b"old",
    "gone": b"gone",
    "gone directory": {"f": b"f"},
    "anew": {"old": b"old", "both": b"old"},
    "merged": {"kept": b"kept", "gone": b"gone", "deep": {"gone": b"gone", "kept": b"kept"}},
    "a file": b"file",
    "a directory": {"f": b"f"},
    "link": Symlink("old"),
}

EXPECTED: Shape = {
    "kept": b"kept",
    "changed": b"new",
    "anew": {"both": b"new"},
    "merged": {"kept": b"kept", "deep": {"kept": b"kept", "new": b"new"}},
    "a file": {"now": b"a directory"},
    "a directory": b"now a file",
    "link": "-> new",
}


def by_the_kernel(base: Path, layer: Path) -> None:
    """What the kernel's overlay writes when programs make these changes."""
    merged = layer.with_name("kernel merged")
    merged.mkdir()
    kernel = KernelOverlay((base,), layer, merged)
    kernel.mount()
    try:
        for name in ("gone", "merged/gone", "merged/deep/gone", "a file", "link"):
            (merged / name).unlink()
        for name in ("gone directory", "anew", "a directory"):
            shutil.rmtree(merged / name)
        for directory in ("anew", "a file"):
            (merged / directory).mkdir()
        for name in ("changed", "anew/both", "merged/deep/new"):
            (merged / name).write_bytes(b"new")
        (merged / "a file/now").write_bytes(b"a directory")
        (merged / "a directory").write_bytes(b"now a file")
        (merged / "link").symlink_to("new")
    finally:
        kernel.close()


def by_tar(_: Path, layer: Path) -> None:
    """A layer of an image, unpacked by tar(1), which knows nothing of whiteouts."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:

        def add(name: str, content: bytes | None = b"", target: str = "") -> None:
            member = tarfile.TarInfo(name)
            member.type = tarfile.SYMTYPE if target else tarfile.DIRTYPE if content is None else tarfile.REGTYPE
            member.mode, member.linkname, member.size = (0o755 if content is None else 0o644), target, len(content or b"")
            tar.addfile(member, io.BytesIO(content or b""))

        for name in (".wh.gone", ".wh.gone directory"):
            add(name)
        add("changed", b"new")
        add("anew", None)
        add("anew/.wh..wh..opq")
        add("anew/both", b"new")
        add("merged", None)
        add("merged/.wh.gone")
        add("merged/deep", None)
        add("merged/deep/.wh.gone")
        add("merged/deep/new", b"new")
        add("a file", None)
        add("a file/now", b"a directory")
        add("a directory", b"now a file")
        add("link", target="new")
    subprocess.run(["tar", "-x", "-C", layer], input=archive.getvalue(), check=True)


def by_hand(_: Path, layer: Path) -> None:
    """With mknod and setfattr, after the kernel's documentation."""
    make_tree(
        layer,
        {
            "gone": Whiteout(),
            "gone directory": Whiteout(),
            "changed": b"new",
            "anew": Directory({"both": b"new"}, xattrs={OPAQUE: b"y"}),
            "merged": {"gone": Whiteout(), "deep": {"gone": Whiteout(), "new": b"new"}},
            "a file": {"now": b"a directory"},
            "a directory": b"now a file",
            "link": Symlink("new"),
        },
    )


def by_hand_with_attributes(_: Path, layer: Path) -> None:
    """Where no device can be made: whiteouts are marked files, in directories that say so (Linux 6.7)."""
    holding = {OPAQUE: b"x"}
    gone = File(xattrs={"trusted.overlay.whiteout": b""})
    make_tree(
        layer,
        {
            "gone": gone,
            "gone directory": gone,
            "changed": b"new",
            "anew": Directory({"both": b"new"}, xattrs={OPAQUE: b"y"}),
            "merged": Directory({"gone": gone, "deep": Directory({"gone": gone, "new": b"new"}, xattrs=holding)}, xattrs=holding),
            "a file": {"now": b"a directory"},
            "a directory": b"now a file",
            "link": Symlink("new"),
        },
    )
    os.setxattr(layer, OPAQUE, b"x")


@pytest.mark.parametrize(
    ("make", "is_lower"),
    [
        *((make, True) for make in (by_the_kernel, by_tar, by_hand, by_hand_with_attributes)),
        # An upper is never read by the images' convention: names with `.wh.` are a program's own there.
        *((make, False) for make in (by_the_kernel, by_hand, by_hand_with_attributes)),
    ],
)
def test_a_layer_reads_back_whoever_made_it(tmp_path: Path, make: Callable[[Path, Path], None], is_lower: bool) -> None:
    base, layer, upper, merged = (tmp_path / name for name in ("base", "layer", "upper", "merged"))
    for directory in (base, layer, upper, merged):
        directory.mkdir()
    make_tree(base, BASE)
    make(base, layer)
    overlay = Overlay((layer, base), upper, merged) if is_lower else Overlay((base,), layer, merged)
    overlay.mount()
    try:
        assert shape(merged) == EXPECTED
    finally:
        overlay.close()
