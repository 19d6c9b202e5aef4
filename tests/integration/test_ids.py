"""-o uidmapping, gidmapping: the layers have a container's ids, the merged view the host's, as containers/storage asks for it."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from pyoverlay.testing import Directory, File, Overlay, OverlayFactory
from tests.posix.check import as_user

pytestmark = pytest.mark.root

OVERFLOW = 65534
OWNER = 100_003  # 3 in the layers
OPTIONS = ("-o", "uidmapping=:0:100000:1000,gidmapping=:0:100000:1000")


def owner(path: os.PathLike[str]) -> tuple[int, int]:
    st = os.lstat(path)
    return st.st_uid, st.st_gid


def code(act: Callable[[], object]) -> str:
    with pytest.raises(OSError) as caught:
        act()
    return errno.errorcode[caught.value.errno or 0]


@pytest.fixture
def mapped(overlay: OverlayFactory) -> Overlay:
    """`d` and `d/f` are 3's, `of-nobody` and what is in it 5000's, who has no counterpart."""
    here = overlay(
        {"d": Directory({"f": File("lower", 0o644, uid=3, gid=4)}, 0o755, uid=3, gid=4), "f": File("x", uid=5000)},
        upper={
            "open": Directory({}, 0o777),
            "of-nobody": Directory({"g": File("y", 0o666, uid=5000, gid=5000)}, 0o777, uid=5000, gid=5000),
        },
        options=OPTIONS,
    )
    os.chmod(here.writable, 0o777)
    os.chown(here.writable, 0, 0)
    return here


def test_owners_show_as_their_counterparts(mapped: Overlay) -> None:
    assert owner(mapped.merged) == (100_000, 100_000)
    assert owner(mapped.merged / "d") == owner(mapped.merged / "d/f") == (100_003, 100_004)
    assert owner(mapped.merged / "of-nobody") == owner(mapped.merged / "of-nobody/g") == (OVERFLOW, OVERFLOW)
    assert owner(mapped.merged / "f") == (OVERFLOW, 100_000)


def test_what_somebody_makes_belongs_to_the_counterpart(mapped: Overlay) -> None:
    def make() -> None:
        with open("file", "w") as file:
            file.write("new")
            assert os.fstat(file.fileno()).st_uid == OWNER
        os.mkdir("directory")
        os.symlink("x", "symlink")
        os.mkfifo("fifo")
        os.chmod("file", 0o600)
        with open("f", "a") as file:
            file.write(", changed")
        os.unlink("fifo")

    as_user(mapped.merged / "d", make, uid=OWNER)
    for name in ("file", "directory", "symlink"):
        assert owner(mapped.writable / "d" / name) == (3, 3)
        assert owner(mapped.merged / "d" / name) == (OWNER, OWNER)
    assert owner(mapped.writable / "d/f") == (3, 4)
    assert (mapped.merged / "d/f").read_text() == "lower, changed"


def test_nobody_is_made_an_owner_without_a_counterpart(mapped: Overlay) -> None:
    """As on an idmapped mount of the kernel's: EOVERFLOW, and nothing has changed."""
    d = mapped.merged / "d"
    assert code(lambda: os.chown(d / "f", 3, -1)) == "EOVERFLOW"
    assert code(lambda: os.chown(d / "f", -1, 101_000)) == "EOVERFLOW"
    assert not (mapped.writable / "d").exists()
    os.chown(d / "f", 100_999, 100_999)
    assert owner(mapped.writable / "d/f") == (999, 999)
    assert code(lambda: os.chown(d / "f", 101_000, -1)) == "EOVERFLOW"

    def make() -> None:
        assert code(lambda: os.open("new", os.O_CREAT | os.O_WRONLY)) == "EOVERFLOW"
        assert code(lambda: os.mkdir("new")) == "EOVERFLOW"

    as_user(mapped.merged / "open", make, uid=3)
    assert os.listdir(mapped.merged / "open") == []


def test_what_the_mount_s_own_user_makes_is_its_own_in_the_layers(mapped: Overlay) -> None:
    """An engine prepares a container's root as itself: podman, as root outside of the map, makes /etc/mtab and then gives it away."""
    (mapped.merged / "open/new").write_text("x")
    assert owner(mapped.writable / "open/new") == (0, 0)
    assert owner(mapped.merged / "open/new") == (100_000, 100_000)


def test_what_belongs_to_nobody_is_out_of_the_overflow_user_s_reach(mapped: Overlay) -> None:
    """The kernel takes 65534 for the owner, and would let that user do as it likes."""

    def use() -> None:
        assert os.open("g", os.O_RDONLY) >= 0
        assert code(lambda: os.chmod("g", 0o600)) == "EOVERFLOW"
        assert code(lambda: os.chmod(".", 0o700)) == "EOVERFLOW"
        assert code(lambda: os.utime("g")) == "EACCES"
        assert code(lambda: os.truncate("g", 0)) == "EACCES"
        assert code(lambda: os.setxattr("g", "user.x", b"")) == "EPERM"
        assert code(lambda: os.link("g", "h")) == "EOVERFLOW"
        assert code(lambda: os.rename("g", "h")) == "EOVERFLOW"
        assert code(lambda: os.unlink("g")) == "EOVERFLOW"
        fd = os.open("g", os.O_RDWR)
        assert code(lambda: os.write(fd, b"z")) == "EACCES"
        os.close(fd)

    as_user(mapped.merged / "of-nobody", use, uid=OVERFLOW)
    assert (mapped.writable / "of-nobody/g").read_bytes() == b"y"
    assert owner(mapped.writable / "of-nobody/g") == (5000, 5000)


def test_a_copy_keeps_the_owner_that_the_lower_has(mapped: Overlay) -> None:
    os.chmod(mapped.merged / "d/f", 0o640)
    assert owner(mapped.writable / "d/f") == owner(mapped.writable / "d") == (3, 4)
    assert owner(mapped.merged / "d/f") == (100_003, 100_004)


def test_an_acl_names_counterparts(mapped: Overlay) -> None:
    file = mapped.merged / "d/f"
    subprocess.run(["setfacl", "-m", "u:100007:rw,g:100008:r", file], check=True)
    assert {"user:7:rw-", "group:8:r--"} <= set(listed(mapped.writable / "d/f"))
    assert {"user:100007:rw-", "group:100008:r--"} <= set(listed(file))
    refused = subprocess.run(["setfacl", "-m", "u:7:rw", file], check=False, capture_output=True, text=True)
    assert "Invalid argument" in refused.stderr


def listed(path: Path) -> list[str]:
    return subprocess.run(["getfacl", "-cpn", path], check=True, capture_output=True, text=True).stdout.split()
