"""Images between pyoverlay and real engines: what `commit` and `export` write is taken and runs, what engines save is imported whole."""

from __future__ import annotations

import json
import stat
import subprocess
import tarfile
from pathlib import Path

import pytest

from pyoverlay.testing import File, make_tree
from pyoverlay.testing.mounts import command
from tests.integration.images import mounted
from tests.interop.docker_diff import CASES, TREE
from tests.interop.engines import IMAGE, Docker, Podman, run
from tests.interop.test_docker import described

pytestmark = [pytest.mark.root, pytest.mark.container, pytest.mark.timeout(180)]

CHANGE = "echo new > /new; rm /etc/passwd; chmod 4755 /bin/busybox; rm -r /tmp; mkdir /tmp; echo x > /tmp/x; ln /new /link; mv /root /home"
CHECK = "cat /new /link /tmp/x; ls /etc/passwd /root 2>/dev/null; stat -c %a /bin/busybox; stat -c %h /link; ls -d /home"
CHECKED = "new\nnew\nx\n4755\n2\n/home\n"


def pyoverlay(*arguments: str | Path) -> str:
    return run(*command(*arguments))


def change(merged: Path) -> None:
    """CHANGE, by the programs that are in the tree."""
    subprocess.run(["chroot", merged, "/bin/sh", "-ec", CHANGE], check=True)


@pytest.fixture
def committed(base_image: Path, tmp_path: Path) -> Path:
    """A layout with an image `app:1`: the base image imported, mounted, changed and committed."""
    with mounted(pyoverlay("import", base_image, tmp_path / "store"), tmp_path / "mount") as overlay:
        change(overlay.merged)
        pyoverlay("commit", overlay.merged, f"{tmp_path}/app:1", "--message", "why")
    return tmp_path / "app"


def archived(layout: Path) -> Path:
    """The layout in one file, as `docker load` and `podman load` read it."""
    path = layout.with_suffix(".tar")
    run("tar", "-C", layout, "-cf", path, ".")
    return path


def in_reach(podman: Podman, path: Path) -> Path:
    """A copy where the engine's user may read it."""
    place = podman.directory / path.name
    run("cp", "-r", path, place)
    run("chmod", "-R", "a+rX", place)
    return place


def test_docker_load_takes_what_was_committed_and_runs_it(docker: Docker, committed: Path) -> None:
    assert docker.docker("load", "-i", archived(committed)) == "Loaded image: app:1\n"
    assert docker.docker("run", "--rm", "--network=none", "app:1", "sh", "-c", CHECK) == CHECKED
    history = docker.docker("history", "--no-trunc", "--format", "{{.CreatedBy}}|{{.Comment}}", "app:1")
    assert history.splitlines()[0] == "pyoverlay commit|why"
    docker.docker("rmi", "app:1")


def test_a_change_to_dockers_own_image_shares_its_layers(docker: Docker, tmp_path: Path) -> None:
    docker.docker("save", "-o", tmp_path / "bb.tar", IMAGE)
    with mounted(pyoverlay("import", tmp_path / "bb.tar", tmp_path / "store"), tmp_path / "mount") as overlay:
        change(overlay.merged)
        image = pyoverlay("commit", overlay.merged, f"{tmp_path}/app:2").strip()
    docker.docker("load", "-i", archived(tmp_path / "app"))
    layers = [json.loads(docker.docker("image", "inspect", "-f", "{{json .RootFS.Layers}}", name)) for name in (IMAGE, "app:2")]
    assert layers[0] == layers[1][:-1]
    assert docker.docker("image", "inspect", "-f", "{{.Id}}", "app:2").strip() == image
    assert docker.docker("run", "--rm", "--network=none", "app:2", "sh", "-c", CHECK) == CHECKED
    docker.docker("rmi", "app:2")


@pytest.mark.parametrize("is_sparse", [False, True])
def test_docker_import_takes_an_export(docker: Docker, base_image: Path, tmp_path: Path, is_sparse: bool) -> None:
    """A change that is a whole root file system. Holes that are kept are read too, but Docker, which saves a layer by putting it together
    again from its notes, does not get them right ("could not verify layer data"): that is why they are not kept unless asked for.
    """
    (tmp_path / "empty").mkdir()
    with mounted(str(tmp_path / "empty"), tmp_path / "mount") as overlay:
        run("tar", "-C", overlay.merged, "-xpf", base_image)
        make_tree(overlay.merged, {"sparse": File("begin", size=4 << 20)})
        change(overlay.merged)
        pyoverlay("export", *(["--sparse"] if is_sparse else []), overlay.merged, "-o", tmp_path / "layer.tar")
        docker.docker("import", tmp_path / "layer.tar", "imported")
        assert docker.docker("run", "--rm", "--network=none", "imported", "sh", "-c", CHECK) == CHECKED
        assert docker.docker("run", "--rm", "--network=none", "imported", "stat", "-c", "%s", "/sparse") == f"{4 << 20}\n"
        if is_sparse:
            docker.docker("rmi", "imported")
            return
        docker.docker("save", "-o", tmp_path / "saved.tar", "imported")
        docker.docker("rmi", "imported")
        with mounted(pyoverlay("import", tmp_path / "saved.tar", tmp_path / "store"), tmp_path / "again") as again:
            assert described(again.merged) == described(overlay.merged)


def test_podman_takes_what_was_committed_and_runs_it(podman: Podman, committed: Path) -> None:
    committed = in_reach(podman, committed)
    name = podman.podman("load", "-q", "-i", archived(committed)).split()[-1]
    assert podman.podman("run", "--rm", "--network=none", name, "sh", "-c", CHECK) == CHECKED
    podman.podman("rmi", name)
    image = podman.podman("pull", "-q", "oci:app:1").strip()  # relative: it makes a name of the path, and not every path is one
    assert podman.podman("run", "--rm", "--network=none", image, "sh", "-c", CHECK) == CHECKED
    podman.podman("rmi", image)


@pytest.mark.parametrize("form", ["docker-archive", "oci-archive", "oci-dir"])
def test_what_podman_saved_is_imported_and_runs_on(root_podman: Podman, tmp_path: Path, form: str) -> None:
    podman = root_podman.podman
    podman("run", "--name", "box", "--network=none", IMAGE, "sh", "-c", CHANGE)
    podman("commit", "-q", "box", "saved")
    podman("save", "-q", "--format", form, "-o", tmp_path / "saved", "saved")
    podman("rm", "box")
    with mounted(pyoverlay("import", tmp_path / "saved", tmp_path / "store"), tmp_path / "mount") as overlay:
        assert run("chroot", overlay.merged, "sh", "-c", CHECK) == CHECKED
        (overlay.merged / "more").write_text("more")
        pyoverlay("commit", overlay.merged, tmp_path / "app")
    name = podman("load", "-q", "-i", archived(tmp_path / "app")).split()[-1]
    assert podman("run", "--rm", "--network=none", name, "cat", "/new", "/more") == "new\nmore"
    podman("rmi", name, "saved")


# ── what an engine saved ────────────────────────────────────────────────────────────────────────────────────────────────────

# What Docker puts into every container, and into no image.
OF_A_CONTAINER = {
    *(".dockerenv", "dev", "dev/console", "dev/pts", "dev/shm"),
    *("etc", "etc/hostname", "etc/hosts", "etc/mtab", "etc/resolv.conf"),
}


def test_a_container_that_docker_saved_is_imported_as_it_was(docker: Docker, tmp_path: Path) -> None:
    docker.docker("run", "-d", "--name", "box", "--network=none", IMAGE, "sleep", "1000")
    docker.docker("exec", "box", "sh", "-c", CHANGE)
    docker.docker("commit", "box", "saved:1")
    docker.docker("save", "-o", tmp_path / "saved.tar", "saved:1")
    lowers = pyoverlay("import", tmp_path / "saved.tar", tmp_path / "store")
    merged = Path(docker.docker("inspect", "-f", "{{.GraphDriver.Data.MergedDir}}", "box").strip())
    with mounted(lowers, tmp_path / "mount") as overlay:
        assert image_of(overlay.merged) == image_of(merged)
    docker.docker("rm", "-f", "box")
    docker.docker("rmi", "saved:1")


def image_of(tree: Path) -> dict[str, tuple[object, ...]]:
    """What an image keeps of a container: not what every container has, and of times whole seconds."""
    kept = {name: what for name, what in described(tree).items() if name not in OF_A_CONTAINER}
    return {name: (mode, uid, gid, int(str(time_ns)) // 10**9, *rest) for name, (mode, uid, gid, time_ns, *rest) in kept.items()}


def test_an_export_of_a_containers_upper_is_the_layer_that_docker_commits(docker: Docker, tmp_path: Path) -> None:
    """Of every change in the catalogue the same members in the same order, apart from what we carry and Docker does not (fractions of a
    second, attributes other than capabilities). Of a whiteout Docker also says when it was made, and that it is a link to the one before,
    as whiteouts are on disk. A file named like a whiteout, which Docker writes as if it were one, is refused.
    """
    cases = {f"c{number:02}": case for number, case in enumerate(CASES) if "named as a whiteout" not in case.name}
    (tmp_path / "trees").mkdir()
    for name in cases:
        (tmp_path / "trees" / name).mkdir()
        make_tree(tmp_path / "trees" / name, TREE)
    run("tar", "-C", tmp_path / "trees", "--numeric-owner", "-cf", tmp_path / "trees.tar", ".")
    (tmp_path / "Dockerfile").write_text(f"FROM {IMAGE}\nADD trees.tar /\n")
    docker.docker("build", "-q", "--network=none", "-t", "cases", tmp_path)
    docker.docker("run", "-d", "--name", "box", "--network=none", "cases", "sleep", "1000")
    merged, upper = docker.docker("inspect", "-f", "{{.GraphDriver.Data.MergedDir}} {{.GraphDriver.Data.UpperDir}}", "box").split()
    for name, case in cases.items():
        case.change(Path(merged, name))
    docker.docker("commit", "box", "saved:2")
    docker.docker("save", "-o", tmp_path / "saved.tar", "saved:2")
    with tarfile.open(tmp_path / "saved.tar") as saved:
        manifest = saved.extractfile("manifest.json")
        assert manifest is not None
        layer = json.load(manifest)[0]["Layers"][-1]
        saved.extract(layer, tmp_path)
    pyoverlay("export", upper, "-o", tmp_path / "layer.tar")
    ours, theirs = members(tmp_path / "layer.tar"), members(tmp_path / layer)
    assert len(theirs) > 150
    assert ours == theirs
    docker.docker("rm", "-f", "box")
    docker.docker("rmi", "saved:2", "cases")


def members(path: Path) -> list[tuple[object, ...]]:
    with tarfile.open(path) as tar:
        found = tar.getmembers()
    is_whiteout = [Path(member.name).name.startswith(".wh.") for member in found]
    capability = "SCHILY.xattr.security.capability"
    return [
        (m.name, m.type, stat.S_IMODE(m.mode), m.uid, m.gid, m.size, m.pax_headers.get(capability))
        + (() if whiteout else (int(m.mtime), m.linkname))
        for m, whiteout in zip(found, is_whiteout, strict=True)
    ]
