"""What the core and the kernel are given: a tree for each lower, what an earlier mount made of them, and a list of operations."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from hypothesis import strategies as st

from pyoverlay.core.syscalls import RENAME_EXCHANGE, RENAME_NOREPLACE
from pyoverlay.testing import Directory, File, Symlink, Tree, Whiteout

LENGTH = 50  # operations in a sequence, at most
NOWHERE = "/nonexistent/target"  # symlinks lead there: neither side follows one to anything
ACL_DEFAULT = bytes.fromhex("02000000 01000700ffffffff 02000600e8030000 04000500ffffffff 10000700ffffffff 20000000ffffffff")

Operation = tuple[Any, ...]

NAMES = ("a", "b", "c")
DEPTH = 3
names = st.sampled_from(NAMES)
wild = st.lists(names, min_size=1, max_size=3).map("/".join)
contents = st.sampled_from([b"", b"one", b"two" * 100, b"three" * 2000])
modes = st.sampled_from([0o644, 0o600, 0o4755, 0o2711, 0o777])
directory_modes = st.sampled_from([0o755, 0o700, 0o2775, 0o1777])
owners = st.sampled_from([0, 1000])
xattr_names = st.sampled_from(["user.one", "trusted.two", "trusted.overlay.opaque", "trusted.overlay.own"])
rename_flags = st.sampled_from([0, 0, 0, RENAME_NOREPLACE, RENAME_EXCHANGE])

files = st.builds(File, contents, modes, uid=owners, gid=owners)
leaves = st.one_of(files, files, st.just(Symlink(NOWHERE)), st.just(Whiteout()))


def directories(below: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    entries = st.dictionaries(names, below, max_size=3)
    xattrs = st.sampled_from([{}, {}, {"trusted.overlay.opaque": b"y"}])
    return st.builds(lambda entries, mode, xattrs: Directory(entries, mode, xattrs=xattrs), entries, directory_modes, xattrs)


nodes = st.recursive(leaves, directories, max_leaves=8)
lower_trees = st.one_of(st.dictionaries(names, nodes, max_size=3), st.just({}))


class Pick(NamedTuple):
    """One of the paths there are, or a name in one of the directories: which, is known when the operation runs."""

    kind: str  # "any", "file", "directory", or "in" a directory
    number: int
    name: str = ""

    def resolve(self, root: Path) -> str:
        directories, others = [""], []
        for parent, below, files in os.walk(root):
            at = os.path.relpath(parent, root)
            prefix = "" if at == "." else at + "/"
            directories += [prefix + name for name in below]
            others += [prefix + name for name in files]
        if self.kind == "in":
            shallow = sorted(path for path in directories if path.count("/") < DEPTH - 1)
            return f"{shallow[self.number % len(shallow)]}/{self.name}".lstrip("/")
        found = {"any": directories[1:] + others, "file": others, "directory": directories[1:]}[self.kind]
        return sorted(found)[self.number % len(found)] if found else NAMES[0]


def picks(*kinds: str) -> st.SearchStrategy[Pick]:
    return st.builds(Pick, st.sampled_from(kinds), st.integers(0, 30), names)


def mostly(common: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Now and then what fits the operation less well."""
    return st.one_of(common, common, common, common, picks("any"), wild)


there, file, directory, free = (mostly(picks(kind)) for kind in ("any", "file", "directory", "in"))
target = st.one_of(free, free, there, directory)

operations = st.one_of(
    st.tuples(st.just("create"), free, contents, modes),
    st.tuples(st.just("write"), file, contents, st.sampled_from([0, 2, 5000])),
    st.tuples(st.just("mkdir"), free, directory_modes),
    st.tuples(st.just("unlink"), file),
    st.tuples(st.just("rmdir"), directory),
    st.tuples(st.just("rename"), file, target, rename_flags),
    st.tuples(st.just("rename"), directory, target, rename_flags),
    st.tuples(st.just("rename"), directory, directory, rename_flags),
    st.tuples(st.just("link"), file, free),
    st.tuples(st.just("symlink"), free),
    st.tuples(st.just("mkfifo"), free),
    st.tuples(st.just("chmod"), there, modes),
    st.tuples(st.just("chown"), there, owners, owners),
    st.tuples(st.just("truncate"), file, st.sampled_from([0, 2, 300])),
    st.tuples(st.just("setxattr"), there, xattr_names, st.sampled_from([b"", b"y", b"value"])),
    st.tuples(st.just("removexattr"), there, xattr_names),
    st.tuples(st.just("default_acl"), directory),
    st.tuples(st.just("listdir"), directory),
    st.tuples(st.just("stat"), there),
    st.tuples(st.just("remove_all"), there),
    st.tuples(st.just("remove_all"), directory),
)


def resolved(operation: Operation, root: Path) -> Operation:
    return tuple(operand.resolve(root) if isinstance(operand, Pick) else operand for operand in operation)


def lists_of_length(most: int) -> st.SearchStrategy[tuple[Operation, ...]]:
    """Of every length as often: lists left to themselves are short."""
    return st.integers(1, most).flatmap(lambda length: st.lists(operations, min_size=length, max_size=length)).map(tuple)


RICH: Tree = {
    "a": Directory({"a": Directory({"a": File("aaa"), "b": File("aab")}), "b": File("ab"), "c": Symlink(NOWHERE)}),
    "b": Directory({"a": Directory({"c": File("bac")}), "b": Directory({})}),
    "c": File("c", 0o4755),
}  # fmt: skip


@dataclass(frozen=True)
class Sequence:
    """What both sides are given."""

    lowers: tuple[Tree, ...]
    links: tuple[tuple[str, str], ...]
    earlier: tuple[Operation, ...]  # what an earlier mount of the kernel's did: its upper is the top lower
    operations: tuple[Operation, ...]
    forgets: frozenset[int]
    limit: int

    def __str__(self) -> str:
        lines = [f"lower {number}: {tree!r}" for number, tree in enumerate(self.lowers, 1)]
        return "\n".join(
            [
                *lines,
                f"links {self.links}",
                f"earlier {self.earlier}",
                f"descriptors {self.limit}",
                *(f"{step!r}" for step in self.operations),
            ]
        )


def without_ghosts(tree: Tree, below: tuple[Tree, ...]) -> Tree:
    """A lower without whiteouts in directories that no lower below has too: the kernel lists those as entries that cannot be looked at."""
    kept: dict[str, Any] = {}
    for name, node in tree.items():
        if isinstance(node, Directory):
            merged = () if node.xattrs else directories_at(name, below)
            kept[name] = replace(node, entries=without_ghosts(node.entries, merged))
        elif below or not isinstance(node, Whiteout):
            kept[name] = node
    return kept


def directories_at(name: str, below: tuple[Tree, ...]) -> tuple[Tree, ...]:
    """What a directory of that name merges with, from the top."""
    found: list[Tree] = []
    for tree in below:
        node = tree.get(name)
        if isinstance(node, Directory):
            found.append(node.entries)
        if node is not None and not (isinstance(node, Directory) and not node.xattrs):
            break
    return tuple(found)


def make_sequence(lowers: list[Tree], *rest: Any) -> Sequence:
    clean: list[Tree] = []
    for tree in reversed(lowers):
        clean.insert(0, without_ghosts(tree, tuple(clean)))
    return Sequence(tuple(clean), *rest)


sequences = st.builds(
    make_sequence,
    st.lists(lower_trees | st.just(RICH), min_size=1, max_size=3),
    st.lists(st.tuples(wild, wild), max_size=4).map(tuple),
    st.just(()) | lists_of_length(12),
    lists_of_length(LENGTH),
    st.frozensets(st.integers(0, LENGTH), max_size=3),
    st.sampled_from([4, 1000]),
)
