"""Container engines for the tests of this directory, one of each kind for the whole run; each test leaves it without containers.

Engines take seconds to start and not every machine has them, so these tests are a part of their own: `scripts/test --only interop`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pyoverlay.testing import mounts_below
from tests.interop import engines
from tests.interop.engines import Docker, Podman


def _require(*programs: str) -> None:
    if (reason := engines.missing(*programs)) is not None:
        pytest.skip(reason)


@pytest.fixture(scope="session")
def base_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tar file of a root file system: busybox, and the directories that a container wants."""
    _require()
    path = tmp_path_factory.mktemp("image") / "bb.tar"
    engines.make_base_image(path)
    return path


@pytest.fixture(scope="session")
def shared_root_podman(base_image: Path) -> Iterator[Podman]:
    _require("podman", "buildah", "runc")
    with engines.root_podman(base_image) as podman:
        yield podman


@pytest.fixture(scope="session")
def shared_user_podman(base_image: Path) -> Iterator[Podman]:
    _require("podman", "buildah", "runc", "newuidmap", "setpriv")
    if not engines.is_within_a_users_reach(engines.MOUNT_PROGRAM):
        pytest.skip(f"{engines.MOUNT_PROGRAM} is out of an ordinary user's reach")
    with engines.user_podman(base_image) as podman:
        yield podman


@pytest.fixture(params=["root", "user"])
def podman(request: pytest.FixtureRequest) -> Iterator[Podman]:
    """podman and buildah that mount with our program, and have the image `bb`: of root, and of an ordinary user."""
    yield from _alone(request.getfixturevalue(f"shared_{request.param}_podman"))


@pytest.fixture
def root_podman(shared_root_podman: Podman) -> Iterator[Podman]:
    """The same of root alone."""
    yield from _alone(shared_root_podman)


@pytest.fixture
def user_podman(shared_user_podman: Podman) -> Iterator[Podman]:
    """The same of an ordinary user alone."""
    yield from _alone(shared_user_podman)


def _alone(podman: Podman) -> Iterator[Podman]:
    yield podman
    podman.remove_containers()
    left = [mount.mount_point for mount in mounts_below(podman.directory) if mount.fs_type.startswith("fuse")]
    assert left == [], f"this test left mounts: {left}"


@pytest.fixture(scope="session")
def shared_docker(base_image: Path) -> Iterator[Docker]:
    _require("dockerd", "docker")
    with engines.dockerd(base_image) as docker:
        yield docker


@pytest.fixture
def docker(shared_docker: Docker) -> Iterator[Docker]:
    """A Docker engine on the kernel's overlay (overlay2) that has the image `bb`."""
    yield shared_docker
    shared_docker.remove_containers()


@pytest.fixture(scope="session")
def shared_docker_on_pyoverlay(base_image: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Docker]:
    _require("dockerd", "docker")
    programs = tmp_path_factory.mktemp("programs")
    (programs / "fuse-overlayfs").symlink_to(engines.MOUNT_PROGRAM)
    with engines.dockerd(base_image, "fuse-overlayfs", programs) as docker:
        yield docker


@pytest.fixture
def docker_on_pyoverlay(shared_docker_on_pyoverlay: Docker) -> Iterator[Docker]:
    """A Docker engine that mounts with our program, which it finds under the name fuse-overlayfs."""
    yield shared_docker_on_pyoverlay
    shared_docker_on_pyoverlay.remove_containers()
