"""Changing what an object says of itself: mode, owner, size, times, extended attributes. The object is in the upper: who calls has
copied it up.
"""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass

from pyoverlay.core import marks
from pyoverlay.core.inode import Directory, Inode
from pyoverlay.core.layer import CAPABILITY
from pyoverlay.core.objects import failure
from pyoverlay.core.overrides import is_private
from pyoverlay.core.owners import ACLS
from pyoverlay.core.syscalls import Stat
from pyoverlay.core.upper import Upper
from pyoverlay.core.view import View


@dataclass(slots=True)
class Wanted:
    """What setattr shall change; None leaves it. Times in ns since the epoch, or `syscalls.NOW`; size in bytes."""

    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    size: int | None = None
    atime_ns: int | None = None
    mtime_ns: int | None = None


def setattr(view: View, inode: Inode, wanted: Wanted) -> Stat:
    """chmod, chown, truncate and utimensat at once, in the order in which none undoes another: chown clears suid, truncation sets mtime.

    EOVERFLOW, EACCES: the object belongs to nobody (`owners`), and this does not give it to somebody.
    """
    _require_owner(view, inode, wanted)
    upper = view.upper
    upper.is_dirty = True
    if wanted.size is not None:
        upper.calls.ftruncate(view.data_fd(inode, write=True), wanted.size)
    _, dirfd, name = view.place(inode)
    if wanted.uid is not None or wanted.gid is not None:
        upper.calls.chown(dirfd, name, -1 if wanted.uid is None else wanted.uid, -1 if wanted.gid is None else wanted.gid)
    if wanted.mode is not None:
        upper.calls.chmod(dirfd, name, stat.S_IMODE(wanted.mode))
    if wanted.atime_ns is not None or wanted.mtime_ns is not None:
        upper.calls.utimens(dirfd, name, wanted.atime_ns, wanted.mtime_ns)
    return view.stat(inode)


def _require_owner(view: View, inode: Inode, wanted: Wanted) -> None:
    if wanted.uid is None or wanted.gid is None:
        view.require_owner(inode, errno.EOVERFLOW if (wanted.mode, wanted.uid, wanted.gid) != (None, None, None) else errno.EACCES)


def setxattr(view: View, inode: Inode, name: bytes, value: bytes, flags: int = 0) -> None:
    """setxattr(2). What the caller calls like one of our marks is kept one level deeper, where it means nothing."""
    upper = view.upper
    _refuse_unreadable(inode, name)
    _refuse_private(upper, name)
    view.require_owner(inode, errno.EPERM)
    if name in ACLS:
        value = view.owners.stored_acl(value)
    _, dirfd, at = view.place(inode)
    upper.is_dirty = True
    _acl_may_change(inode)
    upper.calls.setxattr(dirfd, at, marks.escape_xattr(name, upper.mark_prefix), value, flags)


def removexattr(view: View, inode: Inode, name: bytes) -> None:
    """removexattr(2)."""
    upper = view.upper
    _refuse_private(upper, name)
    view.require_owner(inode, errno.EPERM)
    _, dirfd, at = view.place(inode)
    upper.is_dirty = True
    _acl_may_change(inode)
    upper.calls.removexattr(dirfd, at, marks.escape_xattr(name, upper.mark_prefix))


def _acl_may_change(inode: Inode) -> None:
    if isinstance(inode, Directory):
        inode.has_default_acl = None


def _refuse_unreadable(inode: Inode, name: bytes) -> None:
    """user.* is for files and directories (xattr(7)); the daemon's privilege must not widen that."""
    if name.startswith(b"user.") and not inode.is_regular and not isinstance(inode, Directory):
        raise failure(errno.EPERM)


def _refuse_private(upper: Upper, name: bytes) -> None:
    if upper.override is not None and is_private(name):
        raise failure(errno.EOPNOTSUPP if name in ACLS else errno.EPERM)


def write(view: View, inode: Inode, data: bytes, offset: int) -> int:
    """pwrite(2) to an object of the upper. Returns the bytes written.

    Fewer than there are only past the end of the file, where write(2) is told of it. What lies within may be pages of a map, of which the
    kernel takes no count: nobody would hear that the rest was not written.
    """
    upper = view.upper
    upper.is_dirty = True
    written = upper.calls.pwrite(view.data_fd(inode, write=True), data, offset)
    if 0 < written < len(data) and offset + len(data) <= view.stat(inode).st_size:
        written += write(view, inode, data[written:], offset + written)
    return written


def append(view: View, inode: Inode, data: bytes, offset: int) -> int:
    """The same for somebody who can only append (O_APPEND), to a file that may only be appended to (chattr +a): the descriptor that the
    others write by cannot be had of such a file. Returns the bytes written. EPERM: its data are not the upper's yet. EACCES: it belongs to
    nobody (`owners`).
    """
    view.require_owner(inode, errno.EACCES)
    if not inode.in_upper or inode.metacopy is not None:
        raise failure(errno.EPERM)
    upper = view.upper
    _, dirfd, name = view.place(inode)
    fd = upper.open_append(dirfd, name)
    try:
        upper.is_dirty = True
        return upper.calls.pwrite(fd, data, offset)
    finally:
        os.close(fd)


def drop_privileges_of(view: View, inode: Inode) -> None:
    """Clear suid, sgid of an executable group, and file capabilities, as a write by somebody without CAP_FSETID does
    (file_remove_privs).
    """
    st = view.stat(inode)
    mode = st.st_mode & ~stat.S_ISUID
    if st.st_mode & stat.S_IXGRP:
        mode &= ~stat.S_ISGID
    layer, dirfd, name = view.place(inode)
    calls = view.upper.calls
    view.upper.is_dirty = True
    if mode != st.st_mode:
        calls.chmod(dirfd, name, stat.S_IMODE(mode))
    # Asked first: without CAP_SETFCAP the removal is EPERM, whether there is something to remove or not.
    if layer.getxattr(dirfd, name, CAPABILITY) is not None:
        calls.removexattr(dirfd, name, CAPABILITY)


def drop_setgid_of(view: View, inode: Inode, *, unless: int) -> None:
    """Clear sgid of a file that got an ACL from somebody whose group, `unless`, as the view shows it, is not the file's (CVE-2016-7097).

    Of the caller's other groups the kernel tells us nothing, so a member by one of those has to set it again.
    """
    st = view.stat(inode)
    if st.st_mode & stat.S_ISGID and view.owners.shown(st)[1] != unless:
        _, dirfd, name = view.place(inode)
        view.upper.calls.chmod(dirfd, name, stat.S_IMODE(st.st_mode) & ~stat.S_ISGID)
