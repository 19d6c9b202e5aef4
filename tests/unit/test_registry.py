"""The list of live mounts: what is written is read back, and what is stale is known for it."""

from __future__ import annotations

import errno
import json
import math
import os
import stat
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from pyoverlay import registry
from pyoverlay.core.policy import IdRange, Policy, RedirectDir, Whiteouts
from pyoverlay.registry import Record


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYOVERLAY_RUNTIME_DIR", str(tmp_path / "run"))
    return tmp_path / "run"


def record(pid: int, start_time: int, **fields: object) -> Record:
    values = {
        "id": registry.new_id(), "pid": pid, "start_time": start_time, "device": "0:57", "merged": b"/m\xff\n", "lowers": (b"/a", b"/b,:"),
        "upper": b"/u", "work": b"/w", "options": ("ro", "fsname=x"), "started": 1.5,
    }  # fmt: skip
    return Record(**(values | fields))  # type: ignore[arg-type]  # a literal's values have no common type


def written(new: Record) -> Record:
    fd = registry.open_directory()
    try:
        registry.write(fd, new)
    finally:
        os.close(fd)
    return new


def of_this_process(**fields: object) -> Record:
    start_time = registry.start_time(os.getpid())
    assert start_time is not None
    return record(os.getpid(), start_time, **fields)


def ended_process() -> tuple[int, int]:
    """Pid and start time of a process that is no more."""
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:
        start_time = registry.start_time(process.pid)
        assert start_time is not None
        assert process.stdin is not None
        process.stdin.close()
        process.wait()
    return process.pid, start_time


def test_a_record_is_read_back_as_it_was_written(directory: Path) -> None:
    new = written(of_this_process())
    assert registry.records() == [new]
    assert registry.live() == [new]


def test_a_read_only_mount_has_no_upper(directory: Path) -> None:
    new = written(of_this_process(upper=None, work=None))
    assert registry.records() == [new]


def test_the_directory_and_its_files_are_for_their_owner_alone(directory: Path) -> None:
    written(of_this_process())
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert [stat.S_IMODE(file.stat().st_mode) for file in directory.iterdir()] == [0o600]


def test_a_directory_that_others_may_write_to_is_refused(directory: Path) -> None:
    directory.mkdir()
    directory.chmod(0o777)
    with pytest.raises(PermissionError, match="others may write"):
        registry.open_directory()


def test_a_symlink_in_the_place_of_the_directory_is_refused(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    directory.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match=r"Not a directory|Too many levels"):
        registry.open_directory()


def test_records_come_in_the_order_of_their_start(directory: Path) -> None:
    late, early = written(of_this_process(started=2.0)), written(of_this_process(started=1.0))
    assert registry.records() == [early, late]


def test_a_removed_record_is_gone_and_removing_it_again_is_no_error(directory: Path) -> None:
    new = written(of_this_process())
    fd = registry.open_directory()
    registry.remove(fd, new)
    registry.remove(fd, new)
    os.close(fd)
    assert registry.records() == []


def test_a_record_of_an_ended_process_is_stale_and_cleared_away(directory: Path) -> None:
    pid, start_time = ended_process()
    stale = written(record(pid, start_time))
    assert not stale.is_alive
    assert registry.live() == []
    assert list(directory.iterdir()) == []


def test_a_reused_pid_is_not_taken_for_the_daemon(directory: Path) -> None:
    start_time = registry.start_time(os.getpid())
    assert start_time is not None
    assert not record(os.getpid(), start_time - 1).is_alive


def test_a_zombie_is_not_alive() -> None:
    process = subprocess.Popen(["true"])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert registry.start_time(process.pid) is None
    process.wait()


def test_a_failure_outlives_its_daemon_until_it_was_reported(directory: Path) -> None:
    pid, start_time = ended_process()
    new = written(record(pid, start_time))
    fd = registry.open_directory()
    registry.leave_failure(fd, new, "the upper could not be synced")
    os.close(fd)
    assert registry.live() == []
    (left,) = registry.records()
    assert left.failure == "the upper could not be synced"
    registry.clear(left)
    assert registry.records() == []


def test_without_a_directory_there_are_no_mounts(directory: Path) -> None:
    assert registry.records() == []
    assert registry.live() == []


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"id": "x", "merged": 1}', "[" * 100_000, "1", '"x"', "\udcff"])
def test_a_file_that_is_no_record_is_passed_over(directory: Path, content: str) -> None:
    new = written(of_this_process())
    (directory / f"{registry.new_id()}.json").write_text(content, errors="surrogateescape")
    assert registry.records() == [new]


def test_a_file_in_the_place_of_the_directory_holds_no_records(directory: Path) -> None:
    directory.write_text("")
    assert registry.records() == []


def test_what_a_later_release_adds_to_a_record_is_passed_over(directory: Path) -> None:
    new = written(of_this_process())
    file = directory / f"{new.id}.json"
    file.write_text(file.read_text().replace("{", '{"later": 1, ', 1))
    assert registry.records() == [new]


def test_a_stale_record_goes_with_its_socket(directory: Path) -> None:
    pid, start_time = ended_process()
    stale = written(record(pid, start_time))
    (directory / f"{stale.id}.sock").touch()
    assert registry.live() == []
    assert list(directory.iterdir()) == []


def test_the_policy_of_a_mount_is_read_back(directory: Path) -> None:
    ids = (IdRange(0, 1, 1000),)
    policy = Policy(userxattr=True, redirect_dir=RedirectDir.FOLLOW, whiteouts=Whiteouts.KERNEL, squash_uid=7, gid_map=ids)
    new = written(of_this_process(features={**policy.plain(), "extension": True}))
    (read,) = registry.records()
    assert (read, read.policy) == (new, policy)


def test_a_record_of_an_earlier_release_has_the_default_policy(directory: Path) -> None:
    new = written(of_this_process())
    path = directory / f"{new.id}.json"
    texts = json.loads(path.read_text())
    del texts["features"]
    path.write_text(json.dumps(texts))
    assert registry.records()[0].policy == Policy()


# ── what others write into their directories, and root reads ────────────────────────────────────────────────────────────────


def rewritten(directory: Path, **changes: object) -> Path:
    """A record's file with other values in it."""
    path = directory / f"{written(of_this_process()).id}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return path


@pytest.mark.parametrize(
    "changes",
    [
        {"pid": "1/../1"}, {"pid": -1}, {"pid": True}, {"pid": 1.5}, {"start_time": None}, {"started": "now"}, {"started": math.nan},
        {"started": 1e300}, {"merged": 1}, {"merged": None}, {"merged": "relative"}, {"upper": "/a\0b"}, {"lowers": []}, {"lowers": [1]},
        {"options": [1]}, {"options": None}, {"device": None}, {"failure": {}}, {"features": 5}, {"features": {"uid_map": [1]}},
    ],
)  # fmt: skip
def test_a_record_of_other_types_is_none(directory: Path, changes: dict[str, object]) -> None:
    rewritten(directory, **changes)
    assert registry.records() == []


def test_a_record_under_another_name_than_its_own_is_none(directory: Path, tmp_path: Path) -> None:
    """Root clears stale records away by their id: that of another user's could have named any file."""
    victim = tmp_path / "victim.json"
    victim.touch()
    pid, start_time = ended_process()
    rewritten(directory, id=f"../{victim.stem}", pid=pid, start_time=start_time)
    assert registry.live() == []
    assert victim.exists()


def test_a_fifo_in_the_place_of_a_record_holds_nobody_up(directory: Path) -> None:
    new = written(of_this_process())
    os.mkfifo(directory / f"{registry.new_id()}.json")
    os.symlink("/dev/zero", directory / f"{registry.new_id()}.json")
    assert registry.records() == [new]


def test_a_record_knows_whose_it_is(directory: Path) -> None:
    written(of_this_process())
    assert registry.records()[0].owner == os.geteuid()


def test_a_directory_that_becomes_a_symlink_leads_nowhere(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root clears stale records of other users away: one of these could have had it remove a file of such a name anywhere."""
    pid, start_time = ended_process()
    stale = written(record(pid, start_time))
    victim = tmp_path / "victim" / f"{stale.id}.json"
    victim.parent.mkdir()
    victim.touch()

    def swap(pid: int) -> None:
        if not directory.is_symlink():
            directory.rename(tmp_path / "aside")
            directory.symlink_to(victim.parent)

    monkeypatch.setattr(registry, "start_time", swap)
    assert registry.live() == []
    assert directory.is_symlink()
    assert victim.exists()


def test_a_symlink_in_the_place_of_the_directory_is_not_read(directory: Path, tmp_path: Path) -> None:
    written(of_this_process())
    directory.rename(tmp_path / "elsewhere")
    directory.symlink_to(tmp_path / "elsewhere")
    assert registry.records() == []


@pytest.mark.root
def test_a_record_takes_none_of_another_user_s_with_it(directory: Path) -> None:
    """Two directories may hold the same id, if somebody has learnt it."""
    new = written(of_this_process())
    registry.clear(replace(new, owner=4321))
    assert registry.records() == [new]


@pytest.mark.root
def test_a_user_reads_the_own_directories_alone(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """/tmp/pyoverlay-UID may be somebody else's, who was there first."""
    written(of_this_process())
    directory.chmod(0o755)
    monkeypatch.setattr(os, "geteuid", lambda: 4321)
    assert registry.records() == []


def test_a_record_that_finds_no_room_leaves_nothing(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def rename(*arguments: object, **more: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(OSError, match="No space left"):
        written(of_this_process())
    assert list(directory.iterdir()) == []
