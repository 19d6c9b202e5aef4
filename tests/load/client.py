"""A program that works at random in a directory and knows what must be there: `python -m tests.load.client DIRECTORY NUMBER SEED LIMIT`.

In the spirit of fsstress: random operations on names of its own in DIRECTORY/NUMBER, each checked against a model, and some on names
that all clients share in DIRECTORY/shared, where others interfere. LIMIT is "SECONDS s" or "OPERATIONS". A line of JSON tells the
outcome; with an error, also which operation was under way: its outcome is then unknown. A fifth argument is a process to kill after
LIMIT operations, with as many more to follow.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import signal
import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.posix.system_calls import RENAME_EXCHANGE, renameat2

PAGE = 4096  # what a write(2) changes as a whole or not at all, whatever is killed meanwhile: the kernel may send one WRITE a page
MOST_BYTES = 60_000
RECORD = 512
SHARED_NAMES = 12
# What operations on shared names may answer, since others work there too.
INTERFERENCE = {errno.ENOENT, errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR, errno.EINVAL}


class Wrong(AssertionError):
    """The mount answered something else than the model."""


@dataclass(slots=True)
class Node:
    """An object of the model: a directory, a file, or, with a target, a symlink."""

    mode: int = 0o755
    content: bytes | None = None
    target: str | None = None
    note: bytes | None = None  # an extended attribute

    def copy(self) -> Node:
        return Node(self.mode, self.content, self.target, self.note)

    @property
    def is_directory(self) -> bool:
        return self.content is None and self.target is None


Description = dict[str, list[object]]  # path: kind, mode, digest or target, attribute, first path of the same file


def described(nodes: dict[str, Node]) -> Description:
    """A model as something to compare."""
    first: dict[int, str] = {}
    return {path: _describe(nodes[path], first.setdefault(id(nodes[path]), path)) for path in sorted(nodes)}


def _describe(node: Node, first: str) -> list[object]:
    note = None if node.note is None else node.note.decode()
    if node.target is not None:
        return ["l", 0, node.target, note, first]
    if node.content is None:
        return ["d", node.mode, "", note, first]
    return ["f", node.mode, hashlib.sha256(node.content).hexdigest(), note, first]


def seen(top: Path) -> Description:
    """The same of a real directory."""
    first: dict[tuple[int, int], str] = {}
    found: Description = {}
    for path in sorted(_paths(top, "")):
        place = top / path
        st = os.lstat(place)
        mode, kind = stat.S_IMODE(st.st_mode), stat.S_IFMT(st.st_mode)
        names = os.listxattr(place, follow_symlinks=False) if kind != stat.S_IFLNK else []
        note = os.getxattr(place, "user.note").decode() if "user.note" in names else None
        key = first.setdefault((st.st_dev, st.st_ino), path)
        if kind == stat.S_IFLNK:
            found[path] = ["l", 0, os.readlink(place), note, key]
        elif kind == stat.S_IFDIR:
            found[path] = ["d", mode, "", note, key]
        else:
            found[path] = ["f", mode, hashlib.sha256(place.read_bytes()).hexdigest(), note, key]
    return found


def _paths(top: Path, below: str) -> Iterator[str]:
    for entry in os.scandir(top / below):
        path = f"{below}/{entry.name}".lstrip("/")
        yield path
        if entry.is_dir(follow_symlinks=False):
            yield from _paths(top, path)


def initial(seed: int) -> dict[str, Node]:
    """What a client finds: a tree that its lower holds."""
    chance = random.Random(f"initial {seed}")
    nodes: dict[str, Node] = {}
    for directory in ("", "d0", "d1", "d0/d2", "d0/d2/d3"):
        if directory:
            nodes[directory] = Node()
        for number in range(6):
            path = f"{directory}/n{number}".lstrip("/")
            nodes[path] = Node(0o644, chance.randbytes(chance.choice((0, 10, 5000, 40_000))))
    nodes["link"] = Node(target="n0")
    return nodes


def make(top: Path, nodes: dict[str, Node]) -> None:
    """The tree of a model, on disk."""
    top.mkdir()
    for path in sorted(nodes):
        node = nodes[path]
        if node.target is not None:
            os.symlink(node.target, top / path)
        elif node.content is None:
            (top / path).mkdir(node.mode)
        else:
            (top / path).write_bytes(node.content)
            (top / path).chmod(node.mode)


@dataclass(slots=True)
class Client:
    """`top`: the client's own directory. `nodes`: what must be in it. `coming`: what may be in it instead, while an operation is under
    way.
    """

    top: Path
    number: int
    chance: random.Random
    nodes: dict[str, Node]
    coming: dict[str, Node] | None = None
    operations: int = 0
    counts: dict[str, int] = field(default_factory=dict)

    def step(self) -> None:
        """One operation. Raises Wrong, or OSError where none was to be."""
        own = self.chance.random() < 0.9
        act = self.chance.choices(*zip(*(OWN if own else SHARED), strict=True))[0]
        act(self)
        self.operations += 1
        self.counts[act.__name__] = self.counts.get(act.__name__, 0) + 1

    # -- choosing

    def directories(self) -> list[str]:
        return ["", *(path for path, node in self.nodes.items() if node.is_directory)]

    def files(self) -> list[str]:
        return [path for path, node in self.nodes.items() if node.content is not None]

    def one(self, paths: list[str]) -> str | None:
        return self.chance.choice(paths) if paths else None

    def new(self) -> str | None:
        """A path that nothing has yet, if the tree is not too big."""
        directory = self.chance.choice([path for path in self.directories() if path.count("/") < 4])
        path = f"{directory}/n{self.chance.randrange(12)}".lstrip("/")
        return path if path not in self.nodes and len(self.nodes) < 150 else None

    @contextmanager
    def changing(self) -> Iterator[dict[str, Node]]:
        """A copy of the model to be changed as the operation inside will change the tree; links of one file stay that."""
        copies: dict[int, Node] = {}
        self.coming = {path: copies.setdefault(id(node), node.copy()) for path, node in self.nodes.items()}
        yield self.coming
        self.nodes, self.coming = self.coming, None

    def below(self, path: str) -> list[str]:
        return [other for other in self.nodes if other.startswith(path + "/")]

    # -- what changes something

    def create(self) -> None:
        if (path := self.new()) is not None:
            with self.changing() as nodes:
                nodes[path] = Node(0o640, b"")
                os.close(os.open(self.top / path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o640))

    def write(self) -> None:
        if (path := self.one(self.files())) is not None:
            data = self.chance.randbytes(self.chance.choice((1, 100, PAGE)))
            offset = self.chance.randrange(MOST_BYTES // PAGE) * PAGE + self.chance.randrange(PAGE - len(data) + 1)
            with self.changing() as nodes:
                old = nodes[path].content or b""
                nodes[path].content = old[:offset].ljust(offset, b"\0") + data + old[offset + len(data) :]
                with _opened(self.top / path, os.O_WRONLY) as fd:
                    os.pwrite(fd, data, offset)

    def append(self) -> None:
        if (path := self.one(self.files())) is not None and len(self.nodes[path].content or b"") < MOST_BYTES:
            room = PAGE - len(self.nodes[path].content or b"") % PAGE
            data = self.chance.randbytes(self.chance.choice((1, min(300, room), room)))
            with self.changing() as nodes:
                nodes[path].content = (nodes[path].content or b"") + data
                with _opened(self.top / path, os.O_WRONLY | os.O_APPEND) as fd:
                    os.write(fd, data)

    def truncate(self) -> None:
        if (path := self.one(self.files())) is not None:
            size = self.chance.choice((0, 1, 4096, 50_000))
            with self.changing() as nodes:
                nodes[path].content = (nodes[path].content or b"")[:size].ljust(size, b"\0")
                os.truncate(self.top / path, size)

    def mkdir(self) -> None:
        if (path := self.new()) is not None:
            with self.changing() as nodes:
                nodes[path] = Node(0o750)
                os.mkdir(self.top / path, 0o750)

    def symlink(self) -> None:
        if (path := self.new()) is not None:
            with self.changing() as nodes:
                nodes[path] = Node(target=f"to {self.operations}")
                os.symlink(f"to {self.operations}", self.top / path)

    def link(self) -> None:
        if (old := self.one(self.files())) is not None and (path := self.new()) is not None:
            with self.changing() as nodes:
                nodes[path] = nodes[old]
                os.link(self.top / old, self.top / path)

    def unlink(self) -> None:
        if (path := self.one([path for path, node in self.nodes.items() if not node.is_directory])) is not None:
            with self.changing() as nodes:
                del nodes[path]
                os.unlink(self.top / path)

    def rmdir(self) -> None:
        if (path := self.one([path for path in self.directories() if path and not self.below(path)])) is not None:
            with self.changing() as nodes:
                del nodes[path]
                os.rmdir(self.top / path)

    def rename(self) -> None:
        old, path = self.one(list(self.nodes)), self.new()
        if old is None or path is None or path.startswith(old + "/"):
            return
        with self.changing() as nodes:
            _move(nodes, old, path)
            os.rename(self.top / old, self.top / path)

    def replace(self) -> None:
        old, path = self.one(self.files()), self.one(self.files())
        if old is None or path is None or self.nodes[old] is self.nodes[path]:
            return
        with self.changing() as nodes:
            nodes[path] = nodes.pop(old)
            os.rename(self.top / old, self.top / path)

    def exchange(self) -> None:
        old, path = self.one(list(self.nodes)), self.one(list(self.nodes))
        if old is None or path is None or old == path or path.startswith(old + "/") or old.startswith(path + "/"):
            return
        with self.changing() as nodes:
            _move(nodes, old, "aside")
            _move(nodes, path, old)
            _move(nodes, "aside", path)
            renameat2(self.top / old, self.top / path, RENAME_EXCHANGE)

    def chmod(self) -> None:
        if (path := self.one([path for path, node in self.nodes.items() if node.target is None])) is not None:
            with self.changing() as nodes:
                nodes[path].mode = self.chance.choice((0o700, 0o755, 0o711))
                os.chmod(self.top / path, nodes[path].mode)

    def setxattr(self) -> None:
        if (path := self.one([path for path, node in self.nodes.items() if node.target is None])) is not None:
            with self.changing() as nodes:
                note = nodes[path].note = f"note {self.operations}".encode()
                os.setxattr(self.top / path, "user.note", note)

    # -- what looks

    def read(self) -> None:
        if (path := self.one(self.files())) is not None and (self.top / path).read_bytes() != self.nodes[path].content:
            raise Wrong(f"{path}: other content")

    def readdir(self) -> None:
        path = self.chance.choice(self.directories())
        expected = {other.rpartition("/")[2] for other in self.nodes if other.rpartition("/")[0] == path}
        if (found := set(os.listdir(self.top / path))) != expected:
            raise Wrong(f"{path}: lists {found ^ expected} too many or too few")

    def fsync(self) -> None:
        if (path := self.one(self.files())) is not None:
            with _opened(self.top / path, os.O_WRONLY) as fd:
                os.fsync(fd)

    def use_unlinked(self) -> None:
        """A file of a lower or the upper is open, loses its name, and goes on."""
        if (
            path := self.one([path for path in self.files() if sum(node is self.nodes[path] for node in self.nodes.values()) == 1])
        ) is None:
            return
        content = self.nodes[path].content or b""
        with _opened(self.top / path, os.O_RDWR) as fd:
            with self.changing() as nodes:
                del nodes[path]
                os.unlink(self.top / path)
            os.pwrite(fd, b"after", 0)
            if os.pread(fd, MOST_BYTES * 2, 0) != b"after" + content[5:] or os.fstat(fd).st_nlink != 0:
                raise Wrong(f"{path}: unlinked, and then not what was written")

    # -- where others interfere

    def shared(self, act: Callable[[Path, Path], object]) -> None:
        names = [self.top.parent / "shared" / f"s{self.chance.randrange(SHARED_NAMES)}" for _ in range(2)]
        try:
            act(names[0], names[1])
        except OSError as error:
            if error.errno not in INTERFERENCE:
                raise

    def shared_write(self) -> None:
        self.shared(lambda path, _: _write_record(path, self.number))

    def shared_read(self) -> None:
        self.shared(lambda path, _: check_record(path))

    def shared_unlink(self) -> None:
        self.shared(lambda path, _: os.unlink(path))

    def shared_rename(self) -> None:
        self.shared(os.rename)

    def shared_link(self) -> None:
        try:
            self.shared(os.link)
        except PermissionError:  # a directory by then
            return

    def shared_mkdir(self) -> None:
        self.shared(lambda path, _: os.mkdir(path))

    def shared_rmdir(self) -> None:
        self.shared(lambda path, _: os.rmdir(path))

    def shared_list(self) -> None:
        self.shared(lambda path, _: os.listdir(path.parent))


Act = Callable[[Client], None]
OWN: list[tuple[Act, int]] = [
    (Client.create, 10), (Client.write, 12), (Client.append, 6), (Client.truncate, 4), (Client.mkdir, 6), (Client.symlink, 2),
    (Client.link, 3), (Client.unlink, 8), (Client.rmdir, 4), (Client.rename, 10), (Client.replace, 4), (Client.exchange, 3),
    (Client.chmod, 4), (Client.setxattr, 3), (Client.read, 8), (Client.readdir, 6), (Client.fsync, 1), (Client.use_unlinked, 2),
]  # fmt: skip
SHARED: list[tuple[Act, int]] = [
    (Client.shared_write, 6), (Client.shared_read, 4), (Client.shared_unlink, 4), (Client.shared_rename, 4), (Client.shared_link, 2),
    (Client.shared_mkdir, 2), (Client.shared_rmdir, 2), (Client.shared_list, 2),
]  # fmt: skip


def _move(nodes: dict[str, Node], old: str, new: str) -> None:
    for path in [path for path in nodes if path == old or path.startswith(old + "/")]:
        nodes[new + path[len(old) :]] = nodes.pop(path)


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    fd = os.open(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


def _write_record(path: Path, number: int) -> None:
    fd = os.open(path, os.O_CREAT | os.O_WRONLY, 0o644)
    try:
        os.pwrite(fd, bytes([65 + number]) * RECORD, 0)
    finally:
        os.close(fd)


def check_record(path: Path) -> None:
    """A shared file is empty or holds one client's record, whole. Raises Wrong."""
    content = path.read_bytes()
    if content and content != content[:1] * RECORD:
        raise Wrong(f"{path.name}: {len(content)} bytes of {len(set(content))} kinds")


def main(directory: str, number: str, seed: str, limit: str, victim: str = "") -> None:
    """See the module."""
    chance = random.Random(f"{seed} {number}")
    client = Client(Path(directory) / number, int(number), chance, initial(int(number)))
    until = time.monotonic() + float(limit[:-2]) if limit.endswith(" s") else None
    outcome: dict[str, object] = {}
    try:
        while time.monotonic() < until if until is not None else client.operations < int(limit):
            client.step()
        if victim:
            os.kill(int(victim), signal.SIGKILL)
            while client.operations < 2 * int(limit):
                client.step()
    except (OSError, Wrong) as error:
        code = error.errno if isinstance(error, OSError) else None
        outcome = {"error": f"{type(error).__name__}: {error}", "errno": code}
    nodes = described(client.nodes)
    coming = None if client.coming is None else described(client.coming)
    sys.stdout.write(json.dumps({"operations": client.operations, "nodes": nodes, "coming": coming, "counts": client.counts, **outcome}))


if __name__ == "__main__":
    main(*sys.argv[1:])
