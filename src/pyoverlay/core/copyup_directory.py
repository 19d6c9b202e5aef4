"""Directories of lowers come to be in the upper, those above them first; and what every copy-up does besides its data: attributes onto the
copy, marks and times of the directory that it appears in.

The order of the attributes is that of fs/overlayfs/copy_up.c: chown clears suid, sgid and capabilities even for root, so owner comes
first; data moves mtime, so times come last.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager

from pyoverlay.core import marks
from pyoverlay.core.inode import UPPER, Directory, key_of
from pyoverlay.core.layer import CAPABILITY, Layer, Place, tolerated
from pyoverlay.core.objects import failure
from pyoverlay.core.overrides import is_private
from pyoverlay.core.syscalls import Stat
from pyoverlay.core.upper import Upper
from pyoverlay.core.view import View


def copy_attributes(
    upper: Upper,
    source: Place,
    st: Stat,
    name: bytes,
    origin: marks.Origin | None = None,
    *,
    is_indexed: bool = False,
    keeps_mtime: bool = True,
) -> None:
    """Owner, xattrs and origin, mode, times, in this order, onto something in the work directory.

    The mode after the xattrs, since it may forbid an ordinary user to set any: of a file with mode 0444, which is what git makes.
    An owner that cannot be kept refuses the copy-up: nobody's file becomes the daemon's, unless it shows as somebody's already (`squash`).
    """
    dirfd = upper.work_fd
    uid, gid = upper.squash
    if upper.doubts_owners and (uid, gid) == (None, None) and not source.layer.knows_owner(source.dirfd, source.name, st):
        raise failure(errno.EOVERFLOW)
    upper.calls.chown(dirfd, name, st.st_uid if uid is None else uid, st.st_gid if gid is None else gid)
    copy_xattrs(upper, source, dirfd, name)
    if origin is not None:
        upper.set_origin(dirfd, name, origin, is_indexed=is_indexed)
    if not stat.S_ISLNK(st.st_mode):
        upper.calls.chmod(dirfd, name, _mode(source.layer, st))
    upper.calls.utimens(dirfd, name, st.st_atime_ns, st.st_mtime_ns if keeps_mtime else None)


def _mode(layer: Layer, st: Stat) -> int:
    """The permission bits of a copy: a program that its mount keeps from changing its user does not win that right by being copied."""
    mode = stat.S_IMODE(st.st_mode)
    return mode & ~(stat.S_ISUID | stat.S_ISGID) if layer.is_nosuid and stat.S_ISREG(st.st_mode) else mode


def copy_xattrs(upper: Upper, source: Place, dirfd: int, name: bytes) -> None:
    """One that the upper cannot hold is left out only if nobody's rights depend on it (ovl_copy_xattr)."""
    for attribute, value in xattrs_to_copy(upper, source):
        try:
            upper.calls.setxattr(dirfd, name, attribute, value, 0)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EPERM) or attribute.startswith((b"system.", CAPABILITY)):
                raise


def xattrs_to_copy(upper: Upper, source: Place) -> Iterator[tuple[bytes, bytes]]:
    """All but the overlay's own marks."""
    for attribute in source.layer.listxattr(source.dirfd, source.name):
        if attribute.startswith(upper.mark_prefix) and marks.unescape_xattr(attribute, upper.mark_prefix) is None:
            continue
        if (source.layer.is_nosuid and attribute == CAPABILITY) or (upper.override is not None and is_private(attribute)):
            continue
        value = source.layer.getxattr(source.dirfd, source.name, attribute)
        if value is not None:
            yield attribute, value


def mark_impure(view: View, directory: Directory) -> None:
    """Say on a directory of the upper that inode numbers in it are to be looked up by origin.

    One that may only be added to (chattr +a) takes no mark, and all the same what is copied up: the numbers then change at the next mount.
    """
    if directory.is_impure:
        return
    dirfd = view.upper_fd(directory)
    try:
        with view.upper.as_writable(dirfd):
            view.upper.set_mark(dirfd, b".", marks.IMPURE, b"y")
    except PermissionError:
        if not view.upper.is_append_only(dirfd):
            raise
    directory.is_impure = True


def copy_up_directory(view: View, directory: Directory) -> None:
    """A directory, those above it first: upper directories of the same attributes, merged with the lower ones. EROFS without an upper."""
    missing: list[Directory] = []
    above: Directory | None = directory
    while above is not None and not above.in_upper:
        missing.append(above)
        above = above.parent
    for lower in reversed(missing):
        _copy_up_one(view, lower)


@contextmanager
def _movable(upper: Upper, name: bytes) -> Iterator[None]:
    """A directory of the work directory that goes elsewhere: its entry ".." changes, which its mode may forbid (rename(2), EACCES)."""
    if not upper.obeys_modes:
        yield
        return
    fd = upper.pin(upper.work_fd, name)
    try:
        with upper.as_writable(fd):
            yield
    finally:
        os.close(fd)


def _copy_up_one(view: View, directory: Directory) -> None:
    upper, parent = view.upper, directory.parent
    if parent is None:
        raise failure(errno.ENOENT)  # removed meanwhile
    source = view.lower_place(directory)
    st = source.layer.fstat(source.dirfd)
    temporary, is_published = upper.temporary(), False
    upper.is_dirty = True
    try:
        upper.calls.mkdir(temporary, 0o700, upper.work_fd)
        origin = view.origins.of(source)
        copy_attributes(upper, source, st, temporary, origin)
        if origin is not None:
            mark_impure(view, parent)
        real = os.stat(temporary, dir_fd=upper.work_fd, follow_symlinks=False)
        with keeping_times(upper, view.upper_fd(parent)) as dirfd, _movable(upper, temporary):
            upper.calls.rename(upper.work_fd, temporary, dirfd, directory.name)
        is_published = True
    finally:
        if not is_published:
            upper.discard(temporary)
    directory.in_upper = True
    directory.has_origin = True
    directory.is_impure = directory.is_append_only = False
    view.table.add_key(directory, key_of(UPPER, real.st_ino))


@contextmanager
def keeping_times(upper: Upper, dirfd: int) -> Iterator[int]:
    """A directory does not change because something in it was copied up: its times are put back, if they can be: what was copied up
    is there by then. And its mode does not matter, which may forbid an ordinary user to put anything there.
    """
    before = os.stat(dirfd)
    with upper.as_writable(dirfd):
        yield dirfd
        with tolerated("a directory keeps the time of a copy-up in it"):
            upper.calls.utimens(dirfd, b".", before.st_atime_ns, before.st_mtime_ns)
