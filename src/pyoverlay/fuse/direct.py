"""What the receiver calls for a request, by opcode: the fields that the extension has taken out of it in, what it puts into the reply out.

An OSError becomes its negative errno. Any other exception is our bug: EIO for this request, one log entry, and the mount goes on. What
has to wait returns NotImplemented, and the request takes the way through pyfuse3. None in the place of attributes leaves it to the
extension, which has a descriptor for it by then. `_direct.c` is the other side of the table below.
"""

from __future__ import annotations

import errno
import functools
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pyoverlay.core.attributes import Wanted
from pyoverlay.core.remote import MustAsk
from pyoverlay.core.syscalls import NOW
from pyoverlay.fuse.answers import NotAtOnce

if TYPE_CHECKING:
    from pyoverlay.fuse.answers import Answers, Shown

log = logging.getLogger(__name__)

SECOND = 1_000_000_000  # ns

Direct = Callable[..., Any]

# <linux/fuse.h>, enum fuse_opcode
LOOKUP, FORGET, GETATTR, SETATTR, READLINK, SYMLINK, MKNOD, MKDIR, UNLINK, RMDIR, RENAME, LINK = 1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12, 13
READ, WRITE = 15, 16
FSYNC, SETXATTR, GETXATTR, LISTXATTR, REMOVEXATTR, FSYNCDIR, READDIRPLUS, RENAME2 = 20, 21, 22, 23, 24, 30, 44, 45
COPY_FILE_RANGE, COPY_FILE_RANGE_64 = 47, 53

# FATTR_* of <linux/fuse.h>
_MODE, _UID, _GID, _SIZE, _ATIME, _MTIME, _ATIME_NOW, _MTIME_NOW, _KILL_SUIDGID = (1 << bit for bit in (0, 1, 2, 3, 4, 5, 7, 8, 11))


def at_once(answers: Answers, name: str, method: Direct) -> Direct:
    """`method` as the receiver may call it: what it raises is turned into what it returns."""
    trim = answers.view.trim

    @functools.wraps(method)
    def answer(*fields: Any) -> Any:
        try:
            return method(*fields)
        except OSError as error:
            log.debug("%s of %s: %s", name, fields[0], error.strerror)
            return -(error.errno or errno.EIO)
        except (NotAtOnce, MustAsk):
            return NotImplemented
        except Exception:  # a bug costs its caller one EIO, never the mount
            log.exception("%s failed", name)
            return -errno.EIO
        finally:
            trim()

    return answer


def functions(answers: Answers) -> dict[int, Direct]:
    """What answers the requests that need no waiting, by opcode."""

    def setattr_(
        ino: int, valid: int, mode: int, uid: int, gid: int, size: int, atime: int, atime_ns: int, mtime: int, mtime_ns: int
    ) -> Shown | None:
        owner = answers.owner(uid if valid & _UID else None, gid if valid & _GID else None)
        if not valid & _SIZE and answers.goes_to_lane(ino):
            return None
        wanted = Wanted(
            mode=mode if valid & _MODE else None,
            uid=owner[0],
            gid=owner[1],
            size=size if valid & _SIZE else None,
            atime_ns=NOW if valid & _ATIME_NOW else atime * SECOND + atime_ns if valid & _ATIME else None,
            mtime_ns=NOW if valid & _MTIME_NOW else mtime * SECOND + mtime_ns if valid & _MTIME else None,
        )
        return answers.setattr(ino, wanted, drops_privileges=bool(valid & _KILL_SUIDGID))

    def mknod(parent: int, name: bytes, mode: int, rdev: int, uid: int, gid: int, umask: int) -> Shown:
        return answers.mknod(parent, name, mode, rdev, answers.caller(uid, gid, umask))

    def mkdir(parent: int, name: bytes, mode: int, uid: int, gid: int, umask: int) -> Shown:
        return answers.mkdir(parent, name, mode, answers.caller(uid, gid, umask))

    def symlink(parent: int, name: bytes, target: bytes, uid: int, gid: int) -> Shown:
        return answers.symlink(parent, name, target, answers.caller(uid, gid, 0))

    def listxattr(ino: int, uid: int) -> bytes:
        return b"".join(name + b"\0" for name in answers.listxattr(ino, uid))

    def fsync(ino: int, datasync: int) -> int | None:
        return answers.data_to_sync(ino)

    table: dict[int, tuple[str, Direct]] = {
        LOOKUP: ("lookup", answers.lookup),
        FORGET: ("forget", answers.forget),
        GETATTR: ("getattr", answers.getattr),
        SETATTR: ("setattr", setattr_),
        READLINK: ("readlink", answers.readlink),
        SYMLINK: ("symlink", symlink),
        MKNOD: ("mknod", mknod),
        MKDIR: ("mkdir", mkdir),
        UNLINK: ("unlink", answers.unlink),
        RMDIR: ("rmdir", answers.rmdir),
        RENAME: ("rename", answers.rename),
        RENAME2: ("rename", answers.rename),
        LINK: ("link", answers.link),
        FSYNC: ("fsync", fsync),
        FSYNCDIR: ("fsyncdir", fsync),
        SETXATTR: ("setxattr", answers.setxattr),
        GETXATTR: ("getxattr", answers.getxattr),
        LISTXATTR: ("listxattr", listxattr),
        REMOVEXATTR: ("removexattr", answers.removexattr),
        READDIRPLUS: ("readdir", answers.entries),
        COPY_FILE_RANGE: ("copy_file_range", answers.copy_file_range),
        COPY_FILE_RANGE_64: ("copy_file_range", answers.copy_file_range),
    }
    return {opcode: at_once(answers, name, method) for opcode, (name, method) in table.items()}
