"""Every operation, failing at each system call: the caller gets that error, the merged tree is the old one, nothing is left behind, and
with the cause gone the same operation works. tests/crash kills at each of the calls that change something.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest

from pyoverlay.core import change, copyup, copyup_directory, index, layer, merge, metacopy, objects, origins, reads, rename, upper, view
from tests.crash.cases import AT_ONCE, BELOW, CASES, LOWER, RUNNABLE, Case
from tests.unit.conftest import StackFactory
from tests.unit.merged import POLICY, Faulty, Stack, timeless
from tests.unit.wired import FaultyWiredReading, WiredFaulty

CHANGING_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EMFILE, errno.ENOMEM, errno.EROFS)
READING_ERRORS = (errno.EIO, errno.ENOMEM, errno.EMFILE, errno.EACCES)


def failure(code: int) -> OSError:
    return OSError(code, os.strerror(code))


def prepared(stack: StackFactory, case: Case, limit: int | None) -> Stack:
    one: Stack = stack(LOWER, BELOW, limit=limit, policy=case.policy(POLICY))
    case.prepare(one.merged)
    return one


def calls_of(stack: StackFactory, case: Case, faulty: type[Faulty] = Faulty) -> Faulty:
    one = prepared(stack, case, None)
    counted = one.merged.view.upper.calls = faulty(0, AssertionError())
    case.act(one.merged)
    return counted


def fail_changing(stack: StackFactory, case: Case, at: int, code: int, limit: int | None = None, faulty: type[Faulty] = Faulty) -> None:
    one = prepared(stack, case, limit)
    before, calls, descriptors = one.disk_tree(), one.merged.view.upper.calls, open_descriptors(one)
    one.merged.view.upper.calls = faulty(at, failure(code))
    try:
        case.act(one.merged)
    except OSError as error:
        assert error.errno == code
        changed = False
    else:
        changed = True  # the call served nothing that the caller asked for
    one.merged.view.upper.calls = calls
    after = one.disk_tree()
    if not changed:
        assert after == before
        assert timeless(one.merged.tree()) == before, "the live view"
        assert one.work_names() == []
        assert open_descriptors(one) == descriptors
        case.act(one.merged)  # with space again
        after = one.disk_tree()
    assert timeless(one.merged.tree()) == after, "the live view of the new state"
    # Something that could not be removed is tried again later, at the latest when the mount ends.
    assert one.work_names() == one.litter()
    one.close()
    assert os.listdir(one.work / "work") == [], "after the mount"


def open_descriptors(one: Stack) -> int:
    """How many there are besides those that the cache would close by itself."""
    one.merged.view.cache.close_all()
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("limit", [None, 4], ids=["descriptors kept", "four descriptors"])
@pytest.mark.parametrize("name", RUNNABLE)
def test_a_failing_change_leaves_the_tree_as_it_was(stack: StackFactory, name: str, limit: int | None) -> None:
    """Each call with one error, each error at many calls; all of them with --slow."""
    case = RUNNABLE[name]
    for at in range(1, calls_of(stack, case).count + 1):
        fail_changing(stack, case, at, CHANGING_ERRORS[at % len(CHANGING_ERRORS)], limit)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("code", CHANGING_ERRORS, ids=errno.errorcode.__getitem__)
@pytest.mark.parametrize("name", RUNNABLE)
def test_a_change_that_fails_with_any_error_leaves_the_tree_as_it_was(stack: StackFactory, name: str, code: int) -> None:
    case = RUNNABLE[name]
    for at in range(1, calls_of(stack, case).count + 1):
        fail_changing(stack, case, at, code)


@pytest.mark.wire
@pytest.mark.parametrize("name", AT_ONCE)
def test_a_change_that_fails_within_one_call_of_the_extension_leaves_the_tree_as_it_was(stack: StackFactory, name: str) -> None:
    counted = calls_of(stack, CASES[name], WiredFaulty)
    assert isinstance(counted, WiredFaulty)
    assert counted.at_once > 0, counted.made
    for at in range(1, counted.count + 1):
        for code in CHANGING_ERRORS[at % 3 :: 3]:
            fail_changing(stack, CASES[name], at, code, faulty=WiredFaulty)


@pytest.mark.wire
@pytest.mark.parametrize("name", ["chmod_of_a_lower_file", "truncate_of_a_lower_file", "rename_of_a_lower_file"])
def test_a_read_that_fails_within_one_call_of_the_extension_leaves_the_tree_as_it_was(stack: StackFactory, name: str) -> None:
    counted = calls_of(stack, CASES[name], FaultyWiredReading)
    assert isinstance(counted, FaultyWiredReading)
    reads = ["openat", "fstat", "fstat", "preadv2", "flistxattr", "fgetxattr", "name_to_handle_at", "fstat"]
    assert counted.made_to_read == reads
    for at in range(1, len(reads) + 1):
        for code in READING_ERRORS:
            fail_changing(stack, CASES[name], at, code, faulty=FaultyWiredReading)


class FaultyReading:
    """Stands for the module `os` where the core reads layers: counts its calls, and fails the one of number `at`."""

    NAMES = ("stat", "fstat", "open", "readlink", "getxattr", "listxattr", "scandir", "dup", "pread", "lseek")

    def __init__(self, at: int, code: int) -> None:
        self.made: list[str] = []
        self.at = at
        self.code = code

    def __getattr__(self, name: str) -> Any:
        value = getattr(os, name)
        return partial(self._call, name, value) if name in self.NAMES else value

    def _call(self, name: str, call: Callable[..., object], *arguments: object, **named: object) -> object:
        self.made.append(name)
        if len(self.made) == self.at:
            raise failure(self.code)
        return call(*arguments, **named)


@contextmanager
def reading(at: int, code: int) -> Iterator[FaultyReading]:
    faulty = FaultyReading(at, code)
    with pytest.MonkeyPatch.context() as patch:
        for module in (change, copyup, copyup_directory, index, layer, merge, metacopy, objects, origins, reads, rename, upper, view):
            patch.setattr(module, "os", faulty)
        yield faulty


LATE = ("chmod", "chown", "utime", "truncate", "growth", "emptying")


def reads_of(stack: StackFactory, case: Case) -> list[str]:
    one = prepared(stack, case, None)
    with reading(0, 0) as counted:
        case.act(one.merged)
    return counted.made


def fail_reading(stack: StackFactory, name: str, made: list[str], at: int, code: int) -> None:
    case = RUNNABLE[name]
    where = f"{made[at - 1]}, {at} of {made}"
    one = prepared(stack, case, None)
    before, descriptors = one.disk_tree(), open_descriptors(one)
    try:
        with reading(at, code):
            case.act(one.merged)
    except OSError as error:
        # A tree that may not be copied up for a rename is mv's affair.
        assert error.errno == code or ((code, error.errno) == (errno.EACCES, errno.EXDEV) and "by_copying" in name), where
        after = one.disk_tree()
        assert timeless(one.merged.tree()) == after, f"{where}: the live view"
        if after == before:
            assert open_descriptors(one) == descriptors
            case.act(one.merged)
        else:
            # It is done, and only what the answer says of it could not be read. Making a name is taken back then.
            assert name.startswith(LATE), where
            assert at == len(made)
    assert timeless(one.merged.tree()) == one.disk_tree(), f"{where}: the live view of the new state"
    assert one.work_names() == one.litter() == [], where
    one.close()


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", RUNNABLE)
def test_a_failing_read_leaves_the_tree_as_it_was(stack: StackFactory, name: str) -> None:
    """Every fourth call; all of them, with each error, with --slow."""
    made = reads_of(stack, RUNNABLE[name])
    for turn, at in enumerate(range(len(made), 0, -4)):
        fail_reading(stack, name, made, at, READING_ERRORS[turn % len(READING_ERRORS)])


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("code", READING_ERRORS, ids=errno.errorcode.__getitem__)
@pytest.mark.parametrize("name", RUNNABLE)
def test_a_read_that_fails_with_any_error_leaves_the_tree_as_it_was(stack: StackFactory, name: str, code: int) -> None:
    made = reads_of(stack, RUNNABLE[name])
    for at in range(1, len(made) + 1):
        fail_reading(stack, name, made, at, code)
