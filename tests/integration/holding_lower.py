"""`python holding_lower.py DIRECTORY MOUNT-POINT`: a directory, read-only, as a server shows it that can stop answering.

Commands on standard input, each answered by a line `done`: `hold OPERATION` lets its requests wait from now on, `fail OPERATION` fails
them with EIO, `spoil OFFSET` has every read of that byte fail, of whatever file, `step` lets those go on that wait, `release` all. A
request that begins to wait is told by a line `waits OPERATION`. No name, attribute or answer stays valid: all is asked anew each time.
"""

from __future__ import annotations

import errno
import os
import sys

import trio

os.environ["PYOVERLAY_WIRE"] = "0"  # pyfuse3 as its documentation shows it

from pyoverlay.fuse.binding import pyfuse3
from pyoverlay.testing.serving import OPTIONS, ServedDirectory, answered


class HoldingDirectory(ServedDirectory):
    """Each operation by the name of its handler."""

    def __init__(self, directory: str) -> None:
        super().__init__(directory, valid=0)
        self.held: set[str] = set()
        self.failing: set[str] = set()
        self.spoilt = -1
        self.released = trio.Event()

    async def admit(self, operation: str) -> None:
        if operation in self.held:
            say(f"waits {operation}")
            await self.released.wait()
        if operation in self.failing:
            raise pyfuse3.FUSEError(errno.EIO)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        data = await super().read(fh, off, size)
        if off <= self.spoilt < off + size:
            raise pyfuse3.FUSEError(errno.EIO)
        return data

    async def flush(self, fh: int) -> None:
        await self.admit("flush")

    async def getxattr(self, inode: int, name: bytes, ctx: object) -> bytes:
        await self.admit("getxattr")
        return answered(lambda: os.getxattr(self._paths[inode], name, follow_symlinks=False))

    async def listxattr(self, inode: int, ctx: object) -> list[bytes]:
        await self.admit("listxattr")
        names = answered(lambda: os.listxattr(self._paths[inode], follow_symlinks=False))
        return [os.fsencode(name) for name in names]

    def obey(self, command: str, *names: str) -> None:
        """A command."""
        match command:
            case "hold":
                self.held |= {*names}
            case "fail":
                self.failing |= {*names}
            case "spoil":
                self.spoilt = int(names[0])
            case _:
                if command == "release":
                    self.held, self.failing = set(), set()
                self.released.set()
                self.released = trio.Event()


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


async def obey(operations: HoldingDirectory) -> None:
    async for line in trio.wrap_file(sys.stdin):
        command, *names = line.split()
        operations.obey(command, *names)
        say("done")


async def serve(operations: HoldingDirectory) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(obey, operations)
        await pyfuse3.main(max_tasks=10_000)
        os._exit(0)  # a thread still reads the commands


def main() -> None:
    directory, mount_point = sys.argv[1:]
    operations = HoldingDirectory(directory)
    pyfuse3.init(operations, mount_point, {"fsname=holding", *OPTIONS})
    say("done")
    trio.run(serve, operations)


if __name__ == "__main__":
    main()
