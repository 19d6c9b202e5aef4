"""Layers unpacked into plain directories: what an archive says becomes a lower, and what a hostile one says becomes nothing."""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyoverlay.image.tar_member import Kind, Member
from pyoverlay.image.tar_reader import TarReader
from pyoverlay.image.unpacking import Terms, Unacceptable, Unpacked, unpack
from pyoverlay.testing import is_whiteout, make_tree, snapshot, witness
from tests.unit.archives import Item, archive, device, directory, file, link, symlink

IS_ROOT = os.geteuid() == 0
MARKS = "trusted.overlay." if IS_ROOT else "user.overlay."

TERMS = Terms()


class Layer:
    """A directory to unpack in, with something beside it that must stay as it is."""

    def __init__(self, place: Path) -> None:
        make_tree(place, {"outside": {"file": "untouched"}, "layer": {}})
        self.root = place / "layer"
        self._place = place
        self._outside = witness(place / "outside")

    def unpack(self, *items: Item, terms: Terms = TERMS) -> Unpacked:
        fd = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY)
        try:
            return unpack(TarReader(io.BytesIO(archive(*items)).read), fd, terms)
        finally:
            os.close(fd)

    def assert_nothing_outside(self) -> None:
        assert sorted(os.listdir(self._place)) == ["layer", "outside"]
        assert witness(self._place / "outside") == self._outside

    def __truediv__(self, name: str) -> Path:
        return self.root / name


@pytest.fixture
def layer(tmp_path: Path) -> Iterator[Layer]:
    made = Layer(tmp_path)
    yield made
    made.assert_nothing_outside()


def own(**more: int) -> dict[str, int]:
    return {"uid": os.geteuid(), "gid": os.getegid(), **more}


def opaque(path: Path) -> bytes | None:
    try:
        return os.getxattr(path, MARKS + "opaque")
    except OSError:
        return None


def test_every_kind_of_object_is_made_with_its_attributes(layer: Layer) -> None:
    done = layer.unpack(
        directory(b"./", 0o711, **own(mtime_ns=10**18)),
        directory(b"d", 0o555, **own(mtime_ns=2 * 10**18)),
        file(b"d/f", b"content", mode=0o640, xattrs=((b"user.a", bytes(range(256))),), **own(mtime_ns=1_234_567_890_987_654_321)),
        link(b"d/h", b"./d/f"),
        symlink(b"d/l", b"/anywhere/at/all"),
        Member(b"d/p", Kind.FIFO, 0o604),
        (Member(b"d/s", Kind.FILE, size=10 << 20, extents=((5 << 20, 2),)), b"xy"),
    )
    assert done == Unpacked(members=7)
    seen = snapshot(layer.root)
    assert (seen[b"."].mode, seen[b"."].mtime_ns) == (0o711, 10**18)
    assert (seen[b"d"].mode, seen[b"d"].mtime_ns) == (0o555, 2 * 10**18)
    assert (seen[b"d/f"].mode, seen[b"d/f"].mtime_ns) == (0o640, 1_234_567_890_987_654_321)
    assert seen[b"d/f"].xattrs == (("user.a", bytes(range(256))),)
    assert seen[b"d/h"].first_name == b"d/f"
    assert seen[b"d/l"].target == b"/anywhere/at/all"
    assert (seen[b"d/p"].kind, seen[b"d/p"].mode) == ("p", 0o604)
    assert (layer / "d/s").stat().st_size == 10 << 20
    assert (layer / "d/s").stat().st_blocks * 512 < 1 << 20


@pytest.mark.root
def test_owners_set_id_bits_and_capabilities_are_kept_by_root(layer: Layer) -> None:
    capability = bytes.fromhex("0100000202000000000000000000000000000000")
    layer.unpack(
        file(b"f", b"x", mode=0o6755, uid=70000, gid=3_000_000_000, xattrs=((b"security.capability", capability),)),
        directory(b"d", 0o3777, uid=1, gid=2),
        symlink(b"l", b"f"),
    )
    seen = snapshot(layer.root)
    assert (seen[b"f"].mode, seen[b"f"].uid, seen[b"f"].gid) == (0o6755, 70000, 3_000_000_000)
    assert seen[b"f"].xattrs == (("security.capability", capability),)
    assert (seen[b"d"].mode, seen[b"d"].uid, seen[b"d"].gid) == (0o3777, 1, 2)


@pytest.mark.skipif(IS_ROOT, reason="root keeps every owner")
def test_a_user_gets_no_program_that_runs_as_that_user_for_everybody(layer: Layer) -> None:
    done = layer.unpack(file(b"f", b"x", mode=0o6755, uid=0, xattrs=((b"security.capability", b"x"),)))
    assert done.disarmed == 1
    assert stat.S_IMODE((layer / "f").stat().st_mode) == 0o755


def test_directories_that_the_archive_forgot_are_made(layer: Layer) -> None:
    layer.unpack(file(b"a/b/f", b"x", **own()), directory(b"a", 0o700, **own(mtime_ns=10**18)))
    seen = snapshot(layer.root)
    assert (seen[b"a"].mode, seen[b"a"].mtime_ns, seen[b"a/b"].mode, seen[b"a/b"].mtime_ns) == (0o700, 10**18, 0o755, 0)


def test_whiteouts_and_opaque_marks_are_the_kernels(layer: Layer) -> None:
    layer.unpack(directory(b"d", **own()), file(b"d/.wh..wh..opq"), file(b"d/.wh.a"), file(b"e/.wh.b"), device(b"c", 0, 0))
    assert opaque(layer / "d") == b"y"
    assert opaque(layer / "e") is None
    assert [is_whiteout(layer / name) for name in ("d/a", "e/b", "c")] == [True] * 3
    assert sorted(os.listdir(layer / "d")) == ["a"]


@pytest.mark.parametrize("is_first", [True, False])
def test_a_whiteout_hides_what_lies_below_and_not_what_the_layer_has(layer: Layer, is_first: bool) -> None:
    """OCI layer.md: what is in the same layer "can only be hidden by whiteout files in subsequent layers"."""
    whiteouts = [file(b".wh.f"), file(b".wh.d"), file(b".wh.implied")]
    objects = [file(b"f", b"x", **own()), directory(b"d", **own()), file(b"implied/f", b"y", **own())]
    layer.unpack(*([*whiteouts, *objects] if is_first else [*objects, *whiteouts]))
    assert (layer / "f").read_bytes() == b"x"
    assert (opaque(layer / "d"), opaque(layer / "implied")) == (b"y", b"y")
    assert sorted(os.listdir(layer.root)) == ["d", "f", "implied"]


def test_an_opaque_root_is_a_file_since_the_kernel_looks_for_no_mark_there(layer: Layer) -> None:
    layer.unpack(file(b".wh..wh..opq"))
    assert os.listdir(layer.root) == [".wh..wh..opq"]


def test_what_aufs_kept_for_itself_is_left_out(layer: Layer) -> None:
    layer.unpack(file(b".wh..wh.aufs"), file(b".wh..wh.orph", b"x"))
    assert os.listdir(layer.root) == []


def test_attributes_that_would_be_marks_stay_a_programs_own(layer: Layer) -> None:
    """`redirect` in a lower could show any file of the machine's to whoever reads the mount."""
    forged = ((b"user.overlay.redirect", b"/secret"), (b"trusted.overlay.opaque", b"y"), (b"trusted.other", b"1"), (b"security.ima", b"x"))
    layer.unpack(directory(b"d", xattrs=forged, **own()))
    names = sorted(os.listxattr(layer / "d"))
    expected = ["trusted.other", "trusted.overlay.overlay.opaque"] if IS_ROOT else []
    assert names == [*expected, "user.overlay.overlay.redirect"]


@pytest.mark.parametrize(
    ("items", "reason"),
    [
        ([file(b"/etc/passwd")], "an absolute path"),
        ([directory(b"/")], "an absolute path"),
        ([file(b"../outside/file")], "a path that leads upwards"),
        ([file(b"d/../../outside/file")], "a path that leads upwards"),
        ([directory(b"..")], "a path that leads upwards"),
        ([file(b"")], "a member without a name"),
        ([file(b".")], "the root of a layer is a directory"),
        ([symlink(b".", b"/")], "the root of a layer is a directory"),
        ([symlink(b"l", b"../outside"), file(b"l/file", b"x")], "its path leads through a symbolic link"),
        ([symlink(b"l", b"../outside"), file(b"l/.wh.file")], "its path leads through a symbolic link"),
        ([symlink(b"l", b"../outside"), file(b"l/new/file", b"x")], "its path leads through a symbolic link"),
        ([symlink(b"l", b"../outside"), directory(b"l")], "the archive has this name twice"),
        ([symlink(b"l", b"../outside/file"), file(b"l", b"x")], "the archive has this name twice"),
        ([symlink(b"l", b"../outside/file"), link(b"h", b"l/file")], "its path leads through something that is no directory"),
        ([directory(b"d"), symlink(b"d", b"../outside")], "the archive has this name twice"),
        ([link(b"h", b"../outside/file")], "a path that leads upwards"),
        ([link(b"h", b"/etc/passwd")], "an absolute path"),
        ([link(b"h", b"missing")], "a hard link to 'missing', which the layer does not have"),
        ([link(b"h", b"no/such/file")], "which the layer does not have"),
        ([directory(b"d"), link(b"h", b"d")], "which the layer does not have"),
        ([directory(b"d"), link(b"h", b".")], "which the layer does not have"),
        ([file(b".wh.w"), link(b"h", b"w")], "which the layer does not have"),
        ([file(b"f"), file(b"f")], "the archive has this name twice"),
        ([file(b"f"), directory(b"f")], "the archive has this name twice"),
        ([file(b"f"), link(b"f", b"f")], "the archive has this name twice"),
        ([directory(b"f"), file(b"f")], "the archive has this name twice"),
        ([file(b"f"), file(b"f/g")], "its path leads through something that is no directory"),
        ([file(b"f"), file(b"f/g/h")], "its path leads through something that is no directory"),
        ([device(b"null")], "a device node"),
        ([Member(b"sda", Kind.BLOCK_DEVICE, device=(8, 0))], "a device node"),
        ([file(b"n" * 256)], "its name is too long"),
        ([file(b"n/" * 200 + b"x" * 4000)], "its name is too long"),
        ([file(b"n/" * 300 + b"x")], "a path of more than 256 steps"),
        ([file(b"a\0b" + b"n" * 100)], "a path with a zero byte"),
        ([symlink(b"l", b"")], "a symbolic link without a target"),
        ([symlink(b"l", b"t" * 4096)], "a symbolic link's target of more than 4095 bytes"),
        ([file(b".wh.")], "a whiteout of no name"),
        ([file(b"d/.wh...")], "a whiteout of no name"),
        ([file(b"d/.wh..")], "a whiteout of no name"),
        ([directory(b".wh.d")], "a directory whose name begins with .wh."),
        ([file(b".wh.d/f")], "a directory whose name begins with .wh."),
        ([file(b"%d" % number) for number in range(11)], "more than 10 members"),
        ([file(b"d/" * 10 + b"f")], "more than 10 members"),
    ],
)
def test_what_is_hostile_is_refused(layer: Layer, items: list[Item], reason: str) -> None:
    with pytest.raises(Unacceptable) as refused:
        layer.unpack(*items, terms=Terms(members=10))
    assert reason in refused.value.reason


@pytest.mark.root
def test_devices_are_made_when_allowed(layer: Layer) -> None:
    layer.unpack(device(b"null", 1, 3), Member(b"sda", Kind.BLOCK_DEVICE, 0o600, device=(8, 0)), terms=Terms(takes_devices=True))
    seen = snapshot(layer.root)
    assert (seen[b"null"].kind, seen[b"null"].rdev) == ("c", os.makedev(1, 3))
    assert (seen[b"sda"].kind, seen[b"sda"].rdev) == ("b", os.makedev(8, 0))


def test_an_error_of_the_machine_names_the_member(layer: Layer) -> None:
    """Capabilities that are none; an ACL that is none."""
    attribute = b"security.capability" if IS_ROOT else b"system.posix_acl_access"
    with pytest.raises(OSError, match=r"Invalid argument|not supported") as failed:
        layer.unpack(file(b"d/f", xattrs=((attribute, b"no such"),), **own()))
    assert failed.value.filename == "d/f"
