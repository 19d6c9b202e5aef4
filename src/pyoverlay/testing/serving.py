"""A directory, read-only, as a file server shows it: for a lower that is to be slow, to fail, or to stop answering.

Only for processes that do nothing else, since it is served by pyfuse3 as it comes: PYOVERLAY_WIRE=0 has to be in the environment before
this module is imported, and `pyoverlay.testing` does not import it.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Any, TypeVar

from pyoverlay.fuse.binding import pyfuse3

OPTIONS = frozenset({"default_permissions", "allow_other"})

T = TypeVar("T")


class ServedDirectory(pyfuse3.Operations):
    """Answers from what is in `directory`. valid: seconds for which the kernel may keep an answer; keep_cache: and data as well."""

    supports_dot_lookup = False

    def __init__(self, directory: str, *, valid: float, keep_cache: bool = False) -> None:
        super().__init__()
        self._valid = valid
        self._keep_cache = keep_cache
        self._paths = {pyfuse3.ROOT_INODE: os.fsencode(directory)}

    async def admit(self, operation: str) -> None:
        """Awaited before each answer, with the name of the handler: what it waits for the client waits for, what it raises the client
        gets.
        """

    async def lookup(self, parent_inode: int, name: bytes, ctx: object) -> pyfuse3.EntryAttributes:
        await self.admit("lookup")
        return self._entry(os.path.join(self._paths[parent_inode], name))

    async def getattr(self, inode: int, ctx: object) -> pyfuse3.EntryAttributes:
        await self.admit("getattr")
        entry = self._entry(self._paths[inode])
        entry.st_ino = inode
        return entry

    async def readlink(self, inode: int, ctx: object) -> bytes:
        await self.admit("readlink")
        return answered(lambda: os.readlink(self._paths[inode]))

    async def opendir(self, inode: int, ctx: object) -> int:
        await self.admit("opendir")
        return inode

    async def readdir(self, fh: int, start_id: int, token: Any) -> None:
        await self.admit("readdir")
        names = sorted(os.listdir(self._paths[fh]))
        for offset, name in list(enumerate(names, 1))[start_id:]:
            if not pyfuse3.readdir_reply(token, name, self._entry(os.path.join(self._paths[fh], name)), offset):
                return

    async def open(self, inode: int, flags: int, ctx: object) -> pyfuse3.FileInfo:
        await self.admit("open")
        return pyfuse3.FileInfo(fh=os.open(self._paths[inode], os.O_RDONLY), keep_cache=self._keep_cache)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        await self.admit("read")
        return os.pread(fh, size, off)

    async def release(self, fh: int) -> None:
        os.close(fh)

    async def statfs(self, ctx: object) -> pyfuse3.StatvfsData:
        data = pyfuse3.StatvfsData()
        data.f_bsize = data.f_frsize = 4096
        data.f_namemax = 255
        return data

    def _entry(self, path: bytes) -> pyfuse3.EntryAttributes:
        st = answered(lambda: os.lstat(path))
        entry = pyfuse3.EntryAttributes()
        for field in ("st_ino", "st_mode", "st_nlink", "st_uid", "st_gid", "st_size", "st_blocks", "st_blksize"):
            setattr(entry, field, getattr(st, field))
        entry.st_mtime_ns, entry.st_ctime_ns, entry.st_atime_ns = st.st_mtime_ns, st.st_ctime_ns, st.st_atime_ns
        entry.entry_timeout = entry.attr_timeout = self._valid
        self._paths[st.st_ino] = path
        return entry


def answered(call: Callable[[], T]) -> T:
    """What the call returns; an OSError as the client's."""
    try:
        return call()
    except OSError as error:
        raise pyfuse3.FUSEError(error.errno or errno.EIO) from None
