"""Layers that somebody changes behind a mount: no name that was swapped leads the daemon to anything outside of its layer.

The caller lives in a chroot of the merged view, as in a container. A symlink cannot lead it outside, so what it sees or changes there,
the daemon did for it.
"""

from __future__ import annotations

import os
import shlex
import signal
import stat
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pyoverlay.testing import Overlay, Tree, make_tree, witness

pytestmark = pytest.mark.root

INSIDE, SECRET = b"inside" * 1000, b"SECRET" * 1000
FEW, MANY = 256, 600  # the descriptors that the daemon may have, and the files that make it let go of all others
LINKS = ("absolute", "relative", "magic")
SPECIAL = ("fifo", "device")
OTHERS: Tree = {f"f{number}": b"x" for number in range(MANY)}
VICTIMS: Tree = {
    **{f"file-{kind}": INSIDE for kind in (*LINKS, *SPECIAL)},
    **{f"dir-{kind}": {"file": INSIDE, "sub": {"file": INSIDE}} for kind in (*LINKS, *SPECIAL)},
}
OUTSIDE: Tree = {"secret": SECRET, "tree": {"file": SECRET, "sub": {"file": SECRET}, "SECRET-name": SECRET}}


def target(place: Path, kind: str, name: str) -> str:
    """Where a symlink in the root of a layer leads outside: each layer lies in `place`."""
    return {"absolute": f"{place}/outside", "relative": "../outside", "magic": f"/proc/self/root{place}/outside"}[kind] + f"/{name}"


def put(place: Path, layer: int, prefix: str, kind: str) -> None:
    """Make the hostile object under its name in a layer."""
    name = f"{prefix}-{kind}"
    if kind == "fifo":
        os.mkfifo(name, 0o666, dir_fd=layer)
    elif kind == "device":
        os.mknod(name, 0o666 | stat.S_IFCHR, os.makedev(1, 5), dir_fd=layer)
    else:
        os.symlink(target(place, kind, "secret" if prefix == "file" else "tree"), name, dir_fd=layer)


@pytest.fixture
def hostile(tmp_path: Path) -> Iterator[Overlay]:
    """A mount whose daemon may have FEW descriptors, with VICTIMS nowhere yet."""
    for name in ("lower", "upper", "merged", "outside"):
        (tmp_path / name).mkdir()
    make_tree(tmp_path / "outside", OUTSIDE)
    make_tree(tmp_path / "lower", OTHERS)
    limited = tmp_path / "python"
    limited.write_text(f'#!/bin/sh\nulimit -n {FEW}\nexec {shlex.quote(sys.executable)} "$@"\n')
    limited.chmod(0o755)
    overlay = Overlay((tmp_path / "lower",), tmp_path / "upper", tmp_path / "merged", ())
    overlay.python = str(limited)
    try:
        yield overlay
    finally:
        overlay.close()


class Caller:
    """Does everything that may be done with a name or a descriptor. An errno is an answer; what was read is kept."""

    def __init__(self) -> None:
        self.seen: list[bytes] = []

    def tries(self, *acts: Callable[[], object]) -> None:
        for act in acts:
            try:
                self._keep(act())
            except OSError:
                continue

    def _keep(self, answer: object) -> None:
        if isinstance(answer, bytes):
            self.seen.append(answer)
        elif isinstance(answer, list):
            self.seen += map(os.fsencode, answer)

    def uses(self, path: str) -> None:
        """By name, as a file and as a directory."""
        for flags in (os.O_RDONLY, os.O_RDWR, os.O_WRONLY | os.O_APPEND, os.O_RDWR | os.O_CREAT | os.O_TRUNC):
            try:
                fd = os.open(path, flags | os.O_NONBLOCK | os.O_NOFOLLOW)
            except OSError:
                continue
            self.uses_open(fd)
            os.close(fd)
        self.tries(
            lambda: os.listdir(path),
            lambda: os.listxattr(path, follow_symlinks=False),
            lambda: os.setxattr(path, "user.x", b"x", follow_symlinks=False),
            lambda: os.setxattr(path, "trusted.x", b"x", follow_symlinks=False),
            lambda: os.chmod(path, 0o777),
            lambda: os.chown(path, 1, 1, follow_symlinks=False),
            lambda: os.utime(path, (1, 1), follow_symlinks=False),
        )

    def uses_open(self, fd: int) -> None:
        self.tries(
            lambda: os.pread(fd, 10_000, 0),
            lambda: os.listdir(fd),
            lambda: os.listxattr(fd),
            lambda: os.pwrite(fd, b"written", 3),
            lambda: os.pread(fd, 10_000, 0),
            lambda: os.ftruncate(fd, 20_000),
            lambda: os.fsync(fd),
            lambda: os.fchmod(fd, 0o700),
            lambda: os.fchown(fd, 2, 2),
            lambda: os.utime(fd, (2, 2)),
            lambda: os.setxattr(fd, "user.y", b"y"),
        )

    def uses_below(self, path: str) -> None:
        """What lies, or may be made, in a directory."""
        for below in ("file", "sub", "sub/file", "SECRET-name"):
            self.uses(f"{path}/{below}")
        self.tries(
            lambda: os.mkdir(f"{path}/new"),
            lambda: os.close(os.open(f"{path}/sub/new", os.O_CREAT | os.O_WRONLY)),
            lambda: os.link("f0", f"{path}/linked"),
            lambda: os.symlink("x", f"{path}/symlink"),
            lambda: os.rename(f"{path}/file", f"{path}/renamed"),
            lambda: os.rename(f"{path}/sub", f"{path}-sub"),
            lambda: os.rename("f1", f"{path}/sub/f1"),
            lambda: os.unlink(f"{path}/sub/file"),
            lambda: os.unlink(f"{path}/SECRET-name"),
            lambda: os.rmdir(f"{path}/sub"),
        )

    def removes(self, path: str) -> None:
        self.tries(
            lambda: os.link(path, f"{path}-link", follow_symlinks=False),
            lambda: os.rename(path, f"{path}-moved"),
            lambda: os.unlink(f"{path}-moved"),
            lambda: os.rmdir(f"{path}-moved"),
        )


def attack(overlay: Overlay, layer: Path, stage: str) -> bytes:
    """What a caller reads who has everything open while it is swapped."""
    place = overlay.merged.parent
    in_layer = os.open(layer, os.O_RDONLY | os.O_DIRECTORY)
    drop = os.open("/proc/sys/vm/drop_caches", os.O_WRONLY)
    os.chroot(overlay.merged)
    os.chdir("/")
    caller = Caller()
    descriptors = [os.open(name, os.O_RDONLY if name.startswith("dir") else os.O_RDWR) for name in VICTIMS]
    descriptors += [os.open(f"{name}/{below}", os.O_RDONLY) for name in VICTIMS if name.startswith("dir") for below in ("file", "sub")]
    for prefix in ("file", "dir"):
        for kind in (*LINKS, *SPECIAL):
            os.rename(f"{prefix}-{kind}", f"was-{prefix}-{kind}", src_dir_fd=in_layer, dst_dir_fd=in_layer)
            put(place, in_layer, prefix, kind)
    if stage != "cached":
        os.write(drop, b"3")
    if stage == "evicted":
        for name in OTHERS:
            caller.tries(lambda name=name: Path(name).read_bytes())  # type: ignore[misc]
        os.write(drop, b"3")
    for fd in descriptors:
        caller.uses_open(fd)
    for name in VICTIMS:
        caller.uses(name)
        if name.startswith("dir"):
            caller.uses_below(name)
    for fd in descriptors:
        caller.uses_open(fd)
    for name in VICTIMS:
        caller.removes(name)
    return b"\n".join(caller.seen)


def in_a_child(act: Callable[[], bytes], result: Path) -> bytes:
    """What it returns in a process of its own, whom an alarm ends if it never gets an answer."""
    pid = os.fork()
    if pid == 0:
        signal.alarm(60)
        output = os.open(result, os.O_CREAT | os.O_WRONLY)
        try:
            os.write(output, act())
        except BaseException:  # noqa: BLE001 - a forked child must not return into pytest
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    return result.read_bytes()


@pytest.mark.parametrize("stage", ["cached", "forgotten", "evicted"])
@pytest.mark.parametrize("where", ["lower", "upper"])
def test_what_is_swapped_behind_the_mount_leads_nowhere(hostile: Overlay, tmp_path: Path, where: str, stage: str) -> None:
    layer = hostile.lower if where == "lower" else hostile.writable
    make_tree(layer, VICTIMS)
    before = witness(tmp_path / "outside")
    hostile.mount()
    seen = in_a_child(lambda: attack(hostile, layer, stage), tmp_path / "seen")
    assert INSIDE in seen or stage == "evicted"
    assert b"SECRET" not in seen
    assert witness(tmp_path / "outside") == before
    assert (hostile.merged / f"f{MANY - 1}").read_bytes() == b"x"


@pytest.mark.parametrize("where", ["lower", "upper"])
def test_a_symlink_that_leads_outside_is_a_symlink_and_nothing_else(hostile: Overlay, tmp_path: Path, where: str) -> None:
    layer = hostile.lower if where == "lower" else hostile.writable
    fd = os.open(layer, os.O_RDONLY | os.O_DIRECTORY)
    wanted = {}
    for prefix in ("file", "dir"):
        for kind in LINKS:
            put(tmp_path, fd, prefix, kind)
            wanted[f"{prefix}-{kind}"] = os.readlink(f"{prefix}-{kind}", dir_fd=fd)
    os.close(fd)
    before = witness(tmp_path / "outside")
    hostile.mount()
    assert {name: os.readlink(hostile.merged / name) for name in wanted} == wanted

    def use() -> bytes:
        os.chroot(hostile.merged)
        os.chdir("/")
        caller = Caller()
        for name in wanted:
            caller.uses(name)
            caller.uses_below(name)
            caller.removes(name)
        return b"\n".join(caller.seen)

    assert b"SECRET" not in in_a_child(use, tmp_path / "seen")
    assert witness(tmp_path / "outside") == before
