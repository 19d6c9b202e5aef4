"""unlink and rmdir, and objects that live on without a name."""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path

from tests.posix.check import (
    NOBODY,
    SOMEBODY,
    as_user,
    check,
    fails,
    fifo,
    file,
    folder,
    link,
    names_in,
    opened,
    owned_by_nobody,
    symlink,
)
from tests.posix.system_calls import linkat_fd


@check(file("f"), symlink("s", "f"), fifo("p"), file("stays"))
def unlink_removes_the_name(d: Path) -> None:
    for name in ("s", "f", "p"):
        os.unlink(d / name)
        with fails(errno.ENOENT):
            os.lstat(d / name)
        with fails(errno.ENOENT):
            os.unlink(d / name)
    assert names_in(d) == ["stays"]


@check(folder("sub"), file("f"))
def unlink_refuses_directories_and_what_is_not_there(d: Path) -> None:
    with fails(errno.EISDIR):
        os.unlink(d / "sub")
    with fails(errno.ENOENT):
        os.unlink(d / "new")
    with fails(errno.ENOTDIR):
        os.unlink(d / "f" / "below")
    assert names_in(d) == ["f", "sub"]


@check(file("f"), file("g"))
def unlink_moves_the_mtime_of_the_directory(d: Path) -> None:
    for name in ("f", "g"):
        os.utime(d, ns=(10**18, 10**18))
        os.unlink(d / name)
        assert os.stat(d).st_mtime_ns != 10**18, name


@check(folder("empty"), folder("full", file("f")), file("f"), symlink("s", "empty"))
def rmdir_takes_empty_directories_only(d: Path) -> None:
    with fails(errno.ENOTEMPTY):
        os.rmdir(d / "full")
    with fails(errno.ENOTDIR):
        os.rmdir(d / "f")
    with fails(errno.ENOTDIR):
        os.rmdir(d / "s")
    with fails(errno.ENOENT):
        os.rmdir(d / "new")
    with fails(errno.EINVAL):
        os.rmdir(f"{d}/empty/.")
    os.rmdir(d / "empty")
    with fails(errno.ENOENT):
        os.rmdir(d / "empty")
    assert names_in(d) == ["f", "full", "s"]


@check(folder("full", file("f"), folder("sub"), symlink("s")))
def rmdir_works_once_the_last_entry_has_gone(d: Path) -> None:
    os.unlink(d / "full" / "f")
    os.rmdir(d / "full" / "sub")
    with fails(errno.ENOTEMPTY):
        os.rmdir(d / "full")
    os.unlink(d / "full" / "s")
    os.rmdir(d / "full")
    assert names_in(d) == []


@check(folder("sub", file("f", b"old"), folder("deep", file("g"))))
def a_directory_made_anew_holds_nothing_of_the_old_one(d: Path) -> None:
    os.unlink(d / "sub" / "deep" / "g")
    os.rmdir(d / "sub" / "deep")
    os.unlink(d / "sub" / "f")
    os.rmdir(d / "sub")
    os.mkdir(d / "sub")
    with fails(errno.ENOENT):
        os.stat(d / "sub" / "f")
    with fails(errno.ENOENT):
        os.stat(d / "sub" / "deep" / "g")
    assert names_in(d / "sub") == []
    os.mkdir(d / "sub" / "deep")
    with fails(errno.ENOENT):
        os.stat(d / "sub" / "deep" / "g")
    assert names_in(d / "sub" / "deep") == []


@check(file("f", b"old"))
def a_file_made_anew_holds_nothing_of_the_old_one(d: Path) -> None:
    os.unlink(d / "f")
    with opened(d / "f", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600) as fd:
        assert os.fstat(fd).st_size == 0
    assert (d / "f").read_bytes() == b""


@check(file("f"), folder("sub"))
def a_name_can_change_its_kind(d: Path) -> None:
    os.unlink(d / "f")
    os.mkdir(d / "f")
    os.rmdir(d / "sub")
    (d / "sub").write_bytes(b"now a file")
    assert names_in(d / "f") == []
    assert (d / "sub").read_bytes() == b"now a file"
    os.rmdir(d / "f")
    os.symlink("sub", d / "f")
    assert (d / "f").read_bytes() == b"now a file"


@check(file("mine", uid=NOBODY), folder("own", file("f"), uid=NOBODY))
def unlink_is_judged_by_the_directory_not_by_the_file(d: Path) -> None:
    def remove() -> None:
        with fails(errno.EACCES):
            os.unlink("mine")
        with fails(errno.EACCES):
            os.rmdir("own")
        os.unlink("own/f")

    as_user(d, remove)
    assert names_in(d) == ["mine", "own"]
    assert names_in(d / "own") == []


@check(
    folder("sticky", file("other", uid=SOMEBODY), file("mine", uid=NOBODY), folder("theirs", uid=SOMEBODY), mode=0o1777),
)
def a_sticky_directory_lets_only_owners_remove(d: Path) -> None:
    def remove() -> None:
        with fails(errno.EPERM):
            os.unlink("sticky/other")
        with fails(errno.EPERM):
            os.rmdir("sticky/theirs")
        with fails(errno.EPERM):
            os.rename("sticky/other", "sticky/new")
        with fails(errno.EPERM):
            os.rename("sticky/mine", "sticky/other")
        os.unlink("sticky/mine")

    as_user(d, remove)
    assert names_in(d / "sticky") == ["other", "theirs"]


@check(file("f", b"still here"))
def an_unlinked_open_file_can_be_read_and_written(d: Path) -> None:
    with opened(d / "f", os.O_RDWR) as fd:
        os.unlink(d / "f")
        assert os.fstat(fd).st_nlink == 0
        assert os.pread(fd, 20, 0) == b"still here"
        os.pwrite(fd, b"STILL", 0)
        os.pwrite(fd, b"!", 10)
        assert os.pread(fd, 20, 0) == b"STILL here!"
        assert os.fstat(fd).st_size == 11
    assert names_in(d) == []


@check(file("f", b"still here"))
def an_unlinked_file_open_for_reading_keeps_its_content(d: Path) -> None:
    with opened(d / "f", os.O_RDONLY) as fd:
        before = os.fstat(fd)
        os.unlink(d / "f")
        (d / "f").write_bytes(b"another")
        after = os.fstat(fd)
        assert (after.st_nlink, after.st_size, after.st_ino) == (0, 10, before.st_ino)
        assert os.pread(fd, 20, 0) == b"still here"
        assert os.stat(d / "f").st_ino != after.st_ino
    assert (d / "f").read_bytes() == b"another"


@check(file("f", b"still here"))
def an_unlinked_open_file_takes_metadata_changes(d: Path) -> None:
    with opened(d / "f", os.O_RDWR) as fd:
        os.unlink(d / "f")
        os.fchmod(fd, 0o4711)
        os.fchown(fd, SOMEBODY, SOMEBODY)
        os.utime(fd, ns=(10**18 + 1, 10**18 + 2))
        os.setxattr(fd, "user.mark", b"value")
        os.ftruncate(fd, 5)
        os.utime(fd, ns=(10**18 + 1, 10**18 + 2))
        os.fsync(fd)
        status = os.fstat(fd)
        assert (status.st_mode & 0o777, status.st_uid, status.st_gid) == (0o711, SOMEBODY, SOMEBODY)
        assert (status.st_size, status.st_mtime_ns, status.st_nlink) == (5, 10**18 + 2, 0)
        assert os.getxattr(fd, "user.mark") == b"value"
        assert os.pread(fd, 20, 0) == b"still"
    assert names_in(d) == []


@check(file("f", b"still here"))
def an_unlinked_file_open_for_reading_takes_metadata_changes(d: Path) -> None:
    with opened(d / "f", os.O_RDONLY) as fd:
        os.unlink(d / "f")
        os.fchmod(fd, 0o600)
        os.setxattr(fd, "user.mark", b"value")
        assert os.fstat(fd).st_mode & 0o7777 == 0o600
        assert os.getxattr(fd, "user.mark") == b"value"
        assert os.read(fd, 20) == b"still here"
    assert names_in(d) == []


@check(file("f", b"still here"))
def an_unlinked_file_can_be_opened_again_by_its_descriptor(d: Path) -> None:
    with opened(d / "f", os.O_RDONLY) as fd:
        os.unlink(d / "f")
        with opened(f"/proc/self/fd/{fd}", os.O_RDWR) as again:
            os.write(again, b"STILL")
        assert os.pread(fd, 20, 0) == b"STILL here"
        os.truncate(f"/proc/self/fd/{fd}", 3)
        os.chmod(f"/proc/self/fd/{fd}", 0o640)
        assert os.fstat(fd).st_size == 3
        assert os.fstat(fd).st_mode & 0o7777 == 0o640
    assert names_in(d) == []


@check(file("f", b"still here"))
def an_unlinked_file_cannot_be_given_a_name_again(d: Path) -> None:
    with opened(d / "f", os.O_RDONLY) as fd:
        os.unlink(d / "f")
        with fails(errno.ENOENT):
            linkat_fd(fd, d / "new")
    assert names_in(d) == []


@check(file("f", b"still here"))
def an_unlinked_file_stays_mapped(d: Path) -> None:
    with opened(d / "f", os.O_RDWR) as fd:
        with mmap.mmap(fd, 10) as memory:
            os.unlink(d / "f")
            memory[:5] = b"STILL"
            assert memory[:] == b"STILL here"
            memory.flush()
        assert os.pread(fd, 20, 0) == b"STILL here"


@check(file("f", b"one of two"), link("f", "g"))
def a_file_with_another_name_lives_on_under_it(d: Path) -> None:
    with opened(d / "f", os.O_RDWR) as fd:
        os.unlink(d / "f")
        assert os.fstat(fd).st_nlink == 1
        os.pwrite(fd, b"ONE", 0)
        assert (d / "g").read_bytes() == b"ONE of two"
        os.unlink(d / "g")
        assert os.fstat(fd).st_nlink == 0
        assert os.pread(fd, 20, 0) == b"ONE of two"
    assert names_in(d) == []


@check(file("f", b"the old"), file("g", b"the new"))
def a_file_renamed_over_lives_on_for_those_who_have_it_open(d: Path) -> None:
    with opened(d / "f", os.O_RDWR) as fd:
        os.rename(d / "g", d / "f")
        assert os.fstat(fd).st_nlink == 0
        os.pwrite(fd, b"THE", 0)
        assert os.pread(fd, 20, 0) == b"THE old"
    assert (d / "f").read_bytes() == b"the new"
    assert names_in(d) == ["f"]


@check(folder("sub"))
def a_removed_open_directory_is_empty_and_takes_nothing(d: Path) -> None:
    with opened(d / "sub", os.O_RDONLY | os.O_DIRECTORY) as fd:
        os.rmdir(d / "sub")
        assert os.listdir(fd) == []
        with fails(errno.ENOENT):
            os.open("new", os.O_WRONLY | os.O_CREAT, dir_fd=fd)
        with fails(errno.ENOENT):
            os.mkdir("new", dir_fd=fd)
        with fails(errno.ENOENT):
            os.stat("new", dir_fd=fd)
        assert os.fstat(fd).st_nlink == 0
    assert names_in(d) == []


@check(folder("sub"))
def a_removed_working_directory_is_enoent(d: Path) -> None:
    with opened(".", os.O_PATH) as before:
        os.chdir(d / "sub")
        try:
            os.rmdir(d / "sub")
            with fails(errno.ENOENT):
                os.getcwd()
            with fails(errno.ENOENT):
                Path("new").touch()
        finally:
            os.fchdir(before)


@check(owned_by_nobody)
def temporary_files_of_an_ordinary_user_work_without_a_name(d: Path) -> None:
    def use() -> None:
        with opened("new", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600) as fd:
            os.unlink("new")
            os.write(fd, b"x" * 100_000)
            assert os.pread(fd, 10, 99_995) == b"x" * 5
            os.ftruncate(fd, 10)
            assert os.fstat(fd).st_size == 10

    as_user(d, use)
    assert names_in(d) == []
