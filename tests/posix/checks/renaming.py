"""rename(2) and renameat2(2)."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from tests.posix.check import (
    NOBODY,
    Step,
    add,
    as_user,
    check,
    fails,
    fifo,
    file,
    folder,
    link,
    names_in,
    opened,
    symlink,
)
from tests.posix.system_calls import RENAME_EXCHANGE, RENAME_NOREPLACE, RENAME_WHITEOUT, renameat2

# One object of each kind, what makes it under a name, and how a claim recognises it after it moved.
KINDS = ("file", "full", "empty", "symlink", "fifo")


def _object(kind: str, name: str) -> Step:
    match kind:
        case "file":
            return file(name, f"content of {name}".encode())
        case "full":
            return folder(name, file("inside", f"inside {name}".encode()), folder("deep", file("deeper", name.encode())))
        case "empty":
            return folder(name)
        case "symlink":
            return symlink(name, f"target of {name}")
        case _:
            return fifo(name)


def _assert_is(kind: str, original: str, path: Path) -> None:
    """`path` holds the object that `_object` made under the name `original`."""
    mode = os.lstat(path).st_mode
    match kind:
        case "file":
            assert path.read_bytes() == f"content of {original}".encode()
        case "full":
            assert names_in(path) == ["deep", "inside"]
            assert (path / "inside").read_bytes() == f"inside {original}".encode()
            assert (path / "deep" / "deeper").read_bytes() == original.encode()
        case "empty":
            assert stat.S_ISDIR(mode)
            assert names_in(path) == []
        case "symlink":
            assert os.readlink(path) == f"target of {original}"
        case _:
            assert stat.S_ISFIFO(mode)


def _to_a_new_name(kind: str) -> Step:
    def claim(d: Path) -> None:
        number = os.lstat(d / "old").st_ino
        os.rename(d / "old", d / "new")
        _assert_is(kind, "old", d / "new")
        assert os.lstat(d / "new").st_ino == number
        with fails(errno.ENOENT):
            os.lstat(d / "old")
        assert names_in(d) == ["new"]
        os.rename(d / "new", d / "old")
        _assert_is(kind, "old", d / "old")
        assert names_in(d) == ["old"]

    return claim


def _into_another_directory(kind: str) -> Step:
    def claim(d: Path) -> None:
        os.rename(d / "from" / "old", d / "to" / "moved")
        _assert_is(kind, "old", d / "to" / "moved")
        assert names_in(d / "from") == []
        assert names_in(d / "to") == ["moved"]
        os.rmdir(d / "from")

    return claim


def _noreplace(kind: str) -> Step:
    def claim(d: Path) -> None:
        for name in ("f", "sub", "s"):
            with fails(errno.EEXIST):
                renameat2(d / "old", d / name, RENAME_NOREPLACE)
        assert names_in(d) == ["f", "old", "s", "sub"]
        _assert_is(kind, "old", d / "old")
        renameat2(d / "old", d / "new", RENAME_NOREPLACE)
        _assert_is(kind, "old", d / "new")
        assert names_in(d) == ["f", "new", "s", "sub"]

    return claim


def _exchange(one: str, two: str) -> Step:
    def claim(d: Path) -> None:
        numbers = os.lstat(d / "one").st_ino, os.lstat(d / "two").st_ino
        renameat2(d / "one", d / "two", RENAME_EXCHANGE)
        _assert_is(one, "one", d / "two")
        _assert_is(two, "two", d / "one")
        assert (os.lstat(d / "two").st_ino, os.lstat(d / "one").st_ino) == numbers
        assert names_in(d) == ["one", "two"]

    return claim


def _exchange_between_directories(one: str, two: str) -> Step:
    def claim(d: Path) -> None:
        renameat2(d / "a" / "one", d / "b" / "two", RENAME_EXCHANGE)
        _assert_is(one, "one", d / "b" / "two")
        _assert_is(two, "two", d / "a" / "one")
        assert (names_in(d / "a"), names_in(d / "b")) == (["one"], ["two"])

    return claim


def _over(one: str, two: str, expected: int | None) -> Step:
    def claim(d: Path) -> None:
        if expected is None:
            os.rename(d / "one", d / "two")
            _assert_is(one, "one", d / "two")
            assert names_in(d) == ["two"]
            return
        with fails(expected):
            os.rename(d / "one", d / "two")
        _assert_is(one, "one", d / "one")
        _assert_is(two, "two", d / "two")
        assert names_in(d) == ["one", "two"]

    return claim


def _is_directory(kind: str) -> bool:
    return kind in ("full", "empty")


def _expected_over(one: str, two: str) -> int | None:
    if _is_directory(one):
        if not _is_directory(two):
            return errno.ENOTDIR
        return errno.ENOTEMPTY if two == "full" else None
    return errno.EISDIR if _is_directory(two) else None


for _kind in KINDS:
    add(f"rename_{_kind}_to_a_new_name_and_back", (_object(_kind, "old"),), _to_a_new_name(_kind))
    add(
        f"rename_{_kind}_into_another_directory",
        (folder("from", _object(_kind, "old")), folder("to")),
        _into_another_directory(_kind),
    )
    add(
        f"rename_{_kind}_noreplace",
        (_object(_kind, "old"), file("f"), folder("sub"), symlink("s")),
        _noreplace(_kind),
    )
    for _other in KINDS:
        _both = (_object(_kind, "one"), _object(_other, "two"))
        add(f"rename_{_kind}_over_{_other}", _both, _over(_kind, _other, _expected_over(_kind, _other)))
        add(f"exchange_{_kind}_with_{_other}", _both, _exchange(_kind, _other))
    add(
        f"exchange_{_kind}_with_a_full_directory_elsewhere",
        (folder("a", _object(_kind, "one")), folder("b", _object("full", "two"))),
        _exchange_between_directories(_kind, "full"),
    )


@check(file("f"))
def renaming_onto_itself_does_nothing(d: Path) -> None:
    os.rename(d / "f", d / "f")
    assert (d / "f").read_bytes() == b"old content"
    assert names_in(d) == ["f"]


@check(file("f", b"both"), link("f", "g"))
def renaming_one_hard_link_over_the_other_does_nothing(d: Path) -> None:
    os.rename(d / "f", d / "g")
    assert names_in(d) == ["f", "g"]
    assert os.stat(d / "f").st_nlink == 2


@check(file("f", b"both"), link("f", "g"), folder("sub"))
def a_renamed_hard_link_is_still_the_same_file(d: Path) -> None:
    os.rename(d / "f", d / "sub" / "h")
    assert os.stat(d / "sub" / "h").st_ino == os.stat(d / "g").st_ino
    (d / "sub" / "h").write_bytes(b"changed")
    assert (d / "g").read_bytes() == b"changed"


@check(folder("sub", folder("below")), file("f"))
def rename_refuses_what_cannot_be(d: Path) -> None:
    with fails(errno.EINVAL):
        os.rename(d / "sub", d / "sub" / "below" / "new")
    with fails(errno.ENOTEMPTY):
        os.rename(d / "sub" / "below", d / "sub")
    with fails(errno.ENOENT):
        os.rename(d / "missing", d / "new")
    with fails(errno.ENOENT):
        os.rename(d / "f", d / "missing" / "new")
    with fails(errno.ENOTDIR):
        os.rename(d / "sub", d / "f" / "new")
    with fails(errno.ENAMETOOLONG):
        os.rename(d / "f", d / ("n" * 256))
    with fails(errno.EXDEV):
        os.rename(d / "f", "/dev/shm/new")
    with fails(errno.EBUSY):
        os.rename(f"{d}/sub/.", d / "new")
    assert names_in(d) == ["f", "sub"]


@check(file("f"), file("g"))
def renameat2_refuses_contradicting_and_missing(d: Path) -> None:
    with fails(errno.EINVAL):
        renameat2(d / "f", d / "g", RENAME_NOREPLACE | RENAME_EXCHANGE)
    with fails(errno.EINVAL):
        renameat2(d / "f", d / "g", 1 << 20)
    with fails(errno.ENOENT):
        renameat2(d / "f", d / "new", RENAME_EXCHANGE)
    assert names_in(d) == ["f", "g"]


@check(folder("sub", folder("below", file("f"))), file("g"))
def exchange_refuses_a_directory_with_what_is_inside_it(d: Path) -> None:
    with fails(errno.EINVAL):
        renameat2(d / "sub", d / "sub" / "below", RENAME_EXCHANGE)
    with fails(errno.EINVAL):
        renameat2(d / "sub" / "below", d / "sub", RENAME_EXCHANGE)
    assert names_in(d / "sub" / "below") == ["f"]


@check(folder("a", file("f")), folder("b"))
def rename_moves_the_mtime_of_both_directories(d: Path) -> None:
    for name in ("a", "b"):
        os.utime(d / name, ns=(10**18, 10**18))
    os.rename(d / "a" / "f", d / "b" / "f")
    assert os.stat(d / "a").st_mtime_ns != 10**18
    assert os.stat(d / "b").st_mtime_ns != 10**18


@check(file("f"))
def rename_keeps_the_times_of_the_file(d: Path) -> None:
    os.utime(d / "f", ns=(10**18 + 1, 10**18 + 2))
    os.rename(d / "f", d / "new")
    assert os.stat(d / "new").st_mtime_ns == 10**18 + 2


@check(folder("sub", file("f", b"inside"), folder("deep", file("g", b"deeper"))))
def a_renamed_directory_can_be_used_as_before(d: Path) -> None:
    with opened(d / "sub" / "f", os.O_RDWR) as fd, opened(d / "sub", os.O_RDONLY | os.O_DIRECTORY) as dirfd:
        os.rename(d / "sub", d / "new")
        os.pwrite(fd, b"INSIDE", 0)
        assert (d / "new" / "f").read_bytes() == b"INSIDE"
        os.close(os.open("made", os.O_WRONLY | os.O_CREAT, dir_fd=dirfd))
        assert sorted(os.listdir(dirfd)) == ["deep", "f", "made"]
    (d / "new" / "deep" / "g").write_bytes(b"changed")
    os.unlink(d / "new" / "f")
    os.mkdir(d / "sub")
    assert names_in(d / "sub") == []
    assert names_in(d / "new") == ["deep", "made"]
    assert (d / "new" / "deep" / "g").read_bytes() == b"changed"


@check(folder("a", folder("b", folder("c", file("f", b"deep")))))
def directories_can_be_turned_inside_out(d: Path) -> None:
    os.rename(d / "a" / "b" / "c", d / "c")
    os.rename(d / "a" / "b", d / "c" / "b")
    os.rename(d / "a", d / "c" / "b" / "a")
    assert (d / "c" / "f").read_bytes() == b"deep"
    assert names_in(d) == ["c"]
    assert names_in(d / "c") == ["b", "f"]
    assert names_in(d / "c" / "b") == ["a"]
    assert names_in(d / "c" / "b" / "a") == []


@check(folder("sub", file("f", b"inside")))
def a_working_directory_can_be_renamed(d: Path) -> None:
    with opened(".", os.O_PATH) as before:
        os.chdir(d / "sub")
        try:
            os.rename(d / "sub", d / "new")
            assert os.getcwd() == str(d / "new")
            assert Path("f").read_bytes() == b"inside"
            Path("made").touch()
            assert names_in(Path("..")) == ["new"]
        finally:
            os.fchdir(before)
    assert names_in(d / "new") == ["f", "made"]


@check(folder("sub", file("f")), folder("other"))
def dotdot_of_a_moved_directory_is_its_new_parent(d: Path) -> None:
    os.rename(d / "sub", d / "other" / "sub")
    assert os.stat(d / "other" / "sub" / "..").st_ino == os.stat(d / "other").st_ino


@check(file("f", uid=NOBODY), folder("own", uid=NOBODY), folder("mine", uid=NOBODY, mode=0o755))
def rename_needs_write_permission_in_both_directories(d: Path) -> None:
    def move() -> None:
        with fails(errno.EACCES):
            os.rename("f", "own/f")
        with fails(errno.EACCES):
            os.rename("own", "new")
        Path("own/made").touch()
        with fails(errno.EACCES):
            os.rename("own/made", "made")
        os.rename("own/made", "mine/made")

    as_user(d, move)
    assert names_in(d) == ["f", "mine", "own"]
    assert names_in(d / "mine") == ["made"]


@check(file("f", b"one"), file("g", b"two"))
def a_program_that_saves_by_rename_leaves_the_new_content(d: Path) -> None:
    for round_ in range(5):
        (d / "new").write_bytes(b"round %d" % round_)
        with opened(d / "new", os.O_RDONLY) as fd:
            os.fsync(fd)
        os.rename(d / "new", d / "f")
    assert (d / "f").read_bytes() == b"round 4"
    assert names_in(d) == ["f", "g"]


@check(file("f"))
def rename_whiteout_is_refused_to_ordinary_users_everywhere(d: Path) -> None:
    def try_it() -> None:
        try:
            renameat2("f", "new", RENAME_WHITEOUT)
        except OSError as error:
            # EACCES where the file system knows the flag, EINVAL where it does not (an overlay, FUSE).
            assert error.errno in (errno.EACCES, errno.EINVAL)
        else:
            raise AssertionError("it succeeded")

    as_user(d, try_it)
    assert names_in(d) == ["f"]
