"""File handles of lower objects: what names one on disk for good, over renames and mounts."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable

from pyoverlay.core import marks, syscalls
from pyoverlay.core.layer import Layer, Place, readable_dir
from pyoverlay.core.syscalls import Stat


class Origins:
    """The file systems that lowers lie on, each by a descriptor, which is owned. with_uuid: handles say which file system is theirs;
    `uuid=off` is for those whose uuid changes.
    """

    def __init__(self, lowers: Iterable[Layer], *, with_uuid: bool = True) -> None:
        self.with_uuid = with_uuid
        self._filesystems: dict[int, tuple[bytes, int]] = {}
        for lower in lowers:
            if lower.fs not in self._filesystems:
                fd = readable_dir(lower.root_fd)
                self._filesystems[lower.fs] = (syscalls.filesystem_uuid(fd) if with_uuid else bytes(16), fd)

    def close(self) -> None:
        for _, fd in self._filesystems.values():
            os.close(fd)
        self._filesystems = {}

    def uuid_of(self, layer: Layer) -> bytes:
        """What handles on a layer's file system say that it is."""
        return self._filesystems[layer.fs][0]

    def of(self, place: Place) -> marks.Origin | None:
        """The handle of a lower object; None where its file system has none."""
        uuid, _ = self._filesystems[place.layer.fs]
        try:
            return marks.Origin(uuid, syscalls.name_to_handle_at(place.dirfd, place.name))
        except OSError as error:
            if error.errno in (errno.EOPNOTSUPP, errno.EOVERFLOW):
                return None
            raise

    def find(self, origin: marks.Origin) -> tuple[int, Stat] | None:
        """(file system, attributes) of the object that a handle names, or None: gone, of another file system, or we may not ask."""
        same = [(fs, fd) for fs, (uuid, fd) in self._filesystems.items() if uuid == origin.uuid]
        if not same:
            return None
        fs, mount_fd = same[0]
        try:
            fd = syscalls.open_by_handle_at(mount_fd, origin.handle, os.O_PATH)
        except OSError:
            return None  # ESTALE: the lower was changed; EPERM: no CAP_DAC_READ_SEARCH. The number is then the upper's own.
        try:
            return fs, os.fstat(fd)
        finally:
            os.close(fd)
