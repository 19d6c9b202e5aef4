"""`pyoverlay ps` and `pyoverlay inspect`: what they print of mounts that are well, hang, or are dead."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from pyoverlay import registry
from pyoverlay.cli.ps import command as list_mounts
from pyoverlay.core.policy import Policy
from pyoverlay.report import ps
from pyoverlay.report.mounts import Mount, State
from pyoverlay.report.sizes import Usage, usage
from pyoverlay.testing import Overlay, OverlayFactory, make_tree
from pyoverlay.testing.mounts import command, wait_for_end
from tests.integration.unprivileged import as_user

pytestmark = pytest.mark.root


@pytest.fixture(autouse=True)
def list_of_our_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other mounts of this machine are none of these tests' business."""
    monkeypatch.setenv("PYOVERLAY_RUNTIME_DIR", str(tmp_path / "run"))


@pytest.fixture
def mounted(overlay: OverlayFactory) -> Overlay:
    """A mount over two lowers, of 6 and 4 bytes, with 2820 in its upper."""
    made = overlay({"f": "lower\n"}, {"g": "low\n"}, options=("-o", "noatime,redirect_dir=on"))
    (made.merged / "new").write_bytes(b"x" * 2820)
    return made


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), check=False, capture_output=True, text=True, timeout=30)


def printed(*arguments: str | Path) -> list[str]:
    result = run(*arguments)
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout.splitlines()


def told(*arguments: str | Path) -> Any:
    return json.loads("\n".join(printed(*arguments)))


@contextmanager
def stopped(overlay: Overlay) -> Iterator[int]:
    """The daemon hangs, as one does whose upper's disk does not answer."""
    (daemon,) = overlay.daemons()
    os.kill(daemon, signal.SIGSTOP)
    try:
        yield daemon
    finally:
        os.kill(daemon, signal.SIGCONT)


@contextmanager
def killed(overlay: Overlay) -> Iterator[int]:
    """The daemon has died, and left a dead mount."""
    (daemon,) = overlay.daemons()
    os.kill(daemon, signal.SIGKILL)
    assert wait_for_end([daemon], 10) == []
    try:
        yield daemon
    finally:
        subprocess.run(["umount", "-l", overlay.merged], check=True)


# ── ps ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_ps_lists_a_mount_and_what_it_has_changed(mounted: Overlay) -> None:
    head, line = printed("ps", "-s", "--no-trunc")
    assert re.split(r" {3,}", head) == ["MOUNT ID", "MERGED", "UPPER", "LOWERS", "PID", "STATUS", "SIZE"]
    (daemon,) = mounted.daemons()
    number, merged, upper, lowers, pid, status, size = re.split(r" {3,}", line)
    assert re.fullmatch(r"[0-9a-f]{12}", number)
    assert (merged, upper, lowers) == (str(mounted.merged), str(mounted.writable), ":".join(map(str, mounted.lowers)))
    assert (pid, size) == (str(daemon), "2.82kB (virtual 2.83kB)")
    assert status.startswith("Up ")


def test_ps_cuts_long_paths_and_names_the_top_lower(mounted: Overlay) -> None:
    (line,) = printed("ps", "--noheading")
    assert f"…{str(mounted.merged)[-37:]}" in line
    assert f"…{str(mounted.lower)[-37:]} (+1)" in line


def test_ps_without_mounts_is_a_head_alone() -> None:
    assert printed("ps") == ["MOUNT ID   MERGED    UPPER     LOWERS    PID       STATUS"]
    assert printed("ps", "-q") == []
    assert told("ps", "--json")["mounts"] == []


def test_ps_quiet_prints_what_other_commands_take(mounted: Overlay) -> None:
    assert printed("ps", "-q") == [str(mounted.merged)]


def test_ps_in_json(mounted: Overlay) -> None:
    document = told("ps", "--json", "-s")
    (mount,) = document["mounts"]
    assert document["schema"] == 1
    assert (mount["merged"], mount["upper"], mount["state"], mount["trouble"]) == (str(mounted.merged), str(mounted.writable), "up", None)
    assert mount["lowers"] == [str(lower) for lower in mounted.lowers]
    assert mount["size"] == {"upper": 2820, "virtual": 2830}


def test_ps_by_a_template(mounted: Overlay) -> None:
    assert printed("ps", "--no-trunc", "--format", "{{.Merged}} {{.Size}}") == [f"{mounted.merged} 2.82kB (virtual 2.83kB)"]
    assert printed("ps", "--no-trunc", "--format", r"table {{.Merged}}\t{{.Options}}") == [
        "MERGED".ljust(len(str(mounted.merged)) + 3) + "OPTIONS",
        f"{mounted.merged}   noatime,redirect_dir=on",
    ]
    assert json.loads(printed("ps", "--no-trunc", "--format", "json")[0])["Upper"] == str(mounted.writable)


def test_ps_reads_a_template_as_docker_does(mounted: Overlay) -> None:
    """What is in front of a table, and blanks around; and a head is not what a function makes of it."""
    (id_,) = printed("ps", "--format", " {{.ID}} ")
    assert printed("ps", "--format", "table{{.ID}}") == ["MOUNT ID", id_]
    assert printed("ps", "--format", r"table {{truncate .ID 4}}\t{{json .ID}}\t{{lower .Options}}") == [
        "MOUNT ID   MOUNT ID         OPTIONS", f'{id_[:4]:<11}"{id_}"   noatime,redirect_dir=on'
    ]  # fmt: skip
    assert printed("ps", "--format", r"table {{.ID}}{{if eq .Status .ID}}\t{{.Pid}}{{end}}\t{{.Options}}{{if .Pid}}{{end}}")[0].split() == [
        "MOUNT", "ID", "OPTIONS"
    ]  # fmt: skip
    assert told("ps", "--format", "{{json .}}")["Size"] == "2.82kB (virtual 2.83kB)"
    assert [line.split()[0] for line in printed("ps", "--format", "")] == ["MOUNT", id_]
    assert printed("inspect", "-f", "", mounted.merged) == printed("inspect", mounted.merged)


def test_ps_filters(mounted: Overlay, overlay: OverlayFactory) -> None:
    other = overlay({}, read_only=True)
    assert printed("ps", "-q", "--filter", f"merged={mounted.merged}") == [str(mounted.merged)]
    assert printed("ps", "-q", "--filter", f"lower={other.lower}", "--filter", "status=up") == [str(other.merged)]
    assert printed("ps", "-q", "--filter", f"upper={mounted.writable}", "--filter", "upper=/nowhere") == [str(mounted.merged)]
    assert printed("ps", "-q", "--filter", "status=dead") == []


@pytest.mark.parametrize("arguments", [["--filter", "color=red"], ["--filter", "up"], ["--format", "{{"], ["-q", "--json"]])
def test_ps_refuses_what_it_cannot_mean(arguments: list[str]) -> None:
    result = run("ps", *arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("pyoverlay: --")


@pytest.mark.parametrize(
    ("befalls", "status", "state"),
    [(stopped, r"Up .* \(not answering\)", "not answering"), (killed, "Dead", "dead")],
    ids=["hangs", "died"],
)
def test_a_daemon_that_hangs_or_died_is_told_of(
    mounted: Overlay, befalls: Callable[[Overlay], Any], status: str, state: str
) -> None:
    well = told("ps", "--json")["mounts"][0]
    with befalls(mounted) as daemon:
        (line,) = printed("ps", "--format", "{{.Status}}")
        assert re.fullmatch(status, line)
        assert printed("ps", "--format", "{{.Size}}") == ["2.82kB (virtual 2.83kB)"]
        (mount,) = told("inspect", mounted.merged)
        assert (mount["Id"], mount["State"]["Status"], mount["Requests"]) == (well["id"], state, None)
        assert f"(pid {daemon})" in mount["State"]["Error"]
        assert printed("diff", mounted.merged) == ["A /new"]
        assert printed("diff", mounted.writable) == ["A /new"]


def test_a_dead_mount_is_no_longer_listed_once_it_is_taken_away(mounted: Overlay) -> None:
    with killed(mounted):
        pass
    assert printed("ps", "-q") == []
    assert os.listdir(os.environ["PYOVERLAY_RUNTIME_DIR"]) == []


def test_ps_by_size_of_a_layer_that_is_gone_says_so(mounted: Overlay, tmp_path: Path) -> None:
    mounted.writable.rename(tmp_path / "elsewhere")
    result = run("ps", "-s", "--format", "{{.Size}}")
    (tmp_path / "elsewhere").rename(mounted.writable)
    assert (result.returncode, result.stdout) == (1, "\n")
    assert result.stderr == f"pyoverlay: {mounted.writable}: cannot be measured (No such file or directory)\n"


def test_a_mount_of_another_release_is_listed_and_says_so_where_its_policy_counts(mounted: Overlay, overlay: OverlayFactory) -> None:
    other = overlay({"g": "12"}, read_only=True)
    (record,) = [path for path in Path(os.environ["PYOVERLAY_RUNTIME_DIR"]).glob("*.json") if str(mounted.lower) in path.read_text()]
    document = json.loads(record.read_text())
    record.write_text(json.dumps(document | {"features": document["features"] | {"redirect_dir": "later"}}))
    said = ": mounted by another release of pyoverlay: 'later' is not a valid RedirectDir; use that release\n"
    result = run("ps", "--no-trunc", "--format", "{{.Merged}} {{.Size}}")
    assert (result.returncode, result.stderr) == (1, f"pyoverlay: {mounted.merged}{said}")
    assert result.stdout.splitlines() == [f"{mounted.merged} ", f"{other.merged} 0B (virtual 2B)"]
    for name, path in (("diff", mounted.merged), ("which", mounted.merged / "f")):
        result = run(name, path)
        assert (result.returncode, result.stdout, result.stderr) == (1, "", f"pyoverlay: {mounted.merged}{said}")


def test_ps_by_size_leaves_out_what_ends_while_it_is_measured(
    mounted: Overlay, overlay: OverlayFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was listed, and its layers had gone with it when they were looked at: an error, and exit status 1."""
    other = overlay({"f": "lower"})
    measure = ps.Sizes.of

    def of(sizes: ps.Sizes, mount: Mount) -> ps.Size:
        if mount.record.merged == os.fsencode(mounted.merged):
            mounted.umount()
            shutil.rmtree(mounted.writable)
        return measure(sizes, mount)

    monkeypatch.setattr(ps.Sizes, "of", of)
    result = CliRunner().invoke(list_mounts, ["-s", "--no-trunc", "--format", "{{.Merged}} {{.Size}}"])
    assert (result.exit_code, result.output) == (0, f"{other.merged} 0B (virtual 5B)\n")


def test_a_lower_is_measured_once_and_known_by_what_it_is(overlay: OverlayFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by its path: several lead to it, and one that held another directory before leads elsewhere now."""
    made = overlay({"f": "lower"})
    link = tmp_path / "link"
    link.symlink_to(made.lower)
    (record,) = registry.live()
    through = replace(record, lowers=(os.fsencode(link),))
    measured: list[bytes] = []

    def measure(layer: bytes, policy: Policy, masked: frozenset[tuple[int, int]]) -> Usage:
        measured.append(layer)
        return usage(layer, policy, masked)

    monkeypatch.setattr(ps, "usage", measure)
    sizes = ps.Sizes()
    assert [sizes.of(Mount(each, State.UP)).virtual for each in (record, through)] == [5, 5]
    assert measured.count(record.lowers[0]) == 1
    assert through.lowers[0] not in measured
    link.unlink()
    link.mkdir()
    (link / "g").write_text("another")
    assert sizes.of(Mount(through, State.UP)).virtual == 7


# ── inspect ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_inspect_has_the_shape_of_docker_s(mounted: Overlay) -> None:
    (mount,) = told("inspect", mounted.merged)
    assert mount["GraphDriver"]["Data"] == {
        "LowerDir": ":".join(map(str, mounted.lowers)),
        "MergedDir": str(mounted.merged),
        "UpperDir": str(mounted.writable),
        "WorkDir": str(mounted.work),
    }
    (daemon,) = mounted.daemons()
    assert (mount["GraphDriver"]["Name"], mount["State"]["Pid"], mount["State"]["Running"]) == ("pyoverlay", daemon, True)
    assert mount["Options"] == ["noatime", "redirect_dir=on"]
    assert mount["Features"]["redirect_dir"] == "on"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", mount["State"]["StartedAt"])


@pytest.mark.parametrize("wire", ["1", "0"], ids=["with the extension", "without"])
def test_inspect_counts_requests(overlay: OverlayFactory, monkeypatch: pytest.MonkeyPatch, wire: str) -> None:
    """Asking opens no path in the daemon, which a path could lead into its own mount; here one would end it."""
    monkeypatch.setenv("PYOVERLAY_WIRE", wire)
    monkeypatch.setenv("PYOVERLAY_FORBID_PATHS", "1")
    made = overlay({})
    before = told("inspect", "-f", "{{json .Requests}}", made.merged)
    for number in range(5):
        os.mkdir(made.merged / str(number))
    os.rename(made.merged / "0", made.merged / "a")
    after = told("inspect", "-f", "{{json .Requests}}", made.merged)
    assert (after["mkdir"], after["rename"]) == (before.get("mkdir", 0) + 5, before.get("rename", 0) + 1)


def test_inspect_by_a_template(mounted: Overlay) -> None:
    assert printed("inspect", "-f", "{{.GraphDriver.Data.UpperDir}}", mounted.merged) == [str(mounted.writable)]
    (compact,) = printed("inspect", "-f", "json", mounted.merged)
    assert json.loads(compact)[0]["Name"] == str(mounted.merged)
    assert told("inspect", "--json", mounted.merged)["mounts"][0]["work"] == str(mounted.work)


def test_an_unknown_field_is_an_error_that_lists_what_there_is(mounted: Overlay) -> None:
    result = run("inspect", "-f", "{{.GraphDriver.Data.Upper}}", mounted.merged)
    line = "pyoverlay: --format: there is no field Upper; there is LowerDir, MergedDir, UpperDir, WorkDir\n"
    assert (result.returncode, result.stdout, result.stderr) == (1, "", line)


def test_a_template_that_is_none_is_wrong_usage(mounted: Overlay) -> None:
    result = run("inspect", "-f", "{{.Name", mounted.merged)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("pyoverlay: --format: column 1: the action is not closed with }}\n")


def test_of_several_names_those_that_are_mounts_are_told(mounted: Overlay, tmp_path: Path) -> None:
    result = run("inspect", "-f", "{{.Name}}", tmp_path, mounted.merged)
    assert (result.returncode, result.stdout) == (1, f"{mounted.merged}\n")
    assert result.stderr == f"pyoverlay: {tmp_path}: no mount of pyoverlay; pyoverlay ps lists those there are\n"


def test_a_mount_without_an_upper_has_none_to_tell(overlay: OverlayFactory) -> None:
    made = overlay({}, read_only=True)
    assert printed("inspect", "-f", "[{{.GraphDriver.Data.UpperDir}}]", made.merged) == ["[]"]
    assert printed("ps", "--format", "{{.Size}}") == ["0B (virtual 0B)"]


def test_a_mount_is_found_through_a_symlink_and_by_a_relative_path(mounted: Overlay, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(mounted.merged)
    assert printed("inspect", "-f", "{{.Name}}", tmp_path / "link") == [str(mounted.merged)]
    result = subprocess.run(
        command("inspect", "-f", "{{.Name}}", "merged"), check=True, capture_output=True, text=True, timeout=30, cwd=mounted.merged.parent
    )
    assert result.stdout == f"{mounted.merged}\n"


def test_colons_in_layers_are_escaped_as_mount_takes_them(tmp_path: Path) -> None:
    make_tree(tmp_path, {"a:b": {}, "merged": {}})
    made = Overlay((tmp_path / "a:b",), None, tmp_path / "merged")
    made.mount()
    try:
        assert printed("inspect", "-f", "{{.GraphDriver.Data.LowerDir}}", made.merged) == [f"{tmp_path}/a\\:b"]
    finally:
        made.close()


def test_names_that_are_no_utf8_are_passed_on(tmp_path: Path) -> None:
    name = os.fsdecode(b"m\xff")
    make_tree(tmp_path, {"lower": {}, name: {}})
    made = Overlay((tmp_path / "lower",), None, tmp_path / name)
    made.mount()
    try:
        result = subprocess.run(command("inspect", "-f", "{{.Name}}", made.merged), check=True, capture_output=True, timeout=30)
        assert result.stdout == os.fsencode(made.merged) + b"\n"
        result = subprocess.run(command("ps", "-q"), check=True, capture_output=True, timeout=30)
        assert result.stdout == os.fsencode(made.merged) + b"\n"
        assert told("ps", "--json")["mounts"][0]["merged"] == str(made.merged)
        assert printed("ps", "--noheading", "--no-trunc")[0].split()[1] == f"{tmp_path}/m\\xff"
    finally:
        made.close()


# ── whose mounts are listed ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_record_of_somebody_who_did_not_make_the_mount_is_not_believed(mounted: Overlay) -> None:
    """A user may write into the own runtime directory that root's mount has other layers."""
    (record,) = Path(os.environ["PYOVERLAY_RUNTIME_DIR"]).glob("*.json")
    os.chown(record, 4321, 4321)
    try:
        assert printed("ps", "-q") == []
        assert run("inspect", mounted.merged).returncode == 1
        assert run("which", mounted.merged / "f").returncode == 1
    finally:
        os.chown(record, 0, 0)


def test_a_record_of_somebody_who_did_not_make_the_mount_keeps_no_umount_waiting(mounted: Overlay) -> None:
    """Root's umount would else wait for the end of whatever process that user wrote down."""
    (record,) = Path(os.environ["PYOVERLAY_RUNTIME_DIR"]).glob("*.json")
    forged = record.with_name("0123456789ab.json")
    document = json.loads(record.read_text()) | {"id": forged.stem, "pid": os.getpid(), "started": 2**33}
    document["start_time"] = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    forged.write_text(json.dumps(document))
    os.chown(forged, 4321, 4321)
    try:
        mounted.umount()
    finally:
        forged.unlink()


@pytest.mark.parametrize("words", [["ps"], ["ps", "--format", "{{.ID}}"], ["inspect", "/"], ["diff", "/nowhere"], ["which", "/"]])
def test_reports_load_neither_trio_nor_pyfuse3(words: list[str]) -> None:
    program = f"import sys; from pyoverlay.cli import run; run({words!r}); print(*sys.modules)"
    result = subprocess.run([sys.executable, "-P", "-c", program], check=True, capture_output=True, text=True, timeout=30)
    assert {"trio", "pyfuse3", "pyoverlay.fuse"} & set(result.stdout.splitlines()[-1].split()) == set()


def test_root_sees_a_user_s_mounts_and_a_user_the_own_ones(mounted: Overlay, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those of a user without a session, whose list is in /tmp."""
    (home / "lower/f").write_text("f")
    script = (
        "unset XDG_RUNTIME_DIR; $po mount lower upper merged; echo more > merged/new; rm merged/f; $po ps -q;"
        " $po ps -s --format '{{.Size}}'; $po diff merged; $po which merged/f | head -n 1;"
        " $po inspect -f '{{.State.Status}} {{.Features.userxattr}} {{.State.Pid}}' merged"
    )
    result = as_user(home, script)
    assert result.stderr == ""
    *lines, told = result.stdout.splitlines()
    assert lines == [
        f"{home}/merged", "5B (virtual 6B)", "D /f", "A /new", f"merged/f: not there, whiteout in {home}/upper/f"
    ]  # fmt: skip
    status, userxattr, daemon = told.split()
    try:
        assert (status, userxattr) == ("up", "true")
        with monkeypatch.context() as without:
            without.delenv("PYOVERLAY_RUNTIME_DIR")
            assert printed("ps", "--filter", f"upper={home}/upper", "--format", "{{.Pid}}") == [daemon]
            assert printed("diff", home / "upper") == ["D /f", "A /new"]
    finally:
        os.kill(int(daemon), signal.SIGTERM)
        assert wait_for_end([int(daemon)], 10) == []


def test_what_a_user_may_not_read_is_named_by_its_place(home: Path) -> None:
    for directory in ("lower/closed", "upper/closed", "other"):
        (home / directory).mkdir(mode=0o700)
    script = (
        "$po diff --lower lower upper || $po export upper -o layer.tar || $po diff --lower other upper"
        " || $po diff --lower upper lower || :"
    )
    result = as_user(home, script)
    denied = "refused by the system (Permission denied)"
    assert result.stderr.splitlines() == [
        f"pyoverlay: upper/closed: {denied}", f"pyoverlay: upper/closed: {denied}", f"pyoverlay: {home}/other: {denied}",
        f"pyoverlay: lower/closed: {denied}",
    ]  # fmt: skip
