"""`pyoverlay export`: a mount is changed, its layer is unpacked over a copy of the lower by GNU tar, and both show the same tree."""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from pyoverlay.testing import (
    Device,
    Directory,
    Entry,
    Fifo,
    File,
    HardLink,
    Overlay,
    OverlayFactory,
    Socket,
    Symlink,
    Tree,
    Whiteout,
    make_tree,
    snapshot,
)
from pyoverlay.testing.mounts import command
from tests.posix.kernel_overlay import FULL, KernelOverlay

pytestmark = pytest.mark.root

LOWER: Tree = {
    "f": "from the lower",
    "gone": "x",
    "d": {"a": "1", "b": "2", "sub": {"c": "3"}},
    "opaque": {"old": "x"},
    "type": {"was": "a directory"},
    "h1": "linked",
    "h2": HardLink("h1"),
    "moved": {"kept": "x", "dropped": "y", "deep": {"er": File("z", xattrs={"user.k": b"v"})}, "l1": "l", "l2": HardLink("moved/l1")},
    "target": {"hidden": "by what is renamed over it"},
    "link": Symlink("f"),
}


def export(*arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess[bytes]:
    result = subprocess.run(command("export", *arguments), check=False, capture_output=True, timeout=60)
    if check:
        assert result.returncode == 0, result.stderr.decode()
    return result


def names(archive: bytes) -> list[str]:
    with tarfile.open(fileobj=io.BytesIO(archive), errors="surrogateescape") as tar:
        return [member.name + "/" * member.isdir() for member in tar.getmembers()]


def applied(lower: Tree, archive: bytes, place: Path) -> Path:
    """A lower with the layer on top: its whiteouts and opaque marks by hand, all else by GNU tar."""
    place.mkdir()
    make_tree(place, lower)
    for name in names(archive):
        path = place / name
        if path.name == ".wh..wh..opq":
            subprocess.run(["rm", "-rf", path.parent], check=True)
        elif path.name.startswith(".wh."):
            subprocess.run(["rm", "-rf", path.with_name(path.name[4:])], check=True)
        elif not name.endswith("/") and path.is_dir():
            subprocess.run(["rm", "-rf", path], check=True)
    tar: list[str | Path] = ["tar", "--xattrs", "--xattrs-include=*", "--numeric-owner", "--exclude=.wh.*", "-xpf", "-", "-C", place]
    subprocess.run(tar, input=archive, check=True)
    return place


def seen(tree: Path) -> dict[bytes, Entry]:
    """A snapshot without what a layer does not carry: the root's own attributes, the overlay's marks, sockets; hard links are compared by
    name, but a lower's other names do not count.
    """
    found = snapshot(tree)
    del found[b"."]
    return {path: replace(entry, nlink=0) for path, entry in found.items() if entry.kind != "s"}


def change(merged: Path) -> None:
    """Everything that a layer can say."""
    (merged / "f").write_text("changed")
    (merged / "gone").unlink()
    (merged / "d/a").unlink()
    (merged / "d/sub/c").chmod(0o4751)
    subprocess.run(["rm", "-r", merged / "opaque"], check=True)
    make_tree(merged, {"opaque": {"new": "y"}})
    subprocess.run(["rm", "-r", merged / "type"], check=True)
    make_tree(
        merged,
        {
            "type": Symlink("elsewhere"),
            "new": Directory(
                entries={
                    "file": File("content", uid=70000, gid=3_000_000, mode=0o640, xattrs={"user.binary": bytes(range(256))}),
                    "other name": HardLink("new/file"),
                    "fifo": Fifo(),
                    "socket": Socket(),
                    "zero": Device("c", 1, 5),
                    "disk": Device("b", 259, 70000),
                    "n" * 255: "a long name",
                    "\udcff\xe4": "no UTF-8",
                    "sparse": File("begin", size=1 << 20),
                    "trusted": File("x", xattrs={"trusted.mine": b"1"}),
                },
                mode=0o3775,
                xattrs={"user.on a directory": b""},
            ),
        },
    )
    os.setxattr(merged / "new/trusted", "security.capability", bytes.fromhex("0100000202000000000000000000000000000000"))
    os.link(merged / "h1", merged / "h3")
    (merged / "h2").unlink()
    subprocess.run(["rm", "-r", merged / "target/hidden"], check=True)
    os.rename(merged / "moved", merged / "target")
    (merged / "target/dropped").unlink()
    (merged / "target/added").write_text("new")
    (merged / "link").unlink()


@pytest.fixture
def changed(overlay: OverlayFactory) -> Overlay:
    mounted = overlay(LOWER)
    change(mounted.merged)
    return mounted


def test_the_layer_over_the_lower_is_the_merged_tree(changed: Overlay, tmp_path: Path) -> None:
    layer = export(changed.merged)
    assert seen(applied(LOWER, layer.stdout, tmp_path / "applied")) == seen(changed.merged)
    assert layer.stderr == b"pyoverlay: sockets left out, which no archive can hold: 1\n"


def test_members_are_in_dockers_order_and_spelling(overlay: OverlayFactory) -> None:
    mounted = overlay({"a": {"x": "1"}, "b": "2", "e": "3"})
    subprocess.run(["rm", "-r", mounted.merged / "a"], check=True)
    make_tree(mounted.merged, {"a": Directory(entries={"z": "", ".hidden": ""}, mode=0o700), "c": {"d": ""}})
    (mounted.merged / "b").unlink()
    archive = export(mounted.merged).stdout
    assert names(archive) == ["a/", "a/.wh..wh..opq", "a/.hidden", "a/z", ".wh.b", "c/", "c/.wh..wh..opq", "c/d"]
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        opaque, whiteout = tar.getmember("a/.wh..wh..opq"), tar.getmember(".wh.b")
    assert (opaque.mode, opaque.mtime, opaque.size) == (0o700, 0, 0)
    assert (whiteout.mode, whiteout.mtime, whiteout.size) == (0o600, 0, 0)


def test_a_renamed_directory_is_whole_and_its_old_name_deleted(changed: Overlay) -> None:
    found = names(export(changed.merged).stdout)
    assert ".wh.moved" in found
    assert [name for name in found if name.startswith("target/")] == [
        *("target/", "target/.wh..wh..opq", "target/added", "target/deep/", "target/deep/er", "target/kept", "target/l1", "target/l2")
    ]


def test_the_same_upper_gives_the_same_bytes(changed: Overlay, tmp_path: Path) -> None:
    first = export(changed.merged).stdout
    changed.remount()
    assert export(changed.merged).stdout == first
    changed.umount()
    assert export("--lower", changed.lower, changed.writable).stdout == first
    subprocess.run(["cp", "-a", changed.writable, tmp_path / "copy"], check=True)
    assert export("--lower", changed.lower, tmp_path / "copy").stdout == first


def test_mtime_is_given_to_every_member(changed: Overlay) -> None:
    with tarfile.open(fileobj=io.BytesIO(export("--mtime", "86400", changed.merged).stdout)) as tar:
        assert {member.mtime for member in tar.getmembers()} == {86400}


@pytest.mark.parametrize("arguments", [["export"], ["commit", "-n"]])
def test_a_time_that_no_date_can_have_is_wrong_usage(tmp_path: Path, arguments: list[str]) -> None:
    result = subprocess.run(command(*arguments, "--mtime", "253402300800", tmp_path, tmp_path), check=False, capture_output=True, text=True)
    assert result.returncode == 2
    assert "'--mtime': 253402300800 is in no year from 1 to 9999" in result.stderr


def test_holes_are_kept_when_asked_for(overlay: OverlayFactory, tmp_path: Path) -> None:
    mounted = overlay({})
    make_tree(mounted.merged, {"sparse": File("begin", size=64 << 20)})
    sparse = export("--sparse", mounted.merged).stdout
    assert len(sparse) < 1 << 20
    assert seen(applied({}, sparse, tmp_path / "applied")) == seen(mounted.merged)
    assert (tmp_path / "applied/sparse").stat().st_blocks * 512 < 1 << 20
    assert len(export(mounted.merged).stdout) > 64 << 20


def test_a_layer_made_by_the_kernels_overlay_is_read_too(tmp_path: Path) -> None:
    """Made by hand in the kernel's format, as anybody's upper may be: opaque, whiteouts of both kinds, escaped attributes."""
    upper = tmp_path / "upper"
    upper.mkdir()
    tree: Tree = {
        "deleted": Whiteout(),
        "o": Directory(entries={"n": "1"}, xattrs={"trusted.overlay.opaque": b"y"}),
        "x": Directory(
            entries={"w": File(xattrs={"trusted.overlay.whiteout": b"y"}), "empty": ""},
            xattrs={"trusted.overlay.opaque": b"x"},
        ),
        "user": File("a mark that a program set", xattrs={"trusted.overlay.overlay.opaque": b"y", "user.own": b"1"}),
    }
    make_tree(upper, tree)
    archive = export(upper).stdout
    assert names(archive) == [".wh.deleted", "o/", "o/.wh..wh..opq", "o/n", "user", "x/", "x/empty", "x/.wh.w"]
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        assert tar.getmember("user").pax_headers == {"SCHILY.xattr.user.own": "1"}


def test_a_file_appears_whole_or_not_at_all(overlay: OverlayFactory, tmp_path: Path) -> None:
    mounted = overlay({})
    (mounted.merged / "f").write_text("1")
    layer = tmp_path / "layer.tar"
    export(mounted.merged, "-o", layer)
    assert names(layer.read_bytes()) == ["f"]
    before = layer.read_bytes()
    (mounted.merged / ".wh.x").write_text("")
    refused = export(mounted.merged, "-o", layer, check=False)
    assert (refused.returncode, refused.stdout) == (1, b"")
    assert refused.stderr.decode().strip() == (
        f"pyoverlay: {mounted.merged}/.wh.x: a layer cannot hold a name that begins with .wh.: it would delete another "
        "(Invalid argument); rename it"
    )
    assert layer.read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["layer.tar", "overlay0"]


def test_what_is_no_file_is_written_to_and_not_replaced(overlay: OverlayFactory, tmp_path: Path) -> None:
    """`-o /dev/null` as root must not leave a file there; a symlink stays one."""
    mounted = overlay({})
    (mounted.merged / "f").write_text("1")
    make_tree(tmp_path, {"null": Device("c", 1, 3, 0o666), "link": Symlink("layer.tar")})
    export(mounted.merged, "-o", tmp_path / "null")
    assert os.stat(tmp_path / "null").st_rdev == os.makedev(1, 3)
    export(mounted.merged, "-o", tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert names((tmp_path / "layer.tar").read_bytes()) == ["f"]


def test_a_bare_upper_with_a_renamed_directory_needs_its_lowers(changed: Overlay) -> None:
    changed.umount()
    refused = export(changed.writable, check=False)
    assert refused.returncode == 1
    assert b"part of it lies in a lower, and the lowers are not known; mount it" in refused.stderr


@pytest.mark.parametrize("options", [[], ["-o", "userxattr"]])
def test_marks_are_read_as_the_mount_spells_them(overlay: OverlayFactory, options: list[str]) -> None:
    mounted = overlay({"d": {"old": "1"}}, options=options)
    subprocess.run(["rm", "-r", mounted.merged / "d"], check=True)
    (mounted.merged / "d").mkdir()
    assert names(export(mounted.merged).stdout) == ["d/", "d/.wh..wh..opq"]
    mounted.umount()
    if options:
        refused = export(mounted.writable, check=False)
        assert refused.returncode == 1
        assert refused.stderr.endswith(b"of a mount made with userxattr (Invalid argument); say --userxattr\n")
    bare = export(*(["--userxattr"] if options else []), mounted.writable)
    assert names(bare.stdout) == ["d/", "d/.wh..wh..opq"]


def test_what_is_no_upper_is_refused_in_one_line(overlay: OverlayFactory, tmp_path: Path) -> None:
    mounted = overlay({"f": "1"}, read_only=True)
    for path, reason in (
        (mounted.merged, "mounted read-only: there is no upper, and nothing has changed (Read-only file system)"),
        (tmp_path / "none", "neither a mount nor an upper (No such file or directory)"),
        (Path("/dev/null"), "neither a mount nor an upper (Not a directory)"),
    ):
        refused = export(path, check=False)
        assert (refused.returncode, refused.stdout) == (1, b"")
        assert refused.stderr.decode().startswith(f"pyoverlay: {path}: {reason}")
        assert refused.stderr.count(b"\n") == 1


METACOPIES: Tree = {"d": {"f": "data of the lower", "sub": {"g": "more"}}, "e": {"f": "data in place"}}


def make_metacopies(merged: Path) -> None:
    """Attributes alone change: no data are copied up; then the directory is renamed."""
    for name in ("d/f", "d/sub/g", "e/f"):
        (merged / name).chmod(0o4711)
    os.rename(merged / "d/f", merged / "d/renamed")
    os.rename(merged / "d/sub", merged / "sub")


def test_a_metacopy_file_is_exported_with_its_data(overlay: OverlayFactory, tmp_path: Path) -> None:
    mounted = overlay(METACOPIES, options=["-o", "metacopy=on"])
    make_metacopies(mounted.merged)
    assert os.getxattr(mounted.writable / "d/renamed", "trusted.overlay.metacopy") == b""
    layer = export(mounted.merged).stdout
    assert seen(applied(METACOPIES, layer, tmp_path / "applied")) == seen(mounted.merged)


def test_metacopy_files_and_redirects_of_the_kernel_are_exported_with_their_data(tmp_path: Path) -> None:
    for name, tree in (("lower", METACOPIES), ("upper", {}), ("merged", {})):
        (tmp_path / name).mkdir()
        make_tree(tmp_path / name, tree)
    kernel = KernelOverlay((tmp_path / "lower",), tmp_path / "upper", tmp_path / "merged", (*FULL, "metacopy=on"))
    kernel.mount()
    try:
        make_metacopies(kernel.merged)
        expected = seen(kernel.merged)
    finally:
        kernel.close()
    assert os.getxattr(tmp_path / "upper/d/renamed", "trusted.overlay.metacopy") == b""
    layer = export("--lower", tmp_path / "lower", tmp_path / "upper").stdout
    assert seen(applied(METACOPIES, layer, tmp_path / "applied")) == expected
    refused = export(tmp_path / "upper", check=False)
    assert refused.returncode == 1
    assert b"part of it lies in a lower, and the lowers are not known" in refused.stderr


@pytest.mark.parametrize("is_looked_up", [False, True])
def test_of_a_lowers_hard_links_those_are_exported_that_are_in_the_upper(overlay: OverlayFactory, is_looked_up: bool) -> None:
    """As the next mount shows it: a name that nobody had looked up before the copy-up still leads to the old file then."""
    mounted = overlay({"h1": "linked", "h2": HardLink("h1")})
    if is_looked_up:
        (mounted.merged / "h2").stat()
    with open(mounted.merged / "h1", "a") as file:
        file.write(" and changed")
    with tarfile.open(fileobj=io.BytesIO(export(mounted.merged).stdout)) as tar:
        found = {member.name: (member.type, member.size, member.linkname) for member in tar.getmembers()}
    alone = {"h1": (tarfile.REGTYPE, 18, "")}
    assert found == (alone | {"h2": (tarfile.LNKTYPE, 0, "h1")} if is_looked_up else alone)


def test_an_upper_whose_whiteouts_are_files_is_exported_the_same(overlay: OverlayFactory) -> None:
    """As fuse-overlayfs wrote them; `-o whiteouts=aufs` says that they are what they look like."""
    upper: Tree = {".wh.f": File(mode=0), "d": {".wh..wh..opq": File(mode=0o600), "new": "5"}}
    mounted = overlay({"f": "1", "d": {"old": "2"}, "e": {"gone": "3", "kept": "4"}}, upper=upper, options=["-o", "whiteouts=aufs"])
    (mounted.merged / "e/gone").unlink()
    assert sorted(snapshot(mounted.merged)) == [b".", b"d", b"d/new", b"e", b"e/kept"]
    assert names(export(mounted.merged).stdout) == ["d/", "d/.wh..wh..opq", "d/new", "e/", "e/.wh.gone", ".wh.f"]
