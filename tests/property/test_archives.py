"""Whatever an archive or an image says, in whatever order: it is unpacked inside its directory or refused, and all else stays as it was."""

from __future__ import annotations

import io
import json
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyoverlay.core.calls import Calls, remove_tree
from pyoverlay.errors import Refusal
from pyoverlay.image.importing import Wanted, import_into
from pyoverlay.image.sources import architecture
from pyoverlay.image.store import Store
from pyoverlay.image.tar_member import BLOCK, Kind, Member, checksum
from pyoverlay.image.tar_reader import MalformedArchive, TarReader
from pyoverlay.image.unpacking import Terms, Unacceptable, unpack
from pyoverlay.testing import make_tree, witness
from tests.property.draws import SEQUENCES, drawn
from tests.unit.archives import Item, archive, config_of, digest, directory, file, symlink

ARCHIVES = 2 * SEQUENCES
pytestmark = pytest.mark.timeout(60 + ARCHIVES // 10)
OWN = {"uid": os.geteuid(), "gid": os.getegid()}

# Few names, so that members meet one another; some lead out, through links or by themselves.
NAMES = st.sampled_from([b"a", b"b", b"l", b"..", b".", b"", b".wh.a", b".wh.l", b".wh..wh..opq", b".wh...", b"outside", b"file"])
PATHS = st.lists(NAMES, min_size=1, max_size=4).map(b"/".join)
TARGETS = PATHS | st.sampled_from([b"../outside", b"/", b"..", b"../outside/file", b"/etc/passwd"])
ATTRIBUTES = st.sampled_from([(), ((b"user.overlay.redirect", b"/"),), ((b"trusted.overlay.opaque", b"y"),), ((b"user.x", b"1"),)])

DEVICES = st.sampled_from([(0, 0), (1, 3)])

MEMBERS: st.SearchStrategy[Item] = st.one_of(
    st.builds(lambda name, content, xattrs: file(name, content, xattrs=xattrs, **OWN), PATHS, st.binary(max_size=9), ATTRIBUTES),
    st.builds(lambda name, mode, xattrs: directory(name, mode, xattrs=xattrs, **OWN), PATHS, st.integers(0, 0o7777), ATTRIBUTES),
    st.builds(symlink, PATHS, TARGETS),
    st.builds(lambda name, target: Member(name, Kind.LINK, target=target), PATHS, TARGETS),
    st.builds(lambda name, kind, device: Member(name, kind, device=device), PATHS, st.sampled_from(Kind), DEVICES),
)


@contextmanager
def jail() -> Iterator[tuple[Path, int]]:
    """A place with a directory to unpack in and one beside it, and a descriptor of the first; all of it goes at the end."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        make_tree(place, {"outside": {"file": "untouched", "l": {}}, "layer": {}})
        fd = os.open(place / "layer", os.O_RDONLY | os.O_DIRECTORY)
        try:
            yield place, fd
        finally:
            for left in os.listdir(fd):
                remove_tree(Calls(), fd, os.fsencode(left))
            os.close(fd)


def assert_harmless(layer: Path) -> None:
    """No device but whiteouts, no name that only an archive has, and no mark that it brought along."""
    for above, directories, files in os.walk(layer):
        for name in (*directories, *files):
            path = Path(above, name)
            st = path.lstat()
            assert not stat.S_ISBLK(st.st_mode)
            assert not stat.S_ISCHR(st.st_mode) or st.st_rdev == 0
            assert not name.startswith(".wh.") or name == ".wh..wh..opq"
            assert not any(attribute.endswith("overlay.redirect") for attribute in marks_of(path))


def marks_of(path: Path) -> list[str]:
    """Attributes that one of the overlay's mounts would take for a mark."""
    names = os.listxattr(path, follow_symlinks=False)
    return [name for name in names if name.startswith(("trusted.overlay.", "user.overlay.")) and ".overlay.overlay." not in name]


@drawn(ARCHIVES)
@given(st.lists(MEMBERS, max_size=8))
def test_no_archive_reaches_outside(members: list[Item]) -> None:
    with jail() as (place, fd):
        before = witness(place / "outside")
        try:
            unpack(TarReader(io.BytesIO(archive(*members)).read), fd, Terms())
        except Unacceptable:
            pass
        assert witness(place / "outside") == before
        assert sorted(os.listdir(place)) == ["layer", "outside"]
        assert_harmless(place / "layer")


BEGINNING = archive(
    directory(b"d", 0o755, **OWN),
    file(b"d/" + b"n" * 120, b"content", xattrs=((b"user.a", b"1"),), mtime_ns=1_500_000_000, **OWN),
    symlink(b"l", b"../outside"),
    (Member(b"s", Kind.FILE, size=9999, extents=((5, 600), (700, 3))), b"y" * 603),
    Member(b"h", Kind.LINK, target=b"s"),
)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A good archive with some bytes changed and cut off somewhere; the checksums of its headers are right all the same."""
    data = bytearray(BEGINNING)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(data) - 1))
        data[place] = draw(st.integers(0, 255))
    for start in range(0, len(data) - BLOCK, BLOCK):
        block = bytes(data[start : start + BLOCK])
        if block[257:262] == b"ustar":
            data[start + 148 : start + 156] = b"%06o\0 " % checksum(block)
    return bytes(data[: draw(st.integers(0, len(data)) | st.just(len(data)))])


@drawn(ARCHIVES)
@given(damaged())
def test_damage_is_refused_and_never_an_accident(data: bytes) -> None:
    """What comes out is a refusal or what the system says of a file (an owner or a time that it cannot hold), and nothing else."""
    with jail() as (place, fd):
        before = witness(place / "outside")
        try:
            unpack(TarReader(io.BytesIO(data).read), fd, Terms())
        except (Unacceptable, MalformedArchive):
            pass
        except OSError as error:
            assert error.filename is not None
        assert witness(place / "outside") == before
        assert_harmless(place / "layer")


JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["sha256:" + "0" * 64, "../x", "/"]),
    lambda below: st.lists(below, max_size=3) | st.dictionaries(st.text(max_size=5), below, max_size=3),
    max_leaves=4,
)
# A store waits for its disk with each layer.
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
LAYER = archive(file(b"f", b"content", **OWN))


def places(document: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) in a document."""
    entries = document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    for key, value in entries:
        yield document, key
        yield from places(value)


def damage(draw: st.DrawFn, document: Any) -> None:
    """Put anything in the place of something, or leave it out."""
    container, key = draw(st.sampled_from(list(places(document))))
    if draw(st.booleans()):
        container[key] = draw(JSON)
    else:
        del container[key]


@st.composite
def damaged_layouts(draw: st.DrawFn) -> dict[str, bytes]:
    """The files of an OCI layout and `docker save` archive in one, with something else somewhere; digests are right unless that is it."""
    which = draw(st.sampled_from(["config", "manifest", "index", "saved"]))
    config = config_of([LAYER], history=[{"created_by": "x"}])
    if which == "config":
        damage(draw, config)
    files = {f"blobs/sha256/{digest(LAYER)[7:]}": LAYER}

    def add(document: Any) -> dict[str, Any]:
        data = json.dumps(document).encode()
        files[f"blobs/sha256/{digest(data)[7:]}"] = data
        return {"digest": digest(data), "size": len(data), "platform": {"os": "linux", "architecture": architecture()}}

    manifest = {"config": add(config), "layers": [{"digest": digest(LAYER), "size": len(LAYER)}]}
    if which == "manifest":
        damage(draw, manifest)
    index = {"manifests": [add(manifest) | {"annotations": {"org.opencontainers.image.ref.name": "1"}}]}
    saved = [{"Config": f"blobs/sha256/{add(config)['digest'][7:]}", "RepoTags": ["a:1"], "Layers": [f"blobs/sha256/{digest(LAYER)[7:]}"]}]
    for name, document in (("index", index), ("saved", saved)):
        if which == name:
            damage(draw, document)
    name, document = draw(st.sampled_from([("index.json", index), ("manifest.json", saved)]))
    return files | {"oci-layout": b"{}", name: json.dumps(document).encode()}


@drawn(ARCHIVES)
@given(damaged_layouts(), st.booleans())
def test_documents_of_any_shape_are_read_or_refused(files: dict[str, bytes], is_archive: bool) -> None:
    with tempfile.TemporaryDirectory(dir=MEMORY) as name:
        place = Path(name)
        if is_archive:
            (place / "image").write_bytes(archive(*(file(name.encode(), content, **OWN) for name, content in files.items())))
        else:
            for path, content in files.items():
                (place / "image" / path).parent.mkdir(parents=True, exist_ok=True)
                (place / "image" / path).write_bytes(content)
        try:
            imported = import_into(Store.create(bytes(place / "store")), [bytes(place / "image")], Wanted())
        except Refusal:
            return
        # What no longer looks like an image is a layer like any other.
        as_a_layer = {os.fsencode(path.split("/")[0]) for path in files}
        assert [{*os.listdir(lower)} for lower in imported.lowers] in ([{b"f"}], [as_a_layer], [])
        for image in Store(bytes(place / "store")).images():
            assert isinstance(image.config.get("history") or [], list)
