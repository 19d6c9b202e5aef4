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
        self._filesystems: dict[int, tuple[bytes, int, Layer]] = {}
        try:
            for lower in lowers:
                if lower.fs not in self._filesystems:
                    fd = readable_dir(lower.root_fd)
                    self._filesystems[lower.fs] = (syscalls.filesystem_uuid(fd) if with_uuid else bytes(16), fd, lower)
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        for _, fd, _ in self._filesystems.values():
            os.close(fd)
        self._filesystems = {}

    def uuid_of(self, layer: Layer) -> bytes:
        """What handles on a layer's file system say that it is."""
        return self._filesystems[layer.fs][0]

    def of(self, place: Place) -> marks.Origin | None:
        """The handle of a lower object; None where its file system has none."""
        try:
            return marks.Origin(self.uuid_of(place.layer), place.layer.handle(place.dirfd, place.name))
        except OSError as error:
            if error.errno in (errno.EOPNOTSUPP, errno.EOVERFLOW):
                return None
            raise

    def find(self, origin: marks.Origin) -> tuple[int, Stat] | None:
        """(file system, attributes) of the object that a handle names, or None: gone, of another file system, or we may not ask."""
        same = [(fs, fd, layer) for fs, (uuid, fd, layer) in self._filesystems.items() if uuid == origin.uuid]
        if not same:
            return None
        fs, mount_fd, layer = same[0]
        st = layer.stat_by_handle(mount_fd, origin.handle)
        return None if st is None else (fs, st)  # without it the number is the upper's own
