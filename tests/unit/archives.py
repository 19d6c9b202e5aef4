"""Archives and images made by hand for tests, good ones and hostile ones."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pyoverlay.image.sources import architecture
from pyoverlay.image.tar_member import Kind, Member
from pyoverlay.image.tar_writer import TarWriter

Item = Member | tuple[Member, bytes]


def archive(*items: Item) -> bytes:
    """A tar archive of these members; a file comes with its content."""
    written = io.BytesIO()
    writer = TarWriter(written.write)
    for item in items:
        member, content = item if isinstance(item, tuple) else (item, b"")
        writer.add(member, [content] if content else [])
    writer.close()
    return written.getvalue()


def file(name: bytes, content: bytes = b"", /, **more: Any) -> Item:
    return Member(name, Kind.FILE, size=len(content), **more), content


def directory(name: bytes, mode: int = 0o755, **more: Any) -> Member:
    return Member(name, Kind.DIRECTORY, mode, **more)


def symlink(name: bytes, target: bytes) -> Member:
    return Member(name, Kind.SYMLINK, 0o777, target=target)


def link(name: bytes, target: bytes) -> Member:
    return Member(name, Kind.LINK, target=target)


def device(name: bytes, major: int = 1, minor: int = 3) -> Member:
    return Member(name, Kind.CHARACTER_DEVICE, device=(major, minor))


def digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def config_of(layers: Iterable[bytes], **more: Any) -> dict[str, Any]:
    """An image's configuration; layers are uncompressed archives, the lowest first."""
    rootfs = {"type": "layers", "diff_ids": [digest(layer) for layer in layers]}
    return {"architecture": architecture(), "os": "linux", "config": {"Cmd": ["sh"]}, "rootfs": rootfs, **more}


def saved_image(layers: list[bytes], names: tuple[str, ...] = ("app:1",), **config: Any) -> list[Item]:
    """The members of an archive as `docker save` writes it, the second of two equal layers a link to the first."""
    document = json.dumps(config_of(layers, **config)).encode()
    paths = [f"{number}/layer.tar" for number in range(len(layers))]
    items: list[Item] = []
    for number, (path, layer) in enumerate(zip(paths, layers, strict=True)):
        first = layers.index(layer)
        items.append(symlink(path.encode(), b"../" + paths[first].encode()) if first < number else file(path.encode(), layer))
    name = digest(document)[7:] + ".json"
    manifest = json.dumps([{"Config": name, "RepoTags": [*names], "Layers": paths}]).encode()
    return [*items, file(name.encode(), document), file(b"manifest.json", manifest)]


def make_layout(path: Path, layers: list[bytes], tag: str = "1", *, compress: bool = True, **config: Any) -> Path:
    """An OCI layout in a new directory."""
    blobs = path / "blobs/sha256"
    blobs.mkdir(parents=True)

    def add(data: bytes, media_type: str) -> dict[str, Any]:
        (blobs / digest(data)[7:]).write_bytes(data)
        return {"mediaType": media_type, "digest": digest(data), "size": len(data)}

    kind = "application/vnd.oci.image"
    stored = [gzip.compress(layer, mtime=0) if compress else layer for layer in layers]
    described = [add(layer, f"{kind}.layer.v1.tar" + "+gzip" * compress) for layer in stored]
    manifest = {
        "schemaVersion": 2,
        "config": add(json.dumps(config_of(layers, **config)).encode(), f"{kind}.config.v1+json"),
        "layers": described,
    }
    entry = add(json.dumps(manifest).encode(), f"{kind}.manifest.v1+json") | {"annotations": {"org.opencontainers.image.ref.name": tag}}
    (path / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    (path / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [entry]}))
    return path
