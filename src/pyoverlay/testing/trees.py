"""Trees as literals, and trees as values to compare.

`make_tree(root, {"etc": {"hosts": "127.0.0.1", "mtab": Symlink("/proc/mounts")}, "gone": Whiteout()})` makes files;
`snapshot(root)` reads them back as a dict that equals another's when no program could tell the trees apart;
`witness(root)` is what proves that nobody touched a tree.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

# 2001-09-09 and a second earlier. With relatime the kernel moves an atime that is not newer than the mtime at the first read, so in a
# tree made here every read without O_NOATIME leaves a trace.
MTIME_NS = 1_000_000_000 * 10**9
ATIME_NS = MTIME_NS - 10**9

Name: TypeAlias = str | bytes
Root: TypeAlias = str | bytes | os.PathLike[str] | os.PathLike[bytes]
Xattrs: TypeAlias = Mapping[str, bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class Attributes:
    """What every object has. Owners are left alone when None; times are nanoseconds since 1970."""

    uid: int | None = None
    gid: int | None = None
    mtime_ns: int = MTIME_NS
    atime_ns: int = ATIME_NS
    xattrs: Xattrs = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class File(Attributes):
    """A regular file. `size` in bytes past the content makes the rest a hole."""

    content: Name = b""
    mode: int = 0o644
    size: int | None = None


@dataclass(frozen=True, slots=True)
class Directory(Attributes):
    """A directory; a plain dict stands for one of mode 0755."""

    entries: Mapping[str, Node] = field(default_factory=dict)
    mode: int = 0o755


@dataclass(frozen=True, slots=True)
class Symlink(Attributes):
    """A symbolic link."""

    target: Name


@dataclass(frozen=True, slots=True)
class Fifo(Attributes):
    """A named pipe."""

    mode: int = 0o644


@dataclass(frozen=True, slots=True)
class Socket(Attributes):
    """A Unix socket that nobody listens on."""

    mode: int = 0o755


@dataclass(frozen=True, slots=True)
class Device(Attributes):
    """A device node; `kind` is "c" or "b". Needs root, except for c 0 0."""

    kind: str
    major: int
    minor: int
    mode: int = 0o600


@dataclass(frozen=True, slots=True)
class HardLink:
    """Another name for a file made before it; `to` is that file's path from the root of the tree."""

    to: Name


class Whiteout(Device):
    """The kernel's mark for a deleted name: the character device 0, 0."""

    def __init__(self) -> None:
        super().__init__("c", 0, 0, 0)


# Names that are no UTF-8 are written as os.fsdecode gives them. A tree kept in a variable wants its type said: `LAYER: Tree = {...}`.
Tree: TypeAlias = Mapping[str, "Node"]
Node: TypeAlias = Name | File | Directory | Symlink | Fifo | Socket | Device | HardLink | Tree


def make_tree(root: Root, tree: Tree) -> None:
    """Make the entries of `tree` in the existing directory `root`, depth first and in the order of the dicts.

    Text and bytes are files of mode 0644, dicts directories of mode 0755. The umask has no effect. Raises OSError.
    """
    path = os.fsencode(root)
    _make_entries(path, path, tree)
    os.utime(path, ns=(ATIME_NS, MTIME_NS))


def _make_entries(root: bytes, directory: bytes, tree: Tree) -> None:
    for name, node in tree.items():
        _make(root, os.path.join(directory, os.fsencode(name)), node)


def _make(root: bytes, path: bytes, node: Node) -> None:
    match node:
        case str() | bytes():
            _make(root, path, File(node))
        case HardLink(to):
            os.link(os.path.join(root, os.fsencode(to)), path, follow_symlinks=False)
        case File() | Symlink() | Fifo() | Socket() | Device():
            _make_object(path, node)
            _set_attributes(path, node)
        case Directory(entries=entries):
            os.mkdir(path)
            _make_entries(root, path, entries)
            _set_attributes(path, node)
        case Mapping():
            _make(root, path, Directory(node))


def _make_object(path: bytes, node: File | Symlink | Fifo | Socket | Device) -> None:
    match node:
        case File(content=content, size=size):
            with open(path, "xb") as file:
                file.write(os.fsencode(content))
                if size is not None:
                    file.truncate(size)
        case Symlink(target=target):
            os.symlink(target, path)
        case Fifo():
            os.mkfifo(path)
        case Socket():
            os.mknod(path, stat.S_IFSOCK)
        case Device(kind=kind, major=major, minor=minor):
            os.mknod(path, stat.S_IFBLK if kind == "b" else stat.S_IFCHR, os.makedev(major, minor))


def _set_attributes(path: bytes, node: File | Directory | Symlink | Fifo | Socket | Device) -> None:
    if node.uid is not None or node.gid is not None:  # before the mode: chown clears suid and sgid
        os.chown(path, -1 if node.uid is None else node.uid, -1 if node.gid is None else node.gid, follow_symlinks=False)
    if not isinstance(node, Symlink):
        os.chmod(path, node.mode)
    for name, value in node.xattrs.items():
        os.setxattr(path, name, value, follow_symlinks=False)
    os.utime(path, ns=(node.atime_ns, node.mtime_ns), follow_symlinks=False)  # last: all the above move times


@dataclass(frozen=True, slots=True)
class Entry:
    """One object of a tree as programs see it.

    kind: the type as `ls -l` prints it, one of "-dlpscb". size in bytes (0 for directories: it differs between file systems);
    mtime_ns in nanoseconds; digest: SHA-256 of the content of a file, else empty; nlink: 0 for directories, which count differently
    everywhere; first_name: the first path, in byte order, of the same inode in this tree.
    """

    kind: str
    mode: int
    uid: int
    gid: int
    rdev: int
    size: int
    mtime_ns: int
    nlink: int
    first_name: bytes
    target: bytes
    digest: str
    xattrs: tuple[tuple[str, bytes], ...]


def snapshot(root: Root) -> dict[bytes, Entry]:
    """Everything below `root`, keyed by path from there (`b"."` is the root itself); mount points below are not entered.

    Two trees with equal snapshots have the same names, content, types, modes, owners, times, attributes and hard links. Reading does not
    move atimes of files and directories one may read without moving them; that of a symlink moves. Raises OSError.
    """
    top = os.fsencode(root)
    first_names: dict[tuple[int, int], bytes] = {}
    return {name: _entry(path, name, st, first_names) for name, path, st in _walk(top)}


def _entry(path: bytes, name: bytes, st: os.stat_result, first_names: dict[tuple[int, int], bytes]) -> Entry:
    is_directory = stat.S_ISDIR(st.st_mode)
    return Entry(
        kind=stat.filemode(st.st_mode)[0],
        mode=stat.S_IMODE(st.st_mode),
        uid=st.st_uid,
        gid=st.st_gid,
        rdev=st.st_rdev,
        size=0 if is_directory else st.st_size,
        mtime_ns=st.st_mtime_ns,
        nlink=0 if is_directory else st.st_nlink,
        first_name=first_names.setdefault((st.st_dev, st.st_ino), name),
        target=os.readlink(path) if stat.S_ISLNK(st.st_mode) else b"",
        digest=_digest(path) if stat.S_ISREG(st.st_mode) else "",
        xattrs=_xattrs(path),
    )


def witness(root: Root) -> dict[bytes, tuple[object, ...]]:
    """All that shows whether anybody touched `root` or what is below: equal before and after means untouched.

    Holds inode number, mode, owner, links, device, size, mtime, ctime and atime in nanoseconds, attributes and the content's SHA-256. The
    ctime moves with any change and cannot be set. Taking it of a tree of one's own moves no atime (targets of symlinks are not read: no
    other target comes without another inode or ctime). An ordinary user cannot keep readlink(2) from moving the atime of a symlink: there
    it is left out. Raises OSError.
    """
    is_user = os.geteuid() != 0
    return {
        name: (
            st.st_ino,
            st.st_mode,
            st.st_uid,
            st.st_gid,
            st.st_nlink,
            st.st_rdev,
            st.st_size,
            st.st_mtime_ns,
            st.st_ctime_ns,
            0 if is_user and stat.S_ISLNK(st.st_mode) else st.st_atime_ns,
            _xattrs(path),
            _digest(path) if stat.S_ISREG(st.st_mode) else "",
        )
        for name, path, st in _walk(os.fsencode(root))
    }


def _walk(top: bytes) -> Iterator[tuple[bytes, bytes, os.stat_result]]:
    """Name from the top, path and lstat of the top and all below it, in byte order, on one file system."""
    top_st = os.lstat(top)
    pending = [(b".", top, top_st)]
    while pending:
        name, path, st = pending.pop()
        yield name, path, st
        if not stat.S_ISDIR(st.st_mode) or st.st_dev != top_st.st_dev:
            continue
        prefix = b"" if name == b"." else name + b"/"
        for child in sorted(_list(path), reverse=True):
            child_path = os.path.join(path, child)
            pending.append((prefix + child, child_path, os.lstat(child_path)))


def _list(path: bytes) -> list[bytes]:
    fd = _open_noatime(path, os.O_DIRECTORY)
    try:
        return [os.fsencode(name) for name in os.listdir(fd)]
    finally:
        os.close(fd)


def _digest(path: bytes) -> str:
    with open(_open_noatime(path, 0), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _open_noatime(path: bytes, flags: int) -> int:
    flags |= os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        return os.open(path, flags | os.O_NOATIME)
    except PermissionError as error:
        # O_NOATIME is for the owner and root; a tree of somebody else's can still be looked at.
        if error.errno != errno.EPERM:
            raise
    return os.open(path, flags)


def _xattrs(path: bytes) -> tuple[tuple[str, bytes], ...]:
    names = sorted(os.listxattr(path, follow_symlinks=False))
    return tuple((name, os.getxattr(path, name, follow_symlinks=False)) for name in names)


def is_whiteout(path: Root) -> bool:
    """Whether `path` is the character device 0, 0. Raises OSError, FileNotFoundError if there is nothing."""
    st = os.lstat(path)
    return stat.S_ISCHR(st.st_mode) and st.st_rdev == 0
