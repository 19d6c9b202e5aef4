"""`pyoverlay which`: where a path comes from, what it hides, and why."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from pyoverlay.testing import Overlay, OverlayFactory, Tree, Whiteout
from pyoverlay.testing.mounts import command

pytestmark = pytest.mark.root

TOP: Tree = {
    "f": "1", "gone": "k", "d": {"a": "x", "s": {"c": "y"}}, "o": {"p": "o"}, "rep": "r", "m": {}, "hidden": Whiteout(), "kind": {"x": ""},
    "aufs": {".wh.below": ""}, "all": {".wh..wh..opq": ""},
}  # fmt: skip
BOTTOM: Tree = {
    "f": "2", "d": {"a": "z"}, "m": {}, "only": "k", "hidden": "h", "kind": "a file", "aufs": {"below": "b"}, "all": {"below": "b"},
}  # fmt: skip


@pytest.fixture
def changed(overlay: OverlayFactory) -> Overlay:
    made = overlay(TOP, BOTTOM)
    m = made.merged
    (m / "new").write_text("n")
    with (m / "f").open("a") as file:
        file.write("more")
    (m / "gone").unlink()
    (m / "d").rename(m / "dd")
    shutil.rmtree(m / "o")
    (m / "o").mkdir()
    (m / "rep").unlink()
    (m / "rep").write_text("rr")
    return made


# What is asked for, and the lines without the path: U is the upper, 1 and 2 are the lowers.
ANSWERS = {
    "new": ["upper, added there", "is U/new"],
    "f": ["upper, copied up", "is U/f", "hides 1/f (covered by U/f)", "hides 2/f (covered by U/f)"],
    "only": ["lower 2", "is 2/only"],
    "rep": ["upper, in place of what it hides", "is U/rep", "hides 1/rep (covered by U/rep)"],
    "gone": ["not there, whiteout in U/gone", "hides 1/gone (whiteout in U/gone)"],
    "hidden": ["not there, whiteout in 1/hidden", "hides 2/hidden (whiteout in 1/hidden)"],
    "m": ["merged of lower 1, lower 2", "is 1/m", "is 2/m"],
    "kind": ["lower 1", "is 1/kind", "hides 2/kind (no directory, as what covers it is one)"],
    "o": ["upper, in place of what it hides", "is U/o", "hides 1/o (opaque at U/o)"],
    "o/p": ["not there, opaque at U/o", "hides 1/o/p (opaque at U/o)"],
    "dd": ["merged of upper, lower 1, lower 2", "is U/dd", "is 1/d", "is 2/d"],
    "dd/a": ["lower 1", "is 1/d/a", "hides 2/d/a (covered by 1/d/a)"],
    "dd/s/c": ["lower 1", "is 1/d/s/c"],
    "d/a": ["not there, whiteout in U/d", "hides 1/d/a (whiteout in U/d)", "hides 2/d/a (whiteout in U/d)"],
    "aufs/below": ["not there, whiteout in 1/aufs/below", "hides 2/aufs/below (whiteout in 1/aufs/below)"],
    "all/below": ["not there, whiteout in 1/all/below", "hides 2/all/below (whiteout in 1/all/below)"],
    "nowhere": ["not there, in no layer"],
    "f/x": ["not there, in no layer"],
    "": ["merged of upper, lower 1, lower 2", "is U", "is 1", "is 2"],
}


def which(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command("which", *arguments), check=False, capture_output=True, text=True, timeout=30)


def expected(overlay: Overlay, path: Path, lines: list[str]) -> str:
    roots = {"U": overlay.writable, "1": overlay.lowers[0], "2": overlay.lowers[1]}
    first, *others = lines

    def whole(text: str) -> str:
        return re.sub(r"(?<![\w/])([U12])(?=[/)]|\Z)", lambda found: str(roots[found[1]]), text)

    def line(text: str) -> str:
        verb, _, rest = text.partition(" ")
        return f"    {verb:<5}  {whole(rest)}"

    said = whole(first) if first.startswith("not there") else first
    return "\n".join([f"{path}: {said}", *map(line, others)]) + "\n"


@pytest.mark.parametrize("name", ANSWERS)
def test_a_path_is_traced_to_its_layers(changed: Overlay, name: str) -> None:
    path = changed.merged / name
    result = which(path)
    assert result.stderr == ""
    assert result.stdout == expected(changed, path, ANSWERS[name])
    assert result.returncode == (1 if "not there" in result.stdout else 0)
    assert os.path.lexists(path) is (result.returncode == 0)


def test_which_in_json(changed: Overlay) -> None:
    (told,) = json.loads(which("--json", changed.merged / "gone").stdout)["paths"]
    hidden = {"layer": "lower 1", "path": f"{changed.lower}/gone", "why": f"whiteout in {changed.upper}/gone"}
    assert told == {
        "path": f"{changed.merged}/gone", "state": "absent", "why": f"whiteout in {changed.upper}/gone", "shown": [], "hidden": [hidden]
    }  # fmt: skip


def test_which_works_while_the_daemon_hangs(changed: Overlay) -> None:
    (daemon,) = changed.daemons()
    os.kill(daemon, signal.SIGSTOP)
    try:
        assert which(changed.merged / "only").stdout.startswith(f"{changed.merged}/only: lower 2\n")
    finally:
        os.kill(daemon, signal.SIGCONT)


def test_which_of_a_read_only_mount(overlay: OverlayFactory) -> None:
    made = overlay({"f": ""}, read_only=True)
    assert which(made.merged / "f").stdout == f"{made.merged}/f: lower 1\n    is     {made.lower}/f\n"


def test_what_is_mounted_inside_is_not_taken_for_the_layers(overlay: OverlayFactory, tmp_path: Path) -> None:
    made = overlay({"d": {"f": "lower"}, "e": {}})
    (tmp_path / "other").mkdir()
    subprocess.run(["mount", "--bind", tmp_path / "other", made.merged / "d"], check=True)
    try:
        for path in (made.merged / "d", made.merged / "d/f"):
            result = subprocess.run(command("which", path), check=False, capture_output=True, text=True, timeout=30)
            said = f"pyoverlay: {path}: on another mount, at {made.merged}/d; unmount that to see what the layers have there\n"
            assert (result.returncode, result.stdout, result.stderr) == (1, "", said)
        assert subprocess.run(command("which", made.merged / "e"), check=False, capture_output=True, timeout=30).returncode == 0
    finally:
        subprocess.run(["umount", made.merged / "d"], check=True)


def test_which_outside_of_a_mount_says_so(tmp_path: Path) -> None:
    result = which(tmp_path)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == f"pyoverlay: {tmp_path}: in no mount of pyoverlay; pyoverlay ps lists those there are\n"
