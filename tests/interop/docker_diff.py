"""What `docker diff` and the SIZE of `docker ps -s` say of changes: one case each, as Docker 20.10 printed them on overlay2.

A case is a change made in a directory, `t` below, that a lower fills with `TREE`; the lines are those of that directory, `t` itself
written as `.`. Docker prints them in a random order; here they stand sorted by path.
"""

from __future__ import annotations

import errno
import os
import shutil
import socket
import stat
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pyoverlay.testing import Directory, Fifo, File, HardLink, Symlink, Tree

_2020 = 1_577_836_800 * 10**9

BIN_SIZE = 35_664  # Docker prints 35.7kB

TREE: Tree = {
    "f": File(content=b"from f", mtime_ns=_2020),
    "g": File(content=b"from g!", mtime_ns=_2020),
    "l": Symlink("f"),
    "h1": b"link\n",
    "h2": HardLink("h1"),
    "p": Fifo(),
    "bin": File(content=b"\x7fELF", size=BIN_SIZE, mode=0o755),
    "e": Directory(mtime_ns=_2020),
    "d": Directory({"a": File(content=b"a\n", mtime_ns=_2020), "b": b"b\n", "sub": {"c": b"c\n"}}, mtime_ns=_2020),
}

# CAP_NET_RAW, permitted and effective: struct vfs_cap_data, version 2.
_CAPABILITY = struct.pack("<5I", 0x02000001, 1 << 13, 0, 0, 0)
# user::rw-, user:1000:r--, group::r--, mask::r--, other::r--: the mode stays 0644.
_ACL = struct.pack("<I", 2) + b"".join(
    struct.pack("<HHI", tag, mode, owner)
    for tag, mode, owner in ((1, 6, 2**32 - 1), (2, 4, 1000), (4, 4, 2**32 - 1), (16, 4, 2**32 - 1), (32, 4, 2**32 - 1))
)


@dataclass(frozen=True, slots=True)
class Case:
    """One change. lines: what is printed after `C .`, which stands first unless there are none. size: bytes.

    moved: the lines where a directory of a lower can be renamed (`redirect_dir=on`), which Docker's mounts refuse.
    """

    name: str
    change: Callable[[Path], object]
    lines: str = ""
    size: int = 0
    moved: str | None = None
    is_whole: bool = False  # lines is the letter of `t` itself

    def expected(self, directory: str, *, can_move: bool) -> list[str]:
        """The lines, for `t` at /`directory`."""
        lines = self.moved if can_move and self.moved is not None else self.lines
        if self.is_whole:
            return [f"{lines} /{directory}"]
        words = lines.split()
        found = [f"{letter} /{directory}/{path}" for letter, path in zip(words[::2], words[1::2], strict=True)]
        return [f"C /{directory}", *found] if found else []


# ── the changes ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _read(t: Path) -> None:
    (t / "f").read_bytes()
    os.listdir(t / "d")


def _make_and_rmdir(t: Path) -> None:
    (t / "n").mkdir()
    (t / "n").rmdir()


def _make_and_rm(t: Path) -> None:
    _write(t / "n", b"n")
    (t / "n").unlink()


def _rename_directory(t: Path) -> None:
    try:
        os.rename(t / "d", t / "dd")
    except OSError as error:
        assert error.errno == errno.EXDEV


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def _append(path: Path, content: bytes) -> None:
    with path.open("ab") as file:
        file.write(content)


def _rewrite(path: Path, content: bytes) -> None:
    """In place, without O_TRUNC."""
    with path.open("r+b") as file:
        file.write(content)


def _socket(t: Path) -> None:
    # Bound by a relative name: the path of a socket is at most 107 bytes.
    here = os.open(".", os.O_RDONLY | os.O_DIRECTORY)
    os.chdir(t)
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind("new")
    finally:
        os.fchdir(here)
        os.close(here)


def _sparse(t: Path) -> None:
    with (t / "new").open("wb") as file:
        file.truncate(10 << 20)


def _tree(t: Path) -> None:
    (t / "n/m").mkdir(parents=True)
    _write(t / "n/m/1", b"1\n")


def _with_times(path: Path, change: Callable[[Path], object]) -> None:
    """Make a change, and put the mtime back."""
    st = os.lstat(path)
    change(path)
    os.utime(path, ns=(st.st_atime_ns, st.st_mtime_ns), follow_symlinks=False)


def _replace(path: Path, make: Callable[[Path], object]) -> None:
    if stat.S_ISDIR(os.lstat(path).st_mode):
        shutil.rmtree(path)
    else:
        path.unlink()
    make(path)


def _file_to_directory(t: Path) -> None:
    _replace(t / "f", Path.mkdir)


def _file_to_full_directory(t: Path) -> None:
    _file_to_directory(t)
    _write(t / "f/1", b"1\n")


def _retarget(t: Path) -> None:
    _replace(t / "l", lambda path: path.symlink_to("g"))


def _chown_tree(t: Path) -> None:
    for path in (t / "d", *(t / "d").rglob("*")):
        os.chown(path, 7, 7)


def _swap(t: Path) -> None:
    os.rename(t / "f", t / "x")
    os.rename(t / "g", t / "f")
    os.rename(t / "x", t / "g")


def _move_by_copy(t: Path) -> None:
    shutil.copytree(t / "d", t / "dd")
    shutil.rmtree(t / "d")


def _rename_new_directory(t: Path) -> None:
    (t / "n").mkdir()
    _write(t / "n/1", b"1\n")
    os.rename(t / "n", t / "n2")


def _opaque(t: Path) -> None:
    shutil.rmtree(t / "d")
    (t / "d").mkdir()


def _opaque_as_before(t: Path) -> None:
    st = os.stat(t / "d")
    _opaque(t)
    os.chmod(t / "d", stat.S_IMODE(st.st_mode))
    os.utime(t / "d", ns=(st.st_atime_ns, st.st_mtime_ns))


def _opaque_with(name: str) -> Callable[[Path], None]:
    def change(t: Path) -> None:
        _opaque(t)
        (t / "d" / name).parent.mkdir(exist_ok=True)
        _write(t / "d" / name, b"q\n")

    return change


def _two_names(t: Path) -> None:
    _write(t / "n", b"names\n")
    os.link(t / "n", t / "n2")


def _both_links(t: Path) -> None:
    (t / "h1").unlink()
    (t / "h2").unlink()


def _half_second(t: Path) -> None:
    os.utime(t / "f", ns=(_2020, _2020 + 5 * 10**8))


CASES = (
    Case("read", _read),
    Case("mkdir and rmdir", _make_and_rmdir),
    Case("create and unlink", _make_and_rm),
    Case("rename a directory of the lower", _rename_directory, moved="D d A dd A dd/a A dd/b A dd/sub A dd/sub/c"),
    # something new
    Case("add a file", lambda t: _write(t / "new", b"n\n"), "A new", 2),
    Case("add an empty file", lambda t: _write(t / "new", b""), "A new"),
    Case("add a fifo", lambda t: os.mkfifo(t / "new"), "A new"),
    Case("add a socket", _socket, "A new"),
    Case("add a character device", lambda t: os.mknod(t / "new", stat.S_IFCHR | 0o600, os.makedev(1, 3)), "A new"),
    Case("add a block device", lambda t: os.mknod(t / "new", stat.S_IFBLK | 0o600, os.makedev(7, 200)), "A new"),
    Case("add a symlink", lambda t: (t / "new").symlink_to("f"), "A new", 1),
    Case("add a sparse file", _sparse, "A new", 10 << 20),
    Case("add 1000 bytes", lambda t: _write(t / "new", b"x" * 1000), "A new", 1000),
    Case("add an empty directory", lambda t: (t / "n").mkdir(), "A n"),
    Case("add a tree", _tree, "A n A n/m A n/m/1", 2),
    Case("add below", lambda t: _write(t / "d/sub/new", b"n\n"), "C d C d/sub A d/sub/new", 2),
    Case("add a file named as a whiteout of aufs", lambda t: _write(t / ".wh.x", b"w\n"), "A .wh.x", 2),
    # content
    Case("append", lambda t: _append(t / "f", b"8\n"), "C f", 8),
    Case("rewrite the same bytes", lambda t: _rewrite(t / "f", b"from f"), "C f", 6),
    Case("truncate", lambda t: os.truncate(t / "f", 0), "C f"),
    Case("new bytes, with size and mtime as before", lambda t: _with_times(t / "f", lambda f: _rewrite(f, b"FROM F")), "", 6),
    # copied up, and the same
    Case("open for writing, and close", lambda t: os.close(os.open(t / "f", os.O_RDWR)), "", 6),
    Case("chmod to the same mode", lambda t: os.chmod(t / "f", 0o644), "", 6),
    Case("touch to the same mtime", lambda t: os.utime(t / "f", ns=(_2020, _2020)), "", 6),
    Case("touch to half a second later", _half_second, "", 6),
    Case("user xattr", lambda t: os.setxattr(t / "f", "user.a", b"1"), "", 6),
    Case("ACL", lambda t: os.setxattr(t / "f", "system.posix_acl_access", _ACL), "", 6),
    # deleted
    Case("delete a file", lambda t: (t / "f").unlink(), "D f"),
    Case("delete a symlink", lambda t: (t / "l").unlink(), "D l"),
    Case("delete a fifo", lambda t: (t / "p").unlink(), "D p"),
    Case("delete the first of two links", lambda t: (t / "h1").unlink(), "D h1"),
    Case("delete the second of two links", lambda t: (t / "h2").unlink(), "D h2"),
    Case("delete both links", _both_links, "D h1 D h2"),
    Case("delete a directory", lambda t: shutil.rmtree(t / "d"), "D d"),
    Case("delete an empty directory", lambda t: (t / "e").rmdir(), "D e"),
    Case("delete below", lambda t: (t / "d/sub/c").unlink(), "C d C d/sub D d/sub/c"),
    Case("delete below, with the mtime as before", lambda t: _with_times(t / "d", lambda d: (d / "a").unlink()), "C d D d/a"),
    Case("delete all of it", shutil.rmtree, "D", is_whole=True),
    # replaced
    Case("delete and add again", lambda t: _replace(t / "f", lambda f: _write(f, b"n\n")), "C f", 2),
    Case("a directory becomes a file", lambda t: _replace(t / "d", lambda d: _write(d, b"n\n")), "C d", 2),
    Case("a directory becomes a symlink", lambda t: _replace(t / "d", lambda d: d.symlink_to("./")), "C d", 2),
    Case("a file becomes a directory", _file_to_directory, "C f"),
    Case("a file becomes a directory with a file", _file_to_full_directory, "C f A f/1", 2),
    Case("a file becomes a symlink", lambda t: _replace(t / "f", lambda f: f.symlink_to("g")), "C f", 1),
    Case("a file becomes a fifo", lambda t: _replace(t / "f", os.mkfifo), "C f"),
    Case("a symlink becomes a file", lambda t: _replace(t / "l", lambda path: _write(path, b"n\n")), "C l", 2),
    Case("a symlink gets another target", _retarget, "C l", 1),
    Case("the same, with the mtime as before", lambda t: _with_times(t / "l", lambda path: _retarget(path.parent)), "", 1),
    # attributes
    Case("chmod", lambda t: os.chmod(t / "f", 0o600), "C f", 6),
    Case("chown", lambda t: os.chown(t / "f", 7, 7), "C f", 6),
    Case("chown a symlink", lambda t: os.chown(t / "l", 7, 7, follow_symlinks=False), "C l", 1),
    Case("touch", lambda t: os.utime(t / "f"), "C f", 6),
    Case("setcap", lambda t: os.setxattr(t / "bin", "security.capability", _CAPABILITY), "C bin", BIN_SIZE),
    Case("chmod u+s", lambda t: os.chmod(t / "bin", 0o4755), "C bin", BIN_SIZE),
    Case("touch a fifo", lambda t: os.utime(t / "p"), "C p"),
    Case("chmod a directory", lambda t: os.chmod(t / "d", 0o700), "C d"),
    Case("chown a directory", lambda t: os.chown(t / "d", 7, 7), "C d"),
    Case("touch a directory", lambda t: os.utime(t / "d")),
    Case("xattr of a directory", lambda t: os.setxattr(t / "d", "user.a", b"1")),
    Case("chown a tree", _chown_tree, "C d C d/a C d/b C d/sub C d/sub/c", 6),
    # moved
    Case("rename", lambda t: os.rename(t / "f", t / "f2"), "D f A f2", 6),
    Case("rename over another", lambda t: os.rename(t / "f", t / "g"), "D f C g", 6),
    Case("rename into a directory", lambda t: os.rename(t / "f", t / "d/f"), "C d A d/f D f", 6),
    Case("rename a symlink", lambda t: os.rename(t / "l", t / "l2"), "D l A l2", 1),
    Case("swap two files", _swap, "C f C g", 13),
    Case("move a directory by copying", _move_by_copy, "D d A dd A dd/a A dd/b A dd/sub A dd/sub/c", 6),
    Case("rename a new directory", _rename_new_directory, "A n2 A n2/1", 2),
    # opaque directories
    Case("a directory made anew", _opaque, "C d D d/a D d/b D d/sub"),
    Case("the same, with mode and mtime as before", _opaque_as_before, "C d D d/a D d/b D d/sub"),
    Case("a directory made anew, with a file", _opaque_with("q"), "C d D d/a D d/b A d/q D d/sub", 2),
    Case("a directory made anew, with one of the old names", _opaque_with("a"), "C d C d/a D d/b D d/sub", 2),
    Case("a directory made anew, with a directory of it", _opaque_with("sub/c"), "C d D d/a D d/b C d/sub C d/sub/c", 2),
    # hard links
    Case("link", lambda t: os.link(t / "f", t / "fl"), "A fl", 6),
    Case("link what has two links", lambda t: os.link(t / "h1", t / "h3"), "A h3", 5),
    Case("append to what has two links", lambda t: _append(t / "h1", b"7\n"), "C h1", 7),
    Case("add a file with two names", _two_names, "A n A n2", 6),
)
