"""`pyoverlay diff`: what an upper changes, compared with what Docker prints for the same changes."""

from __future__ import annotations

import errno
import json
import mmap
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pyoverlay import Kind, diff
from pyoverlay.core.policy import Policy
from pyoverlay.report.changes import Comparison
from pyoverlay.report.sizes import usage
from pyoverlay.testing import Directory, File, Overlay, OverlayFactory, Tree, Whiteout, make_tree
from pyoverlay.testing.mounts import command
from tests.interop.docker_diff import CASES, TREE, Case
from tests.posix.kernel_overlay import KernelOverlay

pytestmark = pytest.mark.root

AS_DOCKER = ("redirect_dir=off", "index=off", "metacopy=off")

NAMES = {case.name: f"c{number:02}" for number, case in enumerate(CASES)}


@dataclass(frozen=True, slots=True)
class Changed:
    """A mount in which every case was made, and what the walk over its upper says."""

    overlay: Overlay | KernelOverlay
    lines: list[str]

    @property
    def can_move(self) -> bool:
        return not (isinstance(self.overlay, KernelOverlay) and "redirect_dir=off" in self.overlay.options)

    def below(self, name: str) -> list[str]:
        return [line for line in self.lines if line[3:].split("/")[0] == name]


@pytest.fixture(scope="module", params=["ours", "kernel", "kernel, as Docker mounts it"])
def changed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Changed]:
    """Every case, each in a directory of its own, in one mount over two lowers that share each tree."""
    base = tmp_path_factory.mktemp("diff")
    top, bottom, upper, merged = (_made(base / name) for name in ("top", "bottom", "upper", "merged"))
    for name in NAMES.values():
        in_top: Tree = {key: TREE[key] for key in ("f", "h1", "h2", "d")}
        make_tree(_made(top / name), in_top)
        make_tree(_made(bottom / name), {key: node for key, node in TREE.items() if key not in in_top})
    overlays: dict[str, Overlay | KernelOverlay] = {
        "ours": Overlay((top, bottom), upper, merged),
        "kernel": KernelOverlay((top, bottom), upper, merged),
        "kernel, as Docker mounts it": KernelOverlay((top, bottom), upper, merged, AS_DOCKER),
    }
    overlay = overlays[request.param]
    overlay.mount()
    try:
        for case in CASES:
            case.change(merged / NAMES[case.name])
        yield Changed(overlay, changes(overlay))
    finally:
        overlay.close()


def _made(path: Path) -> Path:
    path.mkdir()
    return path


def changes(overlay: Overlay | KernelOverlay, *, copy_ups: bool = False) -> list[str]:
    lowers = [os.fsencode(lower) for lower in overlay.lowers]
    with Comparison(os.fsencode(overlay.writable), lowers, Policy(metacopy=True), os.fsencode(overlay.work)) as comparison:
        return [f"{change.kind.value} /{os.fsdecode(change.path)}" for change in comparison.changes(copy_ups=copy_ups)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_change_is_told_as_docker_tells_it(changed: Changed, case: Case) -> None:
    name = NAMES[case.name]
    expected = case.expected(name, can_move=changed.can_move)
    assert sorted(changed.below(name)) == sorted(expected)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_an_upper_is_as_large_as_docker_says(changed: Changed, case: Case) -> None:
    upper = changed.overlay.writable / NAMES[case.name]
    size = usage(os.fsencode(upper), Policy(), frozenset()).size if upper.is_dir() else 0
    is_lazy = isinstance(changed.overlay, Overlay) and case.name == "open for writing, and close"  # the first write copies up, here
    assert size == (0 if is_lazy else case.size)


def test_nothing_but_the_cases_is_told(changed: Changed) -> None:
    assert {line[3:].split("/")[0] for line in changed.lines} <= set(NAMES.values())


def test_a_directory_comes_before_what_is_in_it_and_names_in_their_order(changed: Changed) -> None:
    paths = [line[3:].split("/") for line in changed.lines]
    assert paths == sorted(paths)
    assert len(paths) == len({tuple(path) for path in paths})


# The system calls of one walk: all that follow the marker.
WALK = """
import os, sys
from pyoverlay import Kind, diff
from pyoverlay.core.policy import Policy
from pyoverlay.report.changes import Comparison
from pyoverlay.report.sizes import usage
upper, *lowers = map(os.fsencode, sys.argv[1:])
with Comparison(upper, lowers, Policy()) as comparison:
    os.access("/marker", os.F_OK)
    assert [change.path for change in comparison.changes()] == [b"d", b"d/new", b"d/old"]
"""


# Calls that the allocator makes when it pleases: the address space is another one in each process.
MEMORY = {"brk", "mmap", "munmap", "mremap", "madvise"}


def calls_of_a_walk(base: Path, siblings: int) -> int:
    """How many system calls it takes to find one file added, and one removed, beside that many others in each of two lowers."""
    others: Tree = {f"other{number}": "" for number in range(siblings)}
    layers: Tree = {"top": {"d": {"old": "", **others}}, "bottom": {"d": others}, "upper": {"d": {"new": "", "old": Whiteout()}}}
    make_tree(_made(base), layers)
    arguments = ["-o", f"{base}/trace", sys.executable, "-P", "-c", WALK, f"{base}/upper", f"{base}/top", f"{base}/bottom"]
    subprocess.run(["strace", *arguments], check=True, timeout=30)
    lines = (base / "trace").read_text().splitlines()
    start = next(number for number, line in enumerate(lines) if '"/marker"' in line)
    return sum(line.partition("(")[0] not in MEMORY for line in lines[start:])


def test_the_cost_of_a_walk_does_not_grow_with_the_lowers(tmp_path: Path) -> None:
    assert calls_of_a_walk(tmp_path / "few", 3) == calls_of_a_walk(tmp_path / "many", 3000)


def test_metacopy_files_are_told_by_their_attributes(tmp_path: Path) -> None:
    """In a lower over a data-only layer, in the upper over the lower, and renamed."""
    make_tree(tmp_path, {"data": {"blob": "12345"}, "lower": {}, "upper": {}, "merged": {}})
    mark: dict[str, bytes] = {"trusted.overlay.metacopy": b"", "trusted.overlay.redirect": b"/blob"}
    make_tree(tmp_path / "lower", {name: File(size=5, xattrs=mark) for name in ("f", "g", "same")})
    layers = f"lowerdir={tmp_path}/lower::{tmp_path}/data,upperdir={tmp_path}/upper"
    subprocess.run(command("mount", "-o", f"{layers},metacopy=on", tmp_path / "merged"), check=True)
    try:
        os.chmod(tmp_path / "merged/f", 0o600)
        os.rename(tmp_path / "merged/g", tmp_path / "merged/h")
        assert (tmp_path / "merged/h").read_text() == "12345"
        assert printed(tmp_path / "merged") == ["C /f", "D /g", "A /h"]
    finally:
        subprocess.run(command("umount", tmp_path / "merged"), check=True)
    assert "trusted.overlay.metacopy" in os.listxattr(tmp_path / "upper/f")
    assert printed("--lower", f"{tmp_path}/lower::{tmp_path}/data", tmp_path / "upper") == ["C /f", "D /g", "A /h"]


def test_unchanged_copy_ups_are_told_when_asked_for(tmp_path: Path) -> None:
    lower: Tree = {"d": {"same": "1", "deep": {"same": "2"}, "changed": "3"}, "e": {"same": "4"}}
    layers: Tree = {"lower": lower, "upper": {**lower, "d": {**lower["d"], "changed": "new"}}}  # type: ignore[dict-item]
    make_tree(tmp_path, layers)
    with Comparison(os.fsencode(tmp_path / "upper"), [os.fsencode(tmp_path / "lower")], Policy()) as comparison:
        told = [f"{change.kind.value} {os.fsdecode(change.path)}" for change in comparison.changes(copy_ups=True)]
        assert [change.path for change in comparison.changes()] == [b"d", b"d/changed"]
    assert told == ["C d", "C d/changed", "U d/deep", "U d/deep/same", "U d/same", "U e", "U e/same"]


def test_a_tree_deeper_than_python_s_stack_is_walked(tmp_path: Path) -> None:
    (tmp_path / "lower").mkdir()
    here = os.open(_made(tmp_path / "upper"), os.O_RDONLY)
    for _ in range(1500):
        os.mkdir("d", dir_fd=here)
        below = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    try:
        with Comparison(os.fsencode(tmp_path / "upper"), [os.fsencode(tmp_path / "lower")], Policy()) as comparison:
            assert sum(1 for _ in comparison.changes()) == 1500
    finally:
        subprocess.run(["rm", "-r", tmp_path / "upper"], check=True)  # pytest's own removal is recursive


def test_a_failure_names_the_path(tmp_path: Path) -> None:
    make_tree(tmp_path, {"lower": {}, "upper": {"d": {"e": Directory({}, xattrs={"trusted.overlay.redirect": b"/a//b"})}}})
    with Comparison(os.fsencode(tmp_path / "upper"), [os.fsencode(tmp_path / "lower")], Policy()) as comparison:
        with pytest.raises(OSError) as caught:
            list(comparison.changes())
    assert (caught.value.errno, caught.value.filename) == (errno.EINVAL, "d/e")


# ── the command ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def pyoverlay_diff(*arguments: str | Path) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(command("diff", *arguments), check=False, capture_output=True, timeout=30)


def printed(*arguments: str | Path) -> list[str]:
    result = pyoverlay_diff(*arguments)
    assert (result.returncode, result.stderr) == (0, b"")
    return result.stdout.decode(errors="surrogateescape").splitlines()


LOWER: Tree = {"f": "from the lower", "kept": "1", "d": {"a": "1", "sub": {"c": "3"}}, "gone": {"x": "", "y": ""}}


@pytest.fixture
def mounted(overlay: OverlayFactory) -> Overlay:
    """A mount in which something was added, changed, deleted, renamed and copied up."""
    made = overlay(LOWER, {"below": {"b": ""}})
    (made.merged / "new").write_bytes(b"x" * 2000)
    (made.merged / "f").write_text("changed")
    shutil.rmtree(made.merged / "gone")
    (made.merged / "d").rename(made.merged / "moved")
    os.close(os.open(made.merged / "kept", os.O_RDWR | os.O_APPEND))
    os.chmod(made.merged / "kept", 0o644)
    return made


LINES = ["D /d", "C /f", "D /gone", "A /moved", "A /moved/a", "A /moved/sub", "A /moved/sub/c", "A /new"]


def test_diff_of_a_mount_and_of_its_upper_are_the_same(mounted: Overlay) -> None:
    assert printed(mounted.merged) == LINES
    assert printed(mounted.writable) == LINES


def test_diff_of_an_upper_that_is_not_mounted_needs_its_lowers(mounted: Overlay) -> None:
    mounted.umount()
    lowers = ":".join(map(str, mounted.lowers))
    assert printed("--lower", lowers, mounted.writable) == LINES
    result = pyoverlay_diff(mounted.writable)
    line = f"pyoverlay: {mounted.writable}: an upper says what it holds, not what that changes; name the layers below with --lower, "
    assert (result.returncode, result.stdout) == (1, b"")
    assert result.stderr.decode().startswith(line)


def test_diff_of_an_upper_whose_marks_are_spelled_the_other_way_says_so(overlay: OverlayFactory) -> None:
    """An opaque directory would be told as one that nothing happened to."""
    made = overlay({"d": {"old": "1"}}, options=["-o", "userxattr"])
    (made.merged / "d/old").unlink()
    (made.merged / "d").rmdir()
    (made.merged / "d").mkdir()
    assert printed(made.merged) == ["C /d", "D /d/old"]
    made.umount()
    result = pyoverlay_diff("--lower", made.lower, made.writable)
    assert (result.returncode, result.stdout) == (1, b"")
    assert result.stderr.endswith(b"of a mount made with userxattr (Invalid argument); say --userxattr\n")
    assert printed("--userxattr", "--lower", made.lower, made.writable) == ["C /d", "D /d/old"]


def test_diff_shows_copy_ups_and_bare_names_when_asked(mounted: Overlay) -> None:
    assert printed("--all", mounted.merged) == sorted([*LINES, "U /kept"], key=lambda line: line[2:])
    assert printed("--name-only", mounted.merged) == [line[2:] for line in LINES]


def test_diff_sums_by_directory(mounted: Overlay) -> None:
    assert printed("--stat", mounted.merged) == [
        "SIZE      ADDED     CHANGED   DELETED   DIRECTORY",
        "2.01kB    2         1         2         /",
        "0B        2         0         0         /moved",
        "0B        1         0         0         /moved/sub",
        "2.01kB    5         1         2         total",
    ]
    (root, *_) = json.loads("\n".join(printed("--stat", "--json", mounted.merged)))["directories"]
    assert root == {"path": "/", "size": 2007, "added": 2, "changed": 1, "deleted": 2, "copied_up": 0}


def test_diff_in_json(mounted: Overlay) -> None:
    told = json.loads("\n".join(printed("--json", mounted.merged)))
    assert told["schema"] == 1
    assert (told["upper"], told["lowers"]) == (str(mounted.writable), [str(lower) for lower in mounted.lowers])
    assert [f"{change['kind']} {change['path']}" for change in told["changes"]] == LINES
    moved, inside = (change for change in told["changes"] if change["path"] in ("/moved", "/moved/a"))
    assert (moved["type"], moved["in_upper"], inside["in_upper"]) == ("directory", True, False)


def test_diff_as_podman_prints_it(mounted: Overlay) -> None:
    told = json.loads("\n".join(printed("--format", "json", mounted.merged)))
    assert told == {
        "changed": ["/f"], "added": ["/moved", "/moved/a", "/moved/sub", "/moved/sub/c", "/new"], "deleted": ["/d", "/gone"]
    }  # fmt: skip


def test_what_podman_leaves_out_is_left_out(overlay: OverlayFactory) -> None:
    made = overlay({})
    assert printed("--format", "json", made.merged) == ["{}"]
    (made.merged / "new").touch()
    assert printed("--format", "json", made.merged) == ['{"added": ["/new"]}']


def test_diff_of_a_mount_of_the_kernel_s_overlay(tmp_path: Path) -> None:
    make_tree(tmp_path, {"a:b": {"f": "1", "d": {"x": ""}}, "c,d": {"g": ""}, "upper": {}, "merged": {}})
    made = KernelOverlay((tmp_path / "a:b", tmp_path / "c,d"), tmp_path / "upper", tmp_path / "merged")
    made.mount()
    try:
        (made.merged / "d").rename(made.merged / "e")
        (made.merged / "g").unlink()
        assert printed(made.merged) == ["D /d", "A /e", "A /e/x", "D /g"]
    finally:
        made.close()


def test_diff_of_a_read_only_mount_of_the_kernel_s_says_so(tmp_path: Path) -> None:
    make_tree(tmp_path, {"a": {}, "b": {}, "merged": {}})
    subprocess.run(["mount", "-t", "overlay", "o", "-o", f"lowerdir={tmp_path}/a:{tmp_path}/b", tmp_path / "merged"], check=True)
    try:
        result = pyoverlay_diff(tmp_path / "merged")
        assert (result.returncode, b"mounted read-only" in result.stderr) == (1, True)
    finally:
        subprocess.run(["umount", tmp_path / "merged"], check=True)


def test_diff_of_a_kernel_mount_by_relative_paths_says_what_to_name(tmp_path: Path) -> None:
    make_tree(tmp_path, {"a": {}, "upper": {}, "work": {}, "merged": {}})
    options = "lowerdir=a,upperdir=upper,workdir=work"
    subprocess.run(["mount", "-t", "overlay", "o", "-o", options, tmp_path / "merged"], check=True, cwd=tmp_path)
    try:
        result = pyoverlay_diff(tmp_path / "merged")
        assert (result.returncode, b"name its upper, and the layers below with --lower" in result.stderr) == (1, True)
    finally:
        subprocess.run(["umount", tmp_path / "merged"], check=True)


def test_diff_passes_the_bytes_of_a_name_on(overlay: OverlayFactory) -> None:
    made = overlay({})
    (made.merged / os.fsdecode(b"no utf\xff\n")).touch()
    assert pyoverlay_diff(made.merged).stdout == b"A /no utf\xff\n\n"


def test_what_a_shared_map_has_dirtied_counts(overlay: OverlayFactory) -> None:
    made = overlay({"f": File(content=b"x" * 4096)})
    with open(made.merged / "f", "r+b") as file, mmap.mmap(file.fileno(), 4096) as shared:
        shared[0] = 65
        assert printed(made.merged) == ["C /f"]


@pytest.mark.parametrize("named", ["merged", "writable"])
def test_what_the_page_cache_still_holds_counts(overlay: OverlayFactory, named: str) -> None:
    made = overlay({"f": "1234"}, options=["-o", "writeback"])
    with open(made.merged / "f", "r+b", buffering=0) as file:
        file.write(b"4321")
        assert [(one.kind, str(one.path)) for one in diff(getattr(made, named))] == [(Kind.CHANGED, "/f")]


@pytest.mark.parametrize("arguments", [["--name-only", "--stat"], ["--json", "--format", "json"], ["--format", "{{.Path}}"]])
def test_diff_with_two_forms_of_output_is_wrong_usage(tmp_path: Path, arguments: list[str]) -> None:
    assert pyoverlay_diff(*arguments, tmp_path).returncode == 2


def test_diff_of_what_is_no_mount_says_so(tmp_path: Path) -> None:
    result = pyoverlay_diff(tmp_path / "nowhere")
    assert (result.returncode, result.stderr.decode().splitlines()[0].partition(": ")[2].partition(";")[0]) == (
        1, f"{tmp_path}/nowhere: neither a mount nor an upper (No such file or directory)"
    )  # fmt: skip


def test_diff_of_a_read_only_mount_says_so(overlay: OverlayFactory) -> None:
    result = pyoverlay_diff(overlay({"f": ""}, read_only=True).merged)
    assert (result.returncode, b"mounted read-only" in result.stderr) == (1, True)


def test_a_reader_who_has_seen_enough_is_told_nothing(mounted: Overlay) -> None:
    here = os.pipe()
    os.close(here[0])
    with subprocess.Popen(command("diff", mounted.merged), stdout=here[1], stderr=subprocess.PIPE) as process:
        os.close(here[1])
        _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (1, b"")
