"""`python -m bench.slow_lower DIRECTORY MOUNT-POINT`: a directory as a server 20 ms away would show it, read-only.

It answers many requests at once, each after DELAY, as a network file system does: who asks for one thing at a time waits for each.
"""

from __future__ import annotations

import errno
import os
import sys

import trio

os.environ["PYOVERLAY_WIRE"] = "0"  # pyfuse3 as its documentation shows it

from pyoverlay.fuse.binding import pyfuse3
from pyoverlay.testing.serving import OPTIONS, ServedDirectory

DELAY = 0.02  # seconds
_VALID = 3600.0  # seconds that the kernel keeps an answer: what an overlay asks twice is not delayed twice


class SlowDirectory(ServedDirectory):
    """Each answer comes from the directory, DELAY later."""

    async def admit(self, operation: str) -> None:
        await trio.sleep(DELAY)  # the delay is the subject here

    async def getxattr(self, inode: int, name: bytes, ctx: object) -> bytes:
        raise pyfuse3.FUSEError(errno.EOPNOTSUPP)


def main() -> None:
    """Serve until unmounted."""
    directory, mount_point = sys.argv[1:]
    pyfuse3.init(SlowDirectory(directory, valid=_VALID, keep_cache=True), mount_point, {"fsname=slow", *OPTIONS})
    try:
        trio.run(pyfuse3.main)
    finally:
        pyfuse3.close()


if __name__ == "__main__":
    main()
