"""What hypothesis draws sequences from: few names, so that they meet; many operations, weighted by what they can break."""

from __future__ import annotations

from hypothesis import strategies as st

from tests.posix.check import NOBODY
from tests.property import operations as op

NAMES = ("a", "b", "c", "d")

paths = st.builds("/".join, st.lists(st.sampled_from(NAMES), min_size=1, max_size=3))
attributes = st.sampled_from(("user.x", "user.y", "trusted.z", "security.w"))
modes = st.sampled_from((0o600, 0o644, 0o755, 0o777, 0o2775, 0o4755))

_changes: list[st.SearchStrategy[op.Operation]] = [
    st.builds(op.Create, paths),
    st.builds(op.Write, paths, st.sampled_from((0, 3, 5000))),
    st.builds(op.Append, paths),
    st.builds(op.Truncate, paths, st.sampled_from((0, 2, 4097))),
    st.builds(op.Empty, paths),
    st.builds(op.Mkdir, paths),
    st.builds(op.Mkdir, paths),
    st.builds(op.Mkfifo, paths),
    st.builds(op.MakeSymlink, paths, paths),
    st.builds(op.Unlink, paths),
    st.builds(op.Rmdir, paths),
    st.builds(op.Remove, paths),
    st.builds(op.Remove, paths),
    st.builds(op.Rename, paths, paths),
    st.builds(op.Rename, paths, paths),
    st.builds(op.Rename, paths, paths),
    st.builds(op.RenameNoreplace, paths, paths),
    st.builds(op.Exchange, paths, paths),
    st.builds(op.Exchange, paths, paths),
    st.builds(op.Link, paths, paths),
    st.builds(op.Chmod, paths, modes),
    st.builds(op.Chown, paths, st.sampled_from((0, NOBODY))),
    st.builds(op.Utime, paths),
    st.builds(op.SetXattr, paths, attributes),
    st.builds(op.RemoveXattr, paths, attributes),
    st.builds(op.List, paths),
    st.builds(op.Read, paths),
]
changes = st.one_of(_changes)


def _as_user(operation: op.Operation) -> op.Operation:
    return op.AsUser(operation.path, operation)


def _rarely(chance: int, rare: st.SearchStrategy[op.Operation], common: st.SearchStrategy[op.Operation]) -> st.SearchStrategy[op.Operation]:
    """`rare` once in `chance` draws; shrinking leads to `common`."""
    return st.integers(0, chance - 1).flatmap(lambda number: rare if number == chance - 1 else common)


operations = _rarely(
    150,
    st.just(op.Remount(".")),
    _rarely(40, st.just(op.Forget(".")), _rarely(5, changes.map(_as_user), changes)),
)
sequences = st.lists(operations, min_size=1, max_size=30)
