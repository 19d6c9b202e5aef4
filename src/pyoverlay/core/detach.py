"""A directory that lowers are part of becomes the upper's alone, with all that is below it: it can then be renamed where no redirect may
say where its other half lies, since any user could have written that mark.

    survey    the tree: what must be copied, and whether that is too much (EXDEV)
    prepare   each file, in the work directory; filled from there on as by any copy-up
    publish   each of them, in its place, where it shows what the lower's showed
    detach    each directory, from the bottom: all it has is in the upper, so it may hide the lowers

Whoever looks sees the same tree throughout, and others may change it between any two of these steps. What fails before the first file is
published leaves nothing; afterwards some files are copied up, as by a change of their modes.
"""

from __future__ import annotations

import errno
import stat
from collections.abc import Iterator
from contextlib import ExitStack
from types import TracebackType

from pyoverlay.core import copyup, marks
from pyoverlay.core.calls import Order
from pyoverlay.core.copyup import Copy
from pyoverlay.core.copyup_directory import copy_up_directory, keeping_times
from pyoverlay.core.inode import Directory, Inode
from pyoverlay.core.layer import tolerated
from pyoverlay.core.names import bring_up, in_upper
from pyoverlay.core.objects import failure
from pyoverlay.core.syscalls import Stat
from pyoverlay.core.view import View


class Detachment:
    """One directory on its way. A context: at its end nothing is held any more, and what was prepared and not published is gone.

    directories: it and those below, each before its own. files: what is not in the upper yet. limit: bytes that may be copied.
    """

    def __init__(self, view: View, directory: Directory, limit: int) -> None:
        self.view = view
        self.directories: list[Directory] = [directory]
        self.files: dict[Inode, None] = {}
        self.copies: dict[Inode, Copy] = {}
        self._limit = limit
        self._size = 0  # bytes of them
        self._surveyed = 0
        self._held: list[Inode] = []
        self._prepared = ExitStack()

    def __enter__(self) -> Detachment:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._prepared.close()
        for inode in reversed(self._held):
            self.view.forget(inode.ino, 1)

    def survey(self) -> Iterator[None]:
        """A directory at a time; begun anew, it goes on where it was. EXDEV: more than the limit, or something that cannot be copied up as
        it is, and mv does it its way.
        """
        while self._surveyed < len(self.directories):
            directory = self.directories[self._surveyed]
            if directory.has_xattr_whiteouts or self.view.upper.reads_aufs:
                raise failure(errno.EXDEV)  # its whiteouts would show as files once it is opaque
            found = [self.view.lookup(directory, name) for name in self.view.listing(directory)]
            for inode, st in filter(None, found):
                self._note(inode, st)
            self._surveyed += 1
            yield

    def _note(self, inode: Inode, st: Stat) -> None:
        self._hold(inode)
        if isinstance(inode, Directory):
            self.directories.append(inode)
        elif not inode.in_upper and inode not in self.files:
            self.files[inode] = None
            self._size += min(st.st_size, st.st_blocks * 512) if stat.S_ISREG(st.st_mode) else 0
            if self._size > self._limit:
                raise failure(errno.EXDEV)

    def _hold(self, inode: Inode) -> None:
        inode.nlookup += 1
        self._held.append(inode)

    def prepare(self, inode: Inode) -> Copy | None:
        """A copy without data yet; None where others have copied it up, or removed it, in the meantime. EXDEV: it may not be (EPERM)."""
        if inode.in_upper or inode.is_orphan:
            return None
        try:
            self.copies[inode] = self._prepared.enter_context(copyup.prepare(self.view, inode))
        except PermissionError:
            raise failure(errno.EXDEV) from None
        return self.copies[inode]

    def put_on_disk(self) -> None:
        """The data of all copies before their names, by one call."""
        if self.view.upper.order is not Order.NOTHING:
            self.view.upper.calls.syncfs(self.view.upper.root_fd)

    def publish(self, inode: Inode) -> None:
        """EXDEV: its owner cannot be kept."""
        if not inode.in_upper and not inode.is_orphan:
            try:
                copyup.publish(self.view, self.copies[inode])
            except PermissionError:
                raise failure(errno.EXDEV) from None
        del self.copies[inode]

    def detach(self) -> Iterator[None]:
        """A directory at a time, the deepest first; at the end the one it is about."""
        for directory in reversed(self.directories):
            self.detach_one(directory)
            yield

    def detach_one(self, directory: Directory) -> None:
        """One of them, those below which come first."""
        view = self.view
        if directory.is_orphan or not directory.lowers:
            return
        copy_up_directory(view, directory)
        for name in list(view.listing(directory)):
            found = view.lookup(directory, name)
            if found is None:
                continue
            if isinstance(found[0], Directory):
                if found[0].lowers:
                    raise failure(errno.EXDEV)  # somebody moved it here meanwhile
            elif not in_upper(view, directory, name, found[0]):
                bring_up(view, found[0], directory, name)
        upper, dirfd = view.upper, view.upper_fd(directory)
        with upper.as_writable(dirfd):
            upper.set_mark(dirfd, b".", marks.OPAQUE, b"y")
        directory.lowers, directory.is_opaque = (), True
        view.links_changed(directory)
        for name, form in upper.scan(dirfd).items():
            st = upper.stat(dirfd, name) if not form else None
            if st is not None and marks.is_whiteout_device(st):
                with tolerated("a whiteout that hides nothing stays in the upper"), keeping_times(upper, dirfd):
                    upper.calls.unlink(name, dirfd)


def detach(view: View, directory: Directory, limit: int) -> None:
    """All the steps in a row."""
    with Detachment(view, directory, limit) as tree:
        for _ in tree.survey():
            pass
        for inode in tree.files:
            copy = tree.prepare(inode)
            if copy is not None:
                copyup.fill(copy, is_ordered=False)
                copy.park()
        tree.put_on_disk()
        for inode in list(tree.copies):
            tree.publish(inode)
        for _ in tree.detach():
            pass
