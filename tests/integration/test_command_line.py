"""The commands as people and mount(8) call them: their arguments, what they print, their exit codes."""

from __future__ import annotations

import json
import os
import re
import resource
import shlex
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pyoverlay.cli import COMMANDS
from pyoverlay.testing import Overlay, OverlayFactory
from pyoverlay.testing.mounts import MARK, command

MOUNT_PROGRAM = [sys.executable, "-P", "-m", "pyoverlay.daemon.mount_program"]


def run(
    arguments: list[str], overlay: Overlay | None = None, environment: dict[str, str] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    mark = {MARK: overlay.mark} if overlay is not None else {}
    return subprocess.run(
        arguments, check=False, capture_output=True, text=True, timeout=30, cwd=cwd, env=os.environ | mark | (environment or {})
    )


def pyoverlay(*arguments: str | Path, overlay: Overlay | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    return run(command(*arguments), overlay, environment)


def succeeds(result: subprocess.CompletedProcess[str]) -> None:
    """A command that worked says nothing."""
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def layers(overlay: Overlay, *more: str) -> str:
    return ",".join([f"lowerdir={overlay.lower},upperdir={overlay.upper},workdir={overlay.work}", *more])


@pytest.fixture
def unmounted(overlay: OverlayFactory) -> Overlay:
    made = overlay({"file": "of the lower\n"}, mount=False)
    made.work.mkdir()
    return made


# ── mount ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_mount_shows_the_lower_and_writes_to_the_upper(overlay: OverlayFactory) -> None:
    made = overlay({"file": "of the lower\n"}, mount=False)
    succeeds(pyoverlay("mount", made.lower, made.writable, made.merged, overlay=made))
    assert (made.merged / "file").read_text() == "of the lower\n"
    (made.merged / "new").write_text("x")
    assert (made.writable / "new").read_text() == "x"


def test_mount_makes_the_default_work_directory_for_its_owner_alone(overlay: OverlayFactory) -> None:
    made = overlay({}, mount=False)
    succeeds(pyoverlay("mount", made.lower, made.writable, made.merged, overlay=made))
    assert made.work.name == ".upper.pyoverlay-work"
    assert stat.S_IMODE(made.work.stat().st_mode) == 0o700


def test_mount_puts_the_leftmost_lower_on_top(overlay: OverlayFactory) -> None:
    made = overlay({"f": "top"}, {"f": "bottom", "g": "bottom"}, mount=False)
    succeeds(pyoverlay("mount", f"{made.lowers[0]}:{made.lowers[1]}", made.writable, made.merged, overlay=made))
    assert [(made.merged / name).read_text() for name in "fg"] == ["top", "bottom"]


def test_mount_takes_a_lower_whose_name_holds_every_special_character(overlay: OverlayFactory) -> None:
    made = overlay({}, mount=False)
    odd = made.lower.with_name('a:b,c\\d "e" \n=')
    odd.mkdir()
    (odd / "f").write_text("here")
    escaped = re.sub(r"([\\:,])", r"\\\1", str(odd))
    succeeds(pyoverlay("mount", re.sub(r"([\\:])", r"\\\1", str(odd)), made.writable, made.merged, overlay=made))
    assert (made.merged / "f").read_text() == "here"
    succeeds(pyoverlay("umount", made.merged))
    succeeds(pyoverlay("mount", "-o", f"lowerdir={escaped}", made.merged, overlay=made))
    assert (made.merged / "f").read_text() == "here"


@pytest.mark.parametrize(
    "words", ["-o {options} {merged}", "{merged} -o {options}", "-o {options} source {merged}", "source {merged} -o {options}",
              "source -o{options} {merged}", "--options {options} -- source {merged}"]
)  # fmt: skip
def test_mount_takes_the_kernels_spelling_with_options_anywhere(unmounted: Overlay, words: str) -> None:
    arguments = words.format(options=layers(unmounted), merged=unmounted.merged).split()
    succeeds(pyoverlay("mount", *arguments, overlay=unmounted))
    mount = unmounted.mounted()
    assert mount is not None
    assert mount.source == ("source" if "source" in words else "pyoverlay")
    assert (unmounted.merged / "file").read_text() == "of the lower\n"


def test_mount_takes_several_option_strings(unmounted: Overlay) -> None:
    succeeds(
        pyoverlay(
            "mount", "-o", f"lowerdir={unmounted.lower}", "-o", f"upperdir={unmounted.upper},,", "-o", f"workdir={unmounted.work}",
            unmounted.merged, overlay=unmounted,
        )
    )  # fmt: skip
    (unmounted.merged / "new").write_text("")
    assert (unmounted.writable / "new").exists()


def test_without_an_upper_the_mount_is_read_only(unmounted: Overlay) -> None:
    succeeds(pyoverlay("mount", "-o", f"lowerdir={unmounted.lower}", unmounted.merged, overlay=unmounted))
    assert (unmounted.merged / "file").read_text() == "of the lower\n"
    with pytest.raises(OSError, match="Read-only file system"):
        (unmounted.merged / "new").write_text("")


def test_mount_takes_500_layers_and_more_than_a_pipe_of_options(overlay: OverlayFactory, tmp_path: Path) -> None:
    made = overlay({}, mount=False)
    above = tmp_path / ("x" * 200)
    names = [above / f"layer{number}" for number in range(500)]
    for name in names:
        name.mkdir(parents=True)
        (name / name.name).write_text("")
    options = [word for name in names for word in ("-o", f"lowerdir+={name}")]
    assert sum(map(len, options)) > 100_000
    succeeds(pyoverlay("mount", *options, made.merged, overlay=made))
    assert sorted(os.listdir(made.merged)) == sorted(name.name for name in names)


def test_mount_resolves_relative_paths_against_its_own_directory(unmounted: Overlay) -> None:
    succeeds(run(command("mount", "lower0", "upper", "merged"), unmounted, cwd=unmounted.merged.parent))
    assert (unmounted.merged / "file").read_text() == "of the lower\n"


def test_mount_options_come_from_the_environment_too(overlay: OverlayFactory, tmp_path: Path) -> None:
    made = overlay({}, mount=False)
    work = made.work.with_name("my work")
    work.mkdir()
    settings = {"PYOVERLAY_WORKDIR": str(work), "PYOVERLAY_OPTIONS": "fsname=my data", "PYOVERLAY_LOG_FILE": str(tmp_path / "log")}
    succeeds(pyoverlay("mount", made.lower, made.writable, made.merged, overlay=made, **settings))
    mount = made.mounted()
    assert mount is not None
    assert (mount.source, (work / "work").is_dir(), (tmp_path / "log").exists()) == ("my data", True, True)


@pytest.mark.root  # fusermount3 takes its time
def test_mount_returns_within_a_third_of_a_second(overlay: OverlayFactory) -> None:
    """The best of a few, less what other work on the machine took: the command and its daemon take turns, neither waits for a clock."""
    made = overlay({}, mount=False)
    seconds = []
    for _ in range(5):
        begin, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        made.mount()
        wall, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
        (pid,) = made.daemons()
        ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime + sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")
        seconds.append(min(wall, processor))
        made.umount()
    assert min(seconds) < 0.35, seconds


@pytest.mark.root
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("", "rw,relatime"),
        ("nosuid,nodev,noexec", "rw,nosuid,nodev,noexec,relatime"),
        ("noatime", "rw,noatime"),
        ("ro", "ro,relatime"),
    ],
)
def test_generic_options_reach_the_mount(unmounted: Overlay, options: str, expected: str) -> None:
    succeeds(pyoverlay("mount", "-o", layers(unmounted, options), unmounted.merged, overlay=unmounted))
    mount = unmounted.mounted()
    assert mount is not None
    assert mount.options == expected
    assert (mount.fs_type, mount.source) == ("fuse.pyoverlay", "pyoverlay")


@pytest.mark.root
def test_a_mount_of_root_serves_every_user_with_suid_and_permission_checks(overlay: OverlayFactory) -> None:
    made = overlay({}, mount=False)
    made.mount()
    mount = made.mounted()
    assert mount is not None
    assert {"default_permissions", "allow_other"} <= set(mount.super_options.split(","))
    assert "nosuid" not in mount.options


@pytest.mark.root
def test_fsname_and_subtype_are_what_the_list_of_mounts_shows(unmounted: Overlay) -> None:
    options = layers(unmounted, r"fsname=my\, data é", "subtype=fuse-overlayfs")
    succeeds(pyoverlay("mount", "-o", options, "source", unmounted.merged, overlay=unmounted))
    mount = unmounted.mounted()
    assert mount is not None
    assert (mount.source, mount.fs_type) == ("my, data é", "fuse.fuse-overlayfs")
    succeeds(pyoverlay("umount", unmounted.merged))


# ── umount ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_umount_takes_several_and_reports_each_that_fails(overlay: OverlayFactory, tmp_path: Path) -> None:
    first, second = overlay(), overlay()
    result = pyoverlay("umount", first.merged, tmp_path, "/nonexistent", second.merged)
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.splitlines() == [
        f"pyoverlay: {tmp_path}: nothing is mounted here (Invalid argument)",
        "pyoverlay: /nonexistent: does not exist (No such file or directory)",
    ]
    assert (first.mounted(), second.mounted()) == (None, None)


def test_umount_leaves_other_mounts_alone() -> None:
    result = pyoverlay("umount", "/proc")
    assert result.returncode == 1
    assert result.stderr == "pyoverlay: /proc: not an overlay of pyoverlay but a mount of type proc (Invalid argument); use umount\n"


def test_umount_of_a_busy_mount_names_who_holds_it(overlay: OverlayFactory) -> None:
    made = overlay({"file": "x"})
    with subprocess.Popen(["sleep", "60"], cwd=made.merged) as sleeper, (made.merged / "file").open():
        result = pyoverlay("umount", made.merged)
        sleeper.kill()
    assert result.returncode == 1
    assert result.stderr.startswith(f"pyoverlay: {made.merged}: busy: held by ")
    assert f"sleep (pid {sleeper.pid})" in result.stderr
    assert f"(pid {os.getpid()})" in result.stderr
    assert result.stderr.endswith("(Device or resource busy); end that, or detach it with --lazy\n")


def test_who_was_there_before_the_mount_does_not_hold_it(overlay: OverlayFactory) -> None:
    """A mount over /usr covers the programs that everybody runs: their paths are the same, their mount is not."""
    made = overlay(mount=False)
    shutil.copy("/bin/sleep", made.merged / "sleep")
    with subprocess.Popen([made.merged / "sleep", "60"], cwd=made.merged) as before:
        made.mount()
        with subprocess.Popen(["sleep", "60"], cwd=made.merged) as inside:
            result = pyoverlay("umount", made.merged)
            inside.kill()
        before.kill()
    assert result.stderr == (
        f"pyoverlay: {made.merged}: busy: held by sleep (pid {inside.pid}) (Device or resource busy); end that, or detach it with --lazy\n"
    )


def test_a_program_that_runs_from_the_mount_holds_it(overlay: OverlayFactory) -> None:
    made = overlay()
    shutil.copy("/bin/sleep", made.merged / "sleep")
    with subprocess.Popen([made.merged / "sleep", "60"]) as runs:
        result = pyoverlay("umount", made.merged)
        runs.kill()
    assert f"busy: held by sleep (pid {runs.pid}) (" in result.stderr


@pytest.mark.root
def test_umount_of_a_mount_with_another_inside_says_where(overlay: OverlayFactory) -> None:
    made = overlay({"inner": {}})
    subprocess.run(["mount", "-t", "tmpfs", "none", made.merged / "inner"], check=True)
    result = pyoverlay("umount", made.merged)
    subprocess.run(["umount", made.merged / "inner"], check=True)
    assert result.stderr == (
        f"pyoverlay: {made.merged}: busy: something is mounted inside, at {made.merged}/inner (Device or resource busy);"
        " unmount that first\n"
    )


def test_umount_lazy_detaches_a_busy_mount_whose_users_go_on(overlay: OverlayFactory) -> None:
    made = overlay({"file": "still here"})
    with (made.merged / "file").open() as file:
        succeeds(pyoverlay("umount", "--lazy", made.merged))
        assert made.mounted() is None
        assert file.read() == "still here"


def test_umount_of_a_symlink_unmounts_what_it_leads_to(overlay: OverlayFactory, tmp_path: Path) -> None:
    made = overlay()
    (tmp_path / "link").symlink_to(made.merged)
    succeeds(pyoverlay("umount", tmp_path / "link"))
    assert made.mounted() is None


# ── what the group prints ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_version_names_what_is_installed() -> None:
    result = pyoverlay("--version")
    assert result.returncode == 0
    assert re.search(r"^pyoverlay \d+\.\d+\.\d+$", result.stdout, re.MULTILINE)
    assert re.search(r"^pyfuse3 3\.", result.stdout, re.MULTILINE)
    assert re.search(r"^FUSE library version ", result.stdout, re.MULTILINE)


@pytest.mark.parametrize("name", [(), *((name,) for name in COMMANDS)])
def test_help_is_short_and_has_two_examples(name: tuple[str, ...]) -> None:
    result = pyoverlay(*name, "--help")
    assert result.returncode == 0
    assert len(result.stdout.splitlines()) <= 40
    assert len(re.findall(r"^ +pyoverlay ", result.stdout.partition("Examples:")[2], re.MULTILINE)) >= 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give LOWER"),
        (["/a", "/b"], "give LOWER"),
        (["/a", "/b", "/c", "/d"], "give LOWER"),
        (["--nonsense"], "--nonsense"),
        (["-o", "lowerdir=/a"], "give [SOURCE] MERGED"),
        (["-o", "lowerdir=/a", "/s", "/m", "/x"], "give [SOURCE] MERGED"),
        (["-o", "upperdir=/u", "/a", "/b", "/c"], "the upper is given twice"),
        (["-o", "lowerdir=/a,upperdir=/u,workdir=/w", "--workdir", "/w", "/m"], "the work directory is given twice"),
        (["--wait", "soon", "/a", "/b", "/c"], "'soon' is not a valid float"),
        (["--wait", "nan", "/a", "/b", "/c"], "nan is no number of seconds up to 1000000"),
        (["--wait", "1e7", "/a", "/b", "/c"], "1e7 is no number of seconds up to 1000000"),
    ],
)
def test_a_wrong_command_line_exits_2_and_says_how_to_get_help(arguments: list[str], message: str) -> None:
    result = pyoverlay("mount", *arguments)
    assert result.returncode == 2
    first, *_, last = result.stderr.splitlines()
    assert first.startswith("pyoverlay: ")
    assert message in first
    assert last == "Run 'pyoverlay mount --help' for more information."


def test_an_unknown_command_is_a_usage_error() -> None:
    result = pyoverlay("mont")
    assert result.returncode == 2
    assert result.stderr.splitlines()[0] == "pyoverlay: No such command 'mont'."


# ── in a directory that was removed ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def removed(tmp_path: Path) -> list[str]:
    """What to put before a command that is to run in such a directory."""
    (tmp_path / "removed").mkdir()
    return ["sh", "-c", 'cd "$0" && rmdir "$0" && exec "$@"', str(tmp_path / "removed")]


RELATIVE = ["mount l u m", "umount m", "inspect m", "diff m", "export m", "which m/f", "commit m i"]


@pytest.mark.parametrize("words", RELATIVE)
def test_a_relative_path_in_a_removed_directory_is_refused_in_one_line(removed: list[str], words: str) -> None:
    result = run([*removed, *command(*words.split())])
    assert (result.returncode, result.stdout) == (1, "")
    line = "the current directory was removed (No such file or directory); change to one that is there\n"
    assert re.fullmatch(rf"pyoverlay: [.\w]: {re.escape(line)}", result.stderr)


def test_absolute_paths_need_no_current_directory(unmounted: Overlay, removed: list[str]) -> None:
    relative = run([*removed, *MOUNT_PROGRAM, "-o", f"lowerdir={unmounted.lower}", "m"])
    assert (relative.returncode, relative.stderr.count("\n")) == (32, 1)
    removed[-1] += "-too"
    for argv in (MOUNT_PROGRAM, command("mount")):
        Path(removed[-1]).mkdir()
        succeeds(run([*removed, *argv, "-o", layers(unmounted), str(unmounted.merged)], unmounted))
        Path(removed[-1]).mkdir()
        succeeds(run([*removed, *command("umount", unmounted.merged)]))


def test_the_root_directory_is_not_the_current_one(overlay: OverlayFactory) -> None:
    made = overlay()
    result = run(command("umount", "--lazy", "/"), cwd=made.merged)
    assert (result.returncode, result.stderr.startswith("pyoverlay: /: ")) == (1, True)
    assert made.mounted() is not None


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_a_script_for_the_shell(shell: str) -> None:
    result = pyoverlay("completion", shell, PATH="/nonexistent")
    assert (result.returncode, result.stderr) == (0, "")
    assert "_PYOVERLAY_COMPLETE" in result.stdout
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=result.stdout, text=True, check=True)


def test_completion_completes_commands() -> None:
    result = pyoverlay(_PYOVERLAY_COMPLETE="bash_complete", COMP_WORDS="pyoverlay um", COMP_CWORD="1")
    assert result.stdout == "plain,umount\n"


def test_completion_completes_mount_points(overlay: OverlayFactory, tmp_path: Path) -> None:
    made = overlay()
    words = f"pyoverlay inspect {str(made.merged)[:-3]}"
    result = pyoverlay(_PYOVERLAY_COMPLETE="bash_complete", COMP_WORDS=words, COMP_CWORD="2")
    assert result.stdout.splitlines() == [f"file,{str(made.merged)[:-3]}", f"plain,{made.merged}"]


def test_bash_shows_mount_points_whatever_files_there_are(overlay: OverlayFactory, tmp_path: Path) -> None:
    made = overlay()
    script = """
        eval "$(pyoverlay completion bash)"
        COMP_WORDS=(pyoverlay umount "$1") COMP_CWORD=2
        compopt() { (IFS=' '; echo "compopt $*"); }
        _pyoverlay_completion pyoverlay
        printf '%s\\n' "${COMPREPLY[@]}"
    """
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    result = run(["bash", "-c", script, "bash", str(made.merged)[:-3]], environment={"PATH": path})
    assert (result.stdout.splitlines(), result.stderr) == (["compopt -o default", str(made.merged)], "")


@pytest.mark.parametrize(
    "words", ["mount ", "import ", "export ", "commit ", "commit m ", "doctor ", "export -o ", "mount --workdir ", "mount --log-file ",
              "mount --from ", "diff --lower ", "which "]
)  # fmt: skip
def test_completion_completes_paths(words: str) -> None:
    number = len(words.split(" "))
    result = pyoverlay(_PYOVERLAY_COMPLETE="bash_complete", COMP_WORDS=f"pyoverlay {words}", COMP_CWORD=str(number))
    assert "file," in result.stdout.splitlines()


def test_completion_passes_over_what_a_shell_cannot_be_told(tmp_path: Path) -> None:
    """A name with a newline; one that is no UTF-8 is told as its bytes are."""
    for name in ("new\nline", os.fsdecode(b"m\xff")):
        (tmp_path / name).mkdir()
        made = Overlay((tmp_path / "lower",), None, tmp_path / name)
        made.lower.mkdir(exist_ok=True)
        made.mount()
        try:
            words = f"pyoverlay umount {tmp_path}/"
            environment = os.environ | {"_PYOVERLAY_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": "2"}
            result = subprocess.run(command(), check=True, capture_output=True, timeout=30, env=environment)
            told = [] if "\n" in name else [b"plain," + os.fsencode(made.merged)]
            assert result.stdout.splitlines() == [b"file," + os.fsencode(f"{tmp_path}/"), *told]
        finally:
            made.close()


# ── doctor ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_doctor_finds_that_a_mount_is_possible_here(overlay: OverlayFactory) -> None:
    made = overlay()  # the proof that it is
    result = pyoverlay("doctor", made.writable)
    assert (result.returncode, result.stderr) == (0, "")
    assert re.search(r"^on +/dev/fuse ", result.stdout, re.MULTILINE)
    assert re.search(r"^on +upper ", result.stdout, re.MULTILINE)
    assert not re.search(r"^off ", result.stdout, re.MULTILINE)


def test_doctor_json_gives_each_check_its_state_and_remedy(tmp_path: Path) -> None:
    result = pyoverlay("doctor", "--json", tmp_path)
    document = json.loads(result.stdout)
    assert document["schema"] == 1
    assert {check["state"] for check in document["checks"]} <= {"on", "off", "warn"}
    names = {check["name"] for check in document["checks"]}
    assert {"kernel", "/dev/fuse", "privileges", "fusermount3", "extension", "upper", "whiteout devices", "reflinks"} <= names


def test_doctor_leaves_nothing_in_the_upper_or_beside_it(tmp_path: Path) -> None:
    upper = tmp_path / "upper"
    upper.mkdir()
    before = upper.stat().st_mtime_ns
    assert pyoverlay("doctor", upper).returncode == 0
    assert [*tmp_path.iterdir()] == [upper]
    assert ([*upper.iterdir()], upper.stat().st_mtime_ns) == ([], before)


def test_doctor_says_what_an_upper_lacks() -> None:
    result = pyoverlay("doctor", "/proc")
    assert result.returncode == 1
    assert re.search(r"^off +unnamed files|^off +upper", result.stdout, re.MULTILINE)


def test_doctor_says_that_an_upper_is_missing(tmp_path: Path) -> None:
    result = pyoverlay("doctor", tmp_path / "nowhere")
    assert result.returncode == 1
    assert f"-> mkdir {tmp_path}/nowhere" in result.stdout


# ── mount.fuse.pyoverlay ────────────────────────────────────────────────────────────────────────────────────────────────────


def mount_program(words: str, overlay: Overlay, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    text = words.format(options=layers(overlay), merged=overlay.merged)
    return run([*MOUNT_PROGRAM, *shlex.split(text)], overlay, cwd=cwd)


@pytest.mark.parametrize(
    "words",
    [
        "overlay {merged} -o rw,{options}",
        pytest.param("overlay {merged} -o {options},dev,suid", marks=pytest.mark.root),
        "-o {options} {merged}",
        "-o {options} overlay {merged}",
        "overlay -o {options} {merged}",
        "-o rw -o{options} {merged}",
        "overlay {merged} -sn -o {options}",
        "overlay {merged} -vo {options} -t fuse.pyoverlay",
        "overlay {merged} -rw -o {options}",
        "-- -o-is-a-source {merged}",
        "-o {options},,volatile,private {merged}",
    ],
)
def test_the_mount_program_takes_every_order_of_arguments(unmounted: Overlay, words: str) -> None:
    if words.startswith("--"):
        words = f"-o {{options}} {words}"
    succeeds(mount_program(words, unmounted))
    assert (unmounted.merged / "file").read_text() == "of the lower\n"
    mount = unmounted.mounted()
    assert mount is not None
    assert mount.source == next((word for word in ("overlay", "-o-is-a-source") if f"{word} " in words), "pyoverlay")


def test_the_mount_program_resolves_relative_layers_against_its_directory(unmounted: Overlay) -> None:
    place = unmounted.merged.parent
    (place / "l").mkdir()
    (place / "l" / "LINK").symlink_to("../lower0")
    options = "lowerdir=l/LINK:l/LINK,upperdir=upper,workdir=.upper.pyoverlay-work"
    succeeds(run([*MOUNT_PROGRAM, "-o", options, "merged"], unmounted, cwd=place))
    assert (unmounted.merged / "file").read_text() == "of the lower\n"


def test_the_mount_program_only_pretends_when_told_to_fake(unmounted: Overlay) -> None:
    succeeds(mount_program("overlay {merged} -f -o {options}", unmounted))
    assert unmounted.mounted() is None


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        ("", 1, "no mount point"),
        ("-o", 1, "-o wants a value"),
        ("a b c -o {options}", 1, "too many arguments"),
        ("{merged}", 1, "no lowerdir="),
        ("-x {merged}", 1, "unknown option -x"),
        ("--nonsense {merged}", 1, "unknown option --nonsense"),
        ("-o {options},nonsense {merged}", 1, "-o nonsense: unknown option"),
        ("-o {options},nfs_export=on {merged}", 1, "-o nfs_export=on: not implemented"),
        ("-o lowerdir=/nonexistent {merged}", 32, "/nonexistent: the lower does not exist"),
        ("-o {options} /nonexistent", 32, "/nonexistent: the mount point does not exist"),
    ],
)
def test_the_mount_program_refuses_in_one_line_with_mounts_status(unmounted: Overlay, words: str, status: int, message: str) -> None:
    result = mount_program(words, unmounted)
    assert (result.returncode, result.stdout) == (status, "")
    assert result.stderr.startswith("mount.fuse.pyoverlay: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert unmounted.mounted() is None


def test_the_mount_program_shows_its_version() -> None:
    result = run([*MOUNT_PROGRAM, "--version"])
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("pyoverlay ")


def test_the_mount_program_closes_every_descriptor_that_it_inherits(unmounted: Overlay) -> None:
    """Engines pass descriptors by accident and wait for their end; standard error they read until it ends."""
    read_end, write_end = os.pipe()
    os.set_inheritable(write_end, True)
    arguments = [*MOUNT_PROGRAM, "-o", layers(unmounted), str(unmounted.merged)]
    with subprocess.Popen(
        arguments, close_fds=False, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, env=os.environ | {MARK: unmounted.mark}
    ) as process:
        os.close(write_end)
        assert os.read(read_end, 1) == b""
        os.close(read_end)
        assert process.stderr is not None
        assert process.stderr.read() == b""
        assert process.wait(10) == 0
    assert unmounted.mounted() is not None


@pytest.mark.root
@pytest.mark.parametrize(
    "how",
    ["mount -t fuse.pyoverlay -o '{options}' overlay {merged}", "mount --fstab {fstab} {merged}", "mount --fstab {fstab} -a"],
    ids=["mount -t", "fstab", "mount -a"],
)
def test_mount_8_finds_the_program_by_the_type(unmounted: Overlay, tmp_path: Path, how: str) -> None:
    """By mount(8)'s -t, and by a line of fstab: it calls /sbin/mount.fuse.pyoverlay, here in a mount namespace of the test's."""
    program = tmp_path / "mount.fuse.pyoverlay"
    program.write_text(f'#!/bin/sh\nexec {shlex.join(MOUNT_PROGRAM)} "$@"\n')
    program.chmod(0o755)
    options = layers(unmounted, "noatime,_netdev,x-test=1")
    fstab = tmp_path / "fstab"
    fstab.write_text(f"overlay {unmounted.merged} fuse.pyoverlay {options} 0 0\n")
    mount = how.format(options=options, merged=unmounted.merged, fstab=fstab)
    script = (
        f"mount -t tmpfs none /mnt && mkdir /mnt/u /mnt/w && mount -t overlay -o lowerdir=/sbin,upperdir=/mnt/u,workdir=/mnt/w none /sbin"
        f" && cp {program} /sbin/ && {mount}"
        f" && grep {unmounted.merged} /proc/self/mountinfo && cat {unmounted.merged}/file && umount {unmounted.merged}"
    )
    result = run(["unshare", "-m", "sh", "-c", script], unmounted)
    assert (result.returncode, result.stderr) == (0, "")
    line, content = result.stdout.splitlines()
    assert content == "of the lower"
    assert " rw,noatime " in line
    assert " fuse.pyoverlay overlay " in line
