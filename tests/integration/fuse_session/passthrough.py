"""A small file system over a directory, to try the session layer with: a process that takes commands on standard input.

    passthrough.py '{"root": ..., "mountpoint": ..., "flags": ["NO_OPEN_SUPPORT", ...], "lanes": true, "stock": false}'

It is no overlay: each node is an O_PATH descriptor, numbered by its inode. A command is a JSON list, answered by one line of JSON.
"""

import errno
import json
import os
import stat
import sys
from collections.abc import Callable
from typing import Any

import trio

OPTIONS = json.loads(sys.argv[1])
if OPTIONS.get("stock"):  # pyfuse3 as its documentation shows it
    os.environ["PYOVERLAY_WIRE"] = "0"

from pyoverlay.fuse import loop  # noqa: E402
from pyoverlay.fuse.binding import pyfuse3, wire, wire_reason  # noqa: E402
from pyoverlay.fuse.capabilities import InitFlag, Wanted  # noqa: E402
from pyoverlay.fuse.opcodes import Caller, Statx, attach  # noqa: E402

VALIDITY = OPTIONS.get("validity", 1e9)
HAS_LANES = bool(OPTIONS.get("lanes")) and wire is not None
FS_IOC_GETFLAGS = 0x80086601


class Passthrough(pyfuse3.Operations):
    """What pyfuse3 has handlers for."""

    def __init__(self, root: str) -> None:
        super().__init__()
        self.nodes = {1: os.open(root, os.O_PATH)}
        self.fds: dict[int, int] = {}
        self.paused: frozenset[int] = frozenset()
        self.resumed = trio.Event()
        self.slow_lookup = trio.Event()
        self.waiting = 0
        self.handles: set[tuple[str, bool]] = set()
        self.uniques: list[int] = []
        self.interrupted: list[int] = []

    def path(self, ino: int, name: bytes = b"") -> bytes:
        return os.path.join(b"/proc/self/fd/%d" % self.nodes[ino], name) if name else b"/proc/self/fd/%d" % self.nodes[ino]

    def entry(self, fd: int, ino: int = 0) -> Any:
        st = os.fstat(fd)
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = ino or st.st_ino
        entry.entry_timeout = entry.attr_timeout = VALIDITY
        for name in ("mode", "nlink", "uid", "gid", "rdev", "size", "blksize", "blocks", "atime_ns", "mtime_ns", "ctime_ns"):
            setattr(entry, f"st_{name}", getattr(st, f"st_{name}"))
        return entry

    def known(self, parent: int, name: bytes) -> Any:
        fd = os.open(self.path(parent, name), os.O_PATH | os.O_NOFOLLOW)
        entry = self.entry(fd)
        if entry.st_ino in self.nodes:
            os.close(fd)
        else:
            self.nodes[entry.st_ino] = fd
        if HAS_LANES and wire and stat.S_ISREG(entry.st_mode) and name != b"broken":
            wire.lane(entry.st_ino, self.fd(entry.st_ino), self.fd(entry.st_ino))
            wire.no_xattr(entry.st_ino, True)
        return entry

    def fd(self, ino: int) -> int:
        if ino not in self.fds:
            is_dir = stat.S_ISDIR(os.fstat(self.nodes[ino]).st_mode)
            self.fds[ino] = os.open(self.path(ino), os.O_RDONLY if is_dir else os.O_RDWR)
        return self.fds[ino]

    async def lookup(self, parent_inode: int, name: bytes, ctx: Any) -> Any:
        if name == b"slow":
            self.waiting += 1
            await self.slow_lookup.wait()
            self.waiting -= 1
        try:
            return self.known(parent_inode, name)
        except FileNotFoundError:
            raise pyfuse3.FUSEError(errno.ENOENT) from None

    async def getattr(self, inode: int, ctx: Any) -> Any:
        return self.entry(self.nodes[inode], inode)

    async def setattr(self, inode: int, attr: Any, fields: Any, fh: int | None, ctx: Any) -> Any:
        if fh is not None:
            self.handles.add(("setattr", fh == inode))
        if fields.update_size:
            os.ftruncate(self.fd(inode), attr.st_size)
        if fields.update_mode:
            os.chmod(self.path(inode), stat.S_IMODE(attr.st_mode))
        return self.entry(self.nodes[inode], inode)

    async def readlink(self, inode: int, ctx: Any) -> bytes:
        return os.readlink(b"", dir_fd=self.nodes[inode])

    async def create(self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: Any) -> Any:
        os.close(os.open(self.path(parent_inode, name), os.O_CREAT | os.O_EXCL | os.O_RDWR, mode))
        entry = self.known(parent_inode, name)
        return pyfuse3.FileInfo(fh=entry.st_ino if wire is None else 12345), entry  # with the wire no handler ever sees the 12345

    async def symlink(self, parent_inode: int, name: bytes, target: bytes, ctx: Any) -> Any:
        os.symlink(target, self.path(parent_inode, name))
        return self.known(parent_inode, name)

    async def link(self, inode: int, new_parent_inode: int, new_name: bytes, ctx: Any) -> Any:
        os.link(self.path(inode), self.path(new_parent_inode, new_name), src_dir_fd=0, follow_symlinks=True)
        return self.known(new_parent_inode, new_name)

    async def unlink(self, parent_inode: int, name: bytes, ctx: Any) -> None:
        os.unlink(self.path(parent_inode, name))

    async def open(self, inode: int, flags: int, ctx: Any) -> Any:
        if "NO_OPEN_SUPPORT" in OPTIONS.get("flags", ()):
            raise pyfuse3.FUSEError(errno.ENOSYS)
        return pyfuse3.FileInfo(fh=inode)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        self.handles.add(("read", fh in self.nodes))
        return os.pread(self.fd(fh), size, off)

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        self.handles.add(("write", fh in self.nodes))
        if fh in self.paused:
            if wire is not None:
                self.uniques.append(wire.request()[1])
            self.waiting += 1
            await self.resumed.wait()
            self.waiting -= 1
        return os.pwrite(self.fd(fh), buf, off)

    async def fsync(self, fh: int, datasync: bool) -> None:
        self.handles.add(("fsync", fh in self.nodes))

    async def release(self, fh: int) -> None:
        self.handles.add(("release", fh in self.nodes))

    async def opendir(self, inode: int, ctx: Any) -> int:
        if "NO_OPENDIR_SUPPORT" in OPTIONS.get("flags", ()):
            raise pyfuse3.FUSEError(errno.ENOSYS)
        return inode

    async def readdir(self, fh: int, start_id: int, token: Any) -> None:
        self.handles.add(("readdir", fh in self.nodes))
        for i, name in enumerate(sorted(os.listdir(self.path(fh)))[start_id:], start_id + 1):
            if not pyfuse3.readdir_reply(token, name, self.known(fh, name), i):
                break

    async def statfs(self, ctx: Any) -> Any:
        data = pyfuse3.StatvfsData()
        data.f_namemax = 255
        return data

    async def getxattr(self, inode: int, name: bytes, ctx: Any) -> bytes:
        try:
            return os.getxattr(self.path(inode), name)
        except OSError as error:
            raise pyfuse3.FUSEError(error.errno) from None


class Completed(Passthrough):
    """With what pyfuse3 has no handlers for."""

    async def fallocate(self, ino: int, mode: int, offset: int, length: int) -> None:
        if offset == 13:
            raise RuntimeError("a bug in a handler")
        if mode:
            raise OSError(errno.EOPNOTSUPP, "mode")
        os.posix_fallocate(self.fd(ino), offset, length)

    async def lseek(self, ino: int, offset: int, whence: int) -> int:
        return await trio.to_thread.run_sync(os.lseek, self.fd(ino), offset, whence)  # suspends, as an answer made by a thread does

    async def copy_file_range(self, ino_in: int, off_in: int, ino_out: int, off_out: int, length: int, flags: int) -> int:
        return os.copy_file_range(self.fd(ino_in), self.fd(ino_out), length, off_in, off_out)

    async def tmpfile(self, parent: int, mode: int, flags: int, ctx: Caller) -> Any:
        fd = os.open(self.path(parent), os.O_TMPFILE | os.O_RDWR, stat.S_IMODE(mode & ~ctx.umask))
        entry = self.entry(fd)
        self.nodes[entry.st_ino] = self.fds[entry.st_ino] = fd
        return pyfuse3.FileInfo(fh=entry.st_ino), entry

    async def ioctl(self, ino: int, cmd: int, arg: bytes, out_size: int, ctx: Caller) -> bytes:
        if cmd != FS_IOC_GETFLAGS:
            raise OSError(errno.ENOTTY, "ioctl")
        return (0x10).to_bytes(4, "little")  # FS_IMMUTABLE_FL

    async def statx(self, ino: int, mask: int, flags: int) -> Statx:
        return Statx(self.entry(self.nodes[ino], ino), btime_ns=1_000_000_007)

    def interrupt(self, unique: int) -> None:
        self.interrupted.append(unique)


async def _obey(operations: Passthrough) -> None:
    """One command a line, until standard input ends."""
    commands: dict[str, Callable[..., object]] = {
        "pause": lambda inos: setattr(operations, "paused", frozenset(inos)),
        "resume": operations.resumed.set,
        "resume_lookup": operations.slow_lookup.set,
        "waiting": lambda: operations.waiting,
        "handles": lambda: sorted(operations.handles),
        "uniques": lambda: operations.uniques,
        "interrupted": lambda: operations.interrupted,
        "lane": wire.lane if wire else int,
        "counts": lambda: wire and wire.counts(),
        "written": lambda *node: wire and wire.written(*node),
        "is_active": lambda: wire and wire.is_active(),
        "tasks": lambda: trio.lowlevel.current_statistics().tasks_living,
    }
    async for line in _lines():
        name, *arguments = json.loads(line)
        if name in ("inval_inode", "inval_entry", "prune") and wire is not None:
            notification = getattr(wire, f"notify_{name}")
            if name == "inval_entry":
                arguments[1] = os.fsencode(arguments[1])
            result = await trio.to_thread.run_sync(_result, notification, *arguments)
        else:
            result = commands[name](*arguments)
        print(json.dumps(result), flush=True)  # noqa: T201


def _result(notification: Callable[..., None], *arguments: object) -> str:
    try:
        notification(*arguments)
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "ok"


async def _lines() -> Any:
    rest = b""
    while True:
        await trio.lowlevel.wait_readable(0)
        chunk = os.read(0, 65536)
        if not chunk:
            return
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line


async def _serve(operations: Passthrough) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_obey, operations)
        await pyfuse3.main(max_tasks=OPTIONS.get("max_tasks", 99))
        nursery.cancel_scope.cancel()


def _main() -> None:
    os.umask(0)
    operations = (Completed if wire is not None else Passthrough)(OPTIONS["root"])
    on = InitFlag(0)
    for name in OPTIONS.get("flags", ()):
        on |= InitFlag[name]
    if wire is not None:
        attach(operations, wire, Wanted(on=on))
    if not OPTIONS.get("stock"):
        loop.install(wire)
    pyfuse3.init(operations, OPTIONS["mountpoint"], {"fsname=passthrough", "default_permissions", "allow_other"})
    print(json.dumps(wire_reason), flush=True)  # noqa: T201
    try:
        trio.run(_serve, operations)
    finally:
        pyfuse3.close(unmount=True)


if __name__ == "__main__":
    _main()
