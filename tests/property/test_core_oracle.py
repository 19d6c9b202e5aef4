"""The core and the kernel's overlayfs do the same things to equal layers: the same answers, the same tree, the same marks on disk.

A sequence is a tree for each lower and a list of operations. Where pyoverlay differs on purpose, the comparison says so and why:
see `without_ephemeral_links`, `disk_difference`.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, note

from pyoverlay.core import stack as stacking
from pyoverlay.core.inode import Directory as DirectoryInode
from pyoverlay.core.policy import Fsync, Policy
from pyoverlay.core.stack import open_view
from pyoverlay.core.syscalls import Stat, renameat2
from pyoverlay.testing import Entry, make_tree, snapshot, witness
from tests.posix.kernel_overlay import FULL, KernelOverlay
from tests.property.disks import disk_difference
from tests.property.draws import SEQUENCES, drawn
from tests.property.sequences import ACL_DEFAULT, NOWHERE, Operation, Sequence, resolved, sequences
from tests.unit.asked import Asked
from tests.unit.merged import Merged, TreeSeen, timeless

pytestmark = pytest.mark.root

POLICY = Policy(fsync=Fsync.VOLATILE)
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


def _attributes(st: Stat, nlink: int) -> tuple[int, ...]:
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
        view.pin_limit = limit // 2
        return Merged(view)


def told(done: list[Operation]) -> str:
    return "after\n" + "\n".join(repr(operation) for operation in done) + "\n"


def side_by_side(
    bench: Bench, merged: Merged, kernel: KernelOverlay, sequence: Sequence, done: list[Operation], *, counts_links: bool
) -> tuple[TreeSeen, TreeSeen]:
    """Each operation on both, which answer the same; then the trees, ours and the kernel's. done: gets what was done. Ends both mounts.

    counts_links: whether the link count that an answer ends with has to agree.
    """
    kernel.mount()
    try:
        ours, theirs = CoreSide(merged), KernelSide(bench.mount_point)
        for number, operation in enumerate(sequence.operations):
            if number in sequence.forgets:
                merged.forget()
            operation = resolved(operation, bench.mount_point)
            done.append(operation)
            expected, got = answer(theirs.run, operation), answer(ours.run, operation)
            if not counts_links and isinstance(expected, tuple) and isinstance(got, tuple):
                expected, got = expected[:-1], got[:-1]
            assert got == expected, f"{told(done)}: the kernel says {expected!r}, the core {got!r}"
        return timeless(merged.tree()), timeless(snapshot(bench.mount_point))
    finally:
        kernel.close()
        merged.view.close()


def run(base: Path, sequence: Sequence, kind: type[Merged] = Merged) -> None:
    """kind: how our side is driven."""
    bench = Bench(base, sequence)
    done: list[Operation] = []
    before = [witness(lower) for lower in bench.lowers]
    merged = kind(bench.core(bench.ours, "our-work", sequence.limit).view)
    kernel = bench.kernel(bench.theirs, FULL)
    counts_links = not sequence.forgets  # see without_link_counts
    our_tree, their_tree = side_by_side(bench, merged, kernel, sequence, done, counts_links=counts_links)
    same = timeless if counts_links else without_link_counts
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
    assert disk_difference(bench.theirs, bench.ours) == "", f"{story}the uppers differ"


@pytest.mark.timeout(60 + SEQUENCES)
@drawn(SEQUENCES)
@given(sequence=sequences)
def test_the_core_and_the_kernel_do_the_same(apart: Path, sequence: Sequence) -> None:
    draw(apart, sequence)


@pytest.mark.timeout(60 + SEQUENCES)
@drawn(SEQUENCES // 4)
@given(sequence=sequences)
def test_they_do_the_same_where_every_lower_has_to_be_asked(apart: Path, monkeypatch: pytest.MonkeyPatch, sequence: Sequence) -> None:
    monkeypatch.setattr(stacking, "is_local", lambda fd: False)
    draw(apart, sequence, Asked)


def draw(apart: Path, sequence: Sequence, kind: type[Merged] = Merged) -> None:
    note(str(sequence))
    base = apart / "oracle"
    base.mkdir()
    old = os.umask(0o022)
    try:
        run(base, sequence, kind)
    finally:
        os.umask(old)
        shutil.rmtree(base)
