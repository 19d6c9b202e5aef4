"""A check: what must already be there, and a claim about the directory that holds it.

The same list runs in a directory of ext4, which proves the check itself, and in directories of the merged view whose contents
come from the upper, from a lower, or from both. So `given` is separate from the claim: it is made where the place wants it,
possibly before the file system under test is even mounted, and with nothing but plain system calls.
"""

from __future__ import annotations

import errno
import os
import pickle
import stat
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.whoami import IS_ROOT

Step = Callable[[Path], object]

CHECKS: list[Check] = []

# An ordinary user and group that own nothing: Debian's nobody and nogroup.
NOBODY = 65534
# Another, for what must differ from the first.
SOMEBODY = 12345

# New names that a check may use. In the merged place each hides a directory, or a file, of a lower behind a whiteout.
NEW_NAMES = ("new", "new2", "new3")


@dataclass(frozen=True)
class Check:
    """needs_wire: no overlay of ours passes it without the extension."""

    name: str
    given: tuple[Step, ...]
    claim: Step
    needs_wire: bool = False

    def prepare(self, directory: Path) -> None:
        for step in self.given:
            step(directory)


def check(*given: Step) -> Callable[[Step], Step]:
    """Add the decorated claim to the list; `given` steps make what it finds in its directory."""

    def register(claim: Step) -> Step:
        add(_name_of(claim), given, claim)
        return claim

    return register


def add(name: str, given: tuple[Step, ...], claim: Step, *, needs_wire: bool = False) -> None:
    if any(known.name == name for known in CHECKS):
        raise ValueError(f"two checks are called {name}")
    CHECKS.append(Check(name, given, claim, needs_wire))


def _name_of(claim: Step) -> str:
    name: str = getattr(claim, "__name__")  # noqa: B009 - a Callable need not have one for mypy
    return name


# What may be given.


def file(name: str, content: bytes = b"old content", mode: int = 0o644, uid: int = 0, gid: int = 0) -> Step:
    def make(directory: Path) -> None:
        path = directory / name
        path.write_bytes(content)
        _give(path, uid, gid)
        os.chmod(path, mode)

    return make


def folder(name: str, *inside: Step, mode: int = 0o755, uid: int = 0, gid: int = 0) -> Step:
    def make(directory: Path) -> None:
        path = directory / name
        path.mkdir()
        for step in inside:
            step(path)
        _give(path, uid, gid)
        os.chmod(path, mode)

    return make


def symlink(name: str, target: str = "nowhere", uid: int = 0, gid: int = 0) -> Step:
    def make(directory: Path) -> None:
        os.symlink(target, directory / name)
        _give(directory / name, uid, gid)

    return make


def _give(path: Path, uid: int, gid: int) -> None:
    """An ordinary user's own objects stand for root's."""
    if IS_ROOT or (uid, gid) != (0, 0):
        os.lchown(path, uid, gid)


def fifo(name: str) -> Step:
    return lambda directory: os.mkfifo(directory / name, 0o640)


def socket(name: str) -> Step:
    return lambda directory: os.mknod(directory / name, stat.S_IFSOCK | 0o755)


def device(name: str) -> Step:
    """A node of the device /dev/null."""
    return lambda directory: os.mknod(directory / name, stat.S_IFCHR | 0o640, os.makedev(1, 3))


def link(source: str, name: str) -> Step:
    return lambda directory: os.link(directory / source, directory / name)


def xattr(name: str, attribute: str, value: bytes) -> Step:
    return lambda directory: os.setxattr(directory / name, attribute, value, follow_symlinks=False)


def times(name: str, atime_ns: int, mtime_ns: int) -> Step:
    return lambda directory: os.utime(directory / name, ns=(atime_ns, mtime_ns), follow_symlinks=False)


def owned_by_nobody(directory: Path) -> None:
    """The directory of the check itself belongs to an ordinary user."""
    os.chown(directory, NOBODY, NOBODY)


# What claims are made with.


@contextmanager
def fails(number: int) -> Iterator[None]:
    """The block fails with this errno, not with another and not with success."""
    try:
        yield
    except OSError as error:
        if error.errno != number:
            raise AssertionError(f"expected {errno.errorcode[number]}, got {errno.errorcode.get(error.errno or 0, error.errno)}") from error
        return
    raise AssertionError(f"expected {errno.errorcode[number]}, but the call succeeded")


def fork() -> int:
    """os.fork, which warns since Python 3.12 of threads: the fixtures' watchdog is one, and holds no lock that a child needs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def as_user(directory: Path, act: Callable[[], object], uid: int = NOBODY, groups: tuple[int, ...] = ()) -> None:
    """Run `act` in a child that is this ordinary user, with `directory` as its working directory.

    The child gets there before it gives up root, so that the directories above need not let it in. What it raises is raised
    here, with its traceback as text.
    """
    reader, writer = os.pipe()
    child = fork()
    if child == 0:
        os.close(reader)
        _report(writer, directory, act, uid, groups)
    os.close(writer)
    with open(reader, "rb") as pipe:
        report = pipe.read()
    os.waitpid(child, 0)
    trace = pickle.loads(report)
    if trace is not None:
        raise AssertionError(f"as uid {uid}:\n{trace}")


def _report(writer: int, directory: Path, act: Callable[[], object], uid: int, groups: tuple[int, ...]) -> None:
    trace: str | None = "the child ended early"
    try:
        os.chdir(directory)
        os.setgroups(groups)
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        act()
        trace = None
    except BaseException:  # noqa: BLE001 - everything a forked child raises must reach the parent, not pytest's own frames
        trace = traceback.format_exc()
    finally:
        os.write(writer, pickle.dumps(trace))
        os._exit(0)


@contextmanager
def opened(path: str | Path, flags: int, mode: int = 0o666) -> Iterator[int]:
    fd = os.open(path, flags, mode)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def mode_of(path: Path | str) -> int:
    return os.lstat(path).st_mode & 0o7777


def names_in(path: Path) -> list[str]:
    return sorted(os.listdir(path))
