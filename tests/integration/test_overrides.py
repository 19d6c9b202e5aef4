"""-o xattr_permissions=2: owners and modes are in an attribute, and a program cannot tell."""

from __future__ import annotations

import errno
import os
import stat

import pytest

from pyoverlay.testing import Directory, File, OverlayFactory
from tests.posix.check import NOBODY, as_user

pytestmark = pytest.mark.root

NAME = "user.containers.override_stat"
OPTIONS = ("-o", "xattr_permissions=2")


def seen(path: os.PathLike[str] | str) -> tuple[int, int, int]:
    st = os.lstat(path)
    return st.st_uid, st.st_gid, stat.S_IMODE(st.st_mode)


def test_what_a_user_makes_and_changes_is_the_user_s_in_the_view_and_the_daemon_s_on_disk(overlay: OverlayFactory) -> None:
    nobodys = f"{NOBODY}:{NOBODY}:".encode()
    here = overlay(
        {"d": Directory({"f": File("lower", 0o600, xattrs={NAME: nobodys + b"640"})}, 0o700, xattrs={NAME: nobodys + b"755"})},
        options=OPTIONS,
    )

    def use() -> None:
        with open("f", "a") as file:
            file.write(", changed")
            assert seen("f") == (NOBODY, NOBODY, 0o640)
            os.fchmod(file.fileno(), 0o600)
            assert os.fstat(file.fileno()).st_mode == stat.S_IFREG | 0o600
        with open("new", "w") as file:
            os.fchmod(file.fileno(), 0o4751)
            assert os.fstat(file.fileno()).st_uid == NOBODY
            assert os.fstat(file.fileno()).st_mode == stat.S_IFREG | 0o4751
            file.write("x")
            file.flush()  # takes set-user-id away, though no mode on disk has it
            assert os.fstat(file.fileno()).st_mode == stat.S_IFREG | 0o751
            os.fchmod(file.fileno(), 0o4750)
        os.mkdir("directory", 0o750)
        os.rename("new", "directory/new")
        os.link("f", "g")
        with pytest.raises(PermissionError):
            os.setxattr("f", NAME, b"0:0:4755")
        assert os.listxattr("f") == []

    as_user(here.merged / "d", use)
    for name, mode in (("f", 0o600), ("g", 0o600), ("directory", 0o750), ("directory/new", 0o4750)):
        assert seen(here.merged / "d" / name) == (NOBODY, NOBODY, mode)
        assert seen(here.writable / "d" / name)[:2] == (0, 0)
    here.remount()
    assert seen(here.merged / "d/directory/new") == (NOBODY, NOBODY, 0o4750)
    assert (here.merged / "d/f").read_text() == "lower, changed"


def test_the_kernel_judges_by_what_is_shown(overlay: OverlayFactory) -> None:
    files = {"secret": File("x", 0o644, xattrs={NAME: b"0:0:600"}), "open": File("x", 0o600, xattrs={NAME: b"0:0:644"})}
    here = overlay(files, options=OPTIONS)

    def use() -> None:
        with pytest.raises(PermissionError) as caught:
            os.open("secret", os.O_RDONLY)
        assert caught.value.errno == errno.EACCES
        with open("open") as file:
            assert file.read() == "x"

    as_user(here.merged, use)
