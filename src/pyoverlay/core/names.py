"""The steps that making, removing and renaming have in common: what they need to know of a name, the whiteouts and marks that keep true
what shows under it, and what becomes of an object that loses one.

Each change becomes visible by one system call, which is its caller's; what is here comes before it or takes note of it. The steps are those
of fs/overlayfs/dir.c.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from pyoverlay.core import marks, syscalls
from pyoverlay.core.copyup import copy_up, link_to_copy
from pyoverlay.core.copyup_directory import copy_up_directory
from pyoverlay.core.inode import Directory, Inode, Listing
from pyoverlay.core.objects import failure
from pyoverlay.core.policy import RedirectDir
from pyoverlay.core.upper import Upper
from pyoverlay.core.view import View

log = logging.getLogger(__name__)

_LONG_REDIRECT = 1024  # bytes; ext4 says ENOSPC of an attribute that its block cannot hold


def open_for_change(view: View, parent: Directory) -> None:
    """Before an entry comes or goes: the directory is in the upper. EOVERFLOW: it belongs to nobody (`owners`)."""
    view.require_owner(parent)
    if not parent.in_upper:
        copy_up_directory(view, parent)


def require_removable(view: View, parent: Directory) -> None:
    """Before a whiteout takes a lower's name away. EPERM: the directory is one that nothing may be taken out of, which for the upper's file
    system is no reason to refuse the whiteout: that is something new.
    """
    if parent.is_append_only is None:
        parent.is_append_only = view.upper.is_append_only(view.upper_fd(parent))
    if parent.is_append_only:
        raise failure(errno.EPERM)


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
