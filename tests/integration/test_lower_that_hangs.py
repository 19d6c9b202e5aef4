"""A lower whose server stops answering holds up those who need it, and nobody else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from pyoverlay.testing import Overlay, Symlink, make_tree, mounts_below
from pyoverlay.testing.mounts import MARK, Connection, command, wait_for_end
from tests.integration.looks import litter
from tests.posix.check import opened

pytestmark = pytest.mark.root

SECONDS = 10  # far above what anything takes that does not hang
MANY = 150  # more callers than one lower has threads, or stock pyfuse3 tasks

# What a client does with the path it is given, and what it prints.
READS = {
    "lstat": "st = os.lstat(path); print(st.st_size)",
    "list": "print(sorted(os.listdir(path)))",
    "walk": "print(sorted(name for _, _, names in os.walk(path) for name in names))",
    "cat": "print(open(path).read())",
    "readlink": "print(os.readlink(path))",
    "getxattr": "print(os.getxattr(path, 'user.colour'))",
    "listxattr": "print(os.listxattr(path))",
    "chmod": "os.chmod(path, 0o600); print(oct(os.lstat(path).st_mode))",
    "append": "open(path, 'a').write('+'); print(open(path).read())",
    "rename": "os.rename(path, path + '.new'); print(open(path + '.new').read())",
    "unlink": "os.unlink(path); print(os.path.lexists(path))",
}

# (operation of the server that hangs, what the client does, to what, what it prints in the end)
CASES = [
    ("lookup", "lstat", "file", "5"),
    ("getattr", "lstat", "file", "5"),
    ("opendir", "list", "directory", "['below', 'one', 'two']"),
    ("readdir", "list", "directory", "['below', 'one', 'two']"),
    ("lookup", "walk", "directory", "['one', 'three', 'two']"),
    ("getattr", "walk", "directory", "['one', 'three', 'two']"),
    ("open", "cat", "file", "a far"),
    ("read", "cat", "file", "a far"),
    ("readlink", "readlink", "link", "file"),
    ("getxattr", "getxattr", "file", "b'red'"),
    ("listxattr", "listxattr", "file", "['user.colour']"),
    ("listxattr", "chmod", "file", "0o100600"),
    ("getxattr", "append", "file", "a far+"),
    ("read", "append", "file", "a far+"),
    ("open", "rename", "file", "a far"),
    ("lookup", "unlink", "file", "False"),
]


class Hung:
    """`overlay` over `near`, an ordinary lower, and `far` below it, whose server can be held. Both have been looked at before."""

    def __init__(self, base: Path, *options: str) -> None:
        for name in ("disk", "far", "near", "upper", "merged"):
            (base / name).mkdir()
        make_tree(base / "disk", {
            "far": {"file": "a far", "link": Symlink("file"), "directory": {"one": "1", "two": "2"}},
            "huge": "0123456789abcdef" * (1 << 16),
        })  # fmt: skip
        (base / "disk" / "far" / "directory" / "below").mkdir()
        (base / "disk" / "far" / "directory" / "below" / "three").write_text("3")
        os.setxattr(base / "disk" / "far" / "file", "user.colour", b"red")
        make_tree(base / "near", {"near": {"file": "near", "other": "other", "directory": {"inside": "inside"}}})
        self.base = base
        self.server = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("holding_lower.py"), base / "disk", base / "far"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._waiting: list[str] = []  # what has been said of requests that wait, or did until a step
        self._line()
        self.overlay = Overlay((base / "near", base / "far"), base / "upper", base / "merged", ("-o", "stop_timeout=0.2", *options))
        self.overlay.mount()
        self.merged = self.overlay.merged
        assert sorted(os.listdir(self.merged)) == ["far", "huge", "near"]
        for name in ("near", "far"):
            os.lstat(self.merged / name)

    def _line(self) -> str:
        assert self.server.stdout is not None
        return self.server.stdout.readline().strip()

    def _tell(self, line: str) -> None:
        assert self.server.stdin is not None
        print(line, file=self.server.stdin, flush=True)
        while (answer := self._line()) != "done":
            self._waiting.append(answer)

    def hold(self, *operations: str) -> None:
        self._waiting.clear()
        self._tell(f"hold {' '.join(operations)}")

    def spoil(self, offset: int) -> None:
        self._tell(f"spoil {offset}")

    def fail(self, *operations: str) -> None:
        self._tell(f"fail {' '.join(operations)}")

    def step(self) -> None:
        self._tell("step")

    def known_near(self) -> AbstractContextManager[int]:
        """Meanwhile the kernel does not forget that `near` is there, of which it would have to ask the server: other suites drop caches."""
        return opened(self.merged / "near", os.O_PATH)

    def release(self) -> None:
        self._tell("release")

    def wait_until_held(self, operation: str) -> None:
        assert (self._waiting.pop(0) if self._waiting else self._line()) == f"waits {operation}"

    @contextmanager
    def client(self, act: str, path: str) -> Iterator[subprocess.Popen[str]]:
        code = f"import os, sys; path = sys.argv[1]; {READS[act]}"
        with subprocess.Popen([sys.executable, "-I", "-S", "-c", code, self.merged / path], stdout=subprocess.PIPE, text=True) as process:
            try:
                yield process
            except subprocess.TimeoutExpired:
                self.release()  # else it would be waited for in vain
                raise

    def close(self) -> None:
        self.release()
        self.overlay.close()
        for mount in mounts_below(self.base):
            Connection.of(mount).detach()
        self.server.wait(SECONDS)
        for stream in (self.server.stdin, self.server.stdout):
            assert stream is not None
            stream.close()


@pytest.fixture
def hung(tmp_path: Path) -> Iterator[Hung]:
    made = Hung(tmp_path)
    try:
        yield made
        assert litter(made.overlay) == []
    finally:
        made.close()


def work_elsewhere(merged: Path, number: int = 0) -> None:
    """What another program does in other directories."""
    near = merged / "near"
    assert sorted(name for _, _, names in os.walk(near) for name in names if not name.startswith("new")) == ["file", "inside", "other"]
    assert (near / "directory" / "inside").read_text() == "inside"
    (near / f"new{number}").write_text("new")
    os.rename(near / f"new{number}", near / "directory" / f"new{number}")
    (near / "file").write_text("near")
    with (near / "other").open("a"):
        os.chmod(near / "other", 0o600)
    os.mkdir(near / "made")
    os.rmdir(near / "made")
    os.unlink(near / "directory" / f"new{number}")
    assert os.statvfs(near).f_namemax == 255


@pytest.mark.parametrize(("operation", "act", "name", "printed"), CASES)
def test_who_needs_it_waits_and_gets_the_right_answer_and_nobody_else_waits(
    hung: Hung, operation: str, act: str, name: str, printed: str
) -> None:
    with hung.known_near():
        hung.hold(operation)
        with hung.client(act, f"far/{name}") as client:
            hung.wait_until_held(operation)
            work_elsewhere(hung.merged)
            assert client.poll() is None
            hung.release()
            assert client.communicate(timeout=SECONDS)[0] == f"{printed}\n"
    assert client.returncode == 0
    work_elsewhere(hung.merged, 1)


# Who waits in the kernel for pages that were asked for ahead can be killed whatever the daemon does; everybody else, once the daemon has
# their request, only when it answers, and of a caller's end it hears through the extension.
KILLED = [
    ("read", "cat", "file"),
    *(
        pytest.param(*case, marks=pytest.mark.wire)
        for case in [
            ("lookup", "lstat", "file"),
            ("getattr", "walk", "directory"),
            ("readdir", "list", "directory"),
            ("readlink", "readlink", "link"),
            ("listxattr", "chmod", "file"),
            ("read", "append", "file"),
        ]
    ),
]


@pytest.mark.parametrize(("operation", "act", "name"), KILLED)
def test_who_waits_for_it_can_be_killed_and_the_late_answer_disturbs_nobody(hung: Hung, operation: str, act: str, name: str) -> None:
    with hung.known_near():
        hung.hold(operation)
        with hung.client(act, f"far/{name}") as client:
            hung.wait_until_held(operation)
            client.kill()
            assert client.wait(SECONDS) == -signal.SIGKILL
        work_elsewhere(hung.merged)
    hung.release()
    with hung.client(act, f"far/{name}") as client:
        assert client.communicate(timeout=SECONDS)[0] == f"{printed_by(operation, act)}\n"


def printed_by(operation: str, act: str) -> str:
    return next(printed for held, done, _, printed in CASES if (held, done) == (operation, act))


# A thread for each path; the last that begins says so, and all that they found is one line.
TOGETHER = """
import os, sys, threading
paths, found = sys.argv[1:], set()
def look(path):
    found.add(os.lstat(path).st_size)
threads = [threading.Thread(target=look, args=[path]) for path in paths]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(found)
"""


def test_many_who_wait_for_it_leave_room_for_everybody_else(hung: Hung) -> None:
    names = [f"many{number}" for number in range(MANY)]
    for name in names:
        (hung.base / "disk" / "far" / name).write_text("a far")
    hung.hold("lookup")
    paths = [hung.merged / "far" / name for name in names]
    with subprocess.Popen([sys.executable, "-c", TOGETHER, *paths], stdout=subprocess.PIPE, text=True) as clients:
        hung.wait_until_held("lookup")
        work_elsewhere(hung.merged)
        assert clients.poll() is None
        hung.release()
        assert clients.communicate(timeout=3 * SECONDS)[0] == "{5}\n"
    work_elsewhere(hung.merged, 1)


def test_a_caller_that_has_a_signal_and_lives_waits_for_its_answer(hung: Hung) -> None:
    code = "import os, signal, sys; signal.signal(signal.SIGUSR1, lambda *rest: None); print(os.lstat(sys.argv[1]).st_size)"
    hung.hold("lookup")
    with subprocess.Popen([sys.executable, "-c", code, hung.merged / "far/file"], stdout=subprocess.PIPE, text=True) as client:
        hung.wait_until_held("lookup")
        client.send_signal(signal.SIGUSR1)
        work_elsewhere(hung.merged)
        hung.release()
        assert client.communicate(timeout=SECONDS)[0] == "5\n"


def test_closing_what_was_read_of_it_holds_nobody_up(hung: Hung) -> None:
    assert (hung.merged / "far" / "file").read_text() == "a far"
    hung.hold("flush")
    (hung.merged / "far" / "file").write_text("changed")  # the copy takes the place of what was open
    work_elsewhere(hung.merged)
    assert (hung.merged / "far" / "file").read_text() == "changed"


def test_closing_what_was_opened_for_a_request_holds_nobody_up(hung: Hung) -> None:
    """Two are closed before it is known whether the file is a metacopy: that of the first beginning, and the question's own. Then that of
    the reading thread and, first or last, the one that the reply consisted of, which was closed by who handles all requests.
    """
    hung.hold("flush")
    with hung.client("cat", "far/file") as far:
        hung.wait_until_held("flush")
        for _ in range(3):
            hung.wait_until_held("flush")
            with hung.client("cat", "near/file") as near:
                assert near.communicate(timeout=SECONDS)[0] == "near\n"
            hung.step()
        work_elsewhere(hung.merged)
        hung.release()
        assert far.communicate(timeout=SECONDS)[0] == "a far\n"


@pytest.mark.parametrize(("act", "printed"), [("cat", "a far"), ("append", "a far+")])
def test_a_server_that_fails_when_a_file_is_closed_has_given_what_was_read(hung: Hung, act: str, printed: str) -> None:
    hung.fail("flush")
    with hung.client(act, "far/file") as client:
        assert client.communicate(timeout=SECONDS)[0] == f"{printed}\n"


@pytest.mark.parametrize(
    ("operation", "act", "name"),
    [
        pytest.param("lookup", "lstat", "file", marks=pytest.mark.wire),
        ("read", "cat", "file"),
        pytest.param("read", "append", "huge", marks=pytest.mark.wire),
    ],
)
def test_the_mount_can_be_taken_away_while_it_hangs(hung: Hung, operation: str, act: str, name: str) -> None:
    path = name if name == "huge" else f"far/{name}"
    os.lstat(hung.merged / path)
    hung.hold(operation)
    with hung.client(act, path if operation != "lookup" else "far/directory/one") as client:
        hung.wait_until_held(operation)
        client.kill()
        client.wait(SECONDS)
    (hung.merged / "near" / "kept").write_text("kept")
    daemons = hung.overlay.daemons()
    environment = {**os.environ, MARK: hung.overlay.mark}
    result = subprocess.run(command("umount", hung.merged), check=False, env=environment, capture_output=True, text=True, timeout=SECONDS)
    assert result.returncode == 0, result.stderr
    assert mounts_below(hung.merged) == []
    assert (hung.overlay.writable / "near" / "kept").read_text() == "kept"
    again = Overlay((hung.base / "near",), hung.overlay.writable, hung.merged)
    again.mount()  # nothing of the upper is held any more
    assert (hung.merged / "near" / "kept").read_text() == "kept"
    again.close()
    hung.release()
    assert wait_for_end(daemons, SECONDS) == []


def test_a_daemon_that_is_told_to_end_does_not_wait_for_it(hung: Hung) -> None:
    (daemon,) = hung.overlay.daemons()
    hung.hold("lookup")
    with hung.client("lstat", "far/file") as client:
        hung.wait_until_held("lookup")
        (hung.merged / "near" / "kept").write_text("kept")
        os.kill(daemon, signal.SIGTERM)
        assert client.wait(SECONDS) != 0, "the mount is gone"
    assert mounts_below(hung.merged) == []
    assert (hung.overlay.writable / "near" / "kept").read_text() == "kept"
    hung.release()
    assert wait_for_end([daemon], SECONDS) == []
