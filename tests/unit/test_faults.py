"""Every operation, failing at each of the calls that change the upper: the caller gets that error, the merged tree is the old one, and
with the cause gone the same operation works. tests/crash kills at each of these calls.
"""

from __future__ import annotations

import errno
import os

import pytest

from tests.crash.cases import BELOW, LOWER, RUNNABLE, Case
from tests.unit.conftest import StackFactory
from tests.unit.merged import Faulty, Stack, timeless


def prepared(stack: StackFactory, case: Case, limit: int | None) -> Stack:
    one: Stack = stack(LOWER, BELOW, limit=limit)
    case.prepare(one.merged)
    return one


def calls_of(stack: StackFactory, case: Case) -> int:
    one = prepared(stack, case, None)
    counted = one.merged.view.upper.calls = Faulty(0, AssertionError())
    case.act(one.merged)
    return counted.count


@pytest.mark.parametrize("limit", [None, 4], ids=["descriptors kept", "four descriptors"])
@pytest.mark.parametrize("name", RUNNABLE)
def test_a_failing_call_leaves_the_tree_as_it_was(stack: StackFactory, name: str, limit: int | None) -> None:
    case = RUNNABLE[name]
    number = calls_of(stack, case)
    assert number > 0
    for at in range(1, number + 1):
        one = prepared(stack, case, limit)
        before, calls = one.disk_tree(), one.merged.view.upper.calls
        one.merged.view.upper.calls = Faulty(at, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        try:
            case.act(one.merged)
        except OSError as error:
            assert error.errno == errno.ENOSPC
            changed = False
        else:
            changed = True  # the call served nothing that the caller asked for
        one.merged.view.upper.calls = calls
        after = one.disk_tree()
        if not changed:
            assert after == before, f"call {at} of {number}"
            assert timeless(one.merged.tree()) == before, f"call {at} of {number}: the live view"
            assert one.work_names() == [], f"call {at} of {number}"
            case.act(one.merged)  # with space again
            after = one.disk_tree()
        assert timeless(one.merged.tree()) == after, f"call {at} of {number}: the live view of the new state"
        # Something that could not be removed is tried again later, at the latest when the mount ends.
        assert one.work_names() == one.litter(), f"call {at} of {number}, after the operation"
        one.close()
        assert os.listdir(one.work / "work") == [], f"call {at} of {number}, after the mount"
