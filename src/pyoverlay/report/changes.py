"""What an upper changes: the merged tree compared with that of the lowers alone, by walking the upper.

Two views are opened: `before`, of the lowers; `after`, with the upper on top as one more layer that is only read. Where a directory's
halves below the upper are those of `before`, nothing but the names in the upper can differ, and only these are asked for. Where they
are not (an opaque directory, one that was moved there by a redirect), the two are compared name by name: that much has changed.

The rules of what counts are those of `docker diff` (moby, pkg/archive/changes_unix.go): a file has changed if its type, mode, owner,
device number, size, mtime or file capability has; a directory if its mode, owner or capability has, or anything in it. What is in the
upper and the same by these rules was copied up without a change.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from types import TracebackType

from pyoverlay.core.inode import Directory, Inode
from pyoverlay.core.layer import LowerDir
from pyoverlay.core.policy import Policy
from pyoverlay.core.stack import open_probed
from pyoverlay.core.syscalls import Stat
from pyoverlay.core.view import View
from pyoverlay.report import spelling

_CAPABILITY = b"security.capability"
_NS = 1_000_000_000
_UPPER = 1  # the upper's index in the view `after`, see open_probed


class Kind(Enum):
    """What became of a path. The first three are the letters of `docker diff`."""

    ADDED = "A"
    CHANGED = "C"
    DELETED = "D"
    COPIED_UP = "U"  # in the upper, and unchanged all the same


@dataclass(frozen=True, slots=True)
class Change:
    """One path of the merged tree that is not as in the lowers, or lies in the upper without need.

    path: from the root of the merged tree, without a slash in front. st: its attributes now, of a deleted one those that it had. inode:
    the object in `Comparison.after`, to be read through that view; None if deleted. in_upper: the object itself lies in the upper (else it
    shows at a new place, by the redirect of a directory above). is_opaque: a directory that shows nothing of the one that the lowers have
    under its name.
    """

    kind: Kind
    path: bytes
    st: Stat
    inode: Inode | None
    in_upper: bool
    is_opaque: bool = False

    @property
    def is_directory(self) -> bool:
        return stat.S_ISDIR(self.st.st_mode)


Found = tuple[Inode, Stat]


class Comparison:
    """The merged tree of `upper` over `lowers` (top first; absolute paths), and the lowers alone. A context manager.

    policy: the mount's. work: its work directory, which like the upper shows empty where a lower contains it. data_lowers: layers below
    that show nothing but data of metacopy files. spelling_is_known: that of the upper's marks is the policy's. Raises OSError with the path
    as its filename.
    """

    def __init__(
        self,
        upper: bytes,
        lowers: Sequence[bytes],
        policy: Policy,
        work: bytes | None = None,
        data_lowers: Sequence[bytes] = (),
        *,
        spelling_is_known: bool = True,
    ) -> None:
        empty = masked(upper, work)
        self.upper = upper
        self.policy = policy
        self.spelling_is_known = spelling_is_known
        self.before = open_probed(lowers, policy, masked=empty, data_layers=data_lowers)
        try:
            self.after = open_probed(lowers, policy, upper=upper, masked=empty, data_layers=data_lowers)
        except OSError:
            self.before.close()
            raise

    def __enter__(self) -> Comparison:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Let go of every layer."""
        self.before.close()
        self.after.close()

    def changes(self, *, copy_ups: bool = False) -> Iterator[Change]:
        """Every change, a directory before what is in it, names in the order of their bytes. copy_ups: unchanged ones too.

        A deleted directory is one change; a new one is followed by all it holds. Raises OSError with the path in the merged tree as its
        filename, Refusal where the upper's marks are not spelled as they should be.
        """
        return _Walk(self, copy_ups=copy_ups).run()

    def differs(self, after: Found, before: Found) -> bool:
        """Whether two objects of one name differ by the rules above. What a directory contains is not looked at."""
        (inode, now), (old, then) = after, before
        owners = self.after.owners  # as the mount shows them: where ids are squashed, all are the same
        if now.st_mode != then.st_mode or owners.shown(now) != owners.shown(then):
            return True
        if not stat.S_ISDIR(now.st_mode):
            is_device = stat.S_ISCHR(now.st_mode) or stat.S_ISBLK(now.st_mode)
            if now.st_size != then.st_size or (is_device and now.st_rdev != then.st_rdev) or not _is_same_time(now, then):
                return True
        return _capability(self.after, inode) != _capability(self.before, old)


def masked(upper: bytes, work: bytes | None) -> frozenset[tuple[int, int]]:
    """(st_dev, st_ino) of the directories that show empty where a lower contains them, for open_probed."""
    return frozenset((st.st_dev, st.st_ino) for st in (os.stat(path) for path in (upper, work) if path is not None))


def _is_same_time(now: Stat, then: Stat) -> bool:
    """Nanoseconds count only where both have some: what came out of a tar archive has none."""
    seconds, ns = divmod(now.st_mtime_ns, _NS)
    old_seconds, old_ns = divmod(then.st_mtime_ns, _NS)
    return seconds == old_seconds and (ns == old_ns or not ns or not old_ns)


def _capability(view: View, inode: Inode) -> bytes | None:
    try:
        return view.getxattr(inode, _CAPABILITY)
    except OSError as error:
        if error.errno in (errno.ENODATA, errno.EOPNOTSUPP):
            return None
        raise


def _in_upper(inode: Inode) -> bool:
    directory = inode.lowers[0] if isinstance(inode, Directory) else inode.lower_dir
    return directory is not None and directory.layer.index == _UPPER


def _place(directory: LowerDir) -> tuple[int, tuple[bytes, ...]]:
    """What a directory of a layer is known by in either view: the layer's index, and the names that lead there."""
    names: list[bytes] = []
    here = directory
    while here.parent is not None:
        names.append(here.name)
        here = here.parent
    return directory.layer.index, tuple(names)


class _Frame:
    """A directory that is being gone through.

    held: changes that may be given out only once it is known whether anything in the directory has changed, the directory itself first;
    None: nothing is held back.
    """

    __slots__ = ("after", "before", "held", "names", "path")

    def __init__(self, path: bytes, after: Directory, before: Directory | None, names: Iterator[bytes], held: list[Change] | None) -> None:
        self.path = path
        self.after = after
        self.before = before
        self.names = names
        self.held = held


class _Walk:
    """One pass. The stack is its own: a tree may be deeper than Python's."""

    def __init__(self, comparison: Comparison, *, copy_ups: bool) -> None:
        self._comparison = comparison
        self._after = comparison.after
        self._before = comparison.before
        self._copy_ups = copy_ups
        self._frames: list[_Frame] = []

    def run(self) -> Iterator[Change]:
        self._enter(b"", self._after.root, self._before.root, None)
        while self._frames:
            frame = self._frames[-1]
            name = next(frame.names, None)
            if name is None:
                yield from self._leave()
                continue
            path = frame.path + b"/" + name if frame.path else name
            try:
                changes = self._look_at(frame, name, path)
            except OSError as error:
                raise OSError(error.errno, error.strerror, os.fsdecode(path)) from error
            yield from changes
            self._after.trim()
            self._before.trim()

    def _look_at(self, frame: _Frame, name: bytes, path: bytes) -> list[Change]:
        """What is to be said of one name now. If it is a directory, it is entered."""
        after = self._after.lookup(frame.after, name)
        before = None if frame.before is None else self._before.lookup(frame.before, name)
        change = self._judged(path, after, before)
        is_held = change is not None and change.kind is Kind.COPIED_UP and change.is_directory
        if after is not None and isinstance(after[0], Directory):
            below = before[0] if before is not None and isinstance(before[0], Directory) else None
            said = [] if change is None or is_held else self._said(change)
            self._enter(path, after[0], below, [change] if is_held and change is not None else None)
            return said
        for view, found in ((self._after, after), (self._before, before)):
            if found is not None:
                view.release(found[0])
        return [] if change is None else self._said(change)

    def _judged(self, path: bytes, after: Found | None, before: Found | None) -> Change | None:
        if after is None:
            # Without either it is a whiteout that hides nothing.
            return None if before is None else Change(Kind.DELETED, path, before[1], None, in_upper=False)
        inode, st = after
        in_upper = _in_upper(inode)
        if before is None:
            return Change(Kind.ADDED, path, st, inode, in_upper)
        was_directory = isinstance(before[0], Directory)
        is_opaque = was_directory and in_upper and isinstance(inode, Directory) and len(inode.lowers) == 1
        kind = Kind.CHANGED if self._comparison.differs(after, before) else Kind.COPIED_UP
        return Change(kind, path, st, inode, in_upper, is_opaque)

    def _said(self, change: Change) -> list[Change]:
        """The change, after the directories above it that were held back; nothing if it is held back as well."""
        if change.kind is not Kind.COPIED_UP:
            return [*self._let_go(), change]
        if not self._copy_ups or not change.in_upper:
            return []
        held = self._frames[-1].held
        if held is None:
            return [change]
        held.append(change)
        return []

    def _let_go(self) -> Iterator[Change]:
        for frame in self._frames:
            if frame.held is not None:
                directory, *rest = frame.held
                yield replace(directory, kind=Kind.CHANGED)
                yield from rest
                frame.held = None

    def _enter(self, path: bytes, after: Directory, before: Directory | None, held: list[Change] | None) -> None:
        after.nlookup += 1  # it stays known while its entries come and go
        if before is not None:
            before.nlookup += 1
        if not self._comparison.spelling_is_known and _in_upper(after):
            layer = after.lowers[0].layer
            spelling.require_trusted(layer, layer.dirfd(after.lowers[0]), b".", os.path.join(self._comparison.upper, path))
        self._frames.append(_Frame(path, after, before, iter(sorted(self._names(after, before))), held))

    def _names(self, after: Directory, before: Directory | None) -> set[bytes]:
        """The names under which something can have changed."""
        if before is None:
            return set(self._after.listing(after))
        upper, below = (after.lowers[0], after.lowers[1:]) if _in_upper(after) else (None, after.lowers)
        if [_place(lower) for lower in below] != [_place(lower) for lower in before.lowers]:
            return {*self._after.listing(after), *self._before.listing(before)}
        if upper is None:
            return set()
        contents = upper.layer.read(upper)
        return {*contents.names, *contents.whiteouts}

    def _leave(self) -> Iterator[Change]:
        frame = self._frames.pop()
        if self._frames:
            self._after.forget(frame.after.ino, 1)
            if frame.before is not None:
                self._before.forget(frame.before.ino, 1)
        if frame.held is None:
            return
        unchanged = [change for change in frame.held if self._copy_ups and change.in_upper]
        if self._frames[-1].held is None:
            yield from unchanged
        else:
            self._frames[-1].held += unchanged
