"""Images and layers into a store: found in each of the forms they come in, verified, unpacked once, and nothing left of what failed."""

from __future__ import annotations

import gzip
import io
import json
import os
import subprocess
import sys
import tarfile
import types
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from pyoverlay.core import syscalls
from pyoverlay.errors import Refusal
from pyoverlay.image import sources
from pyoverlay.image.importing import Imported, Wanted, import_into
from pyoverlay.image.store import Store, StoredLayer
from pyoverlay.image.unpacking import Terms
from pyoverlay.testing import Symlink, make_tree, snapshot
from pyoverlay.testing.mounts import command
from tests.unit.archives import archive, config_of, digest, directory, file, make_layout, saved_image, symlink

OWN = {"uid": os.geteuid(), "gid": os.getegid()}
BASE = archive(directory(b"d", **OWN), file(b"d/base", b"base", **OWN))
TOP = archive(file(b"d/top", b"top", **OWN), file(b"d/.wh.base"))
EMPTY = archive()

Import = Callable[..., Imported]


@pytest.fixture
def directory_of_layers(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def imports(directory_of_layers: Path) -> Import:
    def call(*paths: Path, **wanted: object) -> Imported:
        made = Store.create(os.fsencode(directory_of_layers))
        return import_into(made, [os.fsencode(path) for path in paths], replace(Wanted(), **wanted))  # type: ignore[arg-type]

    return call


def lowers(imported: Imported) -> list[str]:
    """The layers' names, top first."""
    return [os.fsdecode(os.path.basename(path)) for path in imported.lowers]


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def assert_both_layers(imported: Imported) -> None:
    assert lowers(imported) == [digest(TOP)[7:], digest(BASE)[7:]]
    top, base = map(snapshot, imported.lowers)
    assert [sorted(top), sorted(base)] == [[b".", b"d", b"d/base", b"d/top"], [b".", b"d", b"d/base"]]


def layout_archive(layout: Path, path: Path) -> Path:
    with tarfile.open(path, "w") as tar:
        tar.add(layout, ".")
    return written(path, gzip.compress(path.read_bytes())) if path.suffix == ".gz" else path


@pytest.mark.parametrize("form", ["saved", "saved.gz", "layout", "layout.tar", "layout.tar.gz", "layers", "layers.gz"])
def test_images_and_layers_come_in_many_forms(tmp_path: Path, imports: Import, form: str) -> None:
    match form:
        case "saved":
            paths = [written(tmp_path / form, archive(*saved_image([BASE, TOP])))]
        case "saved.gz":
            paths = [written(tmp_path / form, gzip.compress(archive(*saved_image([BASE, TOP]))))]
        case "layout":
            paths = [make_layout(tmp_path / form, [BASE, TOP])]
        case "layout.tar" | "layout.tar.gz":
            paths = [layout_archive(make_layout(tmp_path / "layout", [BASE, TOP]), tmp_path / form)]
        case "layers":
            paths = [written(tmp_path / "base.tar", BASE), written(tmp_path / "top.tar", TOP)]
        case _:
            paths = [written(tmp_path / "base.tgz", gzip.compress(BASE)), written(tmp_path / "top.tgz", gzip.compress(TOP))]
    assert_both_layers(imports(*paths))


def test_a_layer_on_top_of_an_image(tmp_path: Path, imports: Import) -> None:
    image = written(tmp_path / "image.tar", archive(*saved_image([BASE])))
    assert_both_layers(imports(image, written(tmp_path / "top.tar", TOP)))


def test_a_layer_is_unpacked_once_whoever_has_it(tmp_path: Path, imports: Import, directory_of_layers: Path) -> None:
    first = imports(make_layout(tmp_path / "layout", [BASE, TOP]))
    inodes = [os.stat(lower).st_ino for lower in first.lowers]
    again = imports(make_layout(tmp_path / "other", [BASE, TOP], compress=False))
    saved = imports(written(tmp_path / "saved", archive(*saved_image([BASE, TOP]))))
    plain = imports(written(tmp_path / "plain", BASE))
    assert first.lowers == again.lowers == saved.lowers == (*first.lowers[:1], *plain.lowers)
    assert [os.stat(lower).st_ino for lower in saved.lowers] == inodes
    assert len(os.listdir(directory_of_layers / "layers")) == 2
    assert os.listdir(directory_of_layers / "unpacking") == []


def test_a_layer_that_comes_twice_counts_where_it_is_highest(tmp_path: Path, imports: Import) -> None:
    image = written(tmp_path / "saved", archive(*saved_image([EMPTY, BASE, EMPTY, TOP, BASE])))
    assert lowers(imports(image)) == [digest(BASE)[7:], digest(TOP)[7:], digest(EMPTY)[7:]]


def test_what_an_image_is_stays_known(tmp_path: Path, imports: Import, directory_of_layers: Path) -> None:
    imports(make_layout(tmp_path / "layout", [BASE, TOP], tag="1.2", author="somebody"))
    made = Store(os.fsencode(directory_of_layers))
    (image,) = made.images()
    assert (image.names, image.config) == (("1.2",), config_of([BASE, TOP], author="somebody"))
    assert image.diff_ids == (digest(BASE), digest(TOP))
    for layer in (BASE, TOP):
        origin = made.origin(digest(layer))
        assert origin == StoredLayer(digest(layer), digest(gzip.compress(layer, mtime=0)), len(gzip.compress(layer, mtime=0)))
        assert gzip.decompress(Path(os.fsdecode(made.blob(origin.digest))).read_bytes()) == layer


def test_blobs_can_be_left_out_and_be_fetched_later(tmp_path: Path, imports: Import, directory_of_layers: Path) -> None:
    layout, blobs = make_layout(tmp_path / "layout", [BASE, TOP]), directory_of_layers / "blobs/sha256"
    first = imports(layout, keeps_blobs=False)
    assert os.listdir(blobs) == []
    inodes = [os.stat(lower).st_ino for lower in first.lowers]
    assert [os.stat(lower).st_ino for lower in imports(layout).lowers] == inodes
    assert len(os.listdir(blobs)) == 2


def test_only_the_owner_reaches_what_is_unpacked(tmp_path: Path, imports: Import, directory_of_layers: Path) -> None:
    imports(written(tmp_path / "base.tar", BASE))
    assert {path.name: path.stat().st_mode & 0o777 for path in directory_of_layers.iterdir()} == dict.fromkeys(
        ("layers", "blobs", "origins", "images", "unpacking"), 0o700
    )


@pytest.mark.parametrize(("tag", "found"), [("app:1", BASE), ("1", BASE), ("registry:5000/other:2", TOP), ("2", TOP)])
def test_a_tag_chooses_among_several_images(tmp_path: Path, imports: Import, tag: str, found: bytes) -> None:
    image = several_images(tmp_path)
    assert lowers(imports(image, tag=tag)) == [digest(found)[7:]]
    layer = written(tmp_path / "layer.tar", EMPTY)
    assert lowers(imports(image, layer, tag=tag)) == [digest(EMPTY)[7:], digest(found)[7:]]


def test_without_a_tag_several_images_are_refused_with_their_names(tmp_path: Path, imports: Import) -> None:
    with pytest.raises(Refusal, match=r"2 images in it \(Invalid argument\); choose one with --tag: app:1, registry:5000/other:2$"):
        imports(several_images(tmp_path))
    with pytest.raises(Refusal, match=r"no image 3 for .* in it .*; it has: app:1, registry:5000/other:2$"):
        imports(several_images(tmp_path), tag="3")


def test_a_refusal_is_one_line_whatever_an_image_is_called(tmp_path: Path, imports: Import) -> None:
    """Names are anybody's: what a terminal would obey, half of a surrogate pair, which JSON can hold and no output can."""
    hostile = "\x1b[2J\n\ud83d"
    several = json.dumps([{"Config": "c", "RepoTags": [f"{name}{hostile}"], "Layers": []} for name in "ab"]).encode()
    missing = json.dumps([{"Config": "c", "RepoTags": [], "Layers": [hostile]}]).encode()
    config = json.dumps(config_of([b""])).encode()
    for manifest in (several, missing):
        image = written(tmp_path / "saved.tar", archive(file(b"manifest.json", manifest), file(b"c", config)))
        with pytest.raises(Refusal) as refused:
            imports(image)
        assert str(refused.value).isprintable()
        assert r"\x1b[2J\x0a\xed\xa0\xbd" in str(refused.value)


def test_a_store_whose_parts_are_somebody_elses_is_refused(tmp_path: Path, imports: Import, directory_of_layers: Path) -> None:
    make_tree(tmp_path, {"store": {"layers": Symlink("../elsewhere")}, "elsewhere": {}})
    with pytest.raises(Refusal, match=r"store/layers: cannot hold layers .Operation not permitted."):
        imports(written(tmp_path / "base.tar", BASE))
    assert os.listdir(tmp_path / "elsewhere") == []


def several_images(tmp_path: Path) -> Path:
    items = []
    manifest = []
    for layer, name in ((BASE, "app:1"), (TOP, "registry:5000/other:2")):
        document = json.dumps(config_of([layer])).encode()
        items += [file(f"{name}/layer.tar".encode(), layer), file(f"{name}.json".encode(), document)]
        manifest.append({"Config": f"{name}.json", "RepoTags": [name], "Layers": [f"{name}/layer.tar"]})
    return written(tmp_path / "several.tar", archive(*items, file(b"manifest.json", json.dumps(manifest).encode())))


def test_images_for_other_machines_do_not_count(tmp_path: Path, imports: Import) -> None:
    layout = make_layout(tmp_path / "layout", [BASE])
    index = json.loads((layout / "index.json").read_text())
    ours = index["manifests"][0] | {"platform": {"os": "linux", "architecture": sources.architecture()}}
    other = ours | {"platform": {"os": "linux", "architecture": "other"}, "digest": "sha256:" + "0" * 64}
    (layout / "index.json").write_text(json.dumps({"manifests": [other, ours]}))
    assert lowers(imports(layout)) == [digest(BASE)[7:]]
    (layout / "index.json").write_text(json.dumps({"manifests": [other]}))
    with pytest.raises(Refusal, match=f"no image  ?for {sources.architecture()} in it"):
        imports(layout)


def test_a_layer_may_hold_a_file_called_manifest(tmp_path: Path, imports: Import) -> None:
    layer = archive(file(b"manifest.json", b'{"name": "an extension of a browser"}', **OWN))
    assert lowers(imports(written(tmp_path / "layer.tar", layer))) == [digest(layer)[7:]]


# ── what is refused, and what is left of it ─────────────────────────────────────────────────────────────────────────────────


def left(directory_of_layers: Path) -> list[str]:
    """Everything in the store but its own directories."""
    parts = {"layers", "blobs", "sha256", "origins", "images", "unpacking"}
    return [name for _, directories, files in os.walk(directory_of_layers) for name in (*directories, *files) if name not in parts]


def test_a_hostile_layer_leaves_nothing(tmp_path: Path, imports: Import, directory_of_layers: Path) -> None:
    hostile = archive(*(file(b"f%d" % number, b"x" * 100, **OWN) for number in range(20)), symlink(b"l", b"/"), file(b"l/etc/x"))
    path = written(tmp_path / "hostile.tar", hostile)
    with pytest.raises(Refusal, match=f"^{path}: l/etc/x: its path leads through a symbolic link$"):
        imports(path)
    assert left(directory_of_layers) == []


@pytest.mark.parametrize("compress", [False, True])
def test_damage_is_found_before_a_layer_has_its_name(tmp_path: Path, imports: Import, directory_of_layers: Path, compress: bool) -> None:
    layout = make_layout(tmp_path / "layout", [BASE, TOP], compress=compress)
    blob = layout / "blobs/sha256" / digest(gzip.compress(TOP, mtime=0) if compress else TOP)[7:]
    other = TOP.replace(b"top", b"pot")
    blob.write_bytes(gzip.compress(other, mtime=0) if compress else other)
    with pytest.raises(Refusal, match=r"a layer in it cannot be unpacked: .* it is damaged"):
        imports(layout)
    assert left(directory_of_layers / "layers") == [digest(BASE)[7:], "d", "base"]
    assert left(directory_of_layers / "unpacking") == []
    assert left(directory_of_layers / "images") == []


def test_a_layer_that_is_there_cannot_be_given_another_blob(tmp_path: Path, imports: Import, directory_of_layers: Path) -> None:
    """Else an image that claims a known layer's diff_id could change what others commit on top of that layer."""
    imports(make_layout(tmp_path / "layout", [BASE]))
    forged = make_layout(tmp_path / "forged", [TOP])
    index = json.loads((forged / "index.json").read_text())
    blobs = forged / "blobs/sha256"
    manifest = json.loads((blobs / index["manifests"][0]["digest"][7:]).read_text())
    for document, holder, key in ((config_of([BASE]), manifest, "config"), (manifest, index["manifests"], 0)):
        data = json.dumps(document).encode()
        (blobs / digest(data)[7:]).write_bytes(data)
        holder[key] = {"digest": digest(data), "size": len(data)}
    (forged / "index.json").write_text(json.dumps(index))
    with pytest.raises(Refusal, match=f"should have the digest {digest(BASE)}"):
        imports(forged)
    origin = Store(os.fsencode(directory_of_layers)).origin(digest(BASE))
    assert origin is not None
    assert origin.digest == digest(gzip.compress(BASE, mtime=0))


def test_what_follows_the_end_of_an_archive_counts(tmp_path: Path, imports: Import, directory_of_layers: Path) -> None:
    """Else a blob could be given any digest by what nobody reads."""
    layout = make_layout(tmp_path / "layout", [BASE])
    blob = layout / "blobs/sha256" / digest(gzip.compress(BASE, mtime=0))[7:]
    for damaged in (gzip.compress(BASE + bytes(512), mtime=0), gzip.compress(BASE, mtime=0) + bytes(8)):
        blob.write_bytes(damaged)
        with pytest.raises(Refusal, match="it is damaged"):
            imports(layout)
    assert left(directory_of_layers / "layers") == []


def test_bombs_stop_at_the_limit(tmp_path: Path, imports: Import, directory_of_layers: Path) -> None:
    bomb = written(tmp_path / "bomb.tgz", gzip.compress(archive(file(b"f", bytes(64 << 20)))))
    with pytest.raises(Refusal, match="more than 1048576 bytes when unpacked"):
        imports(bomb, max_size=1 << 20)
    saved = written(tmp_path / "saved.tar", archive(*saved_image([archive(*(file(b"%d" % n, **OWN) for n in range(101)))])))
    with pytest.raises(Refusal, match="more than 100 members; raise the limit with --max-entries"):
        imports(saved, terms=Terms(members=100))
    assert left(directory_of_layers) == []


LAYOUT_DAMAGES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "an index that is no JSON": ("index.json is no JSON", lambda layout: (layout / "index.json").write_text("{")),
    "an index without images": ("no image", lambda layout: (layout / "index.json").write_text('{"manifests": []}')),
    "an index of the wrong shape": ("something else where", lambda layout: (layout / "index.json").write_text('{"manifests": {}}')),
    "JSON nested without end": ("no JSON", lambda layout: (layout / "index.json").write_text("[" * 100_000)),
    "a huge index": ("larger than", lambda layout: os.truncate(layout / "index.json", 9 << 20)),
    "a digest that is a path": (
        "digest that is not sha256's",
        lambda layout: (layout / "index.json").write_text('{"manifests": [{"digest": "sha256:../../../etc/passwd"}]}'),
    ),
    "a missing blob": (
        "is missing",
        lambda layout: (layout / "index.json").write_text('{"manifests": [{"digest": "sha256:%s"}]}' % ("0" * 64)),
    ),
    "no index": ("neither an image nor a layer", lambda layout: (layout / "index.json").unlink()),
}


@pytest.mark.parametrize("damage", LAYOUT_DAMAGES)
def test_documents_are_not_believed(tmp_path: Path, imports: Import, directory_of_layers: Path, damage: str) -> None:
    layout = make_layout(tmp_path / "layout", [BASE])
    reason, do = LAYOUT_DAMAGES[damage]
    do(layout)
    with pytest.raises(Refusal, match=reason):
        imports(layout)
    assert left(directory_of_layers) == []


def test_a_layout_cannot_lead_out_of_its_directory(tmp_path: Path, imports: Import) -> None:
    layout = make_layout(tmp_path / "layout", [BASE])
    (layout / "index.json").rename(tmp_path / "index.json")
    (layout / "index.json").symlink_to("../index.json")
    with pytest.raises(Refusal, match="Invalid cross-device link"):
        imports(layout)


def test_a_manifest_must_agree_with_its_configuration(tmp_path: Path, imports: Import) -> None:
    items = saved_image([BASE, TOP])
    manifest = json.dumps([{"Config": digest(json.dumps(config_of([BASE, TOP])).encode())[7:] + ".json", "Layers": ["0/layer.tar"]}])
    with pytest.raises(Refusal, match="its configuration names 2 layers, its manifest 1"):
        imports(written(tmp_path / "saved", archive(*items[:-1], file(b"manifest.json", manifest.encode()))))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "neither an image nor a tar archive"),
        (b"no archive" * 100, "neither an image nor a tar archive"),
        (b"\x28\xb5\x2f\xfd" + bytes(600), "zstd"),
        (b"BZh9" + bytes(600), "compressed with bzip2"),
        (b"\xfd7zXZ\0" + bytes(600), "compressed with xz"),
        (gzip.compress(BASE)[:-20], "cut off"),
        (gzip.compress(BASE)[:100] + b"\xff" * 100, "damaged"),
    ],
)
def test_what_is_no_archive_is_refused_in_words(tmp_path: Path, imports: Import, content: bytes, reason: str) -> None:
    with pytest.raises(Refusal, match=reason):
        imports(written(tmp_path / "f", content))


def test_a_directory_that_skopeo_wrote_is_refused_by_its_name(tmp_path: Path, imports: Import) -> None:
    make_tree(tmp_path, {"image": {"version": "Directory Transport Version: 1.1\n", "manifest.json": '{"schemaVersion": 2}'}})
    with pytest.raises(Refusal, match=r"as skopeo's `dir:` writes it \(Invalid argument\); copy it to an `oci:` layout"):
        imports(tmp_path / "image")


def test_zstd_is_read_where_python_has_it(tmp_path: Path, imports: Import, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python 3.14's module by what its documentation says of it, with zlib's format inside: what is asked of it, and what of its errors."""

    class ZstdFile:
        def __init__(self, file: io.RawIOBase, mode: str) -> None:
            assert mode == "r"
            assert file.read(4) == MAGIC
            self._content = io.BytesIO(zlib.decompress(file.read(1 << 20)))

        def read(self, size: int) -> bytes:
            return self._content.read(size)

    monkeypatch.setitem(sys.modules, "compression", types.ModuleType("compression"))
    module = types.ModuleType("compression.zstd")
    module.__dict__.update(ZstdFile=ZstdFile, ZstdError=zlib.error)
    monkeypatch.setitem(sys.modules, "compression.zstd", module)
    layer = written(tmp_path / "layer.tar.zst", MAGIC + zlib.compress(BASE))
    assert lowers(imports(layer)) == [digest(BASE)[7:]]


MAGIC = b"\x28\xb5\x2f\xfd"


def test_paths_that_cannot_be_imported_are_refused(tmp_path: Path, imports: Import) -> None:
    os.mkfifo(tmp_path / "fifo")
    reasons = {"fifo": "neither an archive nor a directory", "none": "No such file", ".": "no index.json and no manifest.json in it"}
    for name, reason in reasons.items():
        with pytest.raises(Refusal, match=reason):
            imports(tmp_path / name)


# ── at the same time, and interrupted ───────────────────────────────────────────────────────────────────────────────────────


def test_imports_at_the_same_time_share_the_work(tmp_path: Path, directory_of_layers: Path) -> None:
    """Four at once of one image: each succeeds and says the same, each layer is there once, and nothing is left on the way."""
    layers = [archive(*(file(b"%d-%d" % (number, n), b"x", **OWN) for n in range(50))) for number in range(6)]
    layout = make_layout(tmp_path / "layout", layers)
    argv = command("import", layout, directory_of_layers)
    imports = [subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    said = {process.communicate(timeout=50)[0] for process in imports}
    assert [process.returncode for process in imports] == [0] * 4
    assert said == {":".join(f"{directory_of_layers}/layers/{digest(layer)[7:]}" for layer in reversed(layers)) + "\n"}
    assert sorted(os.listdir(directory_of_layers / "layers")) == sorted(digest(layer)[7:] for layer in layers)
    assert {len(os.listdir(layer)) for layer in (directory_of_layers / "layers").iterdir()} == {50}
    assert os.listdir(directory_of_layers / "unpacking") == []


def test_an_interrupted_import_leaves_nothing_under_the_final_name(
    tmp_path: Path, imports: Import, directory_of_layers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at the last moment before the rename, as a child process that ends without a word; the next import clears what it left."""
    path = written(tmp_path / "base.tar", BASE)
    if (child := os.fork()) == 0:
        monkeypatch.setattr(syscalls, "syncfs", lambda _: os._exit(9))
        imports(path)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert os.listdir(directory_of_layers / "layers") == []
    assert os.listdir(directory_of_layers / "unpacking") == [digest(BASE)[7:]]
    imports(written(tmp_path / "top.tar", TOP))
    assert os.listdir(directory_of_layers / "unpacking") == []
    assert lowers(imports(path)) == [digest(BASE)[7:]]
