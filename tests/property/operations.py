"""Operations on a small tree, as values: what hypothesis draws, what runs on both overlays, what a regression test is written with."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tests.posix.check import NOBODY, opened
from tests.posix.system_calls import RENAME_EXCHANGE, RENAME_NOREPLACE, renameat2

# A time that no clock gives, so that trees can be compared which were made at different moments.
PAST_NS = 1_111_111_111_222_333_444


@dataclass(frozen=True, slots=True)
class Operation:
    """One system call, or a few that belong together, by paths relative to the current directory. None may wait: paths can be fifos."""

    path: str

    def apply(self) -> object:
        """Do it; what is returned must be the same on both overlays."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Create(Operation):
    def apply(self) -> None:
        with opened(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o664) as fd:
            os.write(fd, self.path.encode())


@dataclass(frozen=True, slots=True)
class Write(Operation):
    offset: int

    def apply(self) -> None:
        with opened(self.path, os.O_WRONLY | os.O_NONBLOCK) as fd:
            os.pwrite(fd, b"written", self.offset)


@dataclass(frozen=True, slots=True)
class Append(Operation):
    def apply(self) -> None:
        with opened(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK, 0o640) as fd:
            os.write(fd, b"+appended")


@dataclass(frozen=True, slots=True)
class Truncate(Operation):
    """By a descriptor: truncate(2) to the same size moves the mtime on ext4, and with us, but not on the tmpfs that the layers lie on."""

    size: int

    def apply(self) -> None:
        with opened(self.path, os.O_WRONLY | os.O_NONBLOCK) as fd:
            os.ftruncate(fd, self.size)


@dataclass(frozen=True, slots=True)
class Empty(Operation):
    def apply(self) -> None:
        os.close(os.open(self.path, os.O_WRONLY | os.O_TRUNC | os.O_NONBLOCK))


@dataclass(frozen=True, slots=True)
class Mkdir(Operation):
    def apply(self) -> None:
        os.mkdir(self.path, 0o775)


@dataclass(frozen=True, slots=True)
class Mkfifo(Operation):
    def apply(self) -> None:
        os.mkfifo(self.path, 0o640)


@dataclass(frozen=True, slots=True)
class MakeSymlink(Operation):
    target: str

    def apply(self) -> None:
        os.symlink(self.target, self.path)


@dataclass(frozen=True, slots=True)
class Unlink(Operation):
    def apply(self) -> None:
        os.unlink(self.path)


@dataclass(frozen=True, slots=True)
class Rmdir(Operation):
    def apply(self) -> None:
        os.rmdir(self.path)


@dataclass(frozen=True, slots=True)
class Remove(Operation):
    """rm -r: most of what is drawn would else never get an empty directory."""

    def apply(self) -> None:
        _remove(self.path)


def _remove(path: str) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        for name in sorted(os.listdir(path)):
            _remove(f"{path}/{name}")
        os.rmdir(path)
    else:
        os.unlink(path)


@dataclass(frozen=True, slots=True)
class Replace(Operation):
    """rm -r, then mkdir: the new directory must be empty, now and after a remount."""

    def apply(self) -> object:
        _remove(self.path)
        os.mkdir(self.path, 0o755)
        return os.listdir(self.path)


@dataclass(frozen=True, slots=True)
class Rename(Operation):
    target: str

    def apply(self) -> None:
        os.rename(self.path, self.target)


@dataclass(frozen=True, slots=True)
class RenameNoreplace(Operation):
    target: str

    def apply(self) -> None:
        renameat2(self.path, self.target, RENAME_NOREPLACE)


@dataclass(frozen=True, slots=True)
class Exchange(Operation):
    target: str

    def apply(self) -> None:
        renameat2(self.path, self.target, RENAME_EXCHANGE)


@dataclass(frozen=True, slots=True)
class Link(Operation):
    target: str

    def apply(self) -> None:
        os.link(self.path, self.target, follow_symlinks=False)


@dataclass(frozen=True, slots=True)
class Chmod(Operation):
    mode: int

    def apply(self) -> None:
        os.chmod(self.path, self.mode)


@dataclass(frozen=True, slots=True)
class Chown(Operation):
    uid: int

    def apply(self) -> None:
        os.lchown(self.path, self.uid, self.uid)


@dataclass(frozen=True, slots=True)
class Utime(Operation):
    def apply(self) -> None:
        os.utime(self.path, ns=(PAST_NS, PAST_NS), follow_symlinks=False)


@dataclass(frozen=True, slots=True)
class SetXattr(Operation):
    name: str

    def apply(self) -> None:
        os.setxattr(self.path, self.name, self.path.encode(), follow_symlinks=False)


@dataclass(frozen=True, slots=True)
class RemoveXattr(Operation):
    name: str

    def apply(self) -> None:
        os.removexattr(self.path, self.name, follow_symlinks=False)


@dataclass(frozen=True, slots=True)
class List(Operation):
    def apply(self) -> object:
        return sorted((entry.name, entry.is_dir(follow_symlinks=False)) for entry in os.scandir(self.path))


@dataclass(frozen=True, slots=True)
class Read(Operation):
    def apply(self) -> object:
        with opened(self.path, os.O_RDONLY | os.O_NONBLOCK) as fd:
            return os.pread(fd, 1000, 0) if os.path.isfile(self.path) else None


@dataclass(frozen=True, slots=True)
class AsUser(Operation):
    """Another operation as an ordinary user; `path` is that of the operation, for people."""

    operation: Operation

    def apply(self) -> object:
        with _ordinary_user():
            return self.operation.apply()


@contextmanager
def _ordinary_user() -> Iterator[None]:
    groups = os.getgroups()
    os.setgroups([])
    os.setegid(NOBODY)
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(groups)


@dataclass(frozen=True, slots=True)
class OfTheMount(Operation):
    """Concerns our mount and not a path, so that Pair.run does it."""

    def apply(self) -> None:
        """Nothing."""


@dataclass(frozen=True, slots=True)
class Forget(OfTheMount):
    """The kernel forgets every inode that is not in use, and its pages: what the daemon then says must be the same."""


@dataclass(frozen=True, slots=True)
class Remount(OfTheMount):
    """Only what is on disk survives."""


def outcome(operation: Operation) -> object:
    """What a caller sees: the errno by name, or the result."""
    try:
        return operation.apply()
    except OSError as error:
        return errno.errorcode[error.errno or 0]
