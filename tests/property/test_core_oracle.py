"""The core and the kernel's overlayfs do the same things to equal layers: the same answers, the same tree, the same marks on disk.

A sequence is a tree for each lower and a list of operations. Where pyoverlay differs on purpose, the comparison says so and why:
see `without_ephemeral_links`, `marks_of`.
"""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st

from pyoverlay.core.inode import Directory as DirectoryInode
from pyoverlay.core.policy import Fsync, Policy
from pyoverlay.core.stack import open_view
from pyoverlay.core.syscalls import RENAME_EXCHANGE, RENAME_NOREPLACE, renameat2
from pyoverlay.testing import Directory, Entry, File, Symlink, Tree, Whiteout, make_tree, snapshot, witness
from tests.posix.kernel_overlay import FULL, KernelOverlay
from tests.unit.merged import Merged, TreeSeen, timeless

pytestmark = pytest.mark.root

SEQUENCES = int(os.environ.get("PYOVERLAY_SEQUENCES", "200"))
LENGTH = int(os.environ.get("PYOVERLAY_SEQUENCE_LENGTH", "50"))

POLICY = Policy(fsync=Fsync.VOLATILE)
NOWHERE = "/nonexistent/target"  # symlinks lead there: neither side follows one to anything
ACL_DEFAULT = bytes.fromhex("02000000 01000700ffffffff 02000600e8030000 04000500ffffffff 10000700ffffffff 20000000ffffffff")

Operation = tuple[Any, ...]

# -- strategies

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


# -- the kernel's side


class KernelSide:
    """The same operations by system calls in the kernel's mount."""

    def __init__(self, root: Path) -> None:
        self.root = os.fspath(root)

    def run(self, operation: Operation) -> object:
        name, path, *rest = operation
        return getattr(self, name)(f"{self.root}/{path}", *rest)

    def create(self, path: str, content: bytes, mode: int) -> None:
        fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW, mode)
        try:
            if content:
                os.write(fd, content)
        finally:
            os.close(fd)

    def write(self, path: str, content: bytes, offset: int) -> None:
        fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        try:
            os.pwrite(fd, content, offset)
        finally:
            os.close(fd)

    def mkdir(self, path: str, mode: int) -> None:
        os.mkdir(path, mode)

    def unlink(self, path: str) -> None:
        os.unlink(path)

    def rmdir(self, path: str) -> None:
        os.rmdir(path)

    def rename(self, path: str, new: str, flags: int) -> None:
        renameat2(-100, os.fsencode(path), -100, os.fsencode(f"{self.root}/{new}"), flags)

    def link(self, path: str, new: str) -> None:
        os.link(path, f"{self.root}/{new}", follow_symlinks=False)

    def symlink(self, path: str) -> None:
        os.symlink(NOWHERE, path)

    def mkfifo(self, path: str) -> None:
        os.mkfifo(path, 0o640)

    def chmod(self, path: str, mode: int) -> None:
        os.chmod(path, mode)

    def chown(self, path: str, uid: int, gid: int) -> None:
        os.chown(path, uid, gid, follow_symlinks=False)

    def truncate(self, path: str, size: int) -> None:
        os.truncate(path, size)

    def setxattr(self, path: str, name: str, value: bytes) -> None:
        os.setxattr(path, name, value, follow_symlinks=False)

    def removexattr(self, path: str, name: str) -> None:
        os.removexattr(path, name, follow_symlinks=False)

    def default_acl(self, path: str) -> None:
        os.setxattr(path, "system.posix_acl_default", ACL_DEFAULT, follow_symlinks=False)

    def listdir(self, path: str) -> list[str]:
        return sorted(os.listdir(path))

    def stat(self, path: str) -> tuple[int, ...]:
        return _attributes(os.lstat(path), os.lstat(path).st_nlink)

    def remove_all(self, path: str) -> None:
        if not stat.S_ISDIR(os.lstat(path).st_mode):
            os.unlink(path)
            return
        for name in sorted(os.listdir(path)):
            self.remove_all(f"{path}/{name}")
        os.rmdir(path)


def _attributes(st: os.stat_result, nlink: int) -> tuple[int, ...]:
    is_directory = stat.S_ISDIR(st.st_mode)
    return (st.st_mode, st.st_uid, st.st_gid, 0 if is_directory else st.st_size, 1 if is_directory else nlink)


class CoreSide:
    """The same operations by the core."""

    def __init__(self, merged: Merged) -> None:
        self.merged = merged

    def run(self, operation: Operation) -> object:
        name, path, *rest = operation
        return getattr(self, name)(path, *rest)

    def create(self, path: str, content: bytes, mode: int) -> None:
        self.merged.create(path, content, mode)

    def write(self, path: str, content: bytes, offset: int) -> None:
        self.merged.write(path, content, offset)

    def mkdir(self, path: str, mode: int) -> None:
        self.merged.mkdir(path, mode)

    def unlink(self, path: str) -> None:
        self.merged.unlink(path)

    def rmdir(self, path: str) -> None:
        self.merged.rmdir(path)

    def rename(self, path: str, new: str, flags: int) -> None:
        self.merged.rename(path, new, flags)

    def link(self, path: str, new: str) -> None:
        self.merged.link(path, new)

    def symlink(self, path: str) -> None:
        self.merged.symlink(NOWHERE, path)

    def mkfifo(self, path: str) -> None:
        self.merged.mknod(path, stat.S_IFIFO | 0o640)

    def chmod(self, path: str, mode: int) -> None:
        self.merged.chmod(path, mode)

    def chown(self, path: str, uid: int, gid: int) -> None:
        self.merged.chown(path, uid, gid)

    def truncate(self, path: str, size: int) -> None:
        self.merged.truncate(path, size)

    def setxattr(self, path: str, name: str, value: bytes) -> None:
        self.merged.setxattr(path, name, value)

    def removexattr(self, path: str, name: str) -> None:
        self.merged.removexattr(path, name)

    def default_acl(self, path: str) -> None:
        self.merged.setxattr(path, "system.posix_acl_default", ACL_DEFAULT)

    def listdir(self, path: str) -> list[str]:
        self.merged.follow(path)
        return self.merged.listdir(path)

    def stat(self, path: str) -> tuple[int, ...]:
        return _attributes(self.merged.stat(path), self.merged.nlink(path))

    def remove_all(self, path: str) -> None:
        if not isinstance(self.merged.walk(path), DirectoryInode):
            self.merged.unlink(path)
            return
        for name in self.merged.listdir(path):
            self.remove_all(f"{path}/{name}")
        self.merged.rmdir(path)


def answer(run: Callable[[Operation], object], operation: Operation) -> object:
    try:
        return run(operation)
    except OSError as error:
        return errno.errorcode[error.errno or 0]


# -- what is compared

LINKED = "trusted.linked"  # on lower objects with several names


def is_linked(entry: Entry) -> bool:
    return any(name == LINKED for name, _ in entry.xattrs)


def without_ephemeral_links(tree: TreeSeen) -> TreeSeen:
    """A lower file's several names stay one file for as long as a mount lasts, as in the kernel with its index; the core keeps no index
    on disk, so across mounts only the names that were looked up before the copy-up lead to the copy.
    """
    return {path: replace(entry, nlink=0, first_name=b"", digest="", size=0, mode=0, uid=0, gid=0, xattrs=()) if is_linked(entry) else entry
            for path, entry in tree.items()}  # fmt: skip


def without_link_counts(tree: TreeSeen) -> TreeSeen:
    """How many names of a lower file were removed is known as long as the inode is: after FORGET the lower's own count shows."""
    return {path: replace(entry, nlink=0) if is_linked(entry) else entry for path, entry in tree.items()}


def difference(one: dict[bytes, Any], other: dict[bytes, Any]) -> list[str]:
    return [
        f"{path!r}: {one.get(path)} != {other.get(path)}" for path in sorted(one.keys() | other.keys()) if one.get(path) != other.get(path)
    ]


def marks_of(upper: Path) -> dict[bytes, tuple[object, ...]]:
    """Path to (what it is, opaque, redirect) of whiteouts and marked directories.

    Copies of a lower's directories are left out: the core copies up the directories above an object before it asks the upper whether the
    change is possible, the kernel some of the time. So are redirects to where the directory is: the kernel sets them before it asks the
    upper whether the target of a rename is empty.
    """
    found: dict[bytes, tuple[object, ...]] = {}
    for path, entry in snapshot(upper).items():
        xattrs = dict(entry.xattrs)
        opaque, redirect = xattrs.get("trusted.overlay.opaque"), xattrs.get("trusted.overlay.redirect")
        if redirect in (os.path.basename(path), b"/" + path):
            redirect = None
        if entry.kind == "c":
            found[path] = ("whiteout",)
        elif entry.kind == "d" and path != b"." and (opaque or redirect):
            found[path] = ("directory", opaque, redirect)
    return found


class Bench:
    """Equal layers for both sides, in a directory of its own."""

    def __init__(self, base: Path, sequence: Sequence) -> None:
        self.base = base
        self.lowers = [base / f"lower{number}" for number in range(1, len(sequence.lowers) + 1)]
        for lower, tree in zip(self.lowers, sequence.lowers, strict=True):
            lower.mkdir()
            make_tree(lower, tree)
        for old, new in sequence.links:
            self._link(self.lowers[0] / old, self.lowers[0] / new)
        self.ours, self.theirs, self.mount_point = base / "ours", base / "theirs", base / "merged"
        for directory in (self.ours, self.theirs, self.mount_point):
            directory.mkdir()
        if sequence.earlier:
            self._run_earlier(sequence.earlier)

    def _run_earlier(self, operations: tuple[Operation, ...]) -> None:
        upper = self.base / "earlier"
        upper.mkdir()
        kernel = self.kernel(upper, FULL)
        kernel.mount()
        try:
            side = KernelSide(self.mount_point)
            for operation in operations:
                answer(side.run, resolved(operation, self.mount_point))
        finally:
            kernel.close()
        for path, entry in snapshot(upper).items():
            if entry.nlink > 1 and entry.rdev == 0 and entry.kind != "c":
                os.setxattr(upper / os.fsdecode(path), LINKED, b"", follow_symlinks=False)
        self.lowers.insert(0, upper)

    @staticmethod
    def _link(old: Path, new: Path) -> None:
        try:
            if stat.S_ISREG(os.lstat(old).st_mode):
                os.link(old, new)
                os.setxattr(new, LINKED, b"")
        except OSError:
            return  # no such pair of names in this tree

    def kernel(self, upper: Path, options: tuple[str, ...]) -> KernelOverlay:
        return KernelOverlay(tuple(self.lowers), upper, self.mount_point, (*options, "volatile"))

    def core(self, upper: Path, work: str, limit: int) -> Merged:
        (self.base / work).mkdir()
        view = open_view([os.fsencode(lower) for lower in self.lowers], os.fsencode(upper), os.fsencode(self.base / work), POLICY)
        view.cache.limit = limit
        return Merged(view)


def told(done: list[Operation]) -> str:
    return "after\n" + "\n".join(repr(operation) for operation in done) + "\n"


def run(base: Path, sequence: Sequence) -> None:
    bench = Bench(base, sequence)
    done: list[Operation] = []
    before = [witness(lower) for lower in bench.lowers]
    merged = bench.core(bench.ours, "our-work", sequence.limit)
    kernel = bench.kernel(bench.theirs, FULL)
    kernel.mount()
    try:
        ours, theirs = CoreSide(merged), KernelSide(bench.mount_point)
        for number, operation in enumerate(sequence.operations):
            if number in sequence.forgets:
                merged.forget()
            operation = resolved(operation, bench.mount_point)
            done.append(operation)
            expected, got = answer(theirs.run, operation), answer(ours.run, operation)
            if sequence.forgets and isinstance(expected, tuple) and isinstance(got, tuple):
                expected, got = expected[:-1], got[:-1]  # see without_link_counts
            assert got == expected, f"{told(done)}: the kernel says {expected!r}, the core {got!r}"
        their_tree, our_tree = timeless(snapshot(bench.mount_point)), timeless(merged.tree())
    finally:
        kernel.close()
        merged.view.close()
    same = without_link_counts if sequence.forgets else timeless
    assert difference(same(our_tree), same(their_tree)) == [], f"{told(done)}the trees differ (ours, the kernel's)"
    assert [witness(lower) for lower in bench.lowers] == before, "a lower was changed"
    assert os.listdir(base / "our-work/work") == [], "something is left in the work directory"
    compare_disks(bench, our_tree, their_tree, told(done))


def compare_disks(bench: Bench, our_tree: TreeSeen, their_tree: TreeSeen, story: str) -> None:
    kernel = bench.kernel(bench.ours, ("redirect_dir=on", "xino=on", "index=off"))
    kernel.mount()
    try:
        seen = timeless(snapshot(bench.mount_point))
    finally:
        kernel.close()
    assert difference(without_ephemeral_links(seen), without_ephemeral_links(our_tree)) == [], (
        f"{story}the kernel sees another tree in our upper (kernel, ours)"
    )
    for upper, tree, whose in ((bench.ours, our_tree, "our"), (bench.theirs, their_tree, "the kernel's")):
        merged = bench.core(upper, f"work-over-{upper.name}", 1000)
        try:
            seen = timeless(merged.tree())
        finally:
            merged.view.close()
        assert difference(without_ephemeral_links(seen), without_ephemeral_links(tree)) == [], (
            f"{story}a fresh view sees another tree in {whose} upper (fresh, live)"
        )
    assert difference(marks_of(bench.ours), marks_of(bench.theirs)) == [], f"{story}the marks differ (ours, the kernel's)"


@pytest.fixture(scope="module")
def numbers() -> Iterator[int]:
    return itertools.count()


@pytest.mark.timeout(3600)
@settings(
    max_examples=SEQUENCES,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink),
    print_blob=True,
)
@given(sequence=sequences)
def test_the_core_and_the_kernel_do_the_same(tmp_path_factory: pytest.TempPathFactory, sequence: Sequence) -> None:
    note(str(sequence))
    base = tmp_path_factory.mktemp("oracle")
    old = os.umask(0o022)
    try:
        run(base, sequence)
    finally:
        os.umask(old)
        shutil.rmtree(base)
