"""Hard links of a lower stay one file, whichever of their names is written, looked up, removed, or found after a while."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from pyoverlay.testing import Fifo, HardLink, Symlink, Tree
from tests.integration.looks import WHITEOUT, Here, layers, shape
from tests.posix.check import opened
from tests.posix.system_calls import RENAME_EXCHANGE, renameat2


def drop_caches() -> None:
    """The kernel forgets every inode that nobody has open."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("2")


def one_file(*paths: Path) -> None:
    """All of these are one file, and there are no more names of it than these."""
    found = [os.lstat(path) for path in paths]
    assert len({(st.st_dev, st.st_ino) for st in found}) == 1
    assert {st.st_nlink for st in found} == {len(paths)}


LINKED: Tree = {"a": {"f": b"shared"}, "b": {"g": HardLink("a/f")}, "h": HardLink("a/f")}


@layers(LINKED)
def test_links_of_a_lower_are_one_file_before_any_change(here: Here) -> None:
    one_file(here.merged / "a/f", here.merged / "b/g", here.merged / "h")
    assert not here.upper.exists()


@pytest.mark.parametrize("written", ["f0", "f1", "f2"])
@layers({f"f{round_}": {"f0": b"shared", "f1": HardLink(f"f{round_}/f0"), "f2": HardLink(f"f{round_}/f0")} for round_ in range(3)})
def test_links_of_a_lower_are_one_file_after_a_write_through_any(here: Here, written: str) -> None:
    d = here.merged / written
    with opened(d / written, os.O_WRONLY) as fd:
        os.write(fd, b"CHANGED")
    assert {(d / name).read_bytes() for name in ("f0", "f1", "f2")} == {b"CHANGED"}
    one_file(d / "f0", d / "f1", d / "f2")


@layers({"f": b"shared", "g": HardLink("f")})
@pytest.mark.root  # only root drops caches
def test_the_other_name_looked_up_after_the_kernel_forgot_is_still_the_same_file(here: Here) -> None:
    """`g` is never named before the write: only the overlay can know that it is the file that was copied up as `f`."""
    (here.merged / "f").write_bytes(b"CHANGED")
    drop_caches()
    assert (here.merged / "g").read_bytes() == b"CHANGED"
    one_file(here.merged / "f", here.merged / "g")
    (here.merged / "g").write_bytes(b"again")
    drop_caches()
    assert (here.merged / "f").read_bytes() == b"again"


@layers(LINKED)
@pytest.mark.root  # only root drops caches
def test_removing_names_of_a_copied_up_file_counts_them_down(here: Here) -> None:
    m = here.merged
    os.chmod(m / "a/f", 0o600)
    os.unlink(m / "a/f")
    one_file(m / "b/g", m / "h")
    drop_caches()
    one_file(m / "b/g", m / "h")
    os.unlink(m / "h")
    one_file(m / "b/g")
    with opened(m / "b/g", os.O_RDWR) as fd:
        os.unlink(m / "b/g")
        assert os.fstat(fd).st_nlink == 0
        os.write(fd, b"SHARED")
        assert os.pread(fd, 10, 0) == b"SHARED"
    assert shape(m) == {"a": {}, "b": {}}
    assert shape(here.upper) == {"a": {"f": WHITEOUT}, "b": {"g": WHITEOUT}, "h": WHITEOUT}


@layers(LINKED)
def test_removing_names_of_a_lower_file_counts_them_down(here: Here) -> None:
    m = here.merged
    with opened(m / "h", os.O_RDONLY) as fd:
        os.unlink(m / "h")
        assert os.fstat(fd).st_nlink == 2
        one_file(m / "a/f", m / "b/g")
        os.unlink(m / "a/f")
        assert os.fstat(fd).st_nlink == 1
        assert os.read(fd, 10) == b"shared"
        (m / "b/g").write_bytes(b"CHANGED")
        assert os.pread(fd, 10, 0) == b"CHANGED"


@layers({"f": b"shared", "g": HardLink("f"), "sub": {}})
@pytest.mark.root  # only root drops caches
def test_a_new_link_to_a_lower_file_joins_the_old_ones(here: Here) -> None:
    m = here.merged
    os.link(m / "f", m / "sub" / "new")
    one_file(m / "f", m / "g", m / "sub/new")
    (m / "g").write_bytes(b"CHANGED")
    drop_caches()
    assert {path.read_bytes() for path in (m / "f", m / "g", m / "sub/new")} == {b"CHANGED"}
    one_file(m / "f", m / "g", m / "sub/new")


@layers({"f": b"single"})
def test_a_single_lower_file_can_be_linked_and_both_are_one(here: Here) -> None:
    os.link(here.merged / "f", here.merged / "g")
    one_file(here.merged / "f", here.merged / "g")
    one_file(here.upper / "f", here.upper / "g")
    assert shape(here.upper) == {"f": b"single", "g": b"single"}
    os.unlink(here.merged / "f")
    one_file(here.merged / "g")
    assert shape(here.upper) == {"f": WHITEOUT, "g": b"single"}


@layers({"f": b"shared", "g": HardLink("f"), "d": {"x": b"x"}})
@pytest.mark.root  # only root drops caches
def test_names_move_and_stay_one_file(here: Here) -> None:
    m = here.merged
    os.rename(m / "f", m / "d" / "moved")
    one_file(m / "g", m / "d/moved")
    renameat2(m / "g", m / "d/x", RENAME_EXCHANGE)
    one_file(m / "d/x", m / "d/moved")
    drop_caches()
    (m / "d/x").write_bytes(b"CHANGED")
    assert (m / "d/moved").read_bytes() == b"CHANGED"
    os.rename(m / "d/x", m / "d/moved")  # two names of one file: nothing happens
    one_file(m / "d/x", m / "d/moved")


@layers({"p": Fifo(), "q": HardLink("p"), "s": Symlink("x"), "t": HardLink("s")})
@pytest.mark.root  # sets what only root may
def test_links_of_special_files_and_symlinks_stay_one(here: Here) -> None:
    m = here.merged
    os.chmod(m / "p", 0o600)
    os.lchown(m / "s", 5, 5)
    drop_caches()
    one_file(m / "p", m / "q")
    one_file(m / "s", m / "t")
    assert os.lstat(m / "q").st_mode & 0o777 == 0o600
    assert os.lstat(m / "t").st_uid == 5


@layers({"f": b"shared", "g": HardLink("f"), "h": HardLink("f")})
def test_links_are_kept_by_cp_and_tar_out_of_the_view(here: Here, tmp_path: Path) -> None:
    (here.merged / "g").write_bytes(b"CHANGED")
    subprocess.run(["cp", "-a", here.merged, tmp_path / "copy"], check=True)
    one_file(*(tmp_path / "copy" / name for name in "fgh"))
    (tmp_path / "untarred").mkdir()
    archive = subprocess.run(["tar", "-C", here.merged, "-c", "."], check=True, capture_output=True).stdout
    subprocess.run(["tar", "-C", tmp_path / "untarred", "-x"], input=archive, check=True)
    one_file(*(tmp_path / "untarred" / name for name in "fgh"))
    assert (tmp_path / "untarred" / "f").read_bytes() == b"CHANGED"


@layers({"d": {"f": b"shared"}, "g": HardLink("d/f")})
@pytest.mark.root  # a redirect is followed with trusted.* marks alone
def test_a_name_in_a_renamed_directory_stays_one_file(here: Here) -> None:
    m = here.merged
    os.rename(m / "d", m / "e")
    one_file(m / "e/f", m / "g")
    (m / "g").write_bytes(b"CHANGED")
    drop_caches()
    assert (m / "e/f").read_bytes() == b"CHANGED"
    one_file(m / "e/f", m / "g")


@layers({"f": b"top", "g": HardLink("f")}, {"x": b"bottom", "y": HardLink("x"), "f": HardLink("x")})
def test_links_are_joined_within_one_lower_only(here: Here) -> None:
    m = here.merged
    (m / "x").write_bytes(b"CHANGED")
    assert shape(m) == {"f": b"top", "g": b"top", "x": b"CHANGED", "y": b"CHANGED"}
    assert os.lstat(m / "f").st_ino != os.lstat(m / "x").st_ino


@layers(upper={"f": b"shared", "g": HardLink("f"), "h": b"other"})
def test_the_known_name_goes_while_the_other_was_never_looked_up(alone: Here) -> None:
    """The file has a name yet, but none that we know, and somebody has it open."""
    alone.remount()
    with opened(alone.merged / "f", os.O_RDWR) as fd:
        os.unlink(alone.merged / "f")
        (alone.merged / "new").write_bytes(b"new")
        os.pwrite(fd, b"CHANGED", 0)
        assert os.fstat(fd).st_nlink == 1
        assert (alone.merged / "g").read_bytes() == b"CHANGED"
        assert os.path.samestat(os.fstat(fd), os.lstat(alone.merged / "g"))
        os.rename(alone.merged / "h", alone.merged / "g")
        os.pwrite(fd, b"again", 0)
        assert (os.fstat(fd).st_nlink, os.pread(fd, 7, 0)) == (0, b"againED")
    assert shape(alone.merged) == {"g": b"other", "new": b"new"}
    alone.remount()
    assert shape(alone.merged) == {"g": b"other", "new": b"new"}
