"""setuid, setgid and file capabilities: who keeps them, and what takes them away."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

from tests.posix.check import NOBODY, SOMEBODY, Step, add, as_user, check, fails, file, folder, mode_of, opened, xattr
from tests.posix.system_calls import CAP_NET_RAW, capability

_CAPABILITY = capability(CAP_NET_RAW)


def _write() -> None:
    with opened("program", os.O_WRONLY) as fd:
        os.write(fd, b"new")


def _append() -> None:
    with opened("program", os.O_WRONLY | os.O_APPEND) as fd:
        os.write(fd, b"new")


def _truncate() -> None:
    os.truncate("program", 3)


def _ftruncate() -> None:
    with opened("program", os.O_RDWR) as fd:
        os.ftruncate(fd, 3)


def _open_with_o_trunc() -> None:
    os.close(os.open("program", os.O_WRONLY | os.O_TRUNC))


WRITERS: dict[str, Callable[[], object]] = {
    "a_write": _write,
    "an_append": _append,
    "truncate": _truncate,
    "ftruncate": _ftruncate,
    "o_trunc": _open_with_o_trunc,
}


def _clears(act: Callable[[], object], expected: int) -> Step:
    def claim(d: Path) -> None:
        as_user(d, act)
        assert oct(mode_of(d / "program")) == oct(expected)

    return claim


def _clears_capability(act: Callable[[], object]) -> Step:
    def claim(d: Path) -> None:
        assert os.getxattr(d / "program", "security.capability") == _CAPABILITY
        as_user(d, act)
        with fails(errno.ENODATA):
            os.getxattr(d / "program", "security.capability")

    return claim


def _keeps_for_root(act: Callable[[], object]) -> Step:
    def claim(d: Path) -> None:
        with opened(".", os.O_PATH) as before:
            os.chdir(d)
            try:
                act()
            finally:
                os.fchdir(before)
        assert oct(mode_of(d / "program")) == oct(0o6777)

    return claim


for _name, _act in WRITERS.items():
    # Who may write but is neither owner nor root: setuid always goes, setgid where the group may execute.
    add(f"{_name}_by_another_user_clears_setuid_and_setgid", (file("program", mode=0o6777),), _clears(_act, 0o777))
    # The file's owner loses them too: only CAP_FSETID keeps them.
    add(
        f"{_name}_by_the_owner_clears_setuid_and_setgid",
        (file("program", mode=0o6755, uid=NOBODY, gid=NOBODY),),
        _clears(_act, 0o755),
    )
    # Setgid without group execute meant mandatory locking; it stays for members of the group.
    add(
        f"{_name}_by_a_member_keeps_setgid_without_group_execute",
        (file("program", mode=0o2666, uid=NOBODY, gid=NOBODY),),
        _clears(_act, 0o2666),
    )
    add(f"{_name}_by_root_keeps_setuid_and_setgid", (file("program", mode=0o6777),), _keeps_for_root(_act))
    add(
        f"{_name}_clears_the_file_capability",
        (file("program", mode=0o777), xattr("program", "security.capability", _CAPABILITY)),
        _clears_capability(_act),
    )


@check(file("program", mode=0o6777), xattr("program", "security.capability", _CAPABILITY))
def a_write_by_root_keeps_the_mode_and_clears_the_capability(d: Path) -> None:
    with opened(d / "program", os.O_WRONLY) as fd:
        os.write(fd, b"new")
    assert mode_of(d / "program") == 0o6777
    with fails(errno.ENODATA):
        os.getxattr(d / "program", "security.capability")


@check(file("program", mode=0o6755), xattr("program", "security.capability", _CAPABILITY))
def chown_by_root_clears_setuid_setgid_and_capability(d: Path) -> None:
    os.chown(d / "program", SOMEBODY, SOMEBODY)
    assert mode_of(d / "program") == 0o755
    with fails(errno.ENODATA):
        os.getxattr(d / "program", "security.capability")


@check(file("program", mode=0o6755, uid=NOBODY, gid=NOBODY))
def chown_of_the_group_by_the_owner_clears_setuid_and_setgid(d: Path) -> None:
    as_user(d, lambda: os.chown("program", -1, SOMEBODY), groups=(SOMEBODY,))
    assert mode_of(d / "program") == 0o755


@check(folder("team", mode=0o6775))
def chown_of_a_directory_keeps_its_bits(d: Path) -> None:
    os.chown(d / "team", SOMEBODY, SOMEBODY)
    assert mode_of(d / "team") == 0o6775


@check(file("program", mode=0o6755), xattr("program", "security.capability", _CAPABILITY))
def chmod_utime_and_link_keep_the_capability(d: Path) -> None:
    os.chmod(d / "program", 0o4711)
    os.utime(d / "program", ns=(10**18, 10**18))
    os.link(d / "program", d / "new")
    os.setxattr(d / "program", "user.x", b"value")
    os.rename(d / "program", d / "new2")
    assert os.getxattr(d / "new2", "security.capability") == _CAPABILITY
    assert mode_of(d / "new2") == 0o4711


@check(file("program", uid=NOBODY, gid=SOMEBODY, mode=0o755))
def chmod_by_a_stranger_to_the_group_drops_setgid(d: Path) -> None:
    as_user(d, lambda: os.chmod("program", 0o6755))
    assert mode_of(d / "program") == 0o4755


@check(file("program", mode=0o755, uid=NOBODY))
def an_ordinary_user_sets_no_capability(d: Path) -> None:
    def try_to_set() -> None:
        with fails(errno.EPERM):
            os.setxattr("program", "security.capability", _CAPABILITY)

    as_user(d, try_to_set)


@check(lambda d: _program(d / "program"))
def a_setuid_program_runs_as_its_owner(d: Path) -> None:
    os.chown(d / "program", SOMEBODY, SOMEBODY)
    os.chmod(d / "program", 0o4755)

    def run() -> None:
        import subprocess

        shown = subprocess.run(["./program", "-u"], capture_output=True, check=True, text=True).stdout
        assert shown == f"{SOMEBODY}\n"

    as_user(d, run)


def _program(path: Path) -> None:
    """A copy of id(1), which prints the effective uid for -u."""
    path.write_bytes(Path("/usr/bin/id").read_bytes())
    path.chmod(0o755)


@check(lambda d: _program(d / "program"))
def a_program_runs_and_cannot_be_written_meanwhile(d: Path) -> None:
    import subprocess

    shown = subprocess.run([d / "program", "-u"], capture_output=True, check=True, text=True).stdout
    assert shown == "0\n"


@check(file("program", mode=0o644))
def a_file_without_execute_permission_does_not_run(d: Path) -> None:
    with fails(errno.EACCES):
        os.execv(d / "program", ["program"])
