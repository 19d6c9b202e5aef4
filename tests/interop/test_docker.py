"""A Docker engine that mounts with our program, and one whose own layers are mounted by us."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from pyoverlay.testing import Overlay
from tests.interop.engines import IMAGE, Docker

pytestmark = [pytest.mark.root, pytest.mark.container, pytest.mark.timeout(180)]


def test_docker_runs_on_our_program(docker_on_pyoverlay: Docker) -> None:
    """`dockerd -s fuse-overlayfs`, where the program of that name is ours."""
    docker = docker_on_pyoverlay.docker
    docker("run", "-d", "--name", "box", "--network=none", IMAGE, "sleep", "1000")
    docker("exec", "box", "sh", "-c", "echo new > /new; rm /etc/passwd; mkdir /d; echo four > /d/file")
    assert docker("inspect", "box", "--format", "{{.GraphDriver.Name}}") == "fuse-overlayfs\n"
    merged = docker("inspect", "box", "--format", "{{.GraphDriver.Data.MergedDir}}").strip()
    (mount,) = [line for line in Path("/proc/mounts").read_text().splitlines() if line.split()[1] == merged]
    assert mount.split()[2] == "fuse.pyoverlay"
    assert set(docker("diff", "box").splitlines()) == {"A /new", "C /etc", "D /etc/passwd", "A /d", "A /d/file"}
    assert docker("ps", "-s", "--format", "{{.Size}}").startswith("9B (virtual ")
    docker("commit", "box", "committed")
    assert docker("run", "--rm", "--network=none", "committed", "sh", "-c", "cat /new /d/file; ls /etc/passwd || true") == "new\nfour\n"


def test_docker_builds_on_our_program(docker_on_pyoverlay: Docker, tmp_path: Path) -> None:
    (tmp_path / "source").write_text("copied\n")
    (tmp_path / "Dockerfile").write_text(
        f"FROM {IMAGE}\nCOPY source /d/copied\nRUN echo ran > /d/ran && rm /etc/passwd\nRUN mv /d /e && mkdir /d && echo again > /d/new\n"
    )
    docker_on_pyoverlay.docker("build", "-q", "--network=none", "-t", "built", str(tmp_path))
    shown = docker_on_pyoverlay.docker("run", "--rm", "--network=none", "built", "sh", "-c", "ls /d /e /etc; cat /e/* /d/*")
    assert shown == "/d:\nnew\n\n/e:\ncopied\nran\n\n/etc:\nhostname\nhosts\nmtab\nresolv.conf\ncopied\nran\nagain\n"


# ── the layers of a container ───────────────────────────────────────────────────────────────────────────────────────────────


def described(tree: Path) -> dict[str, tuple[object, ...]]:
    """What somebody sees in a tree: of each object type, mode, owner, times, of a file its size and content, of a symlink its target."""
    found = {}
    for above, directories, files in os.walk(tree):
        for name in (*directories, *files):
            path = Path(above, name)
            found[str(path.relative_to(tree))] = _described(path)
    return found


def _described(path: Path) -> tuple[object, ...]:
    st = os.lstat(path)
    common = (stat.filemode(st.st_mode), st.st_uid, st.st_gid, st.st_mtime_ns, st.st_rdev)
    if stat.S_ISREG(st.st_mode):
        return (*common, st.st_size, hashlib.sha256(path.read_bytes()).hexdigest())
    return (*common, os.readlink(path)) if stat.S_ISLNK(st.st_mode) else common


def test_the_layers_of_a_container_show_its_file_system(docker: Docker, tmp_path: Path) -> None:
    """overlay2's lowers and a copy of its upper under a mount of ours, beside the container's own mount."""
    (tmp_path / "Dockerfile").write_text(
        f"FROM {IMAGE}\nRUN mkdir -p /d/sub /gone && echo 1 > /d/one && echo 2 > /d/sub/two && ln /d/one /d/link && mkfifo /d/fifo\n"
        "RUN rm -r /gone /d/sub && mkdir /d/sub && echo 3 > /d/sub/three && chown 7:8 /d/one && chmod u+s /bin/busybox\n"
    )
    docker.docker("build", "-q", "--network=none", "-t", "built", str(tmp_path))
    docker.docker("run", "-d", "--name", "box", "--network=none", "built", "sleep", "1000")
    change = "rm /d/link; mv /d/sub/three /d/four; rm -r /d/sub; mkdir /d/sub; echo x >> /d/one; touch /etc/new"
    docker.docker("exec", "box", "sh", "-c", change)
    data = json.loads(docker.docker("inspect", "box", "--format", "{{json .GraphDriver.Data}}"))
    lowers = tuple(map(Path, data["LowerDir"].split(":")))
    assert len(lowers) == 4  # the container's first layer, two of the build and the image

    copy, merged = docker.directory / "upper", docker.directory / "merged"
    subprocess.run(["cp", "-a", data["UpperDir"], copy], check=True)
    merged.mkdir()
    overlay = Overlay(lowers, copy, merged)
    overlay.mount()
    try:
        ours, theirs = described(merged), described(Path(data["MergedDir"]))
    finally:
        overlay.close()
        for directory in (copy, merged, overlay.work):
            shutil.rmtree(directory)
    assert len(theirs) > 250  # busybox has that many names
    assert ours == theirs
