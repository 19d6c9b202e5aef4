"""What makes and removes names in the merged view. Each change becomes visible by one system call.

Something made where the upper holds a whiteout is built in the work directory and put in its place; what removes something that a lower
has puts a whiteout there. The steps are those of fs/overlayfs/dir.c.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import TracebackType

from pyoverlay.core import marks, syscalls
from pyoverlay.core.calls import Caller, remove_tree
from pyoverlay.core.copyup import copy_up, link_to_copy
from pyoverlay.core.copyup_directory import copy_up_directory, mark_impure
from pyoverlay.core.inode import Directory, Inode, Listing
from pyoverlay.core.layer import closed_on_failure, tolerated
from pyoverlay.core.objects import failure
from pyoverlay.core.policy import RedirectDir
from pyoverlay.core.syscalls import Stat
from pyoverlay.core.upper import Upper
from pyoverlay.core.view import View

log = logging.getLogger(__name__)

_ACL_DEFAULT = b"system.posix_acl_default"
_LONG_REDIRECT = 1024  # bytes; ext4 says ENOSPC of an attribute that its block cannot hold

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


# -- steps shared with rename


def open_for_change(view: View, parent: Directory) -> None:
    """Before an entry comes or goes: the directory is in the upper. EOVERFLOW: it belongs to nobody (`owners`)."""
    view.require_owner(parent)
    if not parent.in_upper:
        copy_up_directory(view, parent)


def in_upper(view: View, parent: Directory, name: bytes, inode: Inode) -> bool:
    """Does the upper have something under this name, which shows `inode`?

    The disk is asked only of a hard link of a lower, of which some names are copied up and some are not.
    """
    if not parent.in_upper or not inode.in_upper:
        return False
    if isinstance(inode, Directory) or not (inode.lower_links > 0 or inode.index_name):
        return True
    dirfd = view.upper_fd(parent)
    st = view.upper.stat(dirfd, name)
    return st is not None and not view.upper.is_whiteout(dirfd, name, st, has_xattr_whiteouts=parent.has_xattr_whiteouts)


def has_lower(view: View, parent: Directory, name: bytes, inode: Inode | None = None) -> bool:
    """Would a lower show through if the upper had nothing under this name? inode: what has the name; where it is the top lower's, the disk
    need not be asked.
    """
    if not parent.lowers:
        return False
    if inode is not None and inode.lower_dir is parent.lowers[0] and inode.lower_name == name:
        return True
    return view.find_lower(parent, name) is not None


def ready_for_whiteouts(view: View, directory: Directory) -> None:
    """Where a whiteout is a marked file, the directory says that it may hold such: nobody then asks each empty file of the others."""
    if directory.has_xattr_whiteouts or view.upper.can_make_devices():
        return
    view.upper.set_mark(view.upper_fd(directory), b".", marks.OPAQUE, b"x")
    directory.has_xattr_whiteouts = True


def require_nameable(view: View, name: bytes) -> None:
    """EINVAL for a name that would read as a whiteout."""
    if view.upper.reads_aufs and name.startswith(marks.AUFS_PREFIX):
        raise failure(errno.EINVAL)


def replace_aufs_whiteout(view: View, parent: Directory, name: bytes) -> None:
    """Before something gets a name that `.wh.NAME` hides: a whiteout of our own in its stead, which is then in the way of what is made."""
    upper, dirfd = view.upper, view.upper_fd(parent)
    if upper.has_aufs_whiteout(dirfd, name):
        if upper.stat(dirfd, name) is None:
            put_whiteout(view, parent, name, over=False)
        upper.calls.unlink(marks.AUFS_PREFIX + name, dirfd)


def put_whiteout(view: View, parent: Directory, name: bytes, *, over: bool) -> None:
    """A whiteout under a name: over a file of the upper, or where the upper has nothing."""
    ready_for_whiteouts(view, parent)
    upper, dirfd = view.upper, view.upper_fd(parent)
    if not over:
        upper.link_whiteout(dirfd, name)
        return
    temporary = upper.whiteout()
    with discarded_on_failure(upper, temporary):
        upper.calls.rename(upper.work_fd, temporary, dirfd, name)


def exchange_for_whiteout(view: View, parent: Directory, name: bytes) -> None:
    """A whiteout in the place of whatever the upper has under a name, a directory with whiteouts too: one step, and what was there is
    cleared in the work directory.
    """
    ready_for_whiteouts(view, parent)
    upper = view.upper
    temporary = upper.whiteout()
    with discarded_on_failure(upper, temporary):
        upper.move(view.upper_fd(parent), name, upper.work_fd, temporary, syscalls.RENAME_EXCHANGE)
    upper.discard(temporary)


def count_names(view: View, inode: Inode, parent: Directory, name: bytes) -> None:
    """Before a name of a file goes that an index counts the names of: the upper has that name, and the count is of the upper's links, so
    that the one system call takes from both (ovl_nlink_start). The first such name of a lower file has it copied up.
    """
    if view.index is None or isinstance(inode, Directory) or not (inode.index_name or inode.lower_links > 1):
        return
    bring_up(view, inode, parent, name)
    if inode.index_name:
        view.index.settle(inode)


def bring_up(view: View, inode: Inode, parent: Directory, name: bytes) -> None:
    """The object in the upper, under this very name: a hard link copied up under another one gets this one too."""
    if not inode.in_upper and inode.parent is None:
        raise failure(errno.ESTALE)
    if not inode.in_upper:
        copy_up(view, inode, attributes_only=True)
    copy_up_directory(view, parent)
    if isinstance(inode, Directory) or in_upper(view, parent, name, inode):
        return
    link_to_copy(view, inode, parent, name)
    if not inode.index_name:
        lower_name_gone(view, inode)


def keep_data_found(view: View, inode: Inode) -> None:
    """Before a metacopy of the upper gets another name: say on it where its data are found, or give it the data (ovl_set_redirect)."""
    if inode.metacopy is None:
        return
    if inode.parent is None or view.policy.redirect_dir is not RedirectDir.ON:
        copy_up(view, inode)  # without a name in the upper it has no path that a redirect could say
        return
    dirfd = view.upper_fd(inode.parent)
    redirect = view.upper.getmark(dirfd, inode.name, marks.REDIRECT)
    if redirect is not None and redirect.startswith(b"/"):
        return
    path = path_in_lowers(inode.parent).removesuffix(b"/") + b"/" + (inode.name if redirect is None else redirect)
    set_redirect(view, dirfd, inode.name, path)


def set_redirect(view: View, dirfd: int, name: bytes, redirect: bytes) -> None:
    """EXDEV: longer than an attribute may be; mv and the like then copy by themselves (ovl_set_redirect)."""
    try:
        view.upper.set_mark(dirfd, name, marks.REDIRECT, redirect)
    except OSError as error:
        if error.errno in (errno.E2BIG, errno.ERANGE) or (error.errno == errno.ENOSPC and len(redirect) > _LONG_REDIRECT):
            raise failure(errno.EXDEV) from None
        raise


def path_in_lowers(directory: Directory) -> bytes:
    """Where the lowers have a directory, from the root: its merged path, each name replaced by the redirect it has (ovl_get_redirect)."""
    components: list[bytes] = []
    here: Directory | None = directory
    while here is not None and here.parent is not None:
        redirect = here.redirect
        if redirect is not None and redirect.startswith(b"/"):
            return b"/".join([redirect, *reversed(components)])
        components.append(redirect if redirect is not None else here.name)
        here = here.parent
    return b"/" + b"/".join(reversed(components))


class kept_alive:  # noqa: N801  (read as the verb of a `with`, which as a generator takes three times as long)
    """Around the call that takes away a name, of the upper if is_upper. Before an upper object loses the last one that we know, it is
    held, so that its number is not given to another while the kernel knows it; if the call fails it is let go again.

    Of a lower object with several names, those that the upper does not have yet lead to the copy as well. It must not come to have no
    link at all, since then nothing could give them one (linkat(2)): so it gets a name in the work directory, for as long as we are mounted.
    """

    __slots__ = ("_inode", "_is_held", "_view")

    def __init__(self, view: View, inode: Inode, parent: Directory, name: bytes, *, is_upper: bool) -> None:
        self._view, self._inode = view, inode
        self._is_held = is_upper and _hold(view, inode, parent, name)

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._is_held and isinstance(error, OSError):
            _let_go(self._view, self._inode)


def _hold(view: View, inode: Inode, parent: Directory, name: bytes) -> bool:
    """See kept_alive. Returns whether anything was done."""
    if inode.has_other_name(parent, name) or inode.kept_name or (inode.lower_links > 0 and inode.index_name):
        return False
    if inode.lower_links > 0:
        _keep_name(view, inode, parent, name)
    elif not inode.nlookup or inode.pin >= 0:
        return False
    elif isinstance(inode, Directory) or view.can_pin():  # a directory can have no other name
        is_open = inode.fd >= 0 and inode.metacopy is None
        view.table.pin(inode, inode.fd if is_open else view.upper.pin(view.upper_fd(parent), name))
    else:
        _keep_name(view, inode, parent, name)
    return True


def _keep_name(view: View, inode: Inode, parent: Directory, name: bytes) -> None:
    kept = view.upper.temporary()
    view.upper.calls.link(view.upper_fd(parent), name, view.upper.work_fd, kept)
    _set_kept_name(view, inode, kept)


def _set_kept_name(view: View, inode: Inode, kept: bytes) -> None:
    inode.kept_name = kept
    view.links_changed(inode)


def _let_go(view: View, inode: Inode) -> None:
    if inode.kept_name:
        view.upper.discard(inode.kept_name)
        _set_kept_name(view, inode, b"")
    else:
        view.table.unpin(inode)


def dropped(view: View, inode: Inode, parent: Directory, name: bytes, *, was_lower_name: bool) -> None:
    """Take note that a name is gone."""
    inode.remove_name(parent, name)
    if was_lower_name:
        lower_name_gone(view, inode)
    if isinstance(inode, Directory):
        inode.listing = Listing()
        view.links_changed(inode)
    if parent.listing is not None:
        parent.listing.remove(name)
    forget_in_index(view, inode)
    view.release(inode)


def forget_in_index(view: View, inode: Inode) -> None:
    """A file that no name shows any more leaves the index."""
    if inode.index_name and inode.parent is None and not inode.lower_links and view.index is not None:
        view.index.drop(inode)


def lower_name_gone(view: View, inode: Inode) -> None:
    """A name of the lower object shows no more, or is the upper's now. After the last of them no link need be kept."""
    inode.lower_links -= 1
    view.links_changed(inode)
    if inode.lower_links > 0 or not inode.kept_name or (inode.parent is None and not _pinned_instead(view, inode)):
        return
    view.upper.discard(inode.kept_name)
    inode.kept_name = b""


def _pinned_instead(view: View, inode: Inode) -> bool:
    """A descriptor in the place of the kept name, if there may be one. The name is gone for its caller: nothing here may fail."""
    if not view.can_pin():
        return False
    try:
        view.table.pin(inode, view.upper.pin(view.upper.work_fd, inode.kept_name))
    except OSError as error:
        log.info("an object without a name keeps one in the work directory: %s", error.strerror)
        return False
    return True


@contextmanager
def discarded_on_failure(upper: Upper, temporary: bytes) -> Iterator[None]:
    """What was built in the work directory goes, if it does not get to its place."""
    try:
        yield
    except OSError:
        upper.discard(temporary)
        raise


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
    if (parent.listing is not None and name in parent.listing) or (parent.listing is None and has_visible_lower(view, parent, name)):
        raise failure(errno.EEXIST)


def has_visible_lower(view: View, parent: Directory, name: bytes) -> bool:
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
