"""`python -m bench.slow_lower DIRECTORY MOUNT-POINT`: a directory as a server 20 ms away would show it, read-only.

It answers many requests at once, each after DELAY, as a network file system does: who asks for one thing at a time waits for each.
"""

from __future__ import annotations

import errno
import os
import sys

import pyfuse3
import trio

DELAY = 0.02  # seconds
_VALID = 3600.0  # seconds that the kernel keeps an answer: what an overlay asks twice is not delayed twice


class SlowDirectory(pyfuse3.Operations):  # type: ignore[misc] # Debian's pyfuse3 has no types
    """Each answer comes from the directory, DELAY later."""

    supports_dot_lookup = False

    def __init__(self, directory: str) -> None:
        super().__init__()
        self._paths = {pyfuse3.ROOT_INODE: os.fsencode(directory)}

    async def lookup(self, parent_inode: int, name: bytes, ctx: object) -> pyfuse3.EntryAttributes:
        await trio.sleep(DELAY)  # the delay is the subject here
        return self._entry(os.path.join(self._paths[parent_inode], name))

    async def getattr(self, inode: int, ctx: object) -> pyfuse3.EntryAttributes:
        await trio.sleep(DELAY)  # the delay is the subject here
        entry = self._entry(self._paths[inode])
        entry.st_ino = inode
        return entry

    async def opendir(self, inode: int, ctx: object) -> int:
        await trio.sleep(DELAY)  # the delay is the subject here
        return inode

    async def readdir(self, fh: int, start_id: int, token: object) -> None:
        await trio.sleep(DELAY)  # the delay is the subject here
        names = sorted(os.listdir(self._paths[fh]))
        for offset, name in list(enumerate(names, 1))[start_id:]:
            if not pyfuse3.readdir_reply(token, name, self._entry(os.path.join(self._paths[fh], name)), offset):
                return

    async def open(self, inode: int, flags: int, ctx: object) -> pyfuse3.FileInfo:
        await trio.sleep(DELAY)  # the delay is the subject here
        return pyfuse3.FileInfo(fh=os.open(self._paths[inode], os.O_RDONLY), keep_cache=True)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        await trio.sleep(DELAY)  # the delay is the subject here
        return os.pread(fh, size, off)

    async def release(self, fh: int) -> None:
        os.close(fh)

    async def statfs(self, ctx: object) -> pyfuse3.StatvfsData:
        data = pyfuse3.StatvfsData()
        data.f_bsize = data.f_frsize = 4096
        data.f_namemax = 255
        return data

    async def getxattr(self, inode: int, name: bytes, ctx: object) -> bytes:
        raise pyfuse3.FUSEError(errno.EOPNOTSUPP)

    def _entry(self, path: bytes) -> pyfuse3.EntryAttributes:
        try:
            st = os.lstat(path)
        except OSError as error:
            raise pyfuse3.FUSEError(error.errno or errno.EIO) from None
        entry = pyfuse3.EntryAttributes()
        for field in ("st_ino", "st_mode", "st_nlink", "st_uid", "st_gid", "st_size", "st_blocks", "st_blksize"):
            setattr(entry, field, getattr(st, field))
        entry.st_mtime_ns, entry.st_ctime_ns, entry.st_atime_ns = st.st_mtime_ns, st.st_ctime_ns, st.st_atime_ns
        entry.entry_timeout = entry.attr_timeout = _VALID
        self._paths[st.st_ino] = path
        return entry


def main() -> None:
    """Serve until unmounted."""
    directory, mount_point = sys.argv[1:]
    pyfuse3.init(SlowDirectory(directory), mount_point, {"fsname=slow", "default_permissions", "allow_other"})
    try:
        trio.run(pyfuse3.main)
    finally:
        pyfuse3.close()


if __name__ == "__main__":
    main()
