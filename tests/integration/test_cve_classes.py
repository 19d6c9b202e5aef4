"""What overlays were attacked with, a class a test: nobody gets through a mount what they could not get without it.

Each test is named after the report of the class; the report was of another overlay, or of the tools around one.
"""

from __future__ import annotations

import errno
import os
import shlex
import stat
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from pyoverlay import registry
from pyoverlay.testing import Device, File, Overlay, OverlayFactory, make_tree, witness
from pyoverlay.testing.mounts import command
from tests.integration.images import imported
from tests.integration.unprivileged import AS_NAMESPACE_ROOT, USER, skip_if_out_of_reach, with_fuse
from tests.integration.unprivileged import as_user as by_user
from tests.posix.check import NOBODY, as_user, fails
from tests.posix.system_calls import ACL_ACCESS, ACL_DEFAULT, ACL_GROUP_OBJ, ACL_MASK, ACL_OTHER, ACL_USER, ACL_USER_OBJ, acl
from tests.unit.archives import Item, archive, directory, file, link, symlink

pytestmark = pytest.mark.root

CAPABILITY = "security.capability"
# struct vfs_cap_data of <linux/capability.h>: cap_net_raw permitted and effective, revision 2.
NET_RAW = struct.pack("<IIIII", 0x02000001, 1 << 13, 0, 0, 0)


@contextmanager
def mounted_with(flags: str, place: Path) -> Iterator[Path]:
    """A file system of a stick, or of somebody else: a tmpfs with mount flags."""
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], check=True)
    try:
        suid, capable = File(content="program", mode=0o6755), File(content="program", mode=0o755, xattrs={CAPABILITY: NET_RAW})
        make_tree(place, {"suid": suid, "capable": capable, "null": Device(kind="c", major=1, minor=3)})
        subprocess.run(["mount", "-o", f"remount,bind,{flags}", place], check=True)
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


def over(lower: Path, beside: Path, *options: str) -> Overlay:
    """A mount over a directory that the test brings along."""
    for name in ("upper", "merged"):
        (beside / name).mkdir()
    overlay = Overlay((lower,), beside / "upper", beside / "merged", options)
    overlay.mount()
    return overlay


@pytest.fixture
def stick(tmp_path: Path) -> Iterator[Overlay]:
    """A mount that honours set-user-id bits and devices, by request, over a lower whose own mount does not."""
    with mounted_with("nosuid,nodev", tmp_path / "stick") as lower:
        overlay = over(lower, tmp_path, "-o", "suid,dev")
        try:
            yield overlay
        finally:
            overlay.close()


def test_cve_2021_3847_capabilities_of_a_nosuid_lower_are_not_copied_up(stick: Overlay) -> None:
    os.chmod(stick.merged / "capable", 0o755)
    copy = stick.writable / "capable"
    assert CAPABILITY not in os.listxattr(copy)
    assert copy.read_text() == "program"


def test_cve_2016_1576_set_id_bits_of_a_nosuid_lower_are_not_copied_up(stick: Overlay) -> None:
    os.utime(stick.merged / "suid")
    assert stat.S_IMODE(os.stat(stick.writable / "suid").st_mode) == 0o755


def test_a_device_of_a_nodev_lower_is_not_copied_up(stick: Overlay) -> None:
    with pytest.raises(PermissionError):
        os.chmod(stick.merged / "null", 0o666)
    assert os.listdir(stick.writable) == []
    os.unlink(stick.merged / "null")


def test_what_the_mount_of_a_lower_denies_the_overlay_does_not_give_unasked(tmp_path: Path) -> None:
    with mounted_with("nosuid,nodev", tmp_path / "stick") as lower:
        overlay = over(lower, tmp_path)
        try:
            mount = overlay.mounted()
            assert mount is not None
            assert {"nosuid", "nodev"} <= set(mount.options.split(","))
            with pytest.raises(PermissionError) as caught:
                os.open(overlay.merged / "null", os.O_RDONLY)
            assert caught.value.errno == errno.EACCES
        finally:
            overlay.close()


def test_over_other_lowers_root_s_mounts_have_suid_and_dev(overlay: OverlayFactory) -> None:
    mount = overlay({"suid": File(mode=0o4755)}).mounted()
    assert mount is not None
    assert not {"nosuid", "nodev"} & set(mount.options.split(","))


# ── copies, and what they inherit ───────────────────────────────────────────────────────────────────────────────────────────


def test_cve_2016_1575_a_copy_inherits_nothing_of_the_directories_around_the_upper(tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    os.chmod(place, 0o2777)
    everybody = acl((ACL_USER_OBJ, 7), (ACL_USER, 7, NOBODY), (ACL_GROUP_OBJ, 7), (ACL_MASK, 7), (ACL_OTHER, 7))
    os.setxattr(place, ACL_DEFAULT, everybody)
    os.chown(place, 0, NOBODY)
    lower = tmp_path / "lower"
    lower.mkdir()
    make_tree(lower, {"suid": File(content="program", mode=0o4711)})
    overlay = over(lower, place)
    try:
        os.utime(overlay.merged / "suid")
        copy = overlay.writable / "suid"
        st = os.stat(copy)
        assert (stat.S_IMODE(st.st_mode), st.st_uid, st.st_gid) == (0o4711, 0, 0)
        assert not {ACL_ACCESS, ACL_DEFAULT} & set(os.listxattr(copy))
    finally:
        overlay.close()


# ── who may what ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def refused(code: int, act: Callable[[], object]) -> None:
    with fails(code):
        act()


def test_cve_2015_1328_nobody_makes_anything_where_root_alone_may(overlay: OverlayFactory) -> None:
    made = overlay({"etc": {"passwd": "root"}})

    def attack() -> None:
        refused(errno.EACCES, lambda: os.open("etc/ld.so.preload", os.O_CREAT | os.O_WRONLY, 0o666))
        refused(errno.EACCES, lambda: os.mkdir("etc/new"))
        refused(errno.EACCES, lambda: os.rename("etc/passwd", "etc/old"))
        refused(errno.EACCES, lambda: os.unlink("etc/passwd"))
        refused(errno.EACCES, lambda: os.open("etc/passwd", os.O_WRONLY))

    as_user(made.merged, attack)
    assert os.listdir(made.writable) == []


def test_cve_2015_8660_nobody_changes_the_attributes_of_root_s_files(overlay: OverlayFactory) -> None:
    made = overlay({"file": File(content="x", mode=0o644)})

    def attack() -> None:
        refused(errno.EPERM, lambda: os.chmod("file", 0o4777))
        refused(errno.EPERM, lambda: os.chown("file", NOBODY, NOBODY))
        refused(errno.EPERM, lambda: os.utime("file", (1, 1)))
        refused(errno.EACCES, lambda: os.truncate("file", 0))
        refused(errno.EACCES, lambda: os.setxattr("file", "user.x", b"1"))
        refused(errno.EPERM, lambda: os.setxattr("file", CAPABILITY, NET_RAW))

    as_user(made.merged, attack)
    assert os.listdir(made.writable) == []


def test_cve_2020_16120_a_user_s_mount_reads_what_the_user_may_and_nothing_else(home: Path) -> None:
    (home / "lower/secret").mkdir(mode=0o700)
    (home / "lower/secret/file").write_text("of root")
    (home / "lower/closed").write_text("of root")
    os.chmod(home / "lower/closed", 0o600)
    script = "$po mount lower upper merged; cat merged/closed merged/secret/file; ls merged/secret; $po umount merged"
    for way in (f"set +e; {script}", f"{AS_NAMESPACE_ROOT} 'set +e; {script}'"):
        result = by_user(home, way)
        assert result.stdout == ""
        assert "of root" not in result.stderr
        assert result.stderr.count("Permission denied") == 3


# ── user namespaces ─────────────────────────────────────────────────────────────────────────────────────────────────────────

# Sets cap_net_raw on its argument as a program of the time before namespaces does: revision 2, without an owner.
SET_CAPABILITY = (
    "import os, struct, sys; os.setxattr(sys.argv[1], 'security.capability', struct.pack('<IIIII', 0x02000001, 1 << 13, 0, 0, 0))"
)


def owner_of_capability(path: Path) -> int:
    """The root whose namespace honours it: revision 3 says which (struct vfs_ns_cap_data)."""
    magic, *_, rootid = struct.unpack("<IIIIII", os.getxattr(path, CAPABILITY))
    assert magic >> 24 == 3, "honoured by everybody"
    return int(rootid)


def test_cve_2023_0386_a_program_of_root_is_not_copied_up_by_who_is_not_root(home: Path) -> None:
    (home / "lower/suid").write_text("program")
    os.chmod(home / "lower/suid", 0o6755)
    result = by_user(home, f"{AS_NAMESPACE_ROOT} '$po mount lower upper merged; touch merged/suid || true; $po umount merged'")
    assert result.returncode == 0
    assert result.stderr.startswith("touch: ")
    assert os.listdir(home / "upper") == []


# As root of a user namespace that maps a range of ids, the overflow id among them; the maps are written from outside.
AS_ROOT_OF_A_RANGE = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
assert libc.unshare(0x10000000 | 0x00020000) == 0, os.strerror(ctypes.get_errno())  # CLONE_NEWUSER | CLONE_NEWNS
print("unshared", flush=True)
sys.stdin.readline()
os.setgroups([]), os.setresgid(0, 0, 0), os.setresuid(0, 0, 0)
os.execvp("sh", ["sh", "-ec", sys.argv[1]])
"""


def as_root_of_a_range(home: Path, first: int, script: str) -> str:
    """What a script prints in a user namespace whose ids 0 to 65535 are those from `first` on outside."""
    skip_if_out_of_reach()
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(home / "run"), "PYTHONPATH": str(Path(registry.__file__).parents[1])}
    with subprocess.Popen(
        [*with_fuse(home), sys.executable, "-c", AS_ROOT_OF_A_RANGE, script],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, cwd=home, env={**environment, "po": shlex.join(command())},
    ) as process:  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "unshared\n"
        for kind in ("uid_map", "gid_map"):
            Path(f"/proc/{process.pid}/{kind}").write_text(f"0 {first} 65536")
        return process.communicate("go\n", timeout=30)[0]


def test_cve_2023_0386_an_owner_without_an_id_is_not_taken_for_who_has_the_overflow_id(home: Path) -> None:
    first = 100_000
    for path in (home, *home.iterdir()):
        os.chown(path, first, first)
    nobody = first + NOBODY
    owned = (("roots", 0, 0, 0o6755), ("open", 0, 0, 0o6777), ("group", first, 0, 0o2755), ("nobody", nobody, nobody, 0o644))
    for name, uid, gid, mode in owned:
        (home / "lower" / name).write_text("program")
        os.chown(home / "lower" / name, uid, gid)
        os.chmod(home / "lower" / name, mode)
    (home / "lower/directory").mkdir()
    os.symlink("roots", home / "lower/link")
    told = as_root_of_a_range(
        home, first, "$po mount lower upper merged; cd merged; for n in *; do touch -h $n || true; done; cd ..; $po umount merged"
    )
    assert sorted(line.split("'")[1] for line in told.splitlines()) == ["directory", "group", "open", "roots"], told
    assert told.count(os.strerror(errno.EOVERFLOW)) == 4
    assert sorted(os.listdir(home / "upper")) == ["link", "nobody"]
    assert os.stat(home / "upper/nobody").st_uid == nobody


@pytest.mark.parametrize("what", ["new", "of-the-lower"])
def test_cve_2021_3493_capabilities_set_in_a_namespace_count_there_alone(home: Path, what: str) -> None:
    (home / "lower/of-the-lower").write_text("program")
    os.chown(home / "lower/of-the-lower", USER, USER)
    (home / "set.py").write_text(SET_CAPABILITY)
    script = f"$po mount lower upper merged; touch merged/new; {sys.executable} set.py merged/{what}; $po umount merged"
    result = by_user(home, f"{AS_NAMESPACE_ROOT} '{script}'")
    assert (result.returncode, result.stderr) == (0, "")
    assert owner_of_capability(home / "upper" / what) == USER


def test_cve_2023_2640_capabilities_planted_in_a_lower_are_copied_up_for_their_namespace(home: Path) -> None:
    (home / "lower/program").write_text("program")
    os.chown(home / "lower/program", USER, USER)
    (home / "set.py").write_text(SET_CAPABILITY)
    script = f"{sys.executable} set.py lower/program; $po mount lower upper merged; touch merged/program; $po umount merged"
    result = by_user(home, f"{AS_NAMESPACE_ROOT} '{script}'")
    assert (result.returncode, result.stderr) == (0, "")
    assert owner_of_capability(home / "upper/program") == USER


def test_cve_2023_32629_root_s_mount_keeps_whose_capabilities_were_set(overlay: OverlayFactory, home: Path) -> None:
    """The daemon has every capability, and still the caller's namespace decides: the kernel has converted what arrives."""
    made = overlay({"program": File(content="program", uid=USER, gid=USER)})
    for above in (made.merged.parent, *made.merged.parents):
        if above.stat().st_uid == 0 and above.stat().st_mode & 0o005 != 0o005:
            os.chmod(above, above.stat().st_mode | 0o055)
    (home / "set.py").write_text(SET_CAPABILITY)
    result = by_user(home, f"unshare -Ur {sys.executable} set.py {made.merged}/program")
    assert (result.returncode, result.stderr) == (0, "")
    assert owner_of_capability(made.writable / "program") == USER


def test_cve_2021_3732_what_a_mount_covers_is_not_shown_to_who_may_not_take_it_away(home: Path) -> None:
    covered = home / "lower/covered"
    covered.mkdir()
    (covered / "secret").write_text("what the mount hides")
    script = "$po mount lower upper merged; ls merged merged/covered; $po umount merged"
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", covered], check=True)
    try:
        (covered / "inner").write_text("of the mount")
        for way in (script, f"{AS_NAMESPACE_ROOT} '{script}'"):
            result = by_user(home, way)
            assert (result.returncode, result.stderr) == (0, "")
            assert result.stdout.split() == ["merged:", "covered", "merged/covered:"]
    finally:
        subprocess.run(["umount", covered], check=True)


# ── races ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def run_together(*acts: Callable[[int], object]) -> None:
    """Each act a hundred times, all at once. What one does may be undone by another: ENOENT and EEXIST are answers like any other."""

    def repeat(act: Callable[[int], object]) -> None:
        for number in range(100):
            try:
                act(number)
            except (FileNotFoundError, FileExistsError):
                continue

    with ThreadPoolExecutor(len(acts)) as pool:
        list(pool.map(repeat, acts))


def test_cve_2021_20321_renames_that_race_leave_a_whole_tree(overlay: OverlayFactory) -> None:
    files = {f"{letter}{number}": f"{letter}{number}" for letter in "ab" for number in range(100)}
    made = overlay({"d": files}, {"d": files})
    d = made.merged / "d"
    run_together(
        lambda n: os.rename(d / f"a{n}", d / "target"),
        lambda n: os.rename(d / f"b{n}", d / "target"),
        lambda n: os.unlink(d / "target"),
        lambda n: os.rename(d / "target", d / f"back{n}"),
        lambda n: os.chmod(d / f"b{n}", 0o600),
    )
    left = {name: (d / name).read_text() for name in os.listdir(d)}
    assert set(left.values()) <= set(files.values())
    assert len(set(left.values())) == len(left), "a file is there twice"
    made.remount()
    assert {name: (d / name).read_text() for name in os.listdir(d)} == left


def test_cve_2023_1252_acls_that_race_with_copy_up_are_there_or_not(overlay: OverlayFactory) -> None:
    given = acl((ACL_USER_OBJ, 6), (ACL_USER, 4, NOBODY), (ACL_GROUP_OBJ, 4), (ACL_MASK, 4), (ACL_OTHER, 4))
    made = overlay({f"f{number}": "x" for number in range(100)})
    m = made.merged

    def write(number: int) -> None:
        with open(m / f"f{number}", "ab") as file:
            file.write(b"y")

    run_together(
        write,
        lambda n: os.setxattr(m / f"f{n}", ACL_ACCESS, given),
        lambda n: os.chmod(m / f"f{n}", 0o644),
        lambda n: os.listxattr(m / f"f{n}"),
    )
    for number in range(100):
        assert (m / f"f{number}").read_text() == "xy"
        assert ACL_ACCESS in os.listxattr(made.writable / f"f{number}")


# ── the tools around ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", [r"x\,allow_other", r"x\\\,allow_other", "x\\\\\\,allow_other\\,suid"])
def test_cve_2018_10906_a_source_s_name_is_no_option_of_fusermount3(home: Path, name: str) -> None:
    result = by_user(home, f"$po mount -o 'fsname={name}' lower upper merged; grep $PWD/merged /proc/self/mountinfo; $po umount merged")
    assert (result.returncode, result.stderr) == (0, "")
    options, source = result.stdout.split(" - ")
    assert "nosuid,nodev" in options.split()[5]
    assert "allow_other" in source.split()[1]
    assert "allow_other" not in source.split()[2]


@pytest.mark.parametrize(
    "members",
    [
        [file(b"../outside/file", b"PLANTED")],
        [symlink(b"l", b"../outside"), file(b"l/file", b"PLANTED")],
        [symlink(b"l", b"../outside"), link(b"h", b"l/file"), file(b"h", b"PLANTED")],
        [directory(b"d" * 200), *(symlink(b"l%d" % n, b"d" * 200 + b"/.." * 60) for n in range(70)), file(b"l69/outside/file", b"PLANTED")],
    ],
    ids=["2007-4559 upwards", "2007-4559 through a symlink", "2018-15664 by a hard link", "2025-4517 past PATH_MAX"],
)
def test_cve_2007_4559_2018_15664_2025_4517_no_member_of_an_archive_lands_outside(tmp_path: Path, members: list[Item]) -> None:
    make_tree(tmp_path, {"outside": {"file": "untouched"}, "store": {}})
    before = witness(tmp_path / "outside")
    (tmp_path / "layer.tar").write_bytes(archive(*members))
    result = imported(tmp_path / "layer.tar", tmp_path / "store", check=False)
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert witness(tmp_path / "outside") == before
    assert [path for path in (tmp_path / "store").rglob("*") if path.is_file() and b"PLANTED" in path.read_bytes()] == []


def test_cve_2024_9676_a_symlink_or_a_fifo_in_a_layer_leads_no_tool_outside_and_holds_none_up(overlay: OverlayFactory) -> None:
    """podman followed /etc/passwd of a container's layer to a file of the host, or to a fifo for ever."""
    made = overlay({"lower": "x"})
    outside = made.merged.parent / "outside"
    make_tree(outside.parent, {"outside": {"passwd": "SECRET"}})
    for layer in (made.merged, made.writable):
        (layer / f"in-{layer.name}").symlink_to(outside / "passwd")
        (layer / f"dir-in-{layer.name}").symlink_to(outside)
        os.mkfifo(layer / f"fifo-in-{layer.name}")
    for arguments in (["export"], ["diff"], ["commit"], ["which"]):
        more = [made.merged.parent / "layout:new"] if arguments == ["commit"] else []
        paths = sorted(made.merged.iterdir()) if arguments == ["which"] else [made.merged]
        result = subprocess.run(command(*arguments, *paths, *more), check=False, capture_output=True, timeout=30)
        assert result.returncode == 0, result.stderr
        assert b"SECRET" not in result.stdout
    written = (path for path in (made.merged.parent / "layout").rglob("*") if path.is_file())
    assert all(b"SECRET" not in path.read_bytes() for path in written)
    assert subprocess.run(command("ps", "-s"), check=True, capture_output=True, timeout=30).stderr == b""
