"""Locks, and inotify."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Callable
from pathlib import Path

from tests.posix.check import check, fails, file, folder, fork, opened
from tests.posix.system_calls import (
    IN_ATTRIB,
    IN_CREATE,
    IN_DELETE,
    IN_MODIFY,
    IN_MOVED_FROM,
    IN_MOVED_TO,
    Inotify,
)

_OFD_SETLK = 37  # F_OFD_SETLK: python's fcntl has it from 3.9 on, but not every build


@check(file("f"))
def flock_keeps_another_descriptor_out(d: Path) -> None:
    with opened(d / "f", os.O_RDONLY) as one, opened(d / "f", os.O_RDWR) as two:
        fcntl.flock(one, fcntl.LOCK_EX)
        with fails(errno.EAGAIN):
            fcntl.flock(two, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with fails(errno.EAGAIN):
            fcntl.flock(two, fcntl.LOCK_SH | fcntl.LOCK_NB)
        fcntl.flock(one, fcntl.LOCK_UN)
        fcntl.flock(two, fcntl.LOCK_EX | fcntl.LOCK_NB)


@check(file("f"))
def flock_is_shared_by_readers(d: Path) -> None:
    with opened(d / "f", os.O_RDONLY) as one, opened(d / "f", os.O_RDONLY) as two:
        fcntl.flock(one, fcntl.LOCK_SH)
        fcntl.flock(two, fcntl.LOCK_SH | fcntl.LOCK_NB)
        with fails(errno.EAGAIN):
            fcntl.flock(two, fcntl.LOCK_EX | fcntl.LOCK_NB)


@check(file("f"))
def flock_goes_with_its_descriptor(d: Path) -> None:
    with opened(d / "f", os.O_RDONLY) as one:
        fcntl.flock(one, fcntl.LOCK_EX)
    with opened(d / "f", os.O_RDONLY) as two:
        fcntl.flock(two, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _in_child(act: Callable[[], object]) -> int:
    """Exit status of a child that runs `act`: 0 where it returned, else the errno it failed with."""
    child = fork()
    if child == 0:
        try:
            act()
        except OSError as error:
            os._exit(error.errno or 255)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@check(file("f", b"0123456789"))
def record_locks_keep_another_process_out_of_the_range(d: Path) -> None:
    with opened(d / "f", os.O_RDWR) as fd:
        fcntl.lockf(fd, fcntl.LOCK_EX, 5, 0)

        def lock_the_same() -> None:
            with opened(d / "f", os.O_RDWR) as other:
                fcntl.lockf(other, fcntl.LOCK_EX | fcntl.LOCK_NB, 5, 0)

        def lock_elsewhere() -> None:
            with opened(d / "f", os.O_RDWR) as other:
                fcntl.lockf(other, fcntl.LOCK_EX | fcntl.LOCK_NB, 5, 5)

        assert _in_child(lock_the_same) in (errno.EAGAIN, errno.EACCES)
        assert _in_child(lock_elsewhere) == 0
        fcntl.lockf(fd, fcntl.LOCK_UN, 5, 0)
        assert _in_child(lock_the_same) == 0


@check(file("f", b"0123456789"))
def open_file_description_locks_work(d: Path) -> None:
    lock = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    with opened(d / "f", os.O_RDWR) as one, opened(d / "f", os.O_RDWR) as two:
        fcntl.fcntl(one, _OFD_SETLK, lock)
        with fails(errno.EAGAIN):
            fcntl.fcntl(two, _OFD_SETLK, lock)


@check(folder("sub"))
def a_directory_can_be_locked(d: Path) -> None:
    with opened(d / "sub", os.O_RDONLY) as one, opened(d / "sub", os.O_RDONLY) as two:
        fcntl.flock(one, fcntl.LOCK_EX)
        with fails(errno.EAGAIN):
            fcntl.flock(two, fcntl.LOCK_EX | fcntl.LOCK_NB)


@check(file("f"), file("g"))
def inotify_tells_of_changes_in_a_directory(d: Path) -> None:
    with Inotify(d, IN_CREATE | IN_DELETE | IN_MOVED_FROM | IN_MOVED_TO | IN_MODIFY | IN_ATTRIB) as watch:
        (d / "new").touch()
        with opened(d / "f", os.O_WRONLY) as fd:
            os.write(fd, b"x")
        os.chmod(d / "f", 0o600)
        os.rename(d / "f", d / "moved")
        os.unlink(d / "g")
        events = watch.events()
    for expected in (
        (IN_CREATE, "new"),
        (IN_MODIFY, "f"),
        (IN_ATTRIB, "f"),
        (IN_MOVED_FROM, "f"),
        (IN_MOVED_TO, "moved"),
        (IN_DELETE, "g"),
    ):
        assert expected in events
    assert [name for mask, name in events if mask == IN_MODIFY] == ["f"]


@check(file("f"))
def inotify_on_a_file_tells_of_its_first_write(d: Path) -> None:
    with Inotify(d / "f", IN_MODIFY | IN_ATTRIB) as watch:
        with opened(d / "f", os.O_WRONLY) as fd:
            os.write(fd, b"x")
            os.write(fd, b"y")
        masks = [mask for mask, _ in watch.events()]
        assert IN_MODIFY in masks
        os.chmod(d / "f", 0o600)
        assert [mask for mask, _ in watch.events()] == [IN_ATTRIB]
