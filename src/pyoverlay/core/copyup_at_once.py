"""The copy-up of a small plain file as one call of `Calls`, if there is one that makes it.

Plain is a regular file with one name and its own data, in a mount that keeps owners and modes as they are. Everything else, and what the
call itself finds to be unusual, is for the steps of `copyup`.
"""

from __future__ import annotations

import logging
import os

from pyoverlay.core.calls import Copied, PlainFile
from pyoverlay.core.copyup_directory import copy_up_directory, mark_impure
from pyoverlay.core.inode import UPPER, Directory, Inode, key_of
from pyoverlay.core.view import View

log = logging.getLogger(__name__)

MOST = 64 << 10  # bytes: what a good disk takes less time for than a thread takes to start and to end


def copy_up_at_once(view: View, inode: Inode, size: int | None = None, *, attributes_only: bool = False) -> bool | None:
    """As `copyup.copy_up`, of what is not in the upper yet. None: nothing was done; it takes the steps. It reads nothing from a disk: what
    is not in memory takes the steps, too.
    """
    parent = inode.parent
    if parent is None or not _is_plain(view, inode, attributes_only=attributes_only):
        return None
    copy_up_directory(view, parent)
    _say_of_origins(view, parent, inode)
    upper, layer = view.upper, view.lower_place(inode).layer
    file = _plain_file(view, inode, parent, -1 if size is None else size)
    upper.is_dirty = True
    try:
        copied = upper.calls.copy_up_file(file)
    except OSError:
        upper.discard(file.temporary)
        raise
    if copied is None:
        return None
    if copied.refuses_to_clone:
        upper.cannot_clone_from(layer)
    if copied.times_error:
        log.warning("a directory keeps the time of a copy-up in it: %s", os.strerror(copied.times_error))
    _adopt(view, inode, copied)
    return copied.is_truncated


def _is_plain(view: View, inode: Inode, *, attributes_only: bool) -> bool:
    upper = view.upper
    return (
        upper.calls.copies_up_files
        and inode.is_regular
        and not inode.in_upper
        and inode.metacopy is None
        and not (inode.lower_dir is not None and inode.lower_dir.layer.is_remote)
        and inode.lower_links == 1
        and not inode.links
        and upper.override is None
        and not upper.doubts_owners
        and not view.owners.are_mapped
        and not (attributes_only and view.policy.metacopy)
    )


def _say_of_origins(view: View, parent: Directory, inode: Inode) -> None:
    if not parent.is_impure and view.origins.of(view.lower_place(inode)) is not None:
        mark_impure(view, parent)


def _plain_file(view: View, inode: Inode, parent: Directory, size: int) -> PlainFile:
    upper, (layer, dirfd, name) = view.upper, view.lower_place(inode)
    uid, gid = upper.squash
    return PlainFile(
        source_fd=inode.fd,
        dirfd=dirfd,
        name=name,
        work_fd=upper.work_fd,
        temporary=upper.temporary(),
        new_dirfd=view.upper_fd(parent),
        new=inode.name,
        size=size,
        most=MOST,
        in_memory=layer.is_memory,
        may_share=upper.may_clone_from(layer),
        order=upper.order,
        uid=-1 if uid is None else uid,
        gid=-1 if gid is None else gid,
        is_nosuid=layer.is_nosuid,
        obeys_modes=upper.obeys_modes,
        mark_prefix=upper.mark_prefix,
        uuid=view.origins.uuid_of(layer),
    )


def _adopt(view: View, inode: Inode, copied: Copied) -> None:
    inode.lower_links -= 1
    inode.in_upper = inode.has_origin = True
    view.table.add_key(inode, key_of(UPPER, copied.ino))
    view.set_data_fd(inode, copied.fd, is_writable=True)
    log.debug("copied up %d at once", inode.ino)
