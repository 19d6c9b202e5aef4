"""open(2): its flags, and its errors."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from tests.posix.check import (
    NOBODY,
    as_user,
    check,
    fails,
    fifo,
    file,
    folder,
    mode_of,
    names_in,
    opened,
    owned_by_nobody,
    symlink,
    umask,
)
from tests.posix.system_calls import aligned_buffer


@check(file("f", b"0123456789"))
def reading_gives_the_content(d: Path) -> None:
    assert (d / "f").read_bytes() == b"0123456789"


@check(file("f", b"0123456789"))
def reading_past_the_end_gives_nothing(d: Path) -> None:
    with opened(d / "f", os.O_RDONLY) as fd:
        assert os.pread(fd, 5, 8) == b"89"
        assert os.pread(fd, 5, 10) == b""
        assert os.pread(fd, 5, 1 << 40) == b""


@check(file("f", b"0123456789"))
def a_write_in_the_middle_changes_that_alone(d: Path) -> None:
    with opened(d / "f", os.O_WRONLY) as fd:
        assert os.pwrite(fd, b"ab", 4) == 2
    assert (d / "f").read_bytes() == b"0123ab6789"
    assert names_in(d) == ["f"]


@check(file("f", b"old"))
def a_write_past_the_end_leaves_zeros_between(d: Path) -> None:
    with opened(d / "f", os.O_RDWR) as fd:
        os.pwrite(fd, b"new", 6)
        assert os.fstat(fd).st_size == 9
        assert os.pread(fd, 20, 0) == b"old\0\0\0new"


@check(file("f", b"old"))
def what_one_descriptor_writes_another_reads(d: Path) -> None:
    with opened(d / "f", os.O_RDONLY) as reader, opened(d / "f", os.O_RDWR) as writer:
        assert os.read(reader, 3) == b"old"
        os.write(writer, b"newer")
        assert os.pread(reader, 10, 0) == b"newer"
        assert os.fstat(reader).st_size == 5
        assert os.fstat(reader).st_ino == os.fstat(writer).st_ino == os.stat(d / "f").st_ino


@check(file("f", b"old"))
def reading_through_a_write_only_descriptor_is_ebadf(d: Path) -> None:
    with opened(d / "f", os.O_WRONLY) as fd, fails(errno.EBADF):
        os.read(fd, 1)


@check(file("f", b"old"))
def writing_through_a_read_only_descriptor_is_ebadf(d: Path) -> None:
    with opened(d / "f", os.O_RDONLY) as fd, fails(errno.EBADF):
        os.write(fd, b"x")


@check(file("f", b"old"))
def o_append_writes_at_the_end_whatever_the_offset(d: Path) -> None:
    with opened(d / "f", os.O_WRONLY | os.O_APPEND) as one, opened(d / "f", os.O_WRONLY | os.O_APPEND) as two:
        os.lseek(one, 0, os.SEEK_SET)
        os.write(one, b" one")
        os.write(two, b" two")
        os.write(one, b" three")
    assert (d / "f").read_bytes() == b"old one two three"


@check(file("f", b"old"))
def o_trunc_empties_the_file_and_moves_its_mtime(d: Path) -> None:
    before = os.stat(d / "f")
    os.utime(d / "f", ns=(before.st_atime_ns, 10**18))
    with opened(d / "f", os.O_WRONLY | os.O_TRUNC) as fd:
        assert os.fstat(fd).st_size == 0
    after = os.stat(d / "f")
    assert (after.st_size, after.st_ino) == (0, before.st_ino)
    assert after.st_mtime_ns != 10**18


@check(file("f", b"old"))
def o_trunc_is_seen_through_a_descriptor_opened_before(d: Path) -> None:
    with opened(d / "f", os.O_RDONLY) as reader:
        os.close(os.open(d / "f", os.O_WRONLY | os.O_TRUNC))
        assert os.fstat(reader).st_size == 0
        assert os.read(reader, 10) == b""


@check(file("f", b"old"))
def o_creat_opens_what_is_there(d: Path) -> None:
    with opened(d / "f", os.O_RDWR | os.O_CREAT, 0o600) as fd:
        assert os.read(fd, 10) == b"old"
    assert mode_of(d / "f") == 0o644


@check(file("f", b"old"))
def o_excl_refuses_what_is_there(d: Path) -> None:
    with fails(errno.EEXIST):
        os.open(d / "f", os.O_RDWR | os.O_CREAT | os.O_EXCL)
    assert (d / "f").read_bytes() == b"old"


@check(symlink("s", "target"))
def o_excl_refuses_a_dangling_symlink(d: Path) -> None:
    with fails(errno.EEXIST):
        os.open(d / "s", os.O_RDWR | os.O_CREAT | os.O_EXCL)
    assert names_in(d) == ["s"]


@check(symlink("s", "target"))
def o_creat_follows_a_dangling_symlink(d: Path) -> None:
    os.close(os.open(d / "s", os.O_RDWR | os.O_CREAT, 0o600))
    assert names_in(d) == ["s", "target"]
    assert os.readlink(d / "s") == "target"


@check()
def o_creat_makes_an_empty_file_with_the_mode_less_the_umask(d: Path) -> None:
    with umask(0o027):
        os.close(os.open(d / "new", os.O_WRONLY | os.O_CREAT, 0o666))
        os.close(os.open(d / "new2", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o4777))
    assert (mode_of(d / "new"), mode_of(d / "new2")) == (0o640, 0o4750)
    status = os.stat(d / "new")
    assert (status.st_size, status.st_nlink, status.st_uid, status.st_gid) == (0, 1, 0, 0)
    assert names_in(d) == ["new", "new2"]


@check(owned_by_nobody)
def a_new_file_belongs_to_its_maker(d: Path) -> None:
    as_user(d, lambda: os.close(os.open("new", os.O_WRONLY | os.O_CREAT, 0o600)))
    status = os.stat(d / "new")
    assert (status.st_uid, status.st_gid, mode_of(d / "new")) == (NOBODY, NOBODY, 0o600)


@check()
def a_file_made_read_only_can_be_written_by_its_maker(d: Path) -> None:
    with opened(d / "new", os.O_RDWR | os.O_CREAT, 0o444) as fd:
        os.write(fd, b"content")
        assert os.pread(fd, 10, 0) == b"content"
    assert (d / "new").read_bytes() == b"content"


@check(owned_by_nobody)
def a_file_made_without_any_permission_can_be_written_by_its_maker(d: Path) -> None:
    def make() -> None:
        with opened("new", os.O_RDWR | os.O_CREAT, 0) as fd:
            os.write(fd, b"content")
            assert os.pread(fd, 10, 0) == b"content"
        with fails(errno.EACCES):
            os.open("new", os.O_RDONLY)

    as_user(d, make)
    assert mode_of(d / "new") == 0


@check()
def opening_a_missing_name_is_enoent(d: Path) -> None:
    with fails(errno.ENOENT):
        os.open(d / "new", os.O_RDONLY)
    with fails(errno.ENOENT):
        os.open(d / "new" / "below", os.O_WRONLY | os.O_CREAT)
    assert names_in(d) == []


@check(file("f"))
def a_file_is_no_directory(d: Path) -> None:
    with fails(errno.ENOTDIR):
        os.open(d / "f", os.O_RDONLY | os.O_DIRECTORY)
    with fails(errno.ENOTDIR):
        os.open(d / "f" / "below", os.O_RDONLY)
    with fails(errno.ENOTDIR):
        os.open(d / "f" / "below", os.O_WRONLY | os.O_CREAT)
    with fails(errno.ENOTDIR):
        os.stat(f"{d}/f/")


@check(folder("sub"))
def a_directory_cannot_be_opened_for_writing(d: Path) -> None:
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_CREAT, os.O_RDONLY | os.O_TRUNC):
        with fails(errno.EISDIR):
            os.open(d / "sub", flags)


@check(folder("sub"))
def reading_a_directory_as_a_file_is_eisdir(d: Path) -> None:
    with opened(d / "sub", os.O_RDONLY) as fd, fails(errno.EISDIR):
        os.read(fd, 1)


@check(symlink("s", "f"), file("f"))
def o_nofollow_refuses_a_symlink(d: Path) -> None:
    with fails(errno.ELOOP):
        os.open(d / "s", os.O_RDONLY | os.O_NOFOLLOW)


@check(symlink("a", "b"), symlink("b", "a"))
def a_ring_of_symlinks_is_eloop(d: Path) -> None:
    with fails(errno.ELOOP):
        os.open(d / "a", os.O_RDONLY)


@check(file("f"))
def o_path_gives_a_descriptor_that_cannot_be_read(d: Path) -> None:
    with opened(d / "f", os.O_PATH) as fd:
        assert os.fstat(fd).st_ino == os.stat(d / "f").st_ino
        with fails(errno.EBADF):
            os.read(fd, 1)
        with opened(f"/proc/self/fd/{fd}", os.O_RDONLY) as again:
            assert os.read(again, 20) == b"old content"


@check(fifo("p"))
def what_goes_into_a_fifo_comes_out(d: Path) -> None:
    with opened(d / "p", os.O_RDWR | os.O_NONBLOCK) as fd:
        os.write(fd, b"through")
        assert os.read(fd, 20) == b"through"
    with fails(errno.ENXIO):
        os.open(d / "p", os.O_WRONLY | os.O_NONBLOCK)


@check(file("f", b"x" * 8192))
def o_direct_writes_and_reads_whole_blocks(d: Path) -> None:
    block = aligned_buffer(4096)
    block[:] = b"y" * 4096
    with opened(d / "f", os.O_RDWR | os.O_DIRECT) as fd:
        assert os.pwritev(fd, [block], 4096) == 4096
        block[:] = b"\0" * 4096
        assert os.preadv(fd, [block], 4096) == 4096
        assert block[:] == b"y" * 4096
        assert os.preadv(fd, [block], 8192) == 0
    assert (d / "f").read_bytes() == b"x" * 4096 + b"y" * 4096


@check(file("f", b"x" * 4096))
def o_direct_writes_are_seen_by_cached_reads_and_the_reverse(d: Path) -> None:
    block = aligned_buffer(4096)
    with opened(d / "f", os.O_RDWR) as cached, opened(d / "f", os.O_RDWR | os.O_DIRECT) as direct:
        assert os.pread(cached, 1, 0) == b"x"
        block[:] = b"d" * 4096
        os.pwritev(direct, [block], 0)
        assert os.pread(cached, 4096, 0) == b"d" * 4096
        os.pwrite(cached, b"c" * 4096, 0)
        os.preadv(direct, [block], 0)
        assert block[:] == b"c" * 4096


@check(file("f", b"secret", mode=0o600), file("g", b"readable", mode=0o644))
def an_ordinary_user_opens_only_what_the_mode_allows(d: Path) -> None:
    def try_to_open() -> None:
        with fails(errno.EACCES):
            os.open("f", os.O_RDONLY)
        with fails(errno.EACCES):
            os.open("g", os.O_WRONLY)
        with fails(errno.EACCES):
            os.open("g", os.O_RDONLY | os.O_TRUNC)
        with fails(errno.EACCES):
            os.open("new", os.O_WRONLY | os.O_CREAT)
        with opened("g", os.O_RDONLY) as fd:
            assert os.read(fd, 20) == b"readable"

    as_user(d, try_to_open)
    assert (d / "g").read_bytes() == b"readable"
    assert names_in(d) == ["f", "g"]


@check(file("f", b"x", mode=0o600, uid=NOBODY))
def access_answers_for_the_caller(d: Path) -> None:
    def ask() -> None:
        assert os.access("f", os.R_OK | os.W_OK)
        assert not os.access("f", os.X_OK)
        assert not os.access(".", os.W_OK)
        assert not os.access("missing", os.F_OK)

    as_user(d, ask)
    assert not os.access(d / "f", os.X_OK)


@check(folder("closed", file("f"), mode=0o700))
def a_closed_directory_hides_what_is_inside(d: Path) -> None:
    def look() -> None:
        with fails(errno.EACCES):
            os.stat("closed/f")
        with fails(errno.EACCES):
            os.stat("closed/missing")
        with fails(errno.EACCES):
            os.listdir("closed")

    as_user(d, look)


@check(folder("search", file("f"), mode=0o711))
def a_directory_that_can_only_be_searched_gives_what_is_named(d: Path) -> None:
    def look() -> None:
        assert os.stat("search/f").st_size == 11
        with fails(errno.ENOENT):
            os.stat("search/missing")
        with fails(errno.EACCES):
            os.listdir("search")

    as_user(d, look)


@check(file("f", b"old"))
def an_unchanged_size_and_times_after_opening_for_writing_without_a_write(d: Path) -> None:
    os.utime(d / "f", ns=(10**18, 10**18 + 1))
    os.close(os.open(d / "f", os.O_RDWR))
    status = os.stat(d / "f")
    assert (status.st_size, status.st_mtime_ns) == (3, 10**18 + 1)


@check(file("f", b"old"))
def a_write_moves_mtime_and_ctime(d: Path) -> None:
    os.utime(d / "f", ns=(10**18, 10**18))
    before = os.stat(d / "f")
    with opened(d / "f", os.O_WRONLY) as fd:
        os.write(fd, b"new")
    after = os.stat(d / "f")
    assert after.st_mtime_ns > before.st_mtime_ns
    assert after.st_ctime_ns >= before.st_ctime_ns


@check(file("f", b"old"))
def fsync_and_fdatasync_succeed(d: Path) -> None:
    with opened(d / "f", os.O_RDWR) as fd:
        os.write(fd, b"new")
        os.fsync(fd)
        os.fdatasync(fd)
    with opened(d / "f", os.O_RDONLY) as fd:
        os.fsync(fd)
    with opened(d, os.O_RDONLY | os.O_DIRECTORY) as fd:
        os.fsync(fd)
    assert (d / "f").read_bytes() == b"new"


@check(file("f"), folder("sub"))
def statfs_is_the_same_for_everything(d: Path) -> None:
    whole = os.statvfs(d)
    for name in ("f", "sub"):
        part = os.statvfs(d / name)
        assert (part.f_bsize, part.f_frsize, part.f_blocks, part.f_namemax) == (
            whole.f_bsize,
            whole.f_frsize,
            whole.f_blocks,
            whole.f_namemax,
        )
    assert whole.f_namemax == 255
    assert 0 < whole.f_bavail <= whole.f_bfree <= whole.f_blocks
