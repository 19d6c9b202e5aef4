"""What makes and removes names in the merged view. Each change becomes visible by one system call.

Something made where the upper holds a whiteout is built in the work directory and put in its place; what removes something that a lower
has puts a whiteout there. The steps are those of fs/overlayfs/dir.c.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from pyoverlay.core import marks, syscalls
from pyoverlay.core.calls import Caller, remove_tree
from pyoverlay.core.copyup_directory import mark_impure
from pyoverlay.core.inode import Directory, Inode
from pyoverlay.core.layer import closed_on_failure, tolerated
from pyoverlay.core.names import (
    count_names,
    discarded_on_failure,
    dropped,
    exchange_for_whiteout,
    has_lower,
    in_upper,
    keep_data_found,
    kept_alive,
    open_for_change,
    put_whiteout,
    replace_aufs_whiteout,
    require_nameable,
    require_removable,
)
from pyoverlay.core.objects import failure
from pyoverlay.core.policy import RedirectDir
from pyoverlay.core.syscalls import Stat
from pyoverlay.core.upper import Upper
from pyoverlay.core.view import View

_ACL_DEFAULT = b"system.posix_acl_default"

Build = Callable[[int, bytes], tuple[int, Stat | None]]  # (dirfd, name): make the object there, as `Calls.make`


def create(view: View, parent: Directory, name: bytes, mode: int, caller: Caller) -> tuple[Inode, Stat]:
    """A regular file, empty and open for reading and writing. EEXIST, ENOENT (the directory was removed), and what open(2) raises."""
    return _make(view, parent, name, stat.S_IFREG | mode & 0o7777, caller)


def tmpfile(view: View, parent: Directory, mode: int, caller: Caller) -> tuple[Inode, Stat]:
    """A regular file without a name, open for reading and writing, as O_TMPFILE makes it: `link` can give it one. EOPNOTSUPP where
    the upper has none.
    """
    if parent.is_orphan:
        raise failure(errno.ENOENT)
    open_for_change(view, parent)
    upper = view.upper
    upper.is_dirty = True
    with upper.calls.as_caller(caller):
        fd = upper.calls.open(b".", os.O_TMPFILE | os.O_RDWR, mode & 0o7777, view.upper_fd(parent))
    with closed_on_failure(fd):
        st = upper.fstat(fd)
        pin = os.dup(fd)
    inode = view.adopt_nameless(st, pin)
    view.set_data_fd(inode, fd, is_writable=True)
    return inode, st


def mkdir(view: View, parent: Directory, name: bytes, mode: int, caller: Caller) -> tuple[Inode, Stat]:
    """A directory; it hides what lowers have under its name."""
    return _make(view, parent, name, stat.S_IFDIR | mode & 0o7777, caller)


def symlink(view: View, parent: Directory, name: bytes, target: bytes, caller: Caller) -> tuple[Inode, Stat]:
    """A symlink with that target, taken as it is."""
    return _make(view, parent, name, stat.S_IFLNK, caller, target=target)


def mknod(view: View, parent: Directory, name: bytes, mode: int, rdev: int, caller: Caller) -> tuple[Inode, Stat]:
    """A fifo, socket, device or empty file. EPERM for the device 0/0: that is what a whiteout is (ovl_mknod)."""
    if rdev == 0 and stat.S_ISCHR(mode):
        raise failure(errno.EPERM)
    return _make(view, parent, name, mode if stat.S_IFMT(mode) else stat.S_IFREG | mode, caller, rdev)


def link(view: View, inode: Inode, parent: Directory, name: bytes) -> Stat:
    """Another name for an object of the upper. EPERM for a directory."""
    if isinstance(inode, Directory):
        raise failure(errno.EPERM)
    view.require_owner(inode)
    _require_absent(view, parent, name)
    open_for_change(view, parent)
    upper = view.upper
    upper.is_dirty = True
    keep_data_found(view, inode)
    if inode.index_name and view.index is not None:
        view.index.settle(inode)
    if inode.has_origin:
        mark_impure(view, parent)
    _, from_dirfd, from_name = view.place(inode)
    replace_aufs_whiteout(view, parent, name)
    dirfd = view.upper_fd(parent)
    try:
        upper.calls.link(from_dirfd, from_name, dirfd, name)
    except FileExistsError:
        _require_whiteout(view, parent, name)
        temporary = upper.temporary()
        upper.calls.link(from_dirfd, from_name, upper.work_fd, temporary)
        with discarded_on_failure(upper, temporary):
            upper.calls.rename(upper.work_fd, temporary, dirfd, name)
    try:
        st = view.stat(inode)
    except OSError:
        _take_back(view, parent, name)
        raise
    inode.add_name(parent, name)
    if parent.listing is not None:
        parent.listing.add(name)
    return st


def unlink(view: View, parent: Directory, name: bytes) -> Inode:
    """Remove a name that is no directory's. The object lives on as long as the kernel knows it. ENOENT, EISDIR."""
    inode = _require(view, parent, name)
    if isinstance(inode, Directory):
        raise failure(errno.EISDIR)
    hides = has_lower(view, parent, name, inode)
    open_for_change(view, parent)
    count_names(view, inode, parent, name)
    is_upper = in_upper(view, parent, name, inode)
    if not is_upper:
        require_removable(view, parent)
    upper, dirfd = view.upper, view.upper_fd(parent)
    upper.is_dirty = True
    with kept_alive(view, inode, parent, name, is_upper=is_upper):
        if hides:
            put_whiteout(view, parent, name, over=is_upper)
        else:
            upper.calls.unlink(name, dirfd)
    dropped(view, inode, parent, name, was_lower_name=not is_upper)
    return inode


def rmdir(view: View, parent: Directory, name: bytes) -> Directory:
    """Remove a directory in which the merged view shows nothing. ENOENT, ENOTDIR, ENOTEMPTY."""
    directory = _require(view, parent, name)
    if not isinstance(directory, Directory):
        raise failure(errno.ENOTDIR)
    if len(view.listing(directory)):
        raise failure(errno.ENOTEMPTY)
    hides = has_lower(view, parent, name)
    open_for_change(view, parent)
    upper, dirfd = view.upper, view.upper_fd(parent)
    upper.is_dirty = True
    if not directory.in_upper:
        require_removable(view, parent)
    with kept_alive(view, directory, parent, name, is_upper=directory.in_upper):
        if not directory.in_upper:
            put_whiteout(view, parent, name, over=False)
        elif hides:
            exchange_for_whiteout(view, parent, name)
        else:
            _remove_upper_directory(upper, dirfd, name)
    dropped(view, directory, parent, name, was_lower_name=False)
    return directory


def _remove_upper_directory(upper: Upper, dirfd: int, name: bytes) -> None:
    """It may hold whiteouts: then it goes to the work directory in one step, and is emptied there."""
    try:
        upper.calls.rmdir(name, dirfd)
    except OSError as error:
        if error.errno != errno.ENOTEMPTY:
            raise
        temporary = upper.temporary()
        upper.move(dirfd, name, upper.work_fd, temporary)
        upper.discard(temporary)


def _require(view: View, parent: Directory, name: bytes) -> Inode:
    found = view.lookup(parent, name)
    if found is None:
        raise failure(errno.ENOENT)
    view.require_owner(found[0])
    return found[0]


def _require_absent(view: View, parent: Directory, name: bytes) -> None:
    if parent.is_orphan:
        raise failure(errno.ENOENT)
    require_nameable(view, name)
    if (parent.listing is not None and name in parent.listing) or (parent.listing is None and _has_visible_lower(view, parent, name)):
        raise failure(errno.EEXIST)


def _has_visible_lower(view: View, parent: Directory, name: bytes) -> bool:
    """Does the merged view show a lower's object under this name?"""
    if not parent.lowers:
        return False
    if parent.in_upper:
        dirfd = view.upper_fd(parent)
        if view.upper.stat(dirfd, name) is not None or view.upper.has_aufs_whiteout(dirfd, name):
            return False
    return view.find_lower(parent, name) is not None


def _look_at_new(view: View, parent: Directory, name: bytes, fd: int) -> Stat:
    """The attributes of what was just made, and is open there unless -1."""
    try:
        st = view.upper.fstat(fd) if fd >= 0 else view.upper.stat(view.upper_fd(parent), name)
        if st is None:
            raise failure(errno.ESTALE)
    except OSError:
        if fd >= 0:
            os.close(fd)
        _take_back(view, parent, name)
        raise
    return st


def _take_back(view: View, parent: Directory, name: bytes) -> None:
    """What was made under a name goes again if it cannot be looked at: its caller is told that there is nothing."""
    with tolerated("a name that could not be looked at stays in the upper"):
        if has_lower(view, parent, name):
            exchange_for_whiteout(view, parent, name)
        else:
            remove_tree(view.upper.calls, view.upper_fd(parent), name)


def _require_whiteout(view: View, parent: Directory, name: bytes) -> None:
    """EEXIST if what the upper has under this name is anything else."""
    dirfd = view.upper_fd(parent)
    st = view.upper.stat(dirfd, name)
    if st is None or not view.upper.is_whiteout(dirfd, name, st, has_xattr_whiteouts=parent.has_xattr_whiteouts):
        raise failure(errno.EEXIST)


def _make(
    view: View, parent: Directory, name: bytes, mode: int, caller: Caller, rdev: int = 0, target: bytes = b""
) -> tuple[Inode, Stat]:
    """Make something under a new name: in its place, by one call, or, where a whiteout is, in the work directory and then over that.
    A regular file is then open. EEXIST.
    """
    upper = view.upper
    _require_absent(view, parent, name)
    open_for_change(view, parent)
    if upper.reads_aufs:
        replace_aufs_whiteout(view, parent, name)
    dirfd, st, is_opaque = view.upper_fd(parent), None, False
    upper.is_dirty = True
    try:
        if upper.override is None:
            fd, st = upper.calls.make(dirfd, name, mode, caller, rdev, target)
        elif upper.stat(dirfd, name) is None:  # takes two calls, so nobody may see it after the first
            fd = _make_aside(view, parent, name, partial(upper.calls.make, mode=mode, caller=caller, rdev=rdev, target=target))
        else:
            raise failure(errno.EEXIST)
    except FileExistsError:
        _require_whiteout(view, parent, name)
        is_opaque = stat.S_ISDIR(mode)
        build = partial(upper.calls.make, mode=mode, caller=caller, rdev=rdev, target=target)
        fd = _make_aside(view, parent, name, build, is_opaque=is_opaque)
    else:
        if parent.lowers and stat.S_ISDIR(mode) and view.policy.redirect_dir is RedirectDir.ON:
            is_opaque, st = _mark_new_directory(upper, dirfd, name), None
    if st is None:
        st = _look_at_new(view, parent, name, fd)
    inode = view.adopt(parent, name, st)
    if fd >= 0:
        view.set_data_fd(inode, fd, is_writable=True)
    if isinstance(inode, Directory):
        inode.is_opaque = is_opaque
    return inode, st


def _mark_new_directory(upper: Upper, dirfd: int, name: bytes) -> bool:
    """Where redirects are written the kernel marks a new directory in a merged one (ovl_create_upper): a later look-up need not go below.
    That saves time and nothing else, and the directory is there already, so it may fail: returns whether it did not.
    """
    try:
        upper.set_mark(dirfd, name, marks.OPAQUE, b"y")
    except OSError:
        return False
    return True


def _make_aside(view: View, parent: Directory, name: bytes, build: Build, *, is_opaque: bool = False) -> int:
    """Make something in the work directory and rename it to its place; a directory that hides what a whiteout hid, over that. Returns the
    descriptor that `Calls.make` gave.
    """
    upper = view.upper
    with _nursery(view, parent) as (nursery, temporary):
        fd, _ = build(nursery, temporary)
        dirfd = view.upper_fd(parent)
        try:
            if is_opaque:
                upper.set_mark(nursery, temporary, marks.OPAQUE, b"y")
                upper.move(nursery, temporary, dirfd, name, syscalls.RENAME_EXCHANGE)
            else:
                upper.calls.rename(nursery, temporary, dirfd, name)
        except OSError:
            if fd >= 0:
                os.close(fd)
            raise
        if is_opaque:
            try:
                upper.calls.unlink(temporary, nursery)  # the whiteout
            except OSError:
                upper.discard(temporary)  # the directory is in its place: nothing failed for the caller
    return fd


@contextmanager
def _nursery(view: View, parent: Directory) -> Iterator[tuple[int, bytes]]:
    """Where to build what shall appear in `parent`: (dirfd, free name).

    A new object takes its group from a setgid directory and its ACL from a default ACL. Where the parent has one of these, a directory
    like it in those two respects is made in the work directory, so that the file system itself does the inheriting.
    """
    upper = view.upper
    dirfd = view.upper_fd(parent)
    st = upper.fstat(dirfd)
    acl = upper.getxattr(dirfd, b".", _ACL_DEFAULT)
    temporary = upper.temporary()
    if acl is None and not st.st_mode & stat.S_ISGID:
        with discarded_on_failure(upper, temporary):
            yield upper.work_fd, temporary
        return
    upper.calls.mkdir(temporary, 0o777, upper.work_fd)
    try:
        upper.calls.chown(upper.work_fd, temporary, -1, st.st_gid)
        upper.calls.chmod(upper.work_fd, temporary, 0o777 | st.st_mode & stat.S_ISGID)
        if acl is not None:
            upper.calls.setxattr(upper.work_fd, temporary, _ACL_DEFAULT, acl, 0)
        nursery = upper.pin(upper.work_fd, temporary)
        try:
            yield nursery, b"new"
        finally:
            os.close(nursery)
    finally:
        upper.discard(temporary)
