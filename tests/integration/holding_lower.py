"""`python holding_lower.py DIRECTORY MOUNT-POINT`: a directory, read-only, as a server shows it that can stop answering.

Commands on standard input, each answered by a line `done`: `hold OPERATION` lets its requests wait from now on, `release` lets all go on.
`spoil OFFSET` has every read of that byte fail, of whatever file. A request that begins to wait is told by a line `waits OPERATION`. No
name, attribute or answer stays valid: all is asked anew each time.
"""

from __future__ import annotations

import errno
import os
import sys
from typing import Any

import trio

os.environ["PYOVERLAY_WIRE"] = "0"  # pyfuse3 as its documentation shows it

from pyoverlay.fuse.binding import pyfuse3


class HoldingDirectory(pyfuse3.Operations):
    """Each operation by the name of its handler."""

    supports_dot_lookup = False

    def __init__(self, directory: str) -> None:
        super().__init__()
        self.held: set[str] = set()
        self.spoilt = -1
        self.released = trio.Event()
        self._paths = {pyfuse3.ROOT_INODE: os.fsencode(directory)}

    async def _pass(self, operation: str) -> None:
        if operation in self.held:
            say(f"waits {operation}")
            await self.released.wait()

    async def lookup(self, parent_inode: int, name: bytes, ctx: object) -> pyfuse3.EntryAttributes:
        await self._pass("lookup")
        return self._entry(os.path.join(self._paths[parent_inode], name))

    async def getattr(self, inode: int, ctx: object) -> pyfuse3.EntryAttributes:
        await self._pass("getattr")
        entry = self._entry(self._paths[inode])
        entry.st_ino = inode
        return entry

    async def readlink(self, inode: int, ctx: object) -> bytes:
        await self._pass("readlink")
        return os.readlink(self._paths[inode])

    async def opendir(self, inode: int, ctx: object) -> int:
        await self._pass("opendir")
        return inode

    async def readdir(self, fh: int, start_id: int, token: Any) -> None:
        await self._pass("readdir")
        names = sorted(os.listdir(self._paths[fh]))
        for offset, name in list(enumerate(names, 1))[start_id:]:
            if not pyfuse3.readdir_reply(token, name, self._entry(os.path.join(self._paths[fh], name)), offset):
                return

    async def open(self, inode: int, flags: int, ctx: object) -> pyfuse3.FileInfo:
        await self._pass("open")
        return pyfuse3.FileInfo(fh=os.open(self._paths[inode], os.O_RDONLY))

    async def read(self, fh: int, off: int, size: int) -> bytes:
        await self._pass("read")
        if off <= self.spoilt < off + size:
            raise pyfuse3.FUSEError(errno.EIO)
        return os.pread(fh, size, off)

    async def flush(self, fh: int) -> None:
        await self._pass("flush")

    async def release(self, fh: int) -> None:
        os.close(fh)

    async def statfs(self, ctx: object) -> pyfuse3.StatvfsData:
        data = pyfuse3.StatvfsData()
        data.f_bsize = data.f_frsize = 4096
        data.f_namemax = 255
        return data

    async def getxattr(self, inode: int, name: bytes, ctx: object) -> bytes:
        await self._pass("getxattr")
        return self._answered(lambda: os.getxattr(self._paths[inode], name, follow_symlinks=False))

    async def listxattr(self, inode: int, ctx: object) -> list[bytes]:
        await self._pass("listxattr")
        names = self._answered(lambda: os.listxattr(self._paths[inode], follow_symlinks=False))
        return [os.fsencode(name) for name in names]

    def _entry(self, path: bytes) -> pyfuse3.EntryAttributes:
        st = self._answered(lambda: os.lstat(path))
        entry = pyfuse3.EntryAttributes()
        for field in ("st_ino", "st_mode", "st_nlink", "st_uid", "st_gid", "st_size", "st_blocks", "st_blksize"):
            setattr(entry, field, getattr(st, field))
        entry.st_mtime_ns, entry.st_ctime_ns, entry.st_atime_ns = st.st_mtime_ns, st.st_ctime_ns, st.st_atime_ns
        entry.entry_timeout = entry.attr_timeout = 0
        self._paths[st.st_ino] = path
        return entry

    def _answered(self, call: Any) -> Any:
        try:
            return call()
        except OSError as error:
            raise pyfuse3.FUSEError(error.errno or 0) from None


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


async def obey(operations: HoldingDirectory) -> None:
    async for line in trio.wrap_file(sys.stdin):
        command, *names = line.split()
        if command == "spoil":
            operations.spoilt = int(names[0])
        else:
            operations.held = operations.held | set(names) if command == "hold" else set()
        if not operations.held:
            operations.released.set()
            operations.released = trio.Event()
        say("done")


async def serve(operations: HoldingDirectory) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(obey, operations)
        await pyfuse3.main(max_tasks=10_000)
        os._exit(0)  # a thread still reads the commands


def main() -> None:
    directory, mount_point = sys.argv[1:]
    operations = HoldingDirectory(directory)
    pyfuse3.init(operations, mount_point, {"fsname=holding", "default_permissions", "allow_other"})
    say("done")
    trio.run(serve, operations)


if __name__ == "__main__":
    main()
