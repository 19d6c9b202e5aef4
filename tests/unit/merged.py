"""The merged view of plain directories, driven by paths: what the kernel does between a program and the core, and no more of it than the
core relies on.

It walks paths, refuses what the VFS refuses before a file system is asked (EEXIST, ENOTDIR, a rename into itself), counts the references
that look-ups give, and trims descriptors after each call. Symlinks are taken to lead nowhere.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from pyoverlay.core import attributes, change, copyup
from pyoverlay.core.attributes import Wanted
from pyoverlay.core.calls import Caller, Calls
from pyoverlay.core.inode import Directory, Inode
from pyoverlay.core.layer import readable_dir
from pyoverlay.core.objects import failure
from pyoverlay.core.policy import Fsync, Policy
from pyoverlay.core.rename import rename
from pyoverlay.core.stack import open_view
from pyoverlay.core.syscalls import RENAME_EXCHANGE, RENAME_NOREPLACE, Stat
from pyoverlay.core.view import View
from pyoverlay.testing import Entry, Tree, make_tree, witness

IS_ROOT = os.geteuid() == 0
# Nothing here has to survive a power cut, and a copy-up that waits for the disk takes a hundred times as long.
POLICY = Policy(fsync=Fsync.VOLATILE) if IS_ROOT else Policy(userxattr=True, privileged=False, fsync=Fsync.VOLATILE)
_PREFIX = "trusted.overlay." if IS_ROOT else "user.overlay."

TreeSeen = dict[bytes, Entry]


def mark(name: str) -> str:
    """The extended attribute that marks something in this run's spelling."""
    return _PREFIX + name


def timeless(tree: TreeSeen) -> TreeSeen:
    """Without the times, and without the root's own attributes: what an operation leaves alone or changes."""
    return {path: replace(entry, mtime_ns=0) for path, entry in tree.items() if path != b"."}


class Merged:
    """One view, by paths."""

    def __init__(self, view: View) -> None:
        self.view = view
        self.caller = Caller(os.geteuid(), os.getegid(), 0o022)

    # -- paths

    def look_up(self, parent: Inode, name: bytes) -> Inode | None:
        if not isinstance(parent, Directory):
            raise failure(errno.ENOTDIR)
        found = self.view.lookup(parent, name)
        if found is None:
            return None
        found[0].nlookup += 1
        return found[0]

    def walk(self, path: str) -> Inode:
        here: Inode = self.view.root
        for name in _components(path):
            if stat.S_ISLNK(here.format):
                raise failure(errno.ENOENT)
            found = self.look_up(here, name)
            if found is None:
                raise failure(errno.ENOENT)
            here = found
        return here

    def follow(self, path: str) -> Inode:
        inode = self.walk(path)
        if stat.S_ISLNK(inode.format):
            raise failure(errno.ENOENT)
        return inode

    def parent(self, path: str) -> tuple[Directory, bytes]:
        *above, name = _components(path)
        parent = self.walk("/".join(os.fsdecode(component) for component in above))
        if stat.S_ISLNK(parent.format):
            raise failure(errno.ENOENT)
        if not isinstance(parent, Directory):
            raise failure(errno.ENOTDIR)
        return parent, name

    def entry(self, path: str) -> tuple[Directory, bytes, Inode | None]:
        parent, name = self.parent(path)
        return parent, name, self.look_up(parent, name)

    def _new(self, path: str) -> tuple[Directory, bytes]:
        parent, name, inode = self.entry(path)
        if inode is not None:
            raise failure(errno.EEXIST)
        return parent, name

    def _old(self, path: str) -> tuple[Directory, bytes, Inode]:
        parent, name, inode = self.entry(path)
        if inode is None:
            raise failure(errno.ENOENT)
        return parent, name, inode

    @contextmanager
    def _request(self) -> Iterator[None]:
        try:
            yield
        finally:
            self.view.trim()

    # -- what programs do

    def create(self, path: str, content: bytes = b"", mode: int = 0o644) -> Inode:
        with self._request():
            inode, _ = change.create(self.view, *self._new(path), mode, self.caller)
            inode.nlookup += 1
        if content:
            self.write(path, content)
        return inode

    def mkdir(self, path: str, mode: int = 0o755) -> Inode:
        with self._request():
            inode, _ = change.mkdir(self.view, *self._new(path), mode, self.caller)
            inode.nlookup += 1
            return inode

    def symlink(self, target: str, path: str) -> None:
        with self._request():
            inode, _ = change.symlink(self.view, *self._new(path), os.fsencode(target), self.caller)
            inode.nlookup += 1

    def mknod(self, path: str, mode: int, rdev: int = 0) -> None:
        with self._request():
            inode, _ = change.mknod(self.view, *self._new(path), mode, rdev, self.caller)
            inode.nlookup += 1

    def link(self, old: str, new: str) -> None:
        with self._request():
            inode = self.walk(old)
            parent, name = self._new(new)
            if isinstance(inode, Directory):
                raise failure(errno.EPERM)
            copyup.copy_up(self.view, inode, attributes_only=True)
            change.link(self.view, inode, parent, name)
            inode.nlookup += 1

    def unlink(self, path: str) -> Inode:
        with self._request():
            parent, name, inode = self._old(path)
            if isinstance(inode, Directory):
                raise failure(errno.EISDIR)
            return change.unlink(self.view, parent, name)

    def rmdir(self, path: str) -> Directory:
        with self._request():
            parent, name, inode = self._old(path)
            if not isinstance(inode, Directory):
                raise failure(errno.ENOTDIR)
            return change.rmdir(self.view, parent, name)

    def rename(self, old: str, new: str, flags: int = 0) -> None:
        with self._request():
            old_parent, old_name = self.parent(old)
            new_parent, new_name = self.parent(new)
            source = self._old(old)[2]
            target = self.look_up(new_parent, new_name)
            if target is not None and flags & RENAME_NOREPLACE:
                raise failure(errno.EEXIST)
            if target is None and flags & RENAME_EXCHANGE:
                raise failure(errno.ENOENT)
            if _is_at_or_above(source, new_parent):
                raise failure(errno.EINVAL)
            if target is not None and _is_at_or_above(target, old_parent):
                raise failure(errno.EINVAL if flags & RENAME_EXCHANGE else errno.ENOTEMPTY)
            if source is target:
                return
            if target is not None and not flags & RENAME_EXCHANGE and isinstance(source, Directory) != isinstance(target, Directory):
                raise failure(errno.ENOTDIR if isinstance(source, Directory) else errno.EISDIR)
            rename(self.view, old_parent, old_name, new_parent, new_name, flags)

    def read(self, path: str) -> bytes:
        with self._request():
            return self.read_inode(self.follow(path))

    def read_inode(self, inode: Inode) -> bytes:
        return os.pread(self.view.data_fd(inode), self.view.stat(inode).st_size, 0)

    def write(self, path: str, content: bytes, offset: int = 0) -> None:
        with self._request():
            inode = self.follow(path)
            if isinstance(inode, Directory):
                raise failure(errno.EISDIR)
            if not inode.is_regular:
                raise failure(errno.ENXIO)  # a fifo that nobody reads
            copyup.copy_up(self.view, inode)
            attributes.write(self.view, inode, content, offset)

    def fsync(self, path: str) -> None:
        with self._request():
            inode = self.walk(path)
            assert inode.in_upper, "what is a lower's alone is on disk"
            fd = readable_dir(self.view.upper_fd(inode)) if isinstance(inode, Directory) else self.view.data_fd(inode, write=True)
            try:
                self.view.upper.calls.fsync(fd)
            finally:
                if isinstance(inode, Directory):
                    os.close(fd)

    def truncate(self, path: str, size: int) -> None:
        with self._request():
            inode = self.follow(path)
            if not inode.is_regular:
                raise failure(errno.EISDIR if isinstance(inode, Directory) else errno.EINVAL)
            if not copyup.copy_up(self.view, inode, size):
                attributes.setattr(self.view, inode, Wanted(size=size))

    def setattr(self, path: str, wanted: Wanted, *, follow: bool = True) -> None:
        with self._request():
            inode = self.follow(path) if follow else self.walk(path)
            copyup.copy_up(self.view, inode, attributes_only=True)
            attributes.setattr(self.view, inode, wanted)

    def chmod(self, path: str, mode: int) -> None:
        self.setattr(path, Wanted(mode=mode))

    def chown(self, path: str, uid: int, gid: int) -> None:
        self.setattr(path, Wanted(uid=uid, gid=gid), follow=False)

    def utime(self, path: str, atime_ns: int, mtime_ns: int) -> None:
        self.setattr(path, Wanted(atime_ns=atime_ns, mtime_ns=mtime_ns), follow=False)

    def setxattr(self, path: str, name: str, value: bytes, flags: int = 0) -> None:
        with self._request():
            inode = self.walk(path)
            copyup.copy_up(self.view, inode, attributes_only=True)
            attributes.setxattr(self.view, inode, os.fsencode(name), value, flags)

    def removexattr(self, path: str, name: str) -> None:
        with self._request():
            inode = self.walk(path)
            if name.startswith("user.") and not inode.is_regular and not isinstance(inode, Directory):
                raise failure(errno.EPERM)  # xattr_permission
            self.view.getxattr(inode, os.fsencode(name))
            copyup.copy_up(self.view, inode, attributes_only=True)
            attributes.removexattr(self.view, inode, os.fsencode(name))

    def getxattr(self, path: str, name: str) -> bytes:
        with self._request():
            return self.view.getxattr(self.walk(path), os.fsencode(name))

    def listxattr(self, path: str) -> list[str]:
        with self._request():
            return sorted(os.fsdecode(name) for name in self.view.listxattr(self.walk(path)))

    def listdir(self, path: str = "") -> list[str]:
        with self._request():
            directory = self.walk(path)
            if not isinstance(directory, Directory):
                raise failure(errno.ENOTDIR)
            return sorted(os.fsdecode(name) for _, name in self.view.listing(directory).after(2))

    def stat(self, path: str) -> Stat:
        with self._request():
            return self.view.stat(self.walk(path))

    def ino(self, path: str) -> int:
        with self._request():
            return self.walk(path).ino

    def nlink(self, path: str) -> int:
        with self._request():
            inode = self.walk(path)
            return self.view.nlink(inode, self.view.stat(inode))

    def exists(self, path: str) -> bool:
        try:
            return self.entry(path)[2] is not None
        except (FileNotFoundError, NotADirectoryError):
            return False

    # -- looks

    def tree(self) -> TreeSeen:
        """Everything, as `pyoverlay.testing.snapshot` tells it."""
        seen: TreeSeen = {}
        first_names: dict[int, bytes] = {}
        pending: list[tuple[str, Inode]] = [("", self.view.root)]
        while pending:
            path, inode = pending.pop()
            key = os.fsencode(path) or b"."
            seen[key] = self._entry_of(inode, first_names.setdefault(inode.ino, key))
            if isinstance(inode, Directory):
                below = [f"{path}/{name}".lstrip("/") for name in sorted(self.listdir(path), reverse=True)]
                pending += [(child, self.walk(child)) for child in below]
        return seen

    def _entry_of(self, inode: Inode, first_name: bytes) -> Entry:
        view = self.view
        st = view.stat(inode)
        is_directory = isinstance(inode, Directory)
        entry = Entry(
            kind=stat.filemode(st.st_mode)[0],
            mode=stat.S_IMODE(st.st_mode),
            uid=st.st_uid,
            gid=st.st_gid,
            rdev=st.st_rdev,
            size=0 if is_directory else st.st_size,
            mtime_ns=st.st_mtime_ns,
            nlink=0 if is_directory else view.nlink(inode, st),
            first_name=first_name,
            target=view.readlink(inode) if stat.S_ISLNK(st.st_mode) else b"",
            digest=hashlib.sha256(self.read_inode(inode)).hexdigest() if inode.is_regular else "",
            xattrs=tuple(sorted((os.fsdecode(name), view.getxattr(inode, name)) for name in view.listxattr(inode))),
        )
        view.trim()
        return entry

    def forget(self) -> None:
        """The kernel drops every reference it has."""
        for inode in list(self.view.table.by_ino.values()):
            if inode is not self.view.root:
                self.view.forget(inode.ino, inode.nlookup)


def _components(path: str) -> list[bytes]:
    return [os.fsencode(name) for name in path.split("/") if name]


def _is_at_or_above(inode: Inode, directory: Directory) -> bool:
    above: Directory | None = directory
    while above is not None:
        if above is inode:
            return True
        above = above.parent
    return False


def _without_symlink_atime(seen: tuple[object, ...]) -> tuple[object, ...]:
    mode = seen[1]
    assert isinstance(mode, int)
    return (*seen[:9], *seen[10:]) if stat.S_ISLNK(mode) else seen


CALLS = frozenset(name for name, value in vars(Calls).items() if callable(value) and not name.startswith("_")) - Calls.COMPOUND


class Faulty(Calls):
    """Counts the calls that change the upper; at the one of number `at` it strikes: that raises instead of being made.

    made: the names of all of them, in order.
    """

    def __init__(self, at: int, error: BaseException) -> None:
        self.made: list[str] = []
        self.at = at
        self.error = error

    @property
    def count(self) -> int:
        return len(self.made)

    def strike(self) -> None:
        raise self.error

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        return partial(self._call, value) if name in CALLS else value

    def _call(self, call: Callable[..., object], *arguments: object) -> object:
        self.made.append(call.__name__)
        if self.count == self.at:
            self.strike()
        return call(*arguments)


class Stack:
    """Layers in a directory of the test's, and the merged view of them."""

    def __init__(
        self, base: Path, lowers: tuple[Tree, ...], upper: Tree | None = None, policy: Policy = POLICY, limit: int | None = None
    ) -> None:
        self.policy = policy
        self.limit = limit
        self.lowers = [base / f"lower{number}" for number in range(1, len(lowers) + 1)]
        self.upper, self.work = base / "upper", base / "work"
        for directory, tree in zip((*self.lowers, self.upper, self.work), (*lowers, upper or {}, {}), strict=True):
            directory.mkdir(parents=True)
            make_tree(directory, tree)
        self._before = self.look_at_lowers()
        self._is_read_by_test = False
        self._views: list[View] = []
        self.open()

    def open(self) -> Merged:
        """Mount: a view of the layers as they are on disk now, and the only one."""
        self.close()
        self.merged = Merged(self._open(self.work))
        return self.merged

    def fresh(self) -> Merged:
        """What the layers show to somebody who never saw them before, while the first view stays."""
        work = self.work.with_name("fresh-work")
        work.mkdir(exist_ok=True)
        return Merged(self._open(work))

    def _open(self, work: Path) -> View:
        view = open_view([os.fsencode(lower) for lower in self.lowers], os.fsencode(self.upper), os.fsencode(work), self.policy)
        if self.limit is not None:
            view.cache.limit = self.limit
        self._views.append(view)
        return view

    def disk_tree(self) -> TreeSeen:
        """The merged tree as a fresh view shows it."""
        with self._lent_index():
            merged = self.fresh()
            try:
                return timeless(merged.tree())
            finally:
                merged.view.close()
                self._views.remove(merged.view)

    @contextmanager
    def _lent_index(self) -> Iterator[None]:
        """The fresh view has a work directory of its own, and yet the one index."""
        here, there = self.work / "index", self.work.with_name("fresh-work") / "index"
        if not self.policy.index:
            yield
            return
        there.parent.mkdir(exist_ok=True)
        here.rename(there)
        yield
        there.rename(here)

    def work_names(self) -> list[str]:
        """What lies in the work directory, but for the spare whiteout that others are made of."""
        spare = self.merged.view.upper._spare
        return sorted(name for name in os.listdir(self.work / "work") if os.fsencode(name) != spare)

    def litter(self) -> list[str]:
        """What could not be removed from the work directory, and will be tried again."""
        return sorted(os.fsdecode(name) for name in self.merged.view.upper._litter)

    def look_at_lowers(self) -> list[dict[bytes, tuple[object, ...]]]:
        """As `witness`. Only a clone of a mount stops readlink from moving a symlink's time of access, and only root has that."""
        return [{path: seen if IS_ROOT else _without_symlink_atime(seen) for path, seen in witness(lower).items()} for lower in self.lowers]

    def assert_lowers_untouched(self) -> None:
        assert self._is_read_by_test or self.look_at_lowers() == self._before

    def lower_for_reading(self) -> Path:
        """The top lower, untouched up to now, to be read by the test itself: that moves times of access."""
        self.assert_lowers_untouched()
        self._is_read_by_test = True
        return self.lowers[0]

    def close(self) -> None:
        for view in self._views:
            view.close()
        self._views = []
