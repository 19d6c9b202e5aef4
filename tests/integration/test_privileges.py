"""What the daemon of a mount may still do: the least that serves it, in every set and every thread; and that all of it is needed."""

from __future__ import annotations

import os
import re
import signal
import stat
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pyoverlay import registry
from pyoverlay.daemon.privileges import TO_LOOK, TO_READ, TO_WRITE, Capability
from pyoverlay.testing import Directory, File, Overlay, OverlayFactory, Tree
from tests.integration.test_process_life import daemon_of, end_of, watched
from tests.integration.unprivileged import AS_NAMESPACE_ROOT, FIND_PID, USER, as_user
from tests.posix.check import NOBODY, SOMEBODY
from tests.posix.check import as_user as call_as_user


def statuses(pid: int) -> list[dict[str, str]]:
    """/proc/PID/status of each thread."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found.append(dict(re.findall(r"^(\w+):\s*(.*)$", (task / "status").read_text(errors="replace"), re.MULTILINE)))
    return found


def capabilities(status: dict[str, str], which: str) -> set[int]:
    bits = int(status[which], 16)
    return {number for number in range(64) if bits >> number & 1}


@pytest.mark.root
@pytest.mark.parametrize("read_only", [False, True], ids=["writes", "read-only"])
def test_of_root_s_capabilities_the_daemon_keeps_what_it_needs(overlay: OverlayFactory, read_only: bool) -> None:
    kept = TO_READ if read_only else TO_WRITE
    made = overlay({"file": File(content=b"x" * (1 << 20))}, read_only=read_only)
    (made.merged / "file").read_bytes()  # what has a thread of its own has started it
    if not read_only:
        os.chmod(made.merged / "file", 0o600)
    for status in statuses(daemon_of(made)):
        assert capabilities(status, "CapEff") == kept
        assert capabilities(status, "CapPrm") == kept | TO_LOOK
        assert capabilities(status, "CapBnd") == kept | TO_LOOK
        assert capabilities(status, "CapInh") == capabilities(status, "CapAmb") == set()
        assert status["NoNewPrivs"] == "1"


STATUS = "grep -hE '^(Cap(Eff|Prm|Inh)|NoNewPrivs):' /proc/$(sed 's/.*\"pid\": \\([0-9]*\\).*/\\1/' run/pyoverlay/*.json)/status"


@pytest.mark.root
def test_the_daemon_of_a_user_has_nothing_and_can_get_nothing(home: Path) -> None:
    """no_new_privs, and still it unmounts by fusermount3: through a process that was started before."""
    result = as_user(home, f"$po mount lower upper merged; {STATUS}; $po umount merged")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.split() == ["CapInh:", "0" * 16, "CapPrm:", "0" * 16, "CapEff:", "0" * 16, "NoNewPrivs:", "1"]


@pytest.mark.root
def test_the_daemon_of_a_user_namespace_keeps_no_more_than_root_s(home: Path) -> None:
    script = home / "look"
    script.write_text(f"$po mount lower upper merged\n{STATUS}\n$po umount merged\n")
    result = as_user(home, f"{AS_NAMESPACE_ROOT} '. ./look'")
    assert (result.returncode, result.stderr) == (0, "")
    status = dict(line.split(":") for line in result.stdout.splitlines())
    assert int(status["CapEff"], 16) == sum(1 << number for number in TO_WRITE)
    assert int(status["CapPrm"], 16) == sum(1 << number for number in TO_WRITE | TO_LOOK)
    assert status["NoNewPrivs"].strip() == "1"


@pytest.mark.root
def test_the_daemon_of_root_leaves_no_core_file() -> None:
    program = (
        "import ctypes; from pyoverlay.daemon import privileges; privileges.drop(writes=True);"
        "print(ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))"  # PR_GET_DUMPABLE
    )
    result = subprocess.run([sys.executable, "-P", "-c", program], check=True, capture_output=True, text=True)
    assert result.stdout == "0\n"


@pytest.mark.root
def test_no_thread_of_the_daemon_stays_a_caller(overlay: OverlayFactory) -> None:
    """A thread that starts while the daemon makes something for somebody would be that somebody for life."""
    made = overlay({"file": File(content=b"x" * (8 << 20), mode=0o666), "open": Directory({}, 0o777)})

    def make_and_copy_up() -> None:
        os.umask(0o077)
        for name in ("file", "open/new"):
            with open(name, "ab") as file:  # the first one's data is copied by a thread
                file.write(b"y")
                os.fsync(file.fileno())
        os.mkdir("open/directory")

    call_as_user(made.merged, make_and_copy_up)
    assert os.stat(made.writable / "open/new").st_uid == NOBODY
    seen = statuses(daemon_of(made))
    assert len(seen) > 1, "there is none but the main one"
    for status in seen:
        assert (status["Uid"].split(), status["Gid"].split()) == (["0"] * 4, ["0"] * 4)
        assert status["Umask"] == "0000"


@pytest.mark.root
def test_the_daemon_of_a_user_can_be_looked_at_by_that_user(home: Path) -> None:
    """By ps, a debugger, and umount, which asks in whose namespaces a mount is. A change of ids makes a process root's to look at."""
    result = as_user(
        home,
        "$po mount lower upper merged; echo x > merged/f; mkdir merged/d; chmod 600 merged/f; ln -s f merged/l;"
        f" {FIND_PID}"
        " stat -c %u /proc/$pid/fd; ls /proc/$pid/fd | wc -l; $po umount merged",
    )
    assert (result.returncode, result.stderr) == (0, "")
    owner, descriptors = result.stdout.split()
    assert owner == str(USER)
    assert int(descriptors) > 3


@pytest.mark.root
def test_a_read_only_mount_reads_what_only_its_owner_may(overlay: OverlayFactory) -> None:
    made = overlay({"secret": File(content="x", mode=0o600, uid=SOMEBODY)}, read_only=True)
    assert (made.merged / "secret").read_text() == "x"


@pytest.mark.root
def test_cve_2021_41091_directories_of_state_are_closed_to_others(overlay: OverlayFactory) -> None:
    """Who may enter a layer's directory finds its set-user-id programs."""
    made = overlay({"file": "x"})
    os.chmod(made.merged / "file", 0o600)
    for directory in (made.work, made.work / "work", Path(registry.own_directory())):
        assert stat.S_IMODE(os.stat(directory).st_mode) & 0o077 == 0, directory
    for record in Path(registry.own_directory()).iterdir():
        assert stat.S_IMODE(os.stat(record).st_mode) == 0o600


# ── each capability is needed: without it something that works does not ─────────────────────────────────────────────────────

Attempt = Callable[[Overlay], object]


def _chown(made: Overlay) -> object:
    os.chown(made.merged / "file", SOMEBODY, SOMEBODY)
    return os.stat(made.writable / "file").st_uid == SOMEBODY


def _create_where_the_owner_alone_may(made: Overlay) -> object:
    (made.merged / "closed/new").mkdir()
    return True


def _keep_a_number(made: Overlay) -> object:
    """A copy's number is its lower's, found by a file handle at the next mount."""
    number = os.stat(made.merged / "file").st_ino
    os.chmod(made.merged / "file", 0o640)
    made.remount()
    return os.stat(made.merged / "file").st_ino == number


def _chmod_of_another_s(made: Overlay) -> object:
    os.chmod(made.merged / "private", 0o640)
    return True


def _setgid_of_another_group(made: Overlay) -> object:
    os.chmod(made.merged / "private", 0o2750)
    return os.stat(made.writable / "private").st_mode & stat.S_ISGID


def _create_as(made: Overlay) -> object:
    os.chmod(made.merged, 0o777)
    call_as_user(made.merged, lambda: os.close(os.open("new", os.O_CREAT | os.O_WRONLY, 0o644)))
    st = os.stat(made.writable / "new")
    return (st.st_uid, st.st_gid) == (NOBODY, NOBODY)


def _append_only(made: Overlay) -> object:
    os.chmod(made.merged / "file", 0o600)
    subprocess.run(["chattr", "+a", made.merged / "file"], check=True, capture_output=True)
    subprocess.run(["chattr", "-a", made.writable / "file"], check=True)
    return True


def _device(made: Overlay) -> object:
    os.mknod(made.merged / "null", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    return True


def _capability(made: Overlay) -> object:
    os.setxattr(made.merged / "file", "security.capability", struct.pack("<IIIII", 0x02000001, 1 << 13, 0, 0, 0))
    return True


def _name_who_holds(made: Overlay) -> object:
    pid = daemon_of(made)
    fd = os.open(made.merged, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with watched(pid) as poll:
            os.kill(pid, signal.SIGTERM)
            end_of(poll)
    finally:
        os.close(fd)
    return f"(pid {os.getpid()})" in made.merged.with_name("log").read_text()


NEEDED: dict[Capability, Attempt] = {
    Capability.CHOWN: _chown,
    Capability.DAC_OVERRIDE: _create_where_the_owner_alone_may,
    Capability.DAC_READ_SEARCH: _keep_a_number,
    Capability.FOWNER: _chmod_of_another_s,
    Capability.FSETID: _setgid_of_another_group,
    Capability.SETGID: _create_as,
    Capability.SETUID: _create_as,
    Capability.LINUX_IMMUTABLE: _append_only,
    Capability.MKNOD: _device,
    Capability.SETFCAP: _capability,
    Capability.SYS_PTRACE: _name_who_holds,
}

LOWER: Tree = {
    "file": File(content="x"),
    "private": File(content="x", mode=0o600, uid=SOMEBODY, gid=SOMEBODY),
    "closed": Directory(mode=0o700, uid=SOMEBODY),
}


def succeeds(attempt: Attempt, made: Overlay) -> bool:
    try:
        return bool(attempt(made))
    except (OSError, AssertionError, subprocess.CalledProcessError):
        return False


@pytest.mark.root
@pytest.mark.parametrize(
    "capability",
    [pytest.param(known, id=known.name, marks=[pytest.mark.wire] if known is Capability.LINUX_IMMUTABLE else []) for known in NEEDED],
)
def test_without_a_capability_that_is_kept_something_fails(overlay: OverlayFactory, tmp_path: Path, capability: Capability) -> None:
    attempt = NEEDED[capability]
    made = overlay(LOWER, mount=False)
    made.options = ("-o", "stop_timeout=0", "--log-file", str(made.merged.with_name("log")))
    made.mount()
    assert succeeds(attempt, made)
    if made.mounted():
        made.umount()

    lesser = overlay(LOWER, mount=False)
    lesser.options = ("-o", "stop_timeout=0", "--log-file", str(lesser.merged.with_name("log")))
    lesser.python = str(tmp_path / "python")
    Path(lesser.python).write_text(f"#!/bin/sh\nexec setpriv --bounding-set=-{capability.name.lower()} {sys.executable} \"$@\"\n")
    os.chmod(lesser.python, 0o755)
    lesser.mount()
    assert not succeeds(attempt, lesser)


def test_each_capability_that_is_kept_is_shown_to_be_needed() -> None:
    """SYS_ADMIN apart, without which there is no mount: it stays for umount2(2) and for trusted.* attributes."""
    assert NEEDED.keys() == (TO_WRITE | TO_LOOK) - {Capability.SYS_ADMIN}
