"""Copy-up: a lower object becomes an upper one, whole or not at all.

    prepare   the parents, then a file in the work directory that nobody sees
    fill      the data, and it is on disk before the next step; touches two descriptors and nothing else, so it may run in a thread
    publish   owner, xattrs, origin, mode, times; then one rename makes it appear

Leaving `prepare` without publishing removes what was made: so does every error between. With metacopy=on a change of attributes copies
no data; the file gets them in its place, by the same three steps, before they are first changed. A small file that is nothing but a
file takes one call instead, where `Calls` has it (`copyup_at_once`).
"""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy as copy_of

from pyoverlay.core import marks
from pyoverlay.core.calls import Order
from pyoverlay.core.copyup_at_once import copy_up_at_once
from pyoverlay.core.copyup_directory import copy_attributes, copy_up_directory, keeping_times, mark_impure, xattrs_to_copy
from pyoverlay.core.inode import UPPER, Data, Directory, Inode, key_of
from pyoverlay.core.layer import CAPABILITY, Place, tolerated
from pyoverlay.core.objects import failure
from pyoverlay.core.policy import Verity
from pyoverlay.core.syscalls import Stat
from pyoverlay.core.upper import Upper
from pyoverlay.core.view import View

log = logging.getLogger(__name__)

_BUFFER, _CHUNK = 1 << 20, 4 << 20  # bytes, of one read and of one copy_file_range


class Copy:
    """A copy-up under way. source: where the lower object lies; st: its attributes; fd: the copy's descriptor, of a regular file,
    else -1. metacopy: where the data stay, of one that copies attributes alone. completes: it is the upper's metacopy that gets its data.
    """

    __slots__ = (
        "capability", "completes", "fd", "inode", "is_cancelled", "is_published", "metacopy", "size", "source", "source_fd", "st",
        "temporary", "upper",
    )  # fmt: skip

    def __init__(self, upper: Upper, inode: Inode, source: Place, st: Stat, size: int) -> None:
        self.upper = upper
        self.inode = inode
        self.source = source
        self.st = st
        self.size = size  # bytes of data to copy, from the start
        self.temporary = upper.temporary()
        self.fd = -1
        self.source_fd = -1
        self.metacopy: Data | None = None
        self.completes = False
        self.capability: bytes | None = None  # that the file must have again when its data are there
        self.is_published = False
        self.is_cancelled = False  # set from another thread: fill ends with EINTR

    @property
    def is_truncation(self) -> bool:
        """Publishing it makes the file shorter too: cut off afterwards, the file would be so for nothing if that failed."""
        return self.size < self.st.st_size

    def twin(self) -> Copy:
        """For a thread that may be left alone with it: `fill_by`."""
        return copy_of(self)

    def fill_by(self, fd: int, source_fd: int) -> None:
        """`fill` by these descriptors."""
        self.fd, self.source_fd = fd, source_fd
        fill(self)

    def park(self) -> None:
        """Close the descriptors of one that is filled and has to wait: there may be thousands."""
        for fd in (self.fd, self.source_fd):
            if fd >= 0:
                self.upper.cache.close_fd(fd)
        self.fd = self.source_fd = -1


def is_done(view: View, inode: Inode, *, attributes_only: bool) -> bool:
    """Is as much in the upper as a change needs: of one that leaves the data alone, the attributes?"""
    return inode.in_upper and (attributes_only or view.has_upper_data(inode))


def copy_up(view: View, inode: Inode, size: int | None = None, *, attributes_only: bool = False) -> bool:
    """As much of the object in the upper as a change needs. size: only so much of the data, for a truncation; returns whether that is
    thereby done. attributes_only: none of the data, where metacopy=on.
    """
    if is_done(view, inode, attributes_only=attributes_only):
        return False
    if isinstance(inode, Directory):
        copy_up_directory(view, inode)
        return False
    is_truncated = copy_up_at_once(view, inode, size, attributes_only=attributes_only)
    return copy_up_in_steps(view, inode, size, attributes_only=attributes_only) if is_truncated is None else is_truncated


def copy_up_in_steps(view: View, inode: Inode, size: int | None = None, *, attributes_only: bool = False) -> bool:
    """The same by all three steps in a row, of what is no directory and not there yet."""
    with prepare(view, inode, size, attributes_only=attributes_only) as copy:
        fill(copy)
        publish(view, copy)
    return copy.is_truncation


def consult(view: View, inode: Inode) -> None:
    """Have remote lowers asked, before anything is made, what a copy-up of the object will ask: what was copied when a question comes up
    would be copied again.
    """
    if not view.remotes:
        return
    for start in (inode, *(parent for parent, _ in inode.names())):
        above: Inode | None = start
        while above is not None and not above.in_upper:
            _consult_one(view, above)
            above = above.parent
    if inode.is_regular:
        view.data_fd(inode)


def _consult_one(view: View, inode: Inode) -> None:
    layer, dirfd, name = place = view.lower_place(inode)
    if not layer.is_remote:
        return
    st = view.stat(inode)
    for _ in xattrs_to_copy(view.upper, place):
        pass
    if view.upper.doubts_owners:
        layer.knows_owner(dirfd, name, st)
    view.origins.of(place)
    if stat.S_ISLNK(st.st_mode):
        layer.readlink(dirfd, name)


@contextmanager
def prepare(view: View, inode: Inode, size: int | None = None, *, attributes_only: bool = False) -> Iterator[Copy]:
    """Copy up the directories above, and make the copy in the work directory, without data. EOVERFLOW: it belongs to nobody (`owners`)."""
    if inode.in_upper:
        with _prepare_data(view, inode, size) as copy:
            yield copy
        return
    upper = view.upper
    view.require_owner(inode)
    if inode.parent is not None:
        copy_up_directory(view, inode.parent)
    st = view.stat(inode)
    copy = Copy(upper, inode, view.lower_place(inode), st, st.st_size if size is None else min(size, st.st_size))
    upper.is_dirty = True
    try:
        _make(copy, view, attributes_only=attributes_only)
        yield copy
    finally:
        if not copy.is_published:
            if copy.fd >= 0:
                os.close(copy.fd)
            upper.discard(copy.temporary)
        if copy.source_fd >= 0:
            view.cache.close_fd(copy.source_fd)


def _make(copy: Copy, view: View, *, attributes_only: bool) -> None:
    upper, st = copy.upper, copy.st
    if stat.S_ISREG(st.st_mode):
        copy.source_fd = view.cache.dup(view.data_fd(copy.inode))
        if attributes_only:
            copy.metacopy = _metacopy(view, copy)
        copy.fd = upper.calls.open(copy.temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_NOFOLLOW, 0o600, upper.work_fd)
        if copy.metacopy is not None:
            upper.set_mark(upper.work_fd, copy.temporary, marks.METACOPY, copy.metacopy.mark)
            upper.calls.ftruncate(copy.fd, st.st_size)
    elif stat.S_ISLNK(st.st_mode):
        upper.calls.symlink(copy.source.layer.readlink(copy.source.dirfd, copy.source.name), copy.temporary, upper.work_fd)
    else:
        if copy.source.layer.is_nodev and (stat.S_ISCHR(st.st_mode) or stat.S_ISBLK(st.st_mode)):
            raise failure(errno.EPERM)  # in the upper it would open the device that its own mount does not
        upper.calls.mknod(copy.temporary, stat.S_IFMT(st.st_mode) | 0o600, st.st_rdev, upper.work_fd)


def _metacopy(view: View, copy: Copy) -> Data | None:
    """Where the data of a lower file may stay; None: they must be copied (ovl_need_meta_copy_up)."""
    inode, policy = copy.inode, view.policy
    if not policy.metacopy or inode.parent is None or inode.lower_dir is None or not copy.st.st_size:
        return None
    layer = view.remote_data(inode) or copy.source.layer
    digest = layer.verity(view.data_fd(inode)) if policy.verity is not Verity.OFF else None
    if digest is None and policy.verity is Verity.REQUIRE:
        return None
    mark = marks.encode_metacopy(None if digest is None else marks.Digest(*digest))
    return (inode.metacopy or Data(inode.lower_dir, inode.lower_name))._replace(mark=mark)


@contextmanager
def _prepare_data(view: View, inode: Inode, size: int | None) -> Iterator[Copy]:
    """A metacopy of the upper gets its data where it is: it stays a metacopy until they are all there (ovl_copy_up_meta_inode_data)."""
    upper = view.upper
    st = view.stat(inode)
    place = view.place(inode)
    # A shorter file with the mark is one that the kernel's overlay reads past its end, so what a truncation leaves over is copied too. Of a
    # file that is emptied nothing is: a kill between its last two calls shows that kernel no bytes and, to who reads, the old ones.
    copy = Copy(upper, inode, place, st, 0 if size == 0 else st.st_size)
    copy.completes = True
    upper.is_dirty = True
    try:
        copy.source_fd = view.cache.dup(view.data_fd(inode))
        copy.fd = upper.open_write(place.dirfd, place.name) if place.name else upper.open_pinned(place.dirfd, os.O_RDWR)
        copy.capability = upper.getxattr(copy.fd, b"", CAPABILITY)
        yield copy
    finally:
        try:
            if copy.fd >= 0 and not copy.is_published:
                _take_back(copy)
        finally:
            for fd in (copy.source_fd, -1 if copy.is_published else copy.fd):
                if fd >= 0:
                    view.cache.close_fd(fd)


def _take_back(copy: Copy) -> None:
    """The hole that it was, at the time that it had."""
    calls, st = copy.upper.calls, copy.st
    with tolerated("a file whose data could not be copied up keeps some of them, unseen, and the time of that"):
        calls.ftruncate(copy.fd, 0)
        calls.ftruncate(copy.fd, st.st_size)
        calls.utimens(copy.fd, b"", st.st_atime_ns, st.st_mtime_ns)


def _publish_data(view: View, copy: Copy) -> None:
    """What writing took away is put back; then the mark goes, and what was a hole is the file's data."""
    upper, inode, st = copy.upper, copy.inode, copy.st
    if copy.capability is not None:
        upper.calls.setxattr(copy.fd, b"", CAPABILITY, copy.capability, 0)
    if upper.fstat(copy.fd).st_mode != st.st_mode:
        upper.calls.chmod(copy.fd, b"", stat.S_IMODE(st.st_mode))
    upper.calls.utimens(copy.fd, b"", st.st_atime_ns, None if copy.is_truncation else st.st_mtime_ns)
    upper.calls.removexattr(copy.fd, b"", upper.mark_prefix + marks.METACOPY)
    copy.is_published = True
    inode.metacopy = None
    view.set_data_fd(inode, copy.fd, is_writable=True)


def fill(copy: Copy, is_ordered: bool = True) -> None:
    """Copy the data, holes as holes, and have it on disk, unless the caller sees to that. Raises what reading and writing raise; EINTR
    when cancelled.
    """
    if copy.fd < 0:
        return
    if copy.metacopy is not None:
        return
    if copy.size and (copy.is_truncation or not _clone(copy)):
        _copy_extents(copy)
    if copy.size or copy.completes:
        copy.upper.calls.ftruncate(copy.fd, copy.size)
    if is_ordered:
        _order(copy)


def _clone(copy: Copy) -> bool:
    """FICLONE, where the file system can."""
    upper, layer = copy.upper, copy.source.layer
    is_layers_own = copy.inode.metacopy is None  # the data of a metacopy are another layer's
    if is_layers_own and not upper.may_clone_from(layer):
        return False
    try:
        upper.calls.ficlone(copy.fd, copy.source_fd)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.EXDEV, errno.ENOTTY):
            if is_layers_own:
                upper.cannot_clone_from(layer)
            return False
        if error.errno in (errno.EINVAL, errno.EPERM, errno.ETXTBSY):  # of this file alone
            return False
        raise
    return True


def _copy_extents(copy: Copy) -> None:
    offset = 0
    while offset < copy.size:
        try:
            start = os.lseek(copy.source_fd, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # only a hole is left
                return
            raise
        end = min(os.lseek(copy.source_fd, start, os.SEEK_HOLE), copy.size)
        _copy_range(copy, start, end)
        offset = max(end, start + 1)


def _copy_range(copy: Copy, offset: int, end: int) -> None:
    """copy_file_range where it works between these two file systems, else read and write."""
    calls = copy.upper.calls
    while offset < end:
        if copy.is_cancelled:
            raise failure(errno.EINTR)
        try:
            copied = calls.copy_file_range(copy.source_fd, copy.fd, min(end - offset, _CHUNK), offset, offset)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM):
                raise
            copied = calls.pwrite(copy.fd, os.pread(copy.source_fd, min(end - offset, _BUFFER), offset), offset)
        if not copied:
            return  # the lower got shorter under us
        if copied == _CHUNK and copy.upper.order is not Order.NOTHING:
            calls.start_writeback(copy.fd, offset, copied)  # while the next chunk is copied: a third less for 512 MiB
        offset += copied


def _order(copy: Copy) -> None:
    """The data before the name: an empty file after a power cut is what the rename would otherwise leave."""
    calls = copy.upper.calls
    match copy.upper.order:
        case Order.DATA:
            calls.sync_file_range(copy.fd)
        case Order.DATA_AND_SIZE:
            calls.fdatasync(copy.fd)
        case Order.ALL:
            calls.fsync(copy.fd)


def publish(view: View, copy: Copy) -> None:
    """Make the copy appear under the name that the object has now: all of it, or nothing. Without a name it stays an open file.

    Of a lower object with several names, those that were looked up all lead to the copy, on disk as well: the kernel without an index
    leaves the others the old data.
    """
    if copy.completes:
        _publish_data(view, copy)
        return
    inode, upper = copy.inode, copy.upper
    if copy.fd < 0 <= inode.fd:
        copy.fd = upper.open_write(upper.work_fd, copy.temporary)  # it was parked, and somebody reads the lower's
    copy.source = view.lower_place(inode)  # its descriptor may have been closed while fill ran
    origin = view.origins.of(copy.source) if inode.parent is not None else None
    is_indexed = _goes_to_index(view, copy)
    copy_attributes(upper, copy.source, copy.st, copy.temporary, origin, is_indexed=is_indexed, keeps_mtime=not copy.is_truncation)
    real = os.fstat(copy.fd) if copy.fd >= 0 else os.stat(copy.temporary, dir_fd=upper.work_fd, follow_symlinks=False)
    if inode.parent is None:
        _publish_orphan(view, copy, real)
        return
    names = inode.names()
    for parent, _ in names:
        copy_up_directory(view, parent)
        if origin is not None:
            mark_impure(view, parent)
    if is_indexed:
        _publish_indexed(view, copy, real)
        return
    _name(view, copy, names)
    copy.is_published = True
    inode.lower_links -= len(names)
    _adopt(view, copy, real)


def _goes_to_index(view: View, copy: Copy) -> bool:
    """A lower file with several names, with index=on (ovl_need_index)."""
    return view.index is not None and copy.st.st_nlink > 1


def _publish_indexed(view: View, copy: Copy, real: Stat) -> None:
    """Into the index by one rename, whereby it is the copy of all its lower names; those that were looked up then become links of it."""
    upper, inode, index = copy.upper, copy.inode, view.index
    assert index is not None
    name = index.name_of(copy.source)
    if name is None:
        raise failure(errno.EOPNOTSUPP)
    upper.set_mark(upper.work_fd, copy.temporary, marks.NLINK, marks.encode_nlink(inode.lower_links - 1))
    upper.calls.rename(upper.work_fd, copy.temporary, index.fd, name)
    copy.is_published = True
    inode.index_name = name
    names = inode.names()
    for parent, at in names:
        inode.remove_name(parent, at)
    _adopt(view, copy, real)
    for parent, at in names:
        link_to_copy(view, inode, parent, at)


def link_to_copy(view: View, inode: Inode, parent: Directory, name: bytes) -> None:
    """Give a copy in the upper another of the names of its lower object, which shows it already."""
    mark_impure(view, parent)
    _, dirfd, at = view.place(inode)
    with keeping_times(view.upper, view.upper_fd(parent)) as to:
        if inode.index_name and view.index is not None:
            place = view.lower_place(inode)
            lower = place.layer.stat(place.dirfd, place.name)
            view.index.add_name(inode, parent, to, name, inode.lower_links if lower is None else lower.st_nlink)
        else:
            view.upper.calls.link(dirfd, at, to, name)
            inode.add_name(parent, name)


def _name(view: View, copy: Copy, names: list[tuple[Directory, bytes]]) -> None:
    """Link the copy to all its names but the first, and rename it to that. Not all: then none."""
    upper = copy.upper
    first, *others = names
    linked: list[tuple[Directory, bytes]] = []
    try:
        for parent, name in others:
            with keeping_times(upper, view.upper_fd(parent)) as dirfd:
                upper.calls.link(upper.work_fd, copy.temporary, dirfd, name)
            linked.append((parent, name))
        with keeping_times(upper, view.upper_fd(first[0])) as dirfd:
            upper.calls.rename(upper.work_fd, copy.temporary, dirfd, first[1])
    except OSError:
        for parent, name in linked:
            with tolerated("a link of a copy-up that failed stays in the upper"), keeping_times(upper, view.upper_fd(parent)) as dirfd:
                upper.calls.unlink(name, dirfd)
        raise


def _publish_orphan(view: View, copy: Copy, real: Stat) -> None:
    upper = copy.upper
    if copy.inode.lower_links > 0 or not view.can_pin():
        copy.inode.kept_name = copy.temporary  # other names of the lower object lead here
    else:
        view.table.pin(copy.inode, upper.pin(upper.work_fd, copy.temporary))
        upper.calls.unlink(copy.temporary, upper.work_fd)
    copy.is_published = True
    _adopt(view, copy, real)


def _adopt(view: View, copy: Copy, real: Stat) -> None:
    copy.inode.in_upper = True
    copy.inode.has_origin = True
    view.table.add_key(copy.inode, key_of(UPPER, real.st_ino))
    copy.inode.metacopy = copy.metacopy
    if copy.metacopy is not None:
        os.close(copy.fd)  # who reads goes on with the data's own
        view.links_changed(copy.inode)  # and that no longer tells the attributes
    elif copy.fd >= 0:
        view.set_data_fd(copy.inode, copy.fd, is_writable=True)
    log.debug("copied up %d: %d bytes", copy.inode.ino, copy.size)
