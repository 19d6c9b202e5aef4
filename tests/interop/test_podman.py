"""podman and buildah with `mount_program` set to our program, as root and as an ordinary user."""

from __future__ import annotations

import os
import re

import pytest

from pyoverlay.testing import snapshot
from tests.interop import engines
from tests.interop.engines import IMAGE, Podman

pytestmark = [pytest.mark.root, pytest.mark.container, pytest.mark.timeout(180)]


def names(listing: str) -> set[str]:
    return set(listing.split())


def test_a_built_image_runs_shows_its_changes_and_is_committed(podman: Podman) -> None:
    """Each layer that the build stores spells its whiteouts `.wh.NAME`: engines do so whenever a mount_program is set."""
    containerfile = podman.directory / "Containerfile"
    containerfile.write_text(
        f"FROM localhost/{IMAGE}\n"
        "RUN mkdir -p /d/sub /gone && echo one > /d/one && echo two > /d/sub/two && echo x > /gone/x\n"
        "RUN rm -r /gone && rm /d/one && mv /d/sub /d/moved && chmod 600 /etc/passwd\n"
    )
    podman.podman("build", "-q", "--pull=never", "-f", containerfile, "-t", "built", ".")
    show = ("sh", "-c", "ls /; ls /d /d/moved; cat /d/moved/two; stat -c %a /etc/passwd")
    shown = podman.podman("run", "--rm", "built", *show)
    assert "gone" not in names(shown)
    assert {"moved", "two"} <= names(shown)
    assert shown.endswith("two\n600\n")

    podman.podman("run", "-d", "--name", "box", "built", "sleep", "1000")
    podman.podman("exec", "box", "sh", "-c", "echo new > /d/new; rm /d/moved/two; ln -s new /d/link; echo more >> /etc/passwd")
    lines = set(podman.podman("diff", "box").splitlines())
    assert lines == {"C /d", "A /d/new", "A /d/link", "C /d/moved", "D /d/moved/two", "C /etc", "C /etc/passwd"}

    podman.podman("commit", "-q", "box", "committed")
    assert podman.podman("run", "--rm", "committed", "sh", "-c", "cat /d/link; ls /d/moved; tail -n 1 /etc/passwd") == "new\nmore\n"


def test_buildah_changes_a_mounted_container_and_commits_it(podman: Podman) -> None:
    source = podman.directory / "source"
    source.write_text("copied\n")
    container = podman.buildah("from", "--pull-never", f"localhost/{IMAGE}").strip()
    podman.buildah("run", container, "sh", "-c", "mkdir /d && echo ran > /d/ran")
    podman.buildah("copy", container, source, "/d/copied")
    podman.in_user_namespace(
        'mounted=$(buildah mount "$1"); echo mounted > $mounted/d/mounted; rm $mounted/etc/passwd; buildah umount "$1"', container
    )
    podman.buildah("commit", "-q", container, "by-buildah")
    assert podman.podman("run", "--rm", "by-buildah", "sh", "-c", "cat /d/*; ls /etc/passwd || true") == "copied\nmounted\nran\n"


@pytest.mark.parametrize("options", [(), ("--layers=false",), ("--isolation=chroot",)], ids=["plain", "one layer", "chroot"])
def test_buildah_builds_from_a_containerfile(podman: Podman, options: tuple[str, ...]) -> None:
    (podman.directory / "Containerfile").write_text(f"FROM localhost/{IMAGE}\nCOPY source /copied\nRUN rm /etc/passwd && echo ran > /ran\n")
    (podman.directory / "source").write_text("copied\n")
    podman.buildah("bud", "-q", "--pull-never", *options, "-f", "Containerfile", "-t", "bud", ".")
    assert podman.podman("run", "--rm", "bud", "sh", "-c", "cat /copied /ran; ls /etc/passwd || true") == "copied\nran\n"


def test_an_overlay_volume_leaves_its_directory_as_it_was(podman: Podman) -> None:
    """`-v D:/v:O`: a mount of podman's own making, with the option `private` and nobody to read what is said on stderr."""
    volume = podman.directory / "volume"
    volume.mkdir()
    (volume / "old").write_text("old\n")
    if podman.is_rootless:
        os.chown(volume, engines.USER, engines.USER)
        os.chown(volume / "old", engines.USER, engines.USER)
    before = snapshot(volume)
    script = "echo changed > /v/old; echo new > /v/new; cat /v/*"
    shown = podman.podman("run", "--rm", "-v", f"{volume}:/v:O", IMAGE, "sh", "-c", script)
    assert shown == "new\nchanged\n"
    assert snapshot(volume) == before


def test_an_image_is_mounted_and_is_the_lower_of_another_overlay(podman: Podman) -> None:
    """`--mount type=image`: the lower of the volume is itself a mount of ours."""
    mounted = podman.in_user_namespace('m=$(podman image mount bb); ls $m; cat $m/etc/passwd; podman image umount bb >/dev/null')
    assert {"bin", "etc", "tmp"} <= names(mounted)
    assert "root:x:0:0" in mounted
    script = "rm /image/etc/passwd; echo new > /image/new; ls /image /image/etc"
    shown = podman.podman("run", "--rm", "--mount", "type=image,source=bb,destination=/image,rw=true", IMAGE, "sh", "-c", script)
    assert "new" in names(shown)
    assert "passwd" not in names(shown)
    read_only = ("run", "--rm", "--mount", "type=image,source=bb,destination=/image", IMAGE)
    assert "root:x:0:0" in podman.podman(*read_only, "cat", "/image/etc/passwd")


def test_the_change_of_an_image_is_shown_without_a_trace_in_its_layer(podman: Podman) -> None:
    """`diff IMAGE` mounts the layer itself as an upper, and writes nothing."""
    (podman.directory / "Containerfile").write_text(f"FROM localhost/{IMAGE}\nRUN echo new > /new && rm /etc/passwd\n")
    podman.podman("build", "-q", "--pull=never", "-f", "Containerfile", "-t", "built", ".")
    layers = [path / "diff" for path in podman.store.iterdir() if (path / "diff/new").exists()]
    before = [snapshot(layer) for layer in layers]
    assert any("etc/.wh.passwd" in str(sorted(layer)) for layer in before)
    assert set(podman.podman("diff", "built").splitlines()) == {"A /new", "C /etc", "D /etc/passwd"}
    assert [snapshot(layer) for layer in layers] == before


def test_a_name_that_would_be_a_whiteout_in_the_image_cannot_be_made(podman: Podman) -> None:
    result = podman.attempt("podman", "run", "--rm", IMAGE, "touch", "/etc/.wh.passwd")
    assert result.returncode == 1
    assert "Invalid argument" in result.stderr


def test_a_read_only_container_cannot_be_written_to(podman: Podman) -> None:
    result = podman.attempt("podman", "run", "--rm", "--read-only", IMAGE, "sh", "-c", "echo x > /new")
    assert result.returncode == 1
    assert "Read-only file system" in result.stderr


def test_a_stopped_container_keeps_its_changes(podman: Podman) -> None:
    """No container here has a name that could begin an image's id: `podman diff` looks among these first."""
    podman.podman("run", "-d", "--name", "box", IMAGE, "sleep", "1000")
    podman.podman("exec", "box", "sh", "-c", "echo kept > /kept; rm /etc/passwd")
    podman.podman("stop", "-t0", "box")
    assert {"A /kept", "D /etc/passwd"} <= set(podman.podman("diff", "box").splitlines())
    podman.podman("start", "box")
    assert podman.podman("exec", "box", "cat", "/kept") == "kept\n"


def test_podman_info_says_what_it_mounts_with(podman: Podman) -> None:
    """It calls the program with --version."""
    described = podman.podman("info", "--format", '{{index .Store.GraphOptions "overlay.mount_program"}}')
    assert str(engines.MOUNT_PROGRAM) in described
    assert re.search(r"pyoverlay \d+\.\d+", described)


@pytest.mark.parametrize(
    "options",
    [("--uidmap", "0:1:1000"), ("--userns=keep-id",), ("--userns=auto",), ("--userns=nomap",), ("--uidmap", "0:0:1")],
    ids=" ".join,
)
def test_ids_of_a_container_with_a_map_of_its_own(user_podman: Podman, options: tuple[str, ...]) -> None:
    """podman hands the map to us instead of copying the image with other owners: what the image has of root is root's in the container."""
    owned = "stat -c %u:%g / /bin /etc/passwd; touch /tmp/new; stat -c %u:%g /tmp/new"
    shown = user_podman.podman("run", "--rm", "--user", "0", *options, IMAGE, "sh", "-c", owned)
    assert shown.split() == ["0:0"] * 4


@pytest.mark.parametrize("options", [("--uidmap", "0:1:1000"), ("--userns=keep-id",)], ids=" ".join)
def test_ids_that_a_mapped_container_gives_are_the_image_s(user_podman: Podman, options: tuple[str, ...]) -> None:
    """What is committed from it has the owners that its own users have."""
    changed = "chown 7:8 /etc/passwd; stat -c %u:%g /etc/passwd"
    user_podman.podman("run", "--name", "box", "--user", "0", *options, IMAGE, "sh", "-c", changed)
    user_podman.podman("commit", "-q", "box", "committed")
    assert user_podman.podman("run", "--rm", "committed", "stat", "-c", "%u:%g", "/etc/passwd") == "7:8\n"
