"""Rename: one renameat2, after the marks that make its result right.

A directory that lowers are part of keeps them by a redirect, set before it moves: at its old place it says nothing new. A directory of
the upper alone that comes to a merged parent is marked opaque, or it would merge with what lowers have under its new name. What a lower
has under the old name is hidden by a whiteout that the same system call leaves. The order is that of ovl_rename, fs/overlayfs/dir.c.
"""

from __future__ import annotations

import errno
import os
from typing import NamedTuple

from pyoverlay.core import marks
from pyoverlay.core.copyup_directory import copy_attributes, copy_up_directory, mark_impure
from pyoverlay.core.detach import detach
from pyoverlay.core.inode import UPPER, Directory, Inode, Listing, key_of
from pyoverlay.core.layer import Place, tolerated
from pyoverlay.core.names import (
    bring_up,
    count_names,
    exchange_for_whiteout,
    forget_in_index,
    has_lower,
    in_upper,
    keep_data_found,
    kept_alive,
    lower_name_gone,
    path_in_lowers,
    put_whiteout,
    ready_for_whiteouts,
    replace_aufs_whiteout,
    require_nameable,
    require_removable,
    set_redirect,
)
from pyoverlay.core.objects import failure
from pyoverlay.core.policy import RedirectDir
from pyoverlay.core.syscalls import RENAME_EXCHANGE, RENAME_NOREPLACE, RENAME_WHITEOUT
from pyoverlay.core.view import View


class Side(NamedTuple):
    """One side of a rename. inode is None where nothing has the name."""

    parent: Directory
    name: bytes
    inode: Inode | None


def rename(view: View, old_parent: Directory, old_name: bytes, new_parent: Directory, new_name: bytes, flags: int = 0) -> None:
    """rename(2) and renameat2(2) in the merged view, of names that are looked up here."""
    move(view, side(view, old_parent, old_name), side(view, new_parent, new_name), flags)


def move(view: View, old: Side, new: Side, flags: int = 0) -> None:
    """The same of names that have just been looked up.

    Files must have been copied up (`copyup`), directories detached (`to_detach`), or it is done here, data and all. EXDEV: a directory of
    a lower, without redirects; with `user.` marks one that holds too much.
    EINVAL: RENAME_WHITEOUT, as ovl_rename answers. EOVERFLOW: something of it belongs to nobody (`owners`).
    """
    if flags & ~(RENAME_NOREPLACE | RENAME_EXCHANGE):
        raise failure(errno.EINVAL)
    if old.inode is None:
        raise failure(errno.ENOENT)
    is_exchange = bool(flags & RENAME_EXCHANGE)
    for inode in (old.parent, new.parent, old.inode, new.inode):
        if inode is not None:
            view.require_owner(inode)
    for directory in _to_detach(view, old.inode, new, flags):
        detach(view, directory, view.policy.rename_copy_limit)
    if old.inode is new.inode and not isinstance(old.inode, Directory):
        return  # two links of one file: rename(2) does nothing
    view.upper.is_dirty = True
    bring_up(view, old.inode, old.parent, old.name)
    if is_exchange and new.inode is not None:
        bring_up(view, new.inode, new.parent, new.name)
    copy_up_directory(view, new.parent)
    _prepare_move(view, old.inode, old, new.parent)
    if is_exchange and new.inode is not None:
        _prepare_move(view, new.inode, new, old.parent)
        view.upper.calls.rename(view.upper_fd(old.parent), old.name, view.upper_fd(new.parent), new.name, RENAME_EXCHANGE)
        _moved(view, new.inode, new, old)
    else:
        _replace(view, old, new)
        if old.parent.listing is not None:
            old.parent.listing.remove(old.name)
        if new.parent.listing is not None:
            new.parent.listing.add(new.name)
    _moved(view, old.inode, old, new)


def to_detach(view: View, old: Side, new: Side, flags: int) -> list[Directory]:
    """The directories that a rename first has to make the upper's alone (`detach`). Raises what the rename would before that."""
    if not view.policy.userxattr:
        return []
    return _to_detach(view, old.inode, new, flags) if old.inode is not None else []


def _to_detach(view: View, old: Inode, new: Side, flags: int) -> list[Directory]:
    _check(view, old, new, flags)
    moved = (old, new.inode if flags & RENAME_EXCHANGE else None)
    return [inode for inode in moved if isinstance(inode, Directory) and inode.lowers] if view.policy.userxattr else []


def side(view: View, parent: Directory, name: bytes) -> Side:
    """One side, looked up."""
    found = view.lookup(parent, name)
    return Side(parent, name, found[0] if found else None)


def _check(view: View, old: Inode, new: Side, flags: int) -> None:
    if new.parent.is_orphan:
        raise failure(errno.ENOENT)
    require_nameable(view, new.name)
    if new.inode is None:
        if flags & RENAME_EXCHANGE:
            raise failure(errno.ENOENT)
    elif flags & RENAME_NOREPLACE:
        raise failure(errno.EEXIST)
    for moved in (old, new.inode if flags & RENAME_EXCHANGE else None):
        if isinstance(moved, Directory) and moved.lowers and view.policy.redirect_dir is not RedirectDir.ON:
            raise failure(errno.EXDEV)
    if new.inode is None or flags & RENAME_EXCHANGE:
        return
    if isinstance(new.inode, Directory):
        if not isinstance(old, Directory):
            raise failure(errno.EISDIR)
        if len(view.listing(new.inode)):
            raise failure(errno.ENOTEMPTY)
    elif isinstance(old, Directory):
        raise failure(errno.ENOTDIR)


def _prepare_move(view: View, inode: Inode, entry: Side, to: Directory) -> None:
    """The marks, which mean nothing as long as it stays where it is."""
    if isinstance(inode, Directory):
        if inode.lowers:
            _set_redirect(view, inode, entry, is_same_parent=to is entry.parent)
        elif to.lowers and not inode.is_opaque:
            view.upper.set_mark(view.upper_fd(inode), b"", marks.OPAQUE, b"y")
            inode.is_opaque = True
    else:
        keep_data_found(view, inode)
    if inode.has_origin and to is not entry.parent:
        mark_impure(view, to)


def _set_redirect(view: View, directory: Directory, entry: Side, *, is_same_parent: bool) -> None:
    """One name while it stays in its parent, else the path from the root, both in the layers below (ovl_set_redirect)."""
    if directory.redirect is not None and (is_same_parent or directory.redirect.startswith(b"/")):
        return
    redirect = entry.name if is_same_parent else path_in_lowers(directory)
    set_redirect(view, view.upper_fd(directory), b".", redirect)
    directory.redirect = redirect


def _replace(view: View, old: Side, new: Side) -> None:
    """Move over whatever the upper has under the new name, leaving a whiteout under the old one if a lower has that."""
    leaves_whiteout = has_lower(view, old.parent, old.name, old.inode)
    if new.inode is not None:
        count_names(view, new.inode, new.parent, new.name)
    is_upper = new.inode is not None and in_upper(view, new.parent, new.name, new.inode)
    if new.inode is None:
        replace_aufs_whiteout(view, new.parent, new.name)
        _move(view, old, new, leaves_whiteout=leaves_whiteout, is_upper=False)
        return
    if not is_upper:
        require_removable(view, new.parent)
    if is_upper and isinstance(new.inode, Directory):
        _empty(view, new.inode, new)
    with kept_alive(view, new.inode, new.parent, new.name, is_upper=is_upper):
        _move(view, old, new, leaves_whiteout=leaves_whiteout, is_upper=is_upper)
    _replaced(view, new.inode, new, was_lower_name=not is_upper)


def _move(view: View, old: Side, new: Side, *, leaves_whiteout: bool, is_upper: bool) -> None:
    upper = view.upper
    from_fd, to_fd = view.upper_fd(old.parent), view.upper_fd(new.parent)
    # Over a whiteout is a matter for more than one call only where a whiteout comes to the old name or a directory to the new one.
    minds_whiteout = not is_upper and (leaves_whiteout or isinstance(old.inode, Directory))
    over_whiteout = minds_whiteout and upper.stat(to_fd, new.name) is not None
    if leaves_whiteout and not upper.can_make_devices():
        _replace_leaving_file(view, old, new, is_upper=is_upper, over_whiteout=over_whiteout)
    elif over_whiteout:
        upper.calls.rename(from_fd, old.name, to_fd, new.name, RENAME_EXCHANGE)
        if not leaves_whiteout:
            with tolerated("a whiteout that hides nothing stays in the upper"):  # the rename is done
                upper.calls.unlink(old.name, from_fd)
    else:
        upper.calls.rename(from_fd, old.name, to_fd, new.name, RENAME_WHITEOUT if leaves_whiteout else 0)


def _replace_leaving_file(view: View, old: Side, new: Side, *, is_upper: bool, over_whiteout: bool) -> None:
    """As _replace where the file system has no RENAME_WHITEOUT: what is exchanged for the old name is a whiteout before or after.

    Killed in between, the old name shows what was replaced: nothing is lost.
    """
    ready_for_whiteouts(view, old.parent)
    if not is_upper and not over_whiteout:
        put_whiteout(view, new.parent, new.name, over=False)
    view.upper.calls.rename(view.upper_fd(old.parent), old.name, view.upper_fd(new.parent), new.name, RENAME_EXCHANGE)
    if is_upper:
        exchange_for_whiteout(view, old.parent, old.name)


def _empty(view: View, directory: Directory, entry: Side) -> None:
    """A directory that shows nothing may hold whiteouts: put a really empty one of the same attributes in its place (ovl_clear_empty)."""
    upper, dirfd = view.upper, view.upper_fd(entry.parent)
    if not upper.scan(view.upper_fd(directory)):
        return
    temporary = upper.temporary()
    old = upper.fstat(view.upper_fd(directory))
    upper.calls.mkdir(temporary, 0o700, upper.work_fd)
    try:
        upper.set_mark(upper.work_fd, temporary, marks.OPAQUE, b"y")  # before the mode, which may forbid it to an ordinary user
        copy_attributes(upper, Place(upper, dirfd, entry.name), old, temporary)
        new = os.stat(temporary, dir_fd=upper.work_fd, follow_symlinks=False)
        upper.move(upper.work_fd, temporary, dirfd, entry.name, RENAME_EXCHANGE)
        # Should the rename that follows fail, the directory lives on as this one.
        view.cache.close(directory)
        view.table.remove_key(directory, key_of(UPPER, old.st_ino))
        view.table.add_key(directory, key_of(UPPER, new.st_ino))
        directory.lowers, directory.redirect, directory.is_opaque, directory.is_impure = (), None, True, False
    finally:
        upper.discard(temporary)


def _replaced(view: View, inode: Inode, entry: Side, *, was_lower_name: bool) -> None:
    inode.remove_name(entry.parent, entry.name)
    if isinstance(inode, Directory):
        inode.listing = Listing()
        view.links_changed(inode)
    elif was_lower_name:
        lower_name_gone(view, inode)
    forget_in_index(view, inode)
    view.release(inode)


def _moved(view: View, inode: Inode, old: Side, new: Side) -> None:
    """Take note of a new name."""
    inode.remove_name(old.parent, old.name)
    inode.add_name(new.parent, new.name)
    if isinstance(inode, Directory):
        view.table.move_stray(inode, new.parent, new.name)
