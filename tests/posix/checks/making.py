"""mknod, mkdir, symlink, readlink, link: what they make, and what they refuse."""

from __future__ import annotations

import errno
import os
import socket
import stat
from pathlib import Path

from tests.posix.check import (
    NOBODY,
    SOMEBODY,
    Step,
    add,
    as_user,
    check,
    fails,
    fifo,
    file,
    folder,
    link,
    mode_of,
    names_in,
    opened,
    owned_by_nobody,
    symlink,
    umask,
)
from tests.posix.system_calls import linkat_fd

MAKERS: dict[str, Step] = {
    "mkdir": lambda path: os.mkdir(path),
    "symlink": lambda path: os.symlink("target", path),
    "mkfifo": lambda path: os.mkfifo(path),
    "mknod_file": lambda path: os.mknod(path, stat.S_IFREG | 0o644),
    "mknod_device": lambda path: os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3)),
}


def _refusals(make: Step) -> Step:
    def claim(d: Path) -> None:
        for name in ("f", "sub", "s"):
            with fails(errno.EEXIST):
                make(d / name)
        with fails(errno.ENOENT):
            make(d / "new" / "below")
        with fails(errno.ENOTDIR):
            make(d / "f" / "below")
        with fails(errno.ENAMETOOLONG):
            make(d / ("n" * 256))
        assert names_in(d) == ["f", "s", "sub"]
        assert (d / "f").read_bytes() == b"old content"

    return claim


def _denial(make: Step) -> Step:
    def claim(d: Path) -> None:
        def try_to_make() -> None:
            with fails(errno.EACCES):
                make(Path("new"))

        as_user(d, try_to_make)
        assert names_in(d) == []

    return claim


for _name, _make in MAKERS.items():
    _three = (file("f"), folder("sub"), symlink("s"))
    add(f"{_name}_refuses_a_taken_name_a_missing_parent_and_a_long_name", _three, _refusals(_make))
    if _name != "mknod_device":  # EPERM before EACCES: an ordinary user makes no device anywhere
        add(f"{_name}_needs_write_permission_in_the_directory", (), _denial(_make))


@check()
def mkdir_makes_an_empty_directory_with_the_mode_less_the_umask(d: Path) -> None:
    links = os.stat(d).st_nlink
    with umask(0o027):
        os.mkdir(d / "new", 0o777)
    assert mode_of(d / "new") == 0o750
    assert names_in(d / "new") == []
    assert names_in(d) == ["new"]
    # ext4 counts subdirectories; an overlay may say 1 for a directory, which find(1) understands as "not counted".
    assert os.stat(d).st_nlink in (links + 1, 1)


@check()
def a_new_directory_can_be_filled_at_once(d: Path) -> None:
    os.makedirs(d / "new" / "below" / "deep")
    (d / "new" / "below" / "f").write_bytes(b"x")
    assert names_in(d / "new") == ["below"]
    assert names_in(d / "new" / "below") == ["deep", "f"]


@check(owned_by_nobody)
def what_a_user_makes_belongs_to_that_user(d: Path) -> None:
    def make() -> None:
        os.mkdir("new")
        os.symlink("target", "new2")
        os.mkfifo("new3")

    as_user(d, make)
    for name in ("new", "new2", "new3"):
        status = os.lstat(d / name)
        assert (status.st_uid, status.st_gid) == (NOBODY, NOBODY), name


@check()
def making_an_entry_moves_the_mtime_of_its_directory(d: Path) -> None:
    for name in ("new", "new2", "new3"):
        os.utime(d, ns=(10**18, 10**18))
        if name == "new":
            (d / name).mkdir()
        else:
            (d / name).touch()
        assert os.stat(d).st_mtime_ns != 10**18, name


@check()
def mknod_keeps_type_mode_and_device_number(d: Path) -> None:
    with umask(0):
        os.mknod(d / "new", stat.S_IFCHR | 0o621, os.makedev(1, 3))
        os.mknod(d / "new2", stat.S_IFBLK | 0o640, os.makedev(259, 70000))
        os.mknod(d / "new3", stat.S_IFSOCK | 0o751)
        os.mkfifo(d / "pipe", 0o600)
        os.mknod(d / "plain", stat.S_IFREG | 0o604)
    expected = {
        "new": (stat.S_IFCHR | 0o621, os.makedev(1, 3)),
        "new2": (stat.S_IFBLK | 0o640, os.makedev(259, 70000)),
        "new3": (stat.S_IFSOCK | 0o751, 0),
        "pipe": (stat.S_IFIFO | 0o600, 0),
        "plain": (stat.S_IFREG | 0o604, 0),
    }
    assert names_in(d) == sorted(expected)
    for name, (mode, device) in expected.items():
        status = os.lstat(d / name)
        assert (status.st_mode, status.st_rdev) == (mode, device), name


@check()
def a_character_device_made_in_the_view_works(d: Path) -> None:
    os.mknod(d / "new", stat.S_IFCHR | 0o666, os.makedev(1, 5))
    with opened(d / "new", os.O_RDONLY) as fd:
        assert os.read(fd, 4) == b"\0\0\0\0"


@check(owned_by_nobody)
def an_ordinary_user_makes_no_device(d: Path) -> None:
    def try_to_make() -> None:
        with fails(errno.EPERM):
            os.mknod("new", stat.S_IFCHR | 0o666, os.makedev(1, 5))

    as_user(d, try_to_make)
    assert names_in(d) == []


@check()
def a_unix_socket_listens_and_answers(d: Path) -> None:
    with opened(d, os.O_PATH) as fd, socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind(f"/proc/self/fd/{fd}/new")  # sun_path holds 107 bytes only
        server.listen()
        client.connect(f"/proc/self/fd/{fd}/new")
        accepted, _ = server.accept()
        with accepted:
            client.sendall(b"hello")
            assert accepted.recv(10) == b"hello"
    assert stat.S_ISSOCK(os.lstat(d / "new").st_mode)


@check(symlink("s", "some/../target"))
def readlink_gives_the_target_as_written(d: Path) -> None:
    assert os.readlink(d / "s") == "some/../target"
    status = os.lstat(d / "s")
    assert stat.S_ISLNK(status.st_mode)
    assert status.st_size == len("some/../target")


@check(file("f"), folder("sub"))
def readlink_of_what_is_no_symlink_is_einval(d: Path) -> None:
    for name in ("f", "sub"):
        with fails(errno.EINVAL):
            os.readlink(d / name)
    with fails(errno.ENOENT):
        os.readlink(d / "new")


@check(folder("sub", file("f", b"inside")))
def symlinks_are_followed_relative_absolute_and_upwards(d: Path) -> None:
    os.symlink("sub/f", d / "new")
    os.symlink(d / "sub" / "f", d / "new2")
    os.symlink("../sub/f", d / "sub" / "up")
    os.symlink("sub", d / "new3")
    for name in ("new", "new2", "sub/up", "new3/f"):
        assert (d / name).read_bytes() == b"inside", name


@check()
def a_symlink_may_be_as_long_as_the_kernel_allows(d: Path) -> None:
    target = "a/" * 2047 + "b"
    os.symlink(target, d / "new")
    assert os.readlink(d / "new") == target
    with fails(errno.ENAMETOOLONG):
        os.symlink(target + "c", d / "new2")
    with fails(errno.ENOENT):
        os.symlink("", d / "new3")


@check()
def a_symlink_keeps_a_target_that_is_no_text(d: Path) -> None:
    os.symlink(b"\xff\xfe\n'", os.fsencode(d / "new"))
    assert os.readlink(os.fsencode(d / "new")) == b"\xff\xfe\n'"


@check(file("f", b"shared"))
def a_hard_link_is_the_same_file(d: Path) -> None:
    os.link(d / "f", d / "new")
    one, two = os.stat(d / "f"), os.stat(d / "new")
    assert (one.st_ino, one.st_nlink) == (two.st_ino, two.st_nlink)
    assert one.st_nlink == 2
    (d / "new").write_bytes(b"changed")
    assert (d / "f").read_bytes() == b"changed"
    os.chmod(d / "f", 0o600)
    assert mode_of(d / "new") == 0o600
    os.unlink(d / "f")
    assert os.stat(d / "new").st_nlink == 1
    assert (d / "new").read_bytes() == b"changed"
    assert names_in(d) == ["new"]


@check(file("f", b"shared"), link("f", "g"))
def hard_links_that_were_there_stay_one_file_after_a_write(d: Path) -> None:
    assert os.stat(d / "f").st_nlink == 2
    with opened(d / "g", os.O_WRONLY | os.O_APPEND) as fd:
        os.write(fd, b" by all")
    assert (d / "f").read_bytes() == b"shared by all"
    one, two = os.stat(d / "f"), os.stat(d / "g")
    assert (one.st_ino, one.st_nlink, one.st_size) == (two.st_ino, two.st_nlink, two.st_size)
    assert one.st_nlink == 2


@check(folder("a", file("f", b"shared")), folder("b"), lambda d: os.link(d / "a" / "f", d / "b" / "g"))
def hard_links_in_two_directories_stay_one_file_after_a_write(d: Path) -> None:
    (d / "b" / "g").write_bytes(b"changed")
    assert (d / "a" / "f").read_bytes() == b"changed"
    assert os.stat(d / "a" / "f").st_ino == os.stat(d / "b" / "g").st_ino
    os.unlink(d / "b" / "g")
    assert os.stat(d / "a" / "f").st_nlink == 1
    assert (d / "a" / "f").read_bytes() == b"changed"


@check(fifo("p"), symlink("s", "target"))
def special_files_and_symlinks_can_be_linked(d: Path) -> None:
    os.link(d / "p", d / "new")
    os.link(d / "s", d / "new2", follow_symlinks=False)
    assert os.stat(d / "new").st_ino == os.stat(d / "p").st_ino
    assert os.readlink(d / "new2") == "target"
    assert os.lstat(d / "new2").st_nlink == 2


@check(file("f"), folder("sub"), file("g"))
def link_refuses_directories_taken_names_and_missing_sources(d: Path) -> None:
    with fails(errno.EPERM):
        os.link(d / "sub", d / "new")
    for name in ("g", "sub", "f"):
        with fails(errno.EEXIST):
            os.link(d / "f", d / name)
    with fails(errno.ENOENT):
        os.link(d / "missing", d / "new")
    with fails(errno.ENOENT):
        os.link(d / "f", d / "missing" / "new")
    with fails(errno.ENOTDIR):
        os.link(d / "f", d / "g" / "new")
    with fails(errno.EXDEV):
        os.link(d / "f", "/dev/shm/new")
    assert names_in(d) == ["f", "g", "sub"]
    assert os.stat(d / "f").st_nlink == 1


@check(file("f", b"by descriptor"))
def a_file_can_be_linked_by_its_descriptor(d: Path) -> None:
    with opened(d / "f", os.O_RDONLY) as fd:
        linkat_fd(fd, d / "new")
    assert (d / "new").read_bytes() == b"by descriptor"
    assert os.stat(d / "f").st_nlink == 2


@check(folder("team", mode=0o2775, gid=SOMEBODY))
def a_setgid_directory_gives_its_group_to_what_is_made_in_it(d: Path) -> None:
    with umask(0):
        (d / "team" / "file").touch(0o664)
        os.mkdir(d / "team" / "folder", 0o775)
        os.symlink("x", d / "team" / "symlink")
        os.mkfifo(d / "team" / "fifo", 0o640)
    for name in ("file", "folder", "symlink", "fifo"):
        assert os.lstat(d / "team" / name).st_gid == SOMEBODY, name
    assert mode_of(d / "team" / "folder") == 0o2775
    assert mode_of(d / "team" / "file") == 0o664


@check(folder("team", mode=0o2777, gid=SOMEBODY))
def a_setgid_directory_gives_its_group_for_an_ordinary_user_too(d: Path) -> None:
    def make() -> None:
        with umask(0):
            os.close(os.open("team/file", os.O_WRONLY | os.O_CREAT, 0o664))
            os.mkdir("team/folder", 0o755)
            # A setgid executable cannot be made for a group the caller is not in.
            os.close(os.open("team/program", os.O_WRONLY | os.O_CREAT, 0o2775))

    as_user(d, make)
    for name in ("file", "folder", "program"):
        status = os.lstat(d / "team" / name)
        assert (status.st_uid, status.st_gid) == (NOBODY, SOMEBODY), name
    assert mode_of(d / "team" / "folder") == 0o2755
    assert mode_of(d / "team" / "program") == 0o775
