"""What podman asks of its mount_program, and what it makes of the answers: with a program between the two that keeps notes."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyoverlay import registry
from pyoverlay.testing import mounts_below
from pyoverlay.testing.mounts import wait_for_end
from tests.interop import engines
from tests.interop.engines import IMAGE, Podman

pytestmark = [pytest.mark.root, pytest.mark.container, pytest.mark.timeout(180)]

NOTED = """#!/bin/sh
printf '%s\\n' "$*" >>"$0.argv"
exec {program} "$@" 2>"$0.stderr"
"""


class Noted:
    """A podman of root's own, and the notes of the program that it mounts with."""

    def __init__(self, podman: Podman, program: Path) -> None:
        self.podman = podman
        self._argv, self._stderr = program.with_name("noted.argv"), program.with_name("noted.stderr")

    def calls(self) -> list[str]:
        """The arguments since the last time."""
        lines = self._argv.read_text().splitlines() if self._argv.exists() else []
        self._argv.unlink(missing_ok=True)
        return lines

    def said(self) -> str:
        return self._stderr.read_text()


@pytest.fixture(scope="module")
def noted_podman(base_image: Path) -> Iterator[Noted]:
    if (reason := engines.missing("podman", "buildah", "runc")) is not None:
        pytest.skip(reason)
    with engines.short_directory() as directory:
        program = directory / "noted"
        program.write_text(NOTED.format(program=engines.MOUNT_PROGRAM))
        program.chmod(0o755)
        with engines.root_podman(base_image, program) as podman:
            yield Noted(podman, program)


@pytest.fixture
def noted(noted_podman: Noted) -> Iterator[Noted]:
    noted_podman.calls()
    yield noted_podman
    noted_podman.podman.remove_containers()


def test_its_mounts_are_of_this_form_and_nothing_is_said(noted: Noted) -> None:
    """If a later podman asks otherwise, it shows here first."""
    noted.podman.podman("run", "--rm", IMAGE, "true")
    (call,) = noted.calls()
    store = noted.podman.store
    assert call.startswith(f"-o lowerdir={store}/l/")
    assert f",upperdir={store}/" in call
    assert ",workdir=" in call
    assert ",,volatile " in call  # an empty option among them
    assert call.endswith("/merged")
    assert noted.said() == ""


def test_an_overlay_volume_is_mounted_private(noted: Noted) -> None:
    volume, upper, work = places = [noted.podman.directory / name for name in ("volume", "volume-upper", "volume-work")]
    for place in places:
        place.mkdir()
    noted.podman.podman("run", "--rm", "-v", f"{volume}:/v:O,upperdir={upper},workdir={work}", IMAGE, "touch", "/v/new")
    assert any(call.startswith(f"-o lowerdir={volume},upperdir={upper},workdir={work},private ") for call in noted.calls())
    assert os.listdir(upper) == ["new"]
    assert os.listdir(volume) == []


def test_a_root_file_system_is_overlaid(noted: Noted) -> None:
    """`--rootfs D:O`."""
    root = noted.podman.directory / "root"
    root.mkdir()
    engines.run("tar", "-C", root, "-xf", noted.podman.directory / "image.tar")
    shown = noted.podman.podman("run", "--rm", "--rootfs", f"{root}:O", "sh", "-c", "rm /etc/passwd; touch /new; ls / /etc")
    assert "new" in shown.split()
    assert "passwd" not in shown.split()
    assert (root / "etc/passwd").exists()
    assert not (root / "new").exists()


def test_root_s_containers_have_set_user_id_programs_and_devices(noted: Noted) -> None:
    noted.podman.podman("run", "-d", "--name", "box", IMAGE, "sleep", "1000")
    (mount,) = [mount for mount in mounts_below(noted.podman.store) if mount.fs_type == "fuse.pyoverlay"]
    assert not {"nosuid", "nodev", "noexec"} & set(mount.options.split(","))
    assert "allow_other" in mount.super_options


def test_the_daemon_holds_nothing_that_podman_was_given(noted: Noted) -> None:
    """Whoever started podman may wait for the end of a pipe; podman hands down all it has inherited."""
    reader, writer = os.pipe()
    os.set_inheritable(writer, True)
    try:
        pipe = os.readlink(f"/proc/self/fd/{writer}")
        noted.podman.podman("run", "-d", "--name", "box", IMAGE, "sleep", "1000")
    finally:
        os.close(writer)
        os.close(reader)
    (daemon,) = [record for record in registry.live() if record.merged.startswith(os.fsencode(noted.podman.store))]
    held = [os.readlink(f"/proc/{daemon.pid}/fd/{fd}") for fd in os.listdir(f"/proc/{daemon.pid}/fd")]
    assert pipe not in held
    assert {os.readlink(f"/proc/{daemon.pid}/fd/{fd}") for fd in (0, 1, 2)} == {"/dev/null"}


def test_a_daemon_that_was_killed_is_replaced(noted: Noted) -> None:
    noted.podman.podman("run", "-d", "--name", "box", IMAGE, "sleep", "1000")
    noted.podman.podman("exec", "box", "sh", "-c", "echo kept > /kept")
    (daemon,) = [record for record in registry.live() if record.merged.startswith(os.fsencode(noted.podman.store))]
    os.kill(daemon.pid, signal.SIGKILL)
    assert wait_for_end([daemon.pid], 10) == []
    assert noted.podman.attempt("podman", "exec", "box", "cat", "/kept").returncode != 0
    noted.podman.podman("stop", "-t0", "box")
    noted.podman.podman("start", "box")
    assert noted.podman.podman("exec", "box", "cat", "/kept") == "kept\n"


def test_what_we_refuse_podman_shows(base_image: Path) -> None:
    if (reason := engines.missing("podman", "buildah", "runc")) is not None:
        pytest.skip(reason)
    with engines.root_podman(base_image, options='mountopt = "metacopy=perhaps"\n') as podman:
        result = podman.attempt("podman", "run", "--rm", IMAGE, "true")
    assert result.returncode == 126
    assert "mount.fuse.pyoverlay: -o metacopy=perhaps: no such value" in result.stderr


def test_a_user_without_subordinate_ids_runs_containers(base_image: Path) -> None:
    """`ignore_chown_errors`: every file of the image is that user's, root's inside."""
    if (reason := engines.missing("podman", "buildah", "runc", "newuidmap", "setpriv")) is not None:
        pytest.skip(reason)
    if not engines.is_within_a_users_reach(engines.MOUNT_PROGRAM):
        pytest.skip(f"{engines.MOUNT_PROGRAM} is out of an ordinary user's reach")
    with engines.user_podman(base_image, options='ignore_chown_errors = "true"\n', subordinates=0) as podman:
        shown = podman.podman("run", "--rm", IMAGE, "sh", "-c", "touch /new; rm /etc/passwd; stat -c %u /new /etc; cat /proc/self/uid_map")
    *owners, uid_map = shown.splitlines()
    assert owners == ["0", "0"]
    assert uid_map.split() == ["0", str(engines.USER), "1"]


@pytest.mark.parametrize("user", ["root", "user"])
def test_an_image_whose_owners_are_in_attributes(base_image: Path, user: str) -> None:
    """`force_mask`: podman writes `user.containers.override_stat` into its layers, and asks us for xattr_permissions=2.

    Of a mode it writes the lower nine bits alone (4.3): set-user-id and sticky do not outlive its own hands.
    """
    if (reason := engines.missing("podman", "buildah", "runc", "newuidmap", "setpriv")) is not None:
        pytest.skip(reason)
    if not engines.is_within_a_users_reach(engines.MOUNT_PROGRAM):
        pytest.skip(f"{engines.MOUNT_PROGRAM} is out of an ordinary user's reach")
    start = engines.root_podman if user == "root" else engines.user_podman
    with start(base_image, options='force_mask = "0755"\n') as podman:
        (layer,) = podman.store.glob("*/diff/etc/passwd")
        assert os.getxattr(layer, "user.containers.override_stat").startswith(b"0:0:0644")
        assert os.lstat(layer).st_mode & 0o777 == 0o755
        script = "stat -c '%u:%g %a' /etc/passwd /etc; touch /new; chown 7:8 /new; chmod 640 /new; stat -c '%u:%g %a' /new"
        podman.podman("run", "--name", "box", IMAGE, "sh", "-c", script)
        assert podman.podman("logs", "box").splitlines() == ["0:0 644", "0:0 755", "7:8 640"]
        podman.podman("commit", "-q", "box", "committed")
        shown = podman.podman("run", "--rm", "committed", "stat", "-c", "%u:%g %a", "/new", "/etc/passwd")
        assert shown.splitlines() == ["7:8 640", "0:0 644"]
