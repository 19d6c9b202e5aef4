"""Requests to core calls and back, as far as nothing waits: one plain call each.

With the extension the receiver makes these calls itself, request after request (direct.py); pyfuse3's handlers make them otherwise
(operations.py), after they have awaited what there is to wait for. So each operation is here once. What cannot be answered yet, since data
has to be copied up and on disk first, raises `NotAtOnce`, and nothing has been changed by then.

A file handle is the node id: descriptors belong to inodes, not to opens.
"""

from __future__ import annotations

import errno
import itertools
import os
import time
from collections.abc import Hashable, Iterator, Mapping

from pyoverlay.core import attributes, change, copyup
from pyoverlay.core import rename as renaming
from pyoverlay.core.calls import Caller, Order
from pyoverlay.core.copyup_at_once import copy_up_at_once
from pyoverlay.core.copyup_directory import copy_up_directory
from pyoverlay.core.inode import REFUSED_INO, Directory, Inode
from pyoverlay.core.objects import failure
from pyoverlay.core.owners import ACLS
from pyoverlay.core.policy import Fsync, Verity
from pyoverlay.core.remote import MustAsk, Question
from pyoverlay.core.rename import Side
from pyoverlay.core.syscalls import RENAME_EXCHANGE, Stat
from pyoverlay.core.view import View

# Bytes copied on the loop, where nothing waits for a disk: a thread costs more. And where the copy must be on disk before it appears, which
# takes a good disk less time than a thread takes to start and to end; once it took `SLOW`, threads do it for a while. Seconds.
INLINE_COPY, INLINE_ORDERED = 256 << 10, 64 << 10
_SLOW, _WHILE = 5e-3, 1.0

SELF_AND_ABOVE = (b".", b"..")  # entries for which the kernel takes no reference
_AT_A_TIME = 32  # entries that remote lowers are asked about together
_DOT, _DOTDOT = 1, 2  # offsets of "." and ".."; a Listing's begin after them
_XATTR_CREATE, _XATTR_REPLACE = 1, 2
_SAID_OF_MARKS = (errno.EIO, errno.EPERM, errno.EINVAL, errno.ESTALE)

Shown = tuple[int, Stat, int] | tuple[int, Stat, int, int, int, int]
"""What an object shows: its number, stat, and links; and where the stat does not say what shows of these: uid, gid, blocks."""


Entry = tuple[int, bytes, Inode, Stat]
"""Of a directory: an offset behind it, its name, the object, its attributes."""

# What a listing says of a name whose object is refused: with a type that there is none of, the kernel lists the name and takes no
# attributes from here, so that it asks for them, and hears the errno.
_TIMES = dict.fromkeys(("st_atime_ns", "st_mtime_ns", "st_ctime_ns", "st_blksize", "st_blocks", "st_rdev"), 0)
_REFUSED = (Inode(REFUSED_INO, 0), os.stat_result((0,) * 10, _TIMES))


class NotAtOnce(Exception):
    """The answer has to wait for a copy-up."""


class Answers:
    """What one mount answers. Each method is named after its request and raises OSError with its caller's errno.

    copying: what is being copied up in a thread meanwhile. shows_writeback: sizes and blocks may be behind what the page cache has.
    """

    def __init__(self, view: View) -> None:
        self.view = view
        self.copying: Mapping[Inode, object] = {}
        self.owners = None if view.owners.are_kept else view.owners
        self.shows_writeback = False
        self._slow_until = 0.0

    def shown(self, inode: Inode, st: Stat) -> Shown:
        if self.owners is None and inode.metacopy is None and not self.shows_writeback:
            return inode.ino, st, self.view.nlink(inode, st)
        uid, gid = (st.st_uid, st.st_gid) if self.owners is None else self.owners.shown(st)
        blocks = self.view.blocks(inode, st)
        if inode.is_regular and (st.st_size or self.shows_writeback):
            blocks = max(blocks, 1)
        return inode.ino, st, self.view.nlink(inode, st), uid, gid, blocks

    def _looked_up(self, inode: Inode, st: Stat) -> Shown:
        """As shown, in an answer that gives the kernel a reference: there is none where it cannot be told yet."""
        shown = self.shown(inode, st)
        inode.nlookup += 1
        return shown

    def caller(self, uid: int, gid: int, umask: int) -> Caller:
        if self.owners is not None:
            uid, gid = self.owners.maker(uid, gid)
        return Caller(uid, gid, umask)

    def owner(self, uid: int | None, gid: int | None) -> tuple[int | None, int | None]:
        """The owner that a setattr wants, as the layers have it; None: none is wanted. EOVERFLOW: they have no id for it."""
        return (uid, gid) if self.owners is None else self.owners.stored(uid, gid)

    # -- copy-up

    def copy_up(self, inode: Inode, size: int | None = None, *, attributes_only: bool = False) -> bool:
        """As much of the object in the upper as a change needs. size: no more of the data is wanted; returns whether a truncation to it is
        thereby done. attributes_only: none is wanted.

        NotAtOnce: it takes a thread, or is being done by one.
        """
        if inode in self.copying:
            raise NotAtOnce
        if copyup.is_done(self.view, inode, attributes_only=attributes_only):
            return False
        begin = time.monotonic()
        is_truncated = None
        if not self._waits_for_disk() or begin >= self._slow_until:
            is_truncated = copy_up_at_once(self.view, inode, size, attributes_only=attributes_only)
        if is_truncated is None:
            is_truncated = self._copy_up_in_steps(inode, size, attributes_only=attributes_only)
        if (end := time.monotonic()) - begin > _SLOW:
            self._slow_until = end + _WHILE
        return is_truncated

    def _copy_up_in_steps(self, inode: Inode, size: int | None, *, attributes_only: bool) -> bool:
        if isinstance(inode, Directory):
            copy_up_directory(self.view, inode)
            return False
        if inode.is_regular and not self._is_quick(inode, size, attributes_only=attributes_only):
            raise NotAtOnce
        return copyup.copy_up_in_steps(self.view, inode, size, attributes_only=attributes_only)

    def _waits_for_disk(self) -> bool:
        return self.view.upper.order is not Order.NOTHING

    def _is_quick(self, inode: Inode, size: int | None, *, attributes_only: bool) -> bool:
        if attributes_only and self.view.policy.metacopy and self.view.policy.verity is not Verity.REQUIRE:
            return True
        must_order = self._waits_for_disk()
        if must_order and time.monotonic() < self._slow_until:
            return False
        length = self.view.stat(inode).st_size
        length = length if size is None else min(size, length)
        return length <= (INLINE_ORDERED if must_order else INLINE_COPY) and self._is_cached(inode, 0, length)

    def _is_cached(self, inode: Inode, offset: int, length: int) -> bool:
        """Would reading these bytes not wait for a disk? Judged by the first and the last."""
        if self.view.is_memory(inode) or not length:
            return True
        if self.view.remotes and self.view.remote_data(inode) is not None:
            return False
        fd = self.view.data_fd(inode)
        try:
            return all(os.preadv(fd, [bytearray(1)], at, os.RWF_NOWAIT) >= 0 for at in {offset, offset + length - 1})
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EOPNOTSUPP):
                return False
            raise

    def _copied_up(self, ino: int, *, attributes_only: bool = True) -> Inode:
        inode = self.view.inode(ino)
        self.copy_up(inode, attributes_only=attributes_only)
        return inode

    # -- look-up and attributes

    def lookup(self, parent: int, name: bytes) -> Shown | None:
        """None: there is no such name."""
        directory = self.view.directory(parent)
        try:
            found = self.view.lookup(directory, name)
        except OSError as error:
            self._refused(directory, name, error)
            raise
        return self._looked_up(*found) if found is not None else None

    def _refused(self, parent: Directory, name: bytes, error: OSError) -> None:
        if error.errno in _SAID_OF_MARKS:
            self.view.report(parent, name, error)

    def forget(self, ino: int, nlookup: int) -> None:
        self.view.forget(ino, nlookup)

    def getattr(self, ino: int) -> Shown:
        inode = self.view.inode(ino)
        return self.shown(inode, self.view.stat(inode))

    def goes_to_lane(self, ino: int) -> bool:
        """Before a change of attributes alone: copy up what it is about. Does the extension then make the change by itself?"""
        return False

    def setattr(self, ino: int, wanted: attributes.Wanted, *, drops_privileges: bool) -> Shown:
        inode = self.view.inode(ino)
        if self.copy_up(inode, wanted.size, attributes_only=wanted.size is None):
            wanted.size = None
        st = attributes.setattr(self.view, inode, wanted)
        if drops_privileges:
            attributes.drop_privileges_of(self.view, inode)
            st = self.view.stat(inode)
        return self.shown(inode, st)

    def readlink(self, ino: int) -> bytes:
        return self.view.readlink(self.view.inode(ino))

    # -- extended attributes

    def getxattr(self, ino: int, name: bytes) -> bytes:
        return self.view.getxattr(self.view.inode(ino), name)

    def listxattr(self, ino: int, uid: int) -> list[bytes]:
        names = self.view.listxattr(self.view.inode(ino))
        if uid:
            # trusted.* is for CAP_SYS_ADMIN (xattr(7)). The kernel asks us whether to list it, and tells us the caller's uid alone.
            return [name for name in names if not name.startswith(b"trusted.")]
        return names

    def setxattr(self, ino: int, name: bytes, value: bytes, flags: int, uid: int, gid: int) -> None:
        if flags:
            self._refuse_by_flags(ino, name, flags)
        inode = self._copied_up(ino)
        attributes.setxattr(self.view, inode, name, value)
        if uid and name == ACLS[0] and inode.is_regular:
            attributes.drop_setgid_of(self.view, inode, unless=gid)

    def _refuse_by_flags(self, ino: int, name: bytes, flags: int) -> None:
        """XATTR_CREATE and XATTR_REPLACE, before anything is copied up."""
        try:
            self.view.getxattr(self.view.inode(ino), name)
        except OSError as error:
            if error.errno != errno.ENODATA or flags & _XATTR_REPLACE:
                raise
            return
        if flags & _XATTR_CREATE:
            raise failure(errno.EEXIST)

    def lacks_acl(self, ino: int, name: bytes) -> bool:
        """Is it an ACL that is to be removed, and there is none? Of other attributes that is ENODATA (vfs_remove_acl), and copies nothing
        up either.
        """
        try:
            self.getxattr(ino, name)
        except OSError as error:
            if error.errno == errno.ENODATA and name in ACLS:
                return True
            raise
        return False

    def removexattr(self, ino: int, name: bytes) -> None:
        if self.lacks_acl(ino, name):
            return
        attributes.removexattr(self.view, self._copied_up(ino), name)

    # -- names

    def _made(self, parent: Directory, inode: Inode, st: Stat) -> Shown:
        """As looked up, of what was just made there."""
        return self._looked_up(inode, st)

    def mknod(self, parent: int, name: bytes, mode: int, rdev: int, caller: Caller) -> Shown:
        directory = self.view.directory(parent)
        return self._made(directory, *change.mknod(self.view, directory, name, mode, rdev, caller))

    def create(self, parent: int, name: bytes, mode: int, caller: Caller) -> Shown:
        directory = self.view.directory(parent)
        return self._made(directory, *change.create(self.view, directory, name, mode, caller))

    def tmpfile(self, parent: int, mode: int, caller: Caller) -> Shown:
        return self._looked_up(*change.tmpfile(self.view, self.view.directory(parent), mode, caller))

    def mkdir(self, parent: int, name: bytes, mode: int, caller: Caller) -> Shown:
        directory = self.view.directory(parent)
        return self._made(directory, *change.mkdir(self.view, directory, name, mode, caller))

    def symlink(self, parent: int, name: bytes, target: bytes, caller: Caller) -> Shown:
        return self._looked_up(*change.symlink(self.view, self.view.directory(parent), name, target, caller))

    def link(self, ino: int, new_parent: int, new_name: bytes) -> Shown:
        inode = self._copied_up(ino)
        return self._looked_up(inode, change.link(self.view, inode, self.view.directory(new_parent), new_name))

    def unlink(self, parent: int, name: bytes) -> None:
        if self.view.index is not None:
            for inode in self.to_copy_up_for_unlink(parent, name):
                self.copy_up(inode, attributes_only=True)
        change.unlink(self.view, self.view.directory(parent), name)

    def rmdir(self, parent: int, name: bytes) -> None:
        change.rmdir(self.view, self.view.directory(parent), name)

    def rename(self, old_parent: int, old_name: bytes, new_parent: int, new_name: bytes, flags: int) -> None:
        old, new = self._sides(old_parent, old_name, new_parent, new_name)
        for inode in self._to_copy_up_for_rename(old, new, flags):
            self.copy_up(inode, attributes_only=True)
        if renaming.to_detach(self.view, old, new, flags):
            raise NotAtOnce
        renaming.move(self.view, old, new, flags)

    def _sides(self, old_parent: int, old_name: bytes, new_parent: int, new_name: bytes) -> tuple[Side, Side]:
        view = self.view
        return renaming.side(view, view.directory(old_parent), old_name), renaming.side(view, view.directory(new_parent), new_name)

    def to_copy_up_for_unlink(self, parent: int, name: bytes) -> list[Inode]:
        """The file that has to be in the upper before a name of it goes: where an index counts its names."""
        if self.view.index is None:
            return []
        return self._counted_in_lower(renaming.side(self.view, self.view.directory(parent), name).inode)

    def _counted_in_lower(self, inode: Inode | None) -> list[Inode]:
        if self.view.index is None or inode is None or not inode.is_regular or inode.in_upper or inode.lower_links == 1:
            return []
        return [inode]

    def to_detach_for_rename(self, old_parent: int, old_name: bytes, new_parent: int, new_name: bytes, flags: int) -> list[Directory]:
        """The directories that have to be the upper's alone before (`core.detach`)."""
        return renaming.to_detach(self.view, *self._sides(old_parent, old_name, new_parent, new_name), flags)

    def to_copy_up_for_rename(self, old_parent: int, old_name: bytes, new_parent: int, new_name: bytes, flags: int) -> list[Inode]:
        """The files that a rename has to have in the upper."""
        return self._to_copy_up_for_rename(*self._sides(old_parent, old_name, new_parent, new_name), flags)

    def _to_copy_up_for_rename(self, old: Side, new: Side, flags: int) -> list[Inode]:
        moved = (old.inode, new.inode) if flags & RENAME_EXCHANGE else (old.inode,)
        missing = [inode for inode in moved if inode is not None and inode.is_regular and not inode.in_upper]
        return missing if flags & RENAME_EXCHANGE else missing + self._counted_in_lower(new.inode)

    # -- files

    def data_to_sync(self, ino: int) -> int | None:
        """A descriptor to fsync, the caller's to close; None where that is settled: what is still a lower's alone is durable already."""
        inode = self.view.inode(ino)
        if not inode.in_upper or self.view.policy.fsync is Fsync.VOLATILE:
            return None
        if isinstance(inode, Directory):
            return os.open(b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self.view.upper_fd(inode))
        return self.view.own_fd(inode)

    def copy_file_range(self, ino_in: int, off_in: int, ino_out: int, off_out: int, length: int, flags: int, uid: int) -> int:
        """The bytes copied, reflinked where the file system can. NotAtOnce too where it may take its time."""
        source = self.view.inode(ino_in)
        if length > INLINE_COPY or not self._is_cached(source, off_in, length):
            raise NotAtOnce
        target = self._copied_up(ino_out, attributes_only=False)
        upper = self.view.upper
        upper.is_dirty = True
        fd, fd_out = self.view.data_fd(source), self.view.data_fd(target, write=True)
        copied = upper.calls.copy_file_range(fd, fd_out, length, off_in, off_out)
        if uid:
            attributes.drop_privileges_of(self.view, target)
        return copied

    # -- directories

    def walk(self, ino: int, offset: int) -> Iterator[Entry]:
        """A directory's entries past an offset, "." and ".." first."""
        directory = self.view.directory(ino)
        listing = self.view.listing(directory)
        yield from self._dots(directory, offset)
        for one in listing.after(max(offset, _DOTDOT)):
            yield from self._found(directory, [one])

    def _dots(self, directory: Directory, offset: int) -> Iterator[Entry]:
        if offset < _DOT:
            yield _DOT, b".", directory, self.view.stat(directory)
        if offset < _DOTDOT:
            above = directory.parent or directory
            yield _DOTDOT, b"..", above, self.view.stat(above)

    def _found(self, directory: Directory, places: list[tuple[int, bytes]]) -> Iterator[Entry]:
        """Of names, each with its offset, those that are there."""
        lookups = self.view.lookup_all(directory, [name for _, name in places])
        for (place, name), found in zip(places, lookups, strict=True):
            if isinstance(found, OSError):
                self._refused(directory, name, found)
                yield place, name, *_REFUSED
            elif found is not None:
                yield place, name, *found

    def entries(self, ino: int, offset: int, room: int) -> list[tuple[int, bytes, Shown]]:
        """(offset, name, what it shows) of the entries past an offset, as many as a READDIRPLUS of so many bytes has room for.

        All but "." and ".." give the kernel a reference. What a remote lower has to be asked for is for the next request to say.
        """
        directory = self.view.directory(ino)
        listing = self.view.listing(directory)
        shown: list[tuple[int, bytes, Shown]] = []
        for place, name, inode, st in self._dots(directory, offset):
            room -= entry_size(name)
            if room < 0:
                return shown
            shown.append((place, name, self.shown(inode, st)))
        offset = max(offset, _DOTDOT)
        while some := _fitting(listing.after(offset), room):
            try:
                for offset, name, inode, st in self._found(directory, some):
                    shown.append((offset, name, self._looked_up(inode, st)))
            except (MustAsk, OSError):  # what is told by then is counted, and the next request meets it again
                if not shown:
                    raise
            if shown:
                break
            offset, _ = some[-1]  # not one of these was there, and an empty answer would be the end of the listing
        return shown

    def unanswered(self, ino: int, offset: int) -> list[Question]:
        """What remote lowers have to be asked before the next entries past an offset can be told: of many at once, for else each would wait
        for the answer of the one before it.
        """
        view = self.view
        if not view.remotes:
            return []
        directory = view.directory(ino)
        questions: dict[Hashable, Question] = {}
        for _, name in itertools.islice(view.listing(directory).after(max(offset, _DOTDOT)), _AT_A_TIME):
            try:
                found = view.lookup(directory, name)
            except MustAsk as must:
                if must.question is None:
                    raise
                if questions.setdefault(must.question.key, must.question) is not must.question:
                    must.question.drop()
            except OSError:
                continue  # for `walk` to meet
            else:
                if found is not None:
                    view.release(found[0])  # the kernel has no reference yet
        return list(questions.values())


def _fitting(places: Iterator[tuple[int, bytes]], room: int) -> list[tuple[int, bytes]]:
    """The first of these whose entries have room."""
    some = []
    for place in places:
        room -= entry_size(place[1])
        if room < 0:
            break
        some.append(place)
    return some


def entry_size(name: bytes) -> int:
    """Bytes of an entry in the answer to READDIRPLUS: struct fuse_direntplus, the name, up to a multiple of eight."""
    return 152 + len(name) + 7 & ~7
