"""The next operation, drawn for the tree as it is: most of them then do something, and the rest meet what is in their way."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from hypothesis import strategies as st

from tests.posix.check import NOBODY
from tests.property import operations as op

NAMES = ("a", "b", "c", "d")
DEPTH = 3

Operations = st.SearchStrategy[op.Operation]


@dataclass(frozen=True, slots=True)
class Paths:
    """What there is in a tree, and what could be made in it."""

    everything: list[str]
    directories: list[str]
    others: list[str]
    free: list[str]

    @classmethod
    def of(cls, tree: Path) -> Paths:
        directories, others = [], []
        free = []
        for parent, below, files in os.walk(os.fsencode(tree)):
            at = os.fsdecode(os.path.relpath(parent, os.fsencode(tree)))
            prefix = "" if at == "." else at + "/"
            directories += [prefix + os.fsdecode(name) for name in below]
            others += [prefix + os.fsdecode(name) for name in files]
            if prefix.count("/") < DEPTH:
                free += [prefix + name for name in NAMES if os.fsencode(name) not in below + files]
        return cls(sorted(directories + others), sorted(directories), sorted(others), sorted(free))


def operations(paths: Paths) -> Operations:
    """Any operation, some by an ordinary user; now and then the kernel forgets what it knows, or we mount again."""
    calls = _one_in(6, _calls(paths).map(_as_user), _calls(paths))
    return _one_in(40, st.just(op.Remount(".")), _one_in(15, st.just(op.Forget(".")), calls))


def _one_in(chance: int, rare: Operations, common: Operations) -> Operations:
    """`rare` once in `chance` draws; shrinking leads to `common`."""
    return st.integers(0, chance - 1).flatmap(lambda number: rare if number == chance - 1 else common)


def _as_user(operation: op.Operation) -> op.Operation:
    return op.AsUser(operation.path, operation)


def _calls(paths: Paths) -> Operations:
    wild = st.lists(st.sampled_from(NAMES), min_size=1, max_size=DEPTH).map("/".join)
    there, directory, other, free = (_mostly(some, wild) for some in (paths.everything, paths.directories, paths.others, paths.free))
    target = st.one_of(free, free, there)
    attribute = st.sampled_from(("user.x", "user.y", "trusted.z", "security.w"))
    mode = st.sampled_from((0o600, 0o644, 0o755, 0o777, 0o2775, 0o4755))
    return st.one_of(
        st.builds(op.Create, free),
        st.builds(op.Write, other, st.sampled_from((0, 3, 5000))),
        st.builds(op.Append, st.one_of(other, free)),
        st.builds(op.Truncate, other, st.sampled_from((0, 2, 4097))),
        st.builds(op.Empty, other),
        st.builds(op.Mkdir, free),
        st.builds(op.Mkfifo, free),
        st.builds(op.MakeSymlink, free, wild),
        st.builds(op.Unlink, other),
        st.builds(op.Rmdir, directory),
        st.builds(op.Remove, there),
        st.builds(op.Replace, directory),
        st.builds(op.Rename, other, target),
        st.builds(op.Rename, directory, target),
        st.builds(op.RenameNoreplace, there, target),
        st.builds(op.Exchange, there, there),
        st.builds(op.Exchange, directory, there),
        st.builds(op.Link, other, target),
        st.builds(op.Chmod, there, mode),
        st.builds(op.Chown, there, st.sampled_from((0, NOBODY))),
        st.builds(op.Utime, there),
        st.builds(op.SetXattr, there, attribute),
        st.builds(op.RemoveXattr, there, attribute),
        st.builds(op.List, directory),
        st.builds(op.Read, other),
    )


def _mostly(some: list[str], wild: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    if not some:
        return wild
    return st.integers(0, 9).flatmap(lambda number: wild if number == 9 else st.sampled_from(some))
