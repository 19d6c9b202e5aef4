"""`from pyoverlay import mount, inspect, diff`: the commands, from Python."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

import pyoverlay
from pyoverlay import DaemonFailed, Kind, OptionRefused, Refusal, State, diff, inspect, mount
from pyoverlay.testing import make_tree, mounts_below
from pyoverlay.testing.mounts import wait_for_end

pytestmark = pytest.mark.root


@pytest.fixture
def layers(tmp_path: Path) -> Path:
    make_tree(tmp_path, {"a:b": {"f": "top"}, "base": {"f": "low", "g": "low"}, "upper": {}, "merged": {}})
    return tmp_path


def test_a_mount_lives_as_long_as_its_block(layers: Path) -> None:
    with mount(lowers=[layers / "a:b", layers / "base"], upper=layers / "upper", merged=layers / "merged") as mounted:
        assert mounted.merged == layers / "merged"
        (mounted.merged / "new").write_text("n")
        (mounted.merged / "g").unlink()
        told = inspect(mounted.merged)
        assert (told.state, told.pid, told.upper) == (State.UP, mounted.pid, layers / "upper")
        assert told.lowers == (layers / "a:b", layers / "base")
        assert told.requests is not None
        found = diff(mounted.merged)
        assert [(one.kind, one.path, one.type, one.size) for one in found] == [
            (Kind.DELETED, Path("/g"), "file", None), (Kind.ADDED, Path("/new"), "file", 1)
        ]  # fmt: skip
    assert mounts_below(layers) == []
    assert wait_for_end([mounted.pid], 0) == []
    assert (layers / "upper/new").read_text() == "n"


def test_an_upper_s_changes_are_told_without_a_mount(layers: Path) -> None:
    make_tree(layers / "upper", {"f": "changed", "copied": ""})
    found = diff(layers / "upper", lowers=[layers / "a:b", os.fsencode(layers / "base")])
    assert [(one.kind, str(one.path)) for one in found] == [(Kind.ADDED, "/copied"), (Kind.CHANGED, "/f")]
    with pytest.raises(Refusal, match="name the layers below"):
        diff(layers / "upper")


def test_a_mount_without_an_upper_is_read_only(layers: Path) -> None:
    with mount(lowers=[layers / "base"], merged=layers / "merged", options="noatime") as mounted:
        with pytest.raises(OSError) as caught:
            (mounted.merged / "new").touch()
        assert caught.value.errno == errno.EROFS
        assert inspect(mounted.merged).options == ("noatime",)


def test_paths_may_be_relative(layers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(layers)
    with mount(lowers=["base"], upper="upper", work=None, merged="merged") as mounted:
        assert mounted.merged == layers / "merged"
        assert inspect("merged").work == layers / ".upper.pyoverlay-work"


def test_what_cannot_be_mounted_is_refused_in_the_commands_words(layers: Path) -> None:
    with pytest.raises(pyoverlay.PyoverlayError, match="the lower does not exist"):
        mount(lowers=[layers / "nowhere"], merged=layers / "merged")
    with pytest.raises(OptionRefused, match="unknown option"):
        mount(lowers=[layers / "base"], merged=layers / "merged", options="nope")
    with pytest.raises(OptionRefused, match="layers are arguments of their own"):
        mount(lowers=[layers / "base"], merged=layers / "merged", options="lowerdir=/")
    with pytest.raises(DaemonFailed, match="did not answer within 0 s"):
        mount(lowers=[layers / "base"], merged=layers / "merged", wait=0)
    assert mounts_below(layers) == []


def test_a_daemon_that_has_refused_is_no_zombie(layers: Path) -> None:
    """A program may try for as long as it runs."""
    before = children()
    with pytest.raises(pyoverlay.PyoverlayError, match="the lower does not exist"):
        mount(lowers=[layers / "nowhere"], merged=layers / "merged")
    assert children() == before


def children() -> str:
    """Of this process's threads."""
    return " ".join(file.read_text() for file in Path("/proc/self/task").glob("*/children"))


def test_a_daemon_that_cannot_be_started_is_refused_in_words(layers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    with pytest.raises(DaemonFailed, match="/nonexistent/python: the daemon cannot be started"):
        mount(lowers=[layers / "base"], merged=layers / "merged")


def test_a_block_that_fails_unmounts_too(layers: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        with mount(lowers=[layers / "base"], merged=layers / "merged"):
            raise ZeroDivisionError
    assert mounts_below(layers) == []


def test_a_busy_mount_is_refused_and_can_be_detached(layers: Path) -> None:
    mounted = mount(lowers=[layers / "base"], merged=layers / "merged")
    with (mounted.merged / "f").open():
        with pytest.raises(Refusal, match="busy: held by"):
            mounted.unmount()
        mounted.unmount(lazily=True)
    assert wait_for_end([mounted.pid], 10) == []
    os.waitpid(mounted.pid, 0)
    with pytest.raises(Refusal, match="no mount of pyoverlay"):
        inspect(mounted.merged)


def test_public_names_are_functions_whatever_was_imported_before() -> None:
    program = (
        "import sys, pyoverlay; assert not {'trio', 'click', 'pyoverlay.errors'} & sys.modules.keys(); "
        "import pyoverlay.report.inspect, pyoverlay.report.diff, pyoverlay.cli.mount, pyoverlay.cli.diff; "
        "from pyoverlay import mount, inspect, diff; assert all(map(callable, (mount, inspect, diff))); "
        "assert 'trio' not in sys.modules; print(len(pyoverlay.__all__), {*pyoverlay.__all__} <= {*dir(pyoverlay)})"
    )
    result = subprocess.run([sys.executable, "-P", "-c", program], check=True, capture_output=True, text=True, timeout=30)
    assert result.stdout == f"{len(pyoverlay.__all__)} True\n"
