"""Whose an object is: ids as the layers have them (stored), and as the merged view shows them (shown).

Translated in two places: where attributes leave the view, and where a caller's ids come in. Between them the core knows stored ids alone.
What has no counterpart shows as the overflow id and belongs to nobody: it can be read and not changed, and nobody can be made to own
anything under it. That is what the kernel's idmapped mounts do (Documentation/filesystems/idmappings.rst), errno for errno.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable

from pyoverlay.core.policy import OVERFLOW, IdRange, Policy
from pyoverlay.core.syscalls import Stat

ACLS = (b"system.posix_acl_access", b"system.posix_acl_default")

# <linux/posix_acl_xattr.h>: a header with the version, then entries of tag, permissions, id.
_ACL_HEADER, _ACL_ENTRY = struct.Struct("<I"), struct.Struct("<HHI")
_ACL_USER, _ACL_GROUP = 0x02, 0x08
_NO_ID = 0xFFFFFFFF


class IdMap:
    """One kind of id, uids or gids. No ranges: every id is the same on both sides. squash: everything shows as this one."""

    def __init__(self, ranges: tuple[IdRange, ...], squash: int | None) -> None:
        self.ranges = ranges
        self.squash = squash

    def shown(self, stored: int) -> int | None:
        """None: it has no counterpart."""
        if self.squash is not None:
            return self.squash
        if not self.ranges:
            return stored
        return next((shown + stored - first for first, shown, length in self.ranges if 0 <= stored - first < length), None)

    def lacks(self, shown: int) -> bool:
        """Is there no stored id that would show as this one?"""
        return bool(self.ranges) and not any(0 <= shown - start < length for _, start, length in self.ranges)

    def stored(self, shown: int) -> int:
        """The inverse of `shown`, by the ranges alone. EOVERFLOW: it has no counterpart."""
        if not self.ranges:
            return shown
        for first, start, length in self.ranges:
            if 0 <= shown - start < length:
                return first + shown - start
        raise OSError(errno.EOVERFLOW, os.strerror(errno.EOVERFLOW))


Translation = Callable[[IdMap, int], int]


class Owners:
    """The ids of one mount.

    are_kept: stored and shown ids are the same. are_mapped: some stored ids may have no counterpart.
    """

    def __init__(self, policy: Policy) -> None:
        self.uids = IdMap(policy.uid_map, policy.squash_uid)
        self.gids = IdMap(policy.gid_map, policy.squash_gid)
        self.are_mapped = bool(policy.uid_map or policy.gid_map)
        self._are_squashed = (policy.squash_uid, policy.squash_gid) != (None, None)
        self.are_kept = not self.are_mapped and not self._are_squashed

    def shown(self, st: Stat) -> tuple[int, int]:
        """Owner and group as the view shows them."""
        uid, gid = self.uids.shown(st.st_uid), self.gids.shown(st.st_gid)
        return OVERFLOW if uid is None else uid, OVERFLOW if gid is None else gid

    def are_known(self, st: Stat) -> bool:
        """Have both owner and group a counterpart?"""
        return not self.are_mapped or (self.uids.shown(st.st_uid) is not None and self.gids.shown(st.st_gid) is not None)

    def maker(self, uid: int, gid: int) -> tuple[int, int]:
        """Who is to own what a caller makes, as stored. EOVERFLOW: the caller has no counterpart.

        Where all shows as one owner's it is ours: whoever that owner is, the process may not be able to give anything away. And what an
        engine makes, which runs as we do and outside of the map, is ours too: podman puts files into a container's root before it starts,
        and then gives them away.
        """
        if self._are_squashed:
            return os.geteuid(), os.getegid()
        return (
            uid if uid == os.geteuid() and self.uids.lacks(uid) else self.uids.stored(uid),
            gid if gid == os.getegid() and self.gids.lacks(gid) else self.gids.stored(gid),
        )

    def stored(self, uid: int | None, gid: int | None) -> tuple[int | None, int | None]:
        """A new owner and group, as stored; None: no new one. EOVERFLOW: an id has no counterpart."""
        return None if uid is None else self.uids.stored(uid), None if gid is None else self.gids.stored(gid)

    def shown_acl(self, value: bytes) -> bytes:
        """An ACL as the view shows it; an entry for an id without counterpart is nobody's."""

        def shown(ids: IdMap, number: int) -> int:
            found = ids.shown(number)
            return _NO_ID if found is None else found

        return self._translated(value, shown)

    def stored_acl(self, value: bytes) -> bytes:
        """The inverse. EINVAL: an entry's id has no counterpart."""

        def stored(ids: IdMap, number: int) -> int:
            try:
                return ids.stored(number)
            except OSError:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL)) from None

        return self._translated(value, stored)

    def _translated(self, value: bytes, translate: Translation) -> bytes:
        """What is no ACL is left alone: the file system refuses it."""
        if not self.are_mapped or len(value) < _ACL_HEADER.size or (len(value) - _ACL_HEADER.size) % _ACL_ENTRY.size:
            return value
        entries = []
        for tag, permissions, number in _ACL_ENTRY.iter_unpack(value[_ACL_HEADER.size :]):
            ids = {_ACL_USER: self.uids, _ACL_GROUP: self.gids}.get(tag)
            entries.append(_ACL_ENTRY.pack(tag, permissions, number if ids is None else translate(ids, number)))
        return value[: _ACL_HEADER.size] + b"".join(entries)
