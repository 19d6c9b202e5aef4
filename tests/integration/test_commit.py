"""`pyoverlay commit`: a mount becomes an image whose layers, unpacked again, are the merged tree; and a failure becomes nothing."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pyoverlay.core.policy import Policy
from pyoverlay.errors import Refusal
from pyoverlay.image import committing
from pyoverlay.image import layout as layouts
from pyoverlay.image.committing import Kept, Made, Plan, Words
from pyoverlay.image.layout import Descriptor, changing
from pyoverlay.image.store import StoredLayer
from pyoverlay.report.target import Target
from pyoverlay.testing import Entry, File, Overlay, OverlayFactory, Symlink, Tree, Whiteout, make_tree
from pyoverlay.testing.mounts import command
from tests.integration.images import comparable, imported, mounted
from tests.integration.test_export import LOWER, change, names
from tests.unit.archives import archive, config_of, digest, directory, file, make_layout, saved_image, symlink

pytestmark = pytest.mark.root

BASE = archive(directory(b"d"), file(b"d/f", b"base"), file(b"gone", b"x"), symlink(b"l", b"d"))
MIDDLE = archive(file(b"d/.wh.f"), file(b"d/g", b"middle"))


def commit(*arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    argv = command("commit", *arguments)
    result = subprocess.run(argv, check=False, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
    if check:
        assert (result.returncode, result.stderr) == (0, "")
    return result


def seen_again(image: Path, place: Path) -> dict[bytes, Entry]:
    """The tree of an image that was committed: imported into a fresh store and mounted."""
    place.mkdir()
    lowers = imported("--devices", image, place / "store").stdout
    with mounted(lowers, place) as overlay:
        return comparable(overlay.merged)


class Read:
    """An image in a layout, by tag; each digest on the way is checked."""

    def __init__(self, layout: Path, tag: str = "latest") -> None:
        self._blobs = layout / "blobs/sha256"
        index = json.loads((layout / "index.json").read_text())
        (entry,) = [entry for entry in index["manifests"] if layouts.tag_of(entry) == tag]
        manifest = json.loads(self.blob(entry))
        self.id: str = manifest["config"]["digest"]
        self.config: dict[str, Any] = json.loads(self.blob(manifest["config"]))
        self.blobs = [self.blob(layer) for layer in manifest["layers"]]
        self.layers = [gzip.decompress(blob) if blob[:2] == b"\x1f\x8b" else blob for blob in self.blobs]
        assert self.config["rootfs"] == {"type": "layers", "diff_ids": [digest(layer) for layer in self.layers]}

    def blob(self, descriptor: dict[str, Any]) -> bytes:
        data = (self._blobs / descriptor["digest"][7:]).read_bytes()
        assert (digest(data), len(data)) == (descriptor["digest"], descriptor["size"])
        return data


HISTORY = [{"created_by": "base"}, {"created_by": "ENV a=b", "empty_layer": True}, {"created_by": "middle"}]


@pytest.fixture
def changed(tmp_path: Path) -> Iterator[Overlay]:
    """A change on top of an imported image of two layers."""
    image = make_layout(tmp_path / "image", [BASE, MIDDLE], history=HISTORY, container="of a builder's")
    with mounted(imported(image, tmp_path / "store").stdout, tmp_path) as overlay:
        (overlay.merged / "new").write_text("content")
        (overlay.merged / "gone").unlink()
        yield overlay


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for a small layout."""
    place = tmp_path / "disk"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", place], check=True)
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_change_is_one_layer_on_top_of_the_image_it_was_made_in(changed: Overlay, tmp_path: Path) -> None:
    said = commit(changed.merged, tmp_path / "out", "-m", "why", "-a", "who")
    image = Read(tmp_path / "out")
    assert said.stdout == image.id + "\n"
    assert image.layers[:2] == [BASE, MIDDLE]
    assert image.blobs[:2] == [gzip.compress(layer, mtime=0) for layer in (BASE, MIDDLE)]
    assert names(image.layers[2]) == [".wh.gone", "new"]
    *before, last = image.config["history"]
    assert before == HISTORY
    assert last.pop("created") == image.config["created"]
    assert last == {"created_by": "pyoverlay commit", "author": "who", "comment": "why"}
    known = config_of([])
    assert [image.config[key] for key in ("architecture", "os", "config")] == [known[key] for key in ("architecture", "os", "config")]
    assert "container" not in image.config
    assert seen_again(tmp_path / "out", tmp_path / "again") == comparable(changed.merged)


def test_dockers_manifest_leads_to_the_same_blobs(changed: Overlay, tmp_path: Path) -> None:
    commit(changed.merged, f"{tmp_path}/app:1.2")
    (entry,) = json.loads((tmp_path / "app/manifest.json").read_text())
    image = Read(tmp_path / "app", "1.2")
    assert entry["RepoTags"] == ["app:1.2"]
    assert json.loads((tmp_path / "app" / entry["Config"]).read_text()) == image.config
    assert [(tmp_path / "app" / layer).read_bytes() for layer in entry["Layers"]] == image.blobs


def test_everything_a_layer_can_say_survives(overlay: OverlayFactory, tmp_path: Path) -> None:
    """The lower came from no image: it becomes the base layer."""
    mount = overlay(LOWER)
    change(mount.merged)
    commit(mount.merged, tmp_path / "out")
    assert [entry["created_by"] for entry in Read(tmp_path / "out").config["history"]] == ["pyoverlay commit: a lower", "pyoverlay commit"]
    assert seen_again(tmp_path / "out", tmp_path / "again") == comparable(mount.merged)


def test_each_lower_that_came_from_no_image_is_a_layer_with_its_own_whiteouts(overlay: OverlayFactory, tmp_path: Path) -> None:
    top: Tree = {"a": Whiteout(), "d": {".wh..wh..opq": File(mode=0o600), "new": "1"}, ".wh.b": File(mode=0o600)}
    mount = overlay(top, {"a": "1", "b": "2", "c": Symlink("d"), "d": {"old": "3"}})
    commit(mount.merged, tmp_path / "out")
    image = Read(tmp_path / "out")
    assert [names(layer) for layer in image.layers] == [
        ["a", "b", "c", "d/", "d/old"], [".wh.a", ".wh.b", "d/", "d/.wh..wh..opq", "d/new"], [],
    ]  # fmt: skip
    assert seen_again(tmp_path / "out", tmp_path / "again") == comparable(mount.merged)


def test_what_lies_between_an_image_and_the_change_is_kept(tmp_path: Path) -> None:
    """An image, a layer imported by itself, and a plain directory."""
    (tmp_path / "image.tar").write_bytes(archive(*saved_image([BASE])))
    (tmp_path / "middle.tar").write_bytes(MIDDLE)
    lowers = imported(tmp_path / "image.tar", tmp_path / "middle.tar", tmp_path / "store").stdout.strip()
    make_tree(tmp_path, {"plain": {"p": "1"}})
    with mounted(f"{tmp_path}/plain:{lowers}", tmp_path) as overlay:
        commit(overlay.merged, tmp_path / "out")
        image = Read(tmp_path / "out")
        assert image.layers[:2] == [BASE, MIDDLE]
        assert [names(layer) for layer in image.layers[2:]] == [["p"], []]
        assert len(image.config["history"]) == 4
        assert seen_again(tmp_path / "out", tmp_path / "again") == comparable(overlay.merged)


def test_a_layer_whose_blob_was_not_kept_is_made_anew(tmp_path: Path) -> None:
    image = make_layout(tmp_path / "image", [BASE, MIDDLE])
    with mounted(imported("--discard-blobs", image, tmp_path / "store").stdout, tmp_path) as overlay:
        commit(overlay.merged, tmp_path / "out")
        made = Read(tmp_path / "out")
        assert [names(layer) for layer in made.layers] == [["d/", "d/f", "gone", "l"], ["d/", "d/.wh.f", "d/g"], []]
        assert made.config["config"] == config_of([])["config"]
        assert seen_again(tmp_path / "out", tmp_path / "again") == comparable(overlay.merged)


def test_the_same_mount_and_time_give_the_same_image(changed: Overlay, tmp_path: Path) -> None:
    ids = {commit("--mtime", "1000000000", changed.merged, tmp_path / name, "--name", "x:1").stdout for name in ("one", "two")}
    assert len(ids) == 1
    assert Read(tmp_path / "one").config["created"] == "2001-09-09T01:46:40Z"
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


def test_a_tag_is_replaced_only_when_told_so_and_others_stay(changed: Overlay, tmp_path: Path) -> None:
    first = commit(changed.merged, f"{tmp_path}/app:1").stdout.strip()
    (changed.merged / "more").write_text("more")
    refused = commit(changed.merged, f"{tmp_path}/app:1", check=False)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr == f"pyoverlay: {tmp_path}/app: there is an image 1 in it; replace it with -y, or choose another tag\n"
    second = commit(changed.merged, f"{tmp_path}/app:2").stdout.strip()
    third = commit("-y", changed.merged, f"{tmp_path}/app:2", "-m", "again").stdout.strip()
    assert [Read(tmp_path / "app", tag).id for tag in "12"] == [first, third]
    saved = json.loads((tmp_path / "app/manifest.json").read_text())
    assert {tag: entry["Config"] for entry in saved for tag in entry["RepoTags"]} == {
        "app:1": f"blobs/sha256/{first[7:]}", "app:2": f"blobs/sha256/{third[7:]}",
    }  # fmt: skip
    assert second != third


def test_commits_at_the_same_time_are_all_there(changed: Overlay, tmp_path: Path) -> None:
    commit(changed.merged, f"{tmp_path}/app:0")
    commits = [subprocess.Popen(command("commit", changed.merged, f"{tmp_path}/app:{tag}"), stdout=subprocess.PIPE) for tag in "123"]
    ids = [process.communicate(timeout=50)[0].decode().strip() for process in commits]
    assert [Read(tmp_path / "app", tag).id for tag in "123"] == ids
    assert len(json.loads((tmp_path / "app/manifest.json").read_text())) == 4


def test_a_dry_run_shows_and_does_nothing(changed: Overlay, tmp_path: Path) -> None:
    shown = commit("-n", changed.merged, f"{tmp_path}/app:1").stdout
    assert shown.splitlines() == [
        "base      1",
        *(f"layer     {digest(gzip.compress(layer, mtime=0))}, as it came" for layer in (BASE, MIDDLE)),
        "change    2 entries, 7B",
        f"becomes   {tmp_path}/app:1, for Docker app:1",
    ]
    assert not (tmp_path / "app").exists()


def tree(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_the_names_of_a_base_are_printed_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "image.tar").write_bytes(archive(*saved_image([BASE], names=("a\x1b[2J\n\ud83d:1",))))
    with mounted(imported(tmp_path / "image.tar", tmp_path / "store").stdout, tmp_path / "mount") as overlay:
        (base, *_) = commit("--dry-run", overlay.merged, tmp_path / "out").stdout.splitlines()
    assert base == r"base      a\x1b[2J\x0a\xed\xa0\xbd:1"


def test_other_names_of_an_image_stay_when_one_becomes_another_images(changed: Overlay, tmp_path: Path) -> None:
    """`docker save app:1 other:1` writes one entry with both."""
    commit(changed.merged, f"{tmp_path}/app:1")
    manifest = tmp_path / "app/manifest.json"
    (old,) = json.loads(manifest.read_text())
    manifest.write_text(json.dumps([old | {"RepoTags": ["other:1", "app:1"]}, old | {"RepoTags": None}]))
    (changed.merged / "more").write_text("more")
    commit(changed.merged, f"{tmp_path}/app:1", "-y")
    assert [image["RepoTags"] for image in json.loads(manifest.read_text())] == [["other:1"], None, ["app:1"]]
    assert json.loads(manifest.read_text())[0] == old | {"RepoTags": ["other:1"]}


@pytest.mark.parametrize(("head", "media_type"), [(b"\x1f\x8b\x08", "+gzip"), (b"\x28\xb5\x2f\xfd", "+zstd"), (b"d/\0\0", "")])
def test_a_layer_as_it_came_is_described_as_what_it_is(tmp_path: Path, head: bytes, media_type: str) -> None:
    make_tree(tmp_path, {"upper": {}})
    blob = head + bytes(600)
    (tmp_path / "blob").write_bytes(blob)
    upper = os.fsencode(tmp_path / "upper")
    change = Made(Target(upper, upper, (), Policy(), is_lowest=True), 0, 0)
    kept = Kept(StoredLayer(digest(b"archive"), digest(blob), len(blob)), os.fsencode(tmp_path / "blob"))
    committing.commit(Plan(change, (kept,), None), os.fsencode(tmp_path / "out"), "1", "out:1", Words())
    (entry,) = json.loads((tmp_path / "out/index.json").read_text())["manifests"]
    manifest = json.loads((tmp_path / "out/blobs/sha256" / entry["digest"][7:]).read_text())
    assert [layer["mediaType"] for layer in manifest["layers"]] == [
        f"application/vnd.oci.image.layer.v1.tar{media_type}", "application/vnd.oci.image.layer.v1.tar+gzip"
    ]  # fmt: skip


@pytest.mark.parametrize("is_new", [True, False])
def test_what_cannot_be_a_layer_leaves_the_layout_as_it_was(changed: Overlay, tmp_path: Path, is_new: bool) -> None:
    out = tmp_path / "dir/app"
    out.parent.mkdir()
    if not is_new:
        commit(changed.merged, f"{out}:1")
    before = tree(out.parent)
    (changed.merged / "d/.wh.x").write_text("")
    refused = commit(changed.merged, f"{out}:2", check=False)
    assert refused.returncode == 1
    assert "a layer cannot hold a name that begins with .wh." in refused.stderr
    assert tree(out.parent) == before


def test_a_damaged_blob_leaves_no_layout(changed: Overlay, tmp_path: Path) -> None:
    for blob in (tmp_path / "store/blobs/sha256").iterdir():
        blob.write_bytes(b"damaged")
    refused = commit(changed.merged, tmp_path / "out", check=False)
    assert refused.returncode == 1
    assert "not what its name says: it is damaged; import the image again" in refused.stderr
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_a_full_disk_leaves_the_layout_as_it_was(changed: Overlay, disk: Path) -> None:
    commit(changed.merged, f"{disk}/app:1")
    before = tree(disk)
    (changed.merged / "random").write_bytes(os.urandom(1 << 20))
    refused = commit(changed.merged, f"{disk}/app:2", check=False)
    assert refused.returncode == 1
    assert refused.stderr == f"pyoverlay: {disk}/app: refused by the system (No space left on device)\n"
    assert tree(disk) == before


@pytest.mark.parametrize("fails_at", ["manifest.json", "index.json"])
def test_a_failure_while_it_is_published_leaves_the_layout_as_it_was(
    changed: Overlay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: str
) -> None:
    commit(changed.merged, f"{tmp_path}/app:1")
    before = tree(tmp_path / "app")
    replace = layouts.Layout._replace
    failures = [fails_at]

    def fail(self: layouts.Layout, name: str, document: object) -> None:
        if name in failures:
            failures.remove(name)
            raise OSError(5, "Input/output error")
        replace(self, name, document)

    monkeypatch.setattr(layouts.Layout, "_replace", fail)
    with pytest.raises(Refusal, match="Input/output error"), changing(os.fsencode(tmp_path / "app")) as layout:
        layout.add_image(config_of([]), [Descriptor(layouts.LAYER_TYPE, digest(b""), 0)], "2", "app:2")
    assert failures == []
    assert tree(tmp_path / "app") == before


def test_a_small_layer_that_the_disk_does_not_take_is_the_layouts_affair(changed: Overlay, disk: Path) -> None:
    """It is all in a buffer until the file is closed."""
    commit(changed.merged, f"{disk}/app:1")
    (changed.merged / "more").write_text("more")
    (disk / "filler").touch()
    free = os.statvfs(disk)
    os.truncate(disk / "filler", free.f_bavail * free.f_bsize)
    subprocess.run(["fallocate", "-l", str(free.f_bavail * free.f_bsize), disk / "filler"], check=True)
    refused = commit(changed.merged, f"{disk}/app:2", check=False)
    assert (refused.returncode, refused.stderr) == (1, f"pyoverlay: {disk}/app: refused by the system (No space left on device)\n")


def test_only_a_layout_is_written_to(changed: Overlay, tmp_path: Path) -> None:
    make_tree(tmp_path, {"full": {"mine": "x"}, "file": "x"})
    for place, reason in (("full", "not empty, and no OCI layout"), ("file", "Not a directory"), ("no/where", "No such file")):
        refused = commit(changed.merged, tmp_path / place, check=False)
        assert (refused.returncode, refused.stderr.count("\n")) == (1, 1), refused.stderr
        assert reason in refused.stderr
    assert os.listdir(tmp_path / "full") == ["mine"]


@pytest.mark.parametrize("content", ["{", "{}", "[1]"])
def test_a_layout_that_tells_docker_something_else_is_left_alone(changed: Overlay, tmp_path: Path, content: str) -> None:
    commit(changed.merged, f"{tmp_path}/app:1")
    (tmp_path / "app/manifest.json").write_text(content)
    before = tree(tmp_path / "app")
    refused = commit(changed.merged, f"{tmp_path}/app:2", check=False)
    remedy = "remove it, or name another OCI layout"
    assert refused.stderr == f"pyoverlay: {tmp_path}/app: its manifest.json is none of Docker's (Invalid argument); {remedy}\n"
    assert (refused.returncode, tree(tmp_path / "app")) == (1, before)


def test_names_that_docker_refuses_are_refused_before_anything_is_done(changed: Overlay, tmp_path: Path) -> None:
    refused = commit(changed.merged, f"{tmp_path}/app:1", "--name", "Upper Case:1", check=False)
    reason = "Docker takes no image called 'Upper Case:1'; say what it shall call it with --name"
    assert refused.stderr == f"pyoverlay: {tmp_path}/app: {reason}\n"
    for name in ("app/Upper:1", "a..b:1", "host:port/app:1", "-host/app:1"):
        assert f"no image called {name!r}" in commit(changed.merged, f"{tmp_path}/app:1", "--name", name, check=False).stderr
    refused = commit(changed.merged, f"{tmp_path}/app:-1", check=False)
    assert "'-1' is no tag" in refused.stderr
    assert commit("-n", changed.merged, f"{tmp_path}/app:-1", check=False).stderr == refused.stderr
    assert not (tmp_path / "app").exists()


@pytest.mark.parametrize(
    ("given", "name"),
    [("other", "other:1"), ("localhost:5000/a/b", "localhost:5000/a/b:1"), ("Reg.example.com:443/app:2", "Reg.example.com:443/app:2")],
)
def test_an_image_may_be_called_as_docker_calls_them(changed: Overlay, tmp_path: Path, given: str, name: str) -> None:
    commit(changed.merged, f"{tmp_path}/app:1", "--name", given)
    (entry,) = json.loads((tmp_path / "app/manifest.json").read_text())
    assert entry["RepoTags"] == [name]


def test_what_is_not_mounted_has_no_base(changed: Overlay, tmp_path: Path) -> None:
    refused = commit(tmp_path, tmp_path / "out", check=False)
    assert refused.returncode == 1
    assert "not mounted: its base is not known; mount it, or use `pyoverlay export` for the change alone" in refused.stderr


def test_metacopy_files_have_their_data_from_data_only_layers(tmp_path: Path) -> None:
    """As composefs lays a tree out: names and attributes in one lower, data in another, which is no layer of the image."""
    pointer = {"trusted.overlay.metacopy": b"", "trusted.overlay.redirect": b"/ab/object"}
    make_tree(tmp_path, {"data": {"ab": {"object": "the data"}}, "upper": {}, "merged": {}})
    make_tree(tmp_path, {"lower": {"f": File(size=8, mode=0o640, xattrs=pointer), "g": "plain"}})
    layers = f"lowerdir={tmp_path}/lower::{tmp_path}/data,upperdir={tmp_path}/upper"
    subprocess.run(command("mount", "-o", layers, "-o", "metacopy=on", tmp_path / "merged"), check=True)
    try:
        (tmp_path / "merged/f").chmod(0o600)
        commit(tmp_path / "merged", tmp_path / "out")
        expected = comparable(tmp_path / "merged")
    finally:
        subprocess.run(command("umount", tmp_path / "merged"), check=True)
    assert [names(layer) for layer in Read(tmp_path / "out").layers] == [["f", "g"], ["f"]]
    assert seen_again(tmp_path / "out", tmp_path / "again") == expected
