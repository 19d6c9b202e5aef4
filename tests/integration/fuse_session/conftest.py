"""A mount of `passthrough.py` in a process of its own, and the line by which it is commanded."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


class Session:
    """A live mount: `root` is what it shows, `mountpoint` where."""

    def __init__(self, directory: Path, environment: dict[str, str], **options: Any) -> None:
        self.root, self.mountpoint = directory / "root", directory / "mnt"
        self.root.mkdir(exist_ok=True)
        self.mountpoint.mkdir(exist_ok=True)
        arguments = json.dumps({"root": str(self.root), "mountpoint": str(self.mountpoint), **options})
        self.log = directory / "log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-W", "ignore", Path(__file__).with_name("passthrough.py"), arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, **environment},
            )
        self.wire_reason = self._answer()

    def tell(self, command: str, *arguments: Any) -> Any:
        """Send a command and return its answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([command, *arguments]).encode() + b"\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the file system ended:\n{self.log.read_text()}"
        return json.loads(line)

    def opcodes(self) -> dict[int, int]:
        return {int(opcode): count for opcode, count in self.tell("counts")[0].items()}

    def lanes(self) -> dict[str, int]:
        counts: dict[str, int] = self.tell("counts")[1]
        return counts

    def end(self) -> int:
        """Unmount; the exit code of the process."""
        subprocess.run(["umount", self.mountpoint], check=True)
        return self._wait()

    def abandon(self) -> None:
        """End what is left, whatever state it is in; an aborted mount outlives its process."""
        subprocess.run(["umount", "-l", self.mountpoint], check=False, stderr=subprocess.DEVNULL)
        try:
            self._wait()
        except subprocess.TimeoutExpired:
            self.process.kill()
            self._wait()

    def _wait(self) -> int:
        code = self.process.wait(timeout=10)
        self._close()
        return code

    def _close(self) -> None:
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()


SessionFactory = Callable[..., Session]


@pytest.fixture
def session(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[SessionFactory]:
    """Makes mounts for one test: `session(flags=[...], lanes=True)`; `environment` is added to the process's own.

    A test marked `wire` fails here without the extension, before it waits for what would never come.
    """
    needs_wire = request.node.get_closest_marker("wire") is not None
    made: list[Session] = []

    def make(environment: dict[str, str] | None = None, **options: Any) -> Session:
        directory = tmp_path / str(len(made))
        directory.mkdir(exist_ok=True)
        made.append(Session(directory, environment or {}, **options))
        assert not needs_wire or made[-1].wire_reason == ""
        return made[-1]

    yield make
    for each in made:
        each.abandon()
