"""`pyoverlay mount --from FILE`: many overlays from one command, each with a daemon of its own."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pyoverlay import registry
from pyoverlay.registry import Record
from pyoverlay.testing import Connection, make_tree, mounts_below, processes_marked, snapshot
from pyoverlay.testing.mounts import COMMAND_SECONDS, MARK, command, end, wait_for_end

pytestmark = pytest.mark.root

MIB = 1 << 20


@dataclass(frozen=True)
class Place:
    """A directory with a lower and places for mounts, and the commands that are run in it."""

    directory: Path
    mark: str

    def run(self, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        environment = dict(os.environ) | {MARK: self.mark}
        return subprocess.run(
            command(*arguments), check=False, cwd=self.directory, env=environment, input=stdin, capture_output=True, text=True,
            timeout=COMMAND_SECONDS,
        )  # fmt: skip

    def make(self, *names: str) -> None:
        """An upper `uNAME` and a mount point `mNAME` for each."""
        for name in names:
            (self.directory / f"u{name}").mkdir()
            (self.directory / f"m{name}").mkdir()

    def mount_from(self, text: str, *options: str) -> subprocess.CompletedProcess[str]:
        (self.directory / "list").write_text(text)
        return self.run("mount", "--from", "list", *options)

    def mounted(self) -> list[str]:
        """The names of the mount points that something is mounted on."""
        return sorted(Path(mount.mount_point).name for mount in mounts_below(self.directory))

    def records(self) -> list[Record]:
        return [record for record in registry.live() if record.merged.startswith(os.fsencode(self.directory) + b"/")]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    """Ends with every mount gone, and every daemon; the lower is as it was."""
    lower = tmp_path / "lower"
    lower.mkdir()
    make_tree(lower, {"file": "of the lower", "d": {"below": "too"}})
    before = snapshot(lower)
    here = Place(tmp_path, f"{os.environ[MARK]}/{uuid.uuid4().hex}")
    yield here
    if here.mounted():
        result = here.run("umount", *here.mounted())
        assert (result.returncode, result.stderr) == (0, "")
    left = wait_for_end(processes_marked(here.mark), 5)
    for mount in reversed(mounts_below(tmp_path)):
        Connection.of(mount).detach()
    end(left)
    assert left == []
    assert snapshot(lower) == before


def private_memory(pid: int) -> int:
    """Bytes that no other process shares."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith(("Private_Dirty:", "Private_Clean:")))


def wait_until(is_so: Callable[[], bool], seconds: float = 10) -> None:
    """For what has no event of its own."""
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, "it has not come to be"
        os.sched_yield()


def test_a_hundred_mounts_are_a_hundred_daemons_that_do_not_know_of_one_another(place: Place) -> None:
    names = [str(number) for number in range(100)]
    place.make(*names)
    result = place.mount_from("".join(f"lower u{name} m{name}\n" for name in names))
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert len(place.mounted()) == 100

    records = place.records()
    pids = {record.pid for record in records}
    assert len(records) == len({record.id for record in records}) == len({record.device for record in records}) == len(pids) == 100
    assert set(processes_marked(place.mark)) == pids  # what started them has ended
    assert {os.getsid(pid) for pid in pids} == pids
    assert max(map(private_memory, pids)) < 8 * MIB
    listed = json.loads(place.run("ps", "--json").stdout)["mounts"]
    assert {mount["pid"] for mount in listed if mount["merged"].startswith(f"{place.directory}/")} == pids

    for name in names:
        merged = place.directory / f"m{name}"
        (merged / "file").write_text(name)
        (merged / "d/below").unlink()
        (merged / f"only-in-{name}").touch()
    for name in names:
        assert (place.directory / f"u{name}/file").read_text() == name
        assert sorted(os.listdir(place.directory / f"m{name}")) == ["d", "file", f"only-in-{name}"]
        assert os.listdir(place.directory / f"m{name}/d") == []


def test_a_daemon_that_dies_takes_no_other_with_it(place: Place) -> None:
    place.make("1", "2", "3")
    assert place.mount_from("lower u1 m1\nlower u2 m2\nlower u3 m3\n").returncode == 0
    (victim,) = [record for record in place.records() if record.merged.endswith(b"/m2")]
    os.kill(victim.pid, signal.SIGKILL)
    assert wait_for_end([victim.pid], 10) == []
    for name in ("m1", "m3"):
        (place.directory / name / "file").write_text("still there")
    assert sorted(Path(os.fsdecode(record.merged)).name for record in place.records()) == ["m1", "m3"]
    assert place.run("umount", "--lazy", "m2").returncode == 0
    assert place.mounted() == ["m1", "m3"]


def test_a_line_is_what_the_command_line_takes(place: Place) -> None:
    place.make("1", " 2", "#3", "4")
    (place.directory / "work").mkdir()
    result = place.mount_from(
        "# overlays of the test\n\n"
        "   # indented\n"
        "--workdir work -o noexec lower u1 m1\n"
        "lower 'u 2' m\\ 2\n"
        'lower u#3 "m#3"\n'
        "-o lowerdir=lower theirs ./m4\n"
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert place.mounted() == ["m 2", "m#3", "m1", "m4"]
    assert [mount.source for mount in mounts_below(place.directory / "m4")] == ["theirs"]
    (first,) = [record for record in place.records() if record.merged.endswith(b"/m1")]
    assert first.work == os.fsencode(place.directory / "work")
    assert first.options == ("noexec",)


def test_a_line_that_cannot_be_read_keeps_all_from_being_mounted(place: Place) -> None:
    place.make("1", "2")
    result = place.mount_from(
        "lower u1 m1\n"
        "lower u2\n"
        "lower 'u2 m2\n"
        "-o nonsense lower u2 m2\n"
        "--wait 3 lower u2 m2\n"
        "--from list\n"
        "-f lower u2 m2\n"
        "--help\n"
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.splitlines() == [
        "pyoverlay: list:2: give LOWER[:LOWER...] UPPER MERGED, or -o lowerdir=... and MERGED",
        "pyoverlay: list:3: No closing quotation",
        "pyoverlay: list:4: -o nonsense: unknown option",
        "pyoverlay: list:5: --wait is for the whole command, not for a line",
        "pyoverlay: list:6: --from is for the whole command, not for a line",
        "pyoverlay: list:7: --foreground is for the whole command, not for a line",
        "pyoverlay: list:8: No such option: --help",
    ]
    assert place.mounted() == []
    assert sorted(path.name for path in place.directory.iterdir()) == ["list", "lower", "m1", "m2", "u1", "u2"]


def test_what_cannot_be_mounted_is_reported_and_the_rest_is(place: Place) -> None:
    place.make("1", "2", "3")
    result = place.mount_from("lower u1 m1\nmissing u2 m2\nlower u3 missing\nlower:lower u3 m3\n")
    assert (result.returncode, result.stdout) == (1, "")
    second, third = result.stderr.splitlines()
    assert second.startswith(f"pyoverlay: list:2: {place.directory}/missing: the lower does not exist")
    assert third.startswith(f"pyoverlay: list:3: {place.directory}/missing: the mount point does not exist")
    assert place.mounted() == ["m1", "m3"]
    assert len(processes_marked(place.mark)) == 2


def test_an_upper_that_two_lines_name_is_used_by_one(place: Place) -> None:
    place.make("1", "2")
    result = place.mount_from("lower u1 m1\nlower u1 m2\n")
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert "the upper is already used by" in result.stderr
    assert len(place.mounted()) == len(processes_marked(place.mark)) == 1


def test_a_mount_point_that_two_lines_name_keeps_all_from_being_mounted(place: Place) -> None:
    """One daemon would end before its mount answered, and leave it below the other's."""
    place.make("1", "2", "3")
    result = place.mount_from("lower u1 m1\nlower u2 m2\nlower u3 ./m1\n")
    assert result.returncode == 1
    assert re.fullmatch(r"pyoverlay: (.*):3: ./m1: the mount point of \1:1 too; name another\n", result.stderr)
    assert (place.mounted(), processes_marked(place.mark)) == ([], [])


def test_the_list_may_come_from_standard_input(place: Place) -> None:
    place.make("1")
    assert place.run("mount", "--from", "-", stdin="lower u1 m1").returncode == 0
    assert place.mounted() == ["m1"]
    refused = place.run("mount", "--from", "-", stdin="lower u1")
    assert refused.stderr.startswith("pyoverlay: <stdin>:1: give ")


@pytest.mark.parametrize("others", [("lower", "u1", "m1"), ("-o", "ro"), ("-f",), ("--workdir", "w"), ("-v",)])
def test_with_a_list_all_else_stands_in_its_lines(place: Place, others: tuple[str, ...]) -> None:
    place.make("1")
    result = place.mount_from("lower u1 m1", *others)
    assert result.returncode == 2
    assert result.stderr.startswith("pyoverlay: with --from, all but --wait stands in the lines of the file\n")
    assert place.mounted() == []


def test_an_empty_list_mounts_nothing(place: Place) -> None:
    assert (place.mount_from("# nothing yet\n").returncode, place.mounted()) == (0, [])


def test_what_does_not_answer_in_time_is_given_up_and_leaves_nothing(place: Place) -> None:
    place.make("1", "2")
    result = place.mount_from("lower u1 m1\nlower u2 m2\n", "--wait", "0")
    assert result.returncode == 1
    assert result.stderr.splitlines() == [f"pyoverlay: list:{n}: m{n}: the mount did not answer within 0 s; given up" for n in (1, 2)]
    wait_until(lambda: not processes_marked(place.mark))
    assert place.mounted() == []
    assert place.records() == []
