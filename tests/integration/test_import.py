"""`pyoverlay import`: a change that was exported comes back as a lower, which both overlays show as the tree it was made from."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from pyoverlay.testing import Directory, Entry, Overlay, OverlayFactory, Tree, make_tree, snapshot, witness
from pyoverlay.testing.mounts import command
from tests.integration.images import comparable, imported
from tests.integration.test_export import LOWER, change, export
from tests.posix.kernel_overlay import KernelOverlay
from tests.unit.archives import archive, device, file, saved_image

pytestmark = pytest.mark.root


@pytest.fixture
def lowers(overlay: OverlayFactory, tmp_path: Path) -> tuple[list[Path], dict[bytes, Entry]]:
    """The two layers of a change and of what it was made in, imported, top first; and the merged tree that they stand for."""
    mounted = overlay(LOWER)
    change(mounted.merged)
    base, top = tmp_path / "base.tar", tmp_path / "top.tar"
    mounted.umount()
    export(mounted.lower, "-o", base)
    mounted.mount()
    export(mounted.merged, "-o", top)
    said = imported("--devices", base, top, tmp_path / "store")
    assert said.stderr == ""
    assert said.stdout.count("\n") == 1
    return [Path(lower) for lower in said.stdout.strip().split(":")], comparable(mounted.merged)


@pytest.mark.parametrize("kind", [Overlay, KernelOverlay], ids=["ours", "the kernel's"])
def test_what_was_exported_comes_back(
    lowers: tuple[list[Path], dict[bytes, Entry]], tmp_path: Path, kind: type[Overlay | KernelOverlay]
) -> None:
    layers, expected = lowers
    for directory in ("upper", "merged"):
        (tmp_path / directory).mkdir()
    again = kind(tuple(layers), tmp_path / "upper", tmp_path / "merged")
    again.mount()
    try:
        assert comparable(again.merged) == expected
    finally:
        again.close()


def test_a_lower_alone_is_a_layer_and_is_not_touched_by_becoming_one(tmp_path: Path) -> None:
    for name, tree in (("lower", LOWER), ("out", {})):
        (tmp_path / name).mkdir()
        make_tree(tmp_path / name, tree)
    before = witness(tmp_path / "lower")
    layer = export(tmp_path / "lower").stdout
    assert witness(tmp_path / "lower") == before
    subprocess.run(["tar", "--xattrs", "-xpf", "-", "-C", tmp_path / "out"], input=layer, check=True)
    assert comparable(tmp_path / "out") == comparable(tmp_path / "lower")


@pytest.mark.parametrize("is_option", [False, True], ids=["LOWER", "lowerdir="])
def test_the_lowers_are_printed_as_mount_takes_them(tmp_path: Path, is_option: bool) -> None:
    store = tmp_path / "a:b\\c,d"
    (tmp_path / "layer.tar").write_bytes(archive(file(b"f", b"content")))
    printed = imported(tmp_path / "layer.tar", store).stdout.strip()
    for directory in ("upper", "merged"):
        (tmp_path / directory).mkdir()
    arguments = ["-o", f"lowerdir={printed}"] if is_option else [printed, tmp_path / "upper"]
    mount = subprocess.run(command("mount", *arguments, tmp_path / "merged"), check=False, capture_output=True)
    assert mount.returncode == 0, mount.stderr
    try:
        assert (tmp_path / "merged/f").read_bytes() == b"content"
    finally:
        subprocess.run(command("umount", tmp_path / "merged"), check=True)


def test_device_nodes_are_refused_unless_allowed(tmp_path: Path) -> None:
    saved = tmp_path / "image.tar"
    saved.write_bytes(archive(*saved_image([archive(device(b"null", 1, 3))])))
    refused = imported(saved, tmp_path / "store", check=False)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr == (
        f"pyoverlay: {saved}: null: a device node; --devices allows them; whoever can write to the layers can then write to the machine's "
        "disks\n"
    )
    (lower,) = imported("--devices", saved, tmp_path / "store").stdout.split()
    assert os.stat(Path(lower, "null")).st_rdev == os.makedev(1, 3)


def test_standard_input_is_a_source(tmp_path: Path) -> None:
    """`docker save app | pyoverlay import - DIR`."""
    saved = archive(*saved_image([archive(file(b"f", b"content"))]))
    argv = command("import", "-", tmp_path / "store")
    result = subprocess.run(argv, check=True, input=saved, capture_output=True, timeout=60)
    assert Path(result.stdout.decode().strip(), "f").read_bytes() == b"content"
    large = subprocess.run([*argv, "--max-size", "1K"], check=False, input=saved, capture_output=True, timeout=60)
    assert large.stderr.startswith(b"pyoverlay: -: more than 1024 bytes when unpacked (File too large)")


def test_usage_is_checked(tmp_path: Path) -> None:
    cases: dict[str, list[str | Path]] = {
        "Missing argument": [],
        "give at least one SOURCE, and DIR": [tmp_path],
        "'many' is no size; write 4096, 500M or 64G": ["--max-size", "many", tmp_path, tmp_path],
    }
    for reason, arguments in cases.items():
        result = imported(*arguments, check=False)
        assert (result.returncode, result.stdout) == (2, "")
        assert reason in result.stderr
    assert os.listdir(tmp_path) == []


def test_where_whiteout_devices_are_refused_they_are_files(tmp_path: Path) -> None:
    """As on the root of a container, which is a kernel overlay."""
    tree: Tree = {"lower": {}, "upper": {}, "merged": {}}
    make_tree(tmp_path, tree)
    kernel = KernelOverlay((tmp_path / "lower",), tmp_path / "upper", tmp_path / "merged", ())
    kernel.mount()
    try:
        layer = archive(file(b".wh.deleted"), file(b".wh.again"), file(b"again", b"x"), file(b".wh.d"), file(b"d/f", b"y"))
        (tmp_path / "layer.tar").write_bytes(layer)
        (lower,) = imported(tmp_path / "layer.tar", kernel.merged / "store").stdout.split()
        assert sorted(os.listdir(lower)) == [".wh.deleted", "again", "d"]
        make_tree(tmp_path, {"below": {"deleted": "", "again": "", "d": {"hidden": ""}}, "up": Directory(), "ours": {}})
        ours = Overlay((Path(lower), tmp_path / "below"), tmp_path / "up", tmp_path / "ours")
        ours.mount()
        try:
            assert sorted(snapshot(ours.merged)) == [b".", b"again", b"d", b"d/f"]
        finally:
            ours.close()
    finally:
        kernel.close()
