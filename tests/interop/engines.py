"""Container engines of a test's own: a dockerd, a podman of root's, a podman of an ordinary user's. All state is in one short directory.

No registry and no network: the base image is busybox, made here. Nothing of the machine is changed for them: what a user of podman needs
besides (an entry in passwd, ranges of ids, a /dev/fuse that opens) is bound over the machine's files in a mount namespace of the command's.
"""

from __future__ import annotations

import os
import select
import shutil
import socket as socketlib
import stat
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory

from pyoverlay.testing import mounts_below
from pyoverlay.testing.mounts import Connection, wait_for_end

# The program that engines are told to mount with, of the Python that runs the tests.
MOUNT_PROGRAM = Path(sys.executable).with_name("mount.fuse.pyoverlay")

IMAGE = "bb"  # podman calls it localhost/bb
BUSYBOX = Path("/bin/busybox")  # Debian's busybox-static

USER, FIRST_SUBORDINATE, SUBORDINATES = 4321, 300_000, 65_536

COMMAND_SECONDS = 60.0
START_SECONDS = 20.0
_SHORT = "/var/tmp"  # a socket's path holds 107 bytes; pytest's own directories are longer


class EngineFailedError(AssertionError):
    """A command of an engine returned something other than 0; the text is the command, its status and what it said."""


def run(*argv: str | Path, environment: Mapping[str, str] | None = None, cwd: Path | None = None) -> str:
    """The output of a command that has to succeed. Raises EngineFailedError."""
    result = attempt(*argv, environment=environment, cwd=cwd)
    if result.returncode != 0:
        raise EngineFailedError(f"{' '.join(map(str, argv))}: exit status {result.returncode}\n{result.stdout}{result.stderr}")
    return result.stdout


def attempt(
    *argv: str | Path, environment: Mapping[str, str] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, whatever that is."""
    return subprocess.run(
        argv, check=False, env=environment, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=COMMAND_SECONDS
    )


def missing(*programs: str) -> str | None:
    """Why engines cannot run here, None if they can."""
    if os.geteuid() != 0:
        return "needs root"
    absent = [program for program in programs if shutil.which(program) is None]
    if absent:
        return f"not installed: {', '.join(absent)}"
    return None if BUSYBOX.exists() else f"no {BUSYBOX} (busybox-static)"


def is_within_a_users_reach(program: Path) -> bool:
    """May an ordinary user run it? A checkout in somebody's home directory often is closed to others, though not to setpriv itself."""
    user = ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups"]
    return attempt(*user, "sh", "-c", '"$0" --version', program).returncode == 0


@contextmanager
def short_directory() -> Iterator[Path]:
    """A directory that any user may enter. It goes at the end, with whatever is still mounted in it; mounts left are an AssertionError."""
    with TemporaryDirectory(prefix="pyo-", dir=_SHORT) as name:
        directory = Path(name)
        directory.chmod(0o755)
        yield directory
        left = mounts_below(directory)
        for mount in reversed(left):
            Connection.of(mount).detach()
        assert not left, f"an engine left mounts: {[mount.mount_point for mount in left]}"


def make_base_image(path: Path) -> None:
    """A tar file of a root file system: busybox, all its names, and the directories that a container wants."""
    applets = run(BUSYBOX, "--list").split()
    with tarfile.open(path, "w") as tar:
        for name in ("bin", "etc", "root", "proc", "sys", "dev"):
            _add(tar, name, tarfile.DIRTYPE, 0o755)
        _add(tar, "tmp", tarfile.DIRTYPE, 0o1777)
        _add(tar, "bin/busybox", tarfile.REGTYPE, 0o755, BUSYBOX.read_bytes())
        for applet in applets:
            if applet != "busybox":
                _add(tar, f"bin/{applet}", tarfile.SYMTYPE, 0o777, target="busybox")
        _add(tar, "etc/passwd", tarfile.REGTYPE, 0o644, b"root:x:0:0::/root:/bin/sh\n")


def _add(tar: tarfile.TarFile, name: str, kind: bytes, mode: int, content: bytes = b"", target: str = "") -> None:
    entry = tarfile.TarInfo(name)
    entry.type, entry.mode, entry.size, entry.linkname = kind, mode, len(content), target
    tar.addfile(entry, BytesIO(content))


# ── podman and buildah ──────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Podman:
    """podman and buildah over one store. directory: whose it is may be written to by them. prefix: what makes a command the user's.

    Each method returns what the command printed, and raises EngineFailedError.
    """

    directory: Path
    environment: dict[str, str]
    prefix: tuple[str, ...] = ()

    @property
    def is_rootless(self) -> bool:
        return bool(self.prefix)

    @property
    def store(self) -> Path:
        """Where the layers lie: `ID/diff`, and short names for them in `l/`."""
        return self.directory / "g/overlay"

    def podman(self, *arguments: str | Path) -> str:
        return self.run("podman", *arguments)

    def buildah(self, *arguments: str | Path) -> str:
        return self.run("buildah", *arguments)

    def run(self, *argv: str | Path) -> str:
        return run(*self.prefix, *argv, environment=self.environment, cwd=self.directory)

    def attempt(self, *argv: str | Path) -> subprocess.CompletedProcess[str]:
        """The same for a command that may fail."""
        return attempt(*self.prefix, *argv, environment=self.environment, cwd=self.directory)

    def in_user_namespace(self, script: str, *arguments: str | Path) -> str:
        """A shell script where the store's mounts can be seen and its files belong to root: for a user, `podman unshare`."""
        shell = ("sh", "-ec", script, "sh", *arguments)
        return self.podman("unshare", *shell) if self.is_rootless else self.run(*shell)

    def remove_containers(self) -> None:
        """Of buildah's too; the images stay."""
        self.podman("rm", "-fa", "-t0")
        self.buildah("rm", "--all")

    def close(self) -> None:
        """Remove everything, and end the process that keeps a user's namespace."""
        self.remove_containers()
        self.podman("rmi", "-fa")
        if self.is_rootless:
            self.podman("system", "migrate")
        for mount in reversed(mounts_below(self.store)):
            run("umount", mount.mount_point)  # podman binds its store on itself


@contextmanager
def root_podman(image: Path, program: Path = MOUNT_PROGRAM, options: str = "") -> Iterator[Podman]:
    """A podman of root's that mounts with `program` and has the image `bb`. options: further lines for [storage.options.overlay]."""
    with short_directory() as directory:
        _configure(directory, program, options)
        yield from _started(Podman(directory, _environment(directory)), image)


@contextmanager
def user_podman(image: Path, program: Path = MOUNT_PROGRAM, options: str = "", subordinates: int = SUBORDINATES) -> Iterator[Podman]:
    """The same of an ordinary user, in that user's home directory. subordinates: how many ids the user has besides its own."""
    with short_directory() as directory:
        home = directory / "home"
        for path in (home, directory / "run"):
            path.mkdir(mode=0o700)
            os.chown(path, USER, USER)
        _configure(home, program, options)
        environment = _environment(home) | {"HOME": str(home), "XDG_RUNTIME_DIR": str(directory / "run"), "USER": "pyo"}
        yield from _started(Podman(home, environment, _as_user(directory, subordinates)), image)


def _started(podman: Podman, image: Path) -> Iterator[Podman]:
    reachable = shutil.copy(image, podman.directory / "image.tar")  # pytest's own directories are for root alone
    try:
        podman.podman("import", "-q", reachable, IMAGE)
        yield podman
    finally:
        podman.close()


def _configure(directory: Path, program: Path, options: str) -> None:
    (directory / "storage.conf").write_text(
        f'[storage]\ndriver = "overlay"\ngraphroot = "{directory}/g"\nrootless_storage_path = "{directory}/g"\nrunroot = "{directory}/n"\n'
        f'[storage.options.overlay]\nmount_program = "{program}"\n{options}'
    )
    # Its own limits exceed what a machine without CAP_SYS_RESOURCE may set. runc: crun refuses the first version of cgroups.
    (directory / "containers.conf").write_text(
        '[containers]\ndefault_ulimits = ["nofile=4096:4096", "nproc=4096:4096"]\nnetns = "host"\n[engine]\nruntime = "runc"\n'
    )


def _environment(directory: Path) -> dict[str, str]:
    return dict(os.environ) | {
        "CONTAINERS_STORAGE_CONF": str(directory / "storage.conf"), "CONTAINERS_CONF": str(directory / "containers.conf"),
    }  # fmt: skip


def _as_user(directory: Path, subordinates: int) -> tuple[str, ...]:
    """What makes a command that of a user whom the machine does not know, with a /dev/fuse that opens."""
    node = directory / "fuse"
    os.mknod(node, stat.S_IFCHR, os.makedev(10, 229))
    node.chmod(0o666)
    (directory / "passwd").write_text(f"{Path('/etc/passwd').read_text()}pyo:x:{USER}:{USER}::{directory}/home:/bin/sh\n")
    (directory / "group").write_text(f"{Path('/etc/group').read_text()}pyo:x:{USER}:\n")
    (directory / "subordinate").write_text(f"pyo:{FIRST_SUBORDINATE}:{subordinates}\n" if subordinates else "")
    bound = {"fuse": "/dev/fuse", "passwd": "/etc/passwd", "group": "/etc/group", "subordinate": "/etc/subuid"}
    script = "".join(f'mount --bind "$0/{name}" {path}; ' for name, path in bound.items())
    script += f'mount --bind "$0/subordinate" /etc/subgid; exec setpriv --reuid={USER} --regid={USER} --clear-groups "$@"'
    return ("unshare", "--mount", "sh", "-ec", script, str(directory))


# ── Docker ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Docker:
    """A client of one dockerd. directory: where the engine's state is, below `dk`."""

    directory: Path
    environment: dict[str, str]

    def docker(self, *arguments: str | Path) -> str:
        """What `docker ...` printed. Raises EngineFailedError."""
        return run("docker", *arguments, environment=self.environment, cwd=self.directory)

    def attempt(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """The same for a command that may fail."""
        return attempt("docker", *arguments, environment=self.environment, cwd=self.directory)

    def remove_containers(self) -> None:
        """Running or not; the images stay."""
        containers = self.docker("ps", "-aq").split()
        if containers:
            self.docker("rm", "-f", "-v", *containers)


@contextmanager
def dockerd(image: Path, driver: str = "overlay2", path: Path | None = None) -> Iterator[Docker]:
    """A Docker engine with the image `bb`, without networks (`--network=none` or `host`). path: searched for programs before PATH."""
    with short_directory() as directory:
        address = f"unix://{directory}/d.sock"
        environment = dict(os.environ) | {"DOCKER_HOST": address, "DOCKER_BUILDKIT": "0"}
        if path is not None:
            environment["PATH"] = f"{path}:{environment['PATH']}"
        state = ("--data-root", f"{directory}/dk", "--exec-root", f"{directory}/dx", "--pidfile", f"{directory}/d.pid")
        argv = ["dockerd", *state, "-H", address, "-s", driver, "--iptables=false", "--bridge=none"]
        engine = _start(argv, environment, directory)
        try:
            docker = Docker(directory, environment)
            docker.docker("import", image, IMAGE)
            yield docker
            docker.remove_containers()
        finally:
            _end(engine, directory)


def _start(argv: list[str], environment: dict[str, str], directory: Path) -> subprocess.Popen[bytes]:
    """Start a daemon that says when it is ready as systemd wants to hear it, sd_notify(3), and wait until it does."""
    with socketlib.socket(socketlib.AF_UNIX, socketlib.SOCK_DGRAM) as listener, open(directory / "log", "wb") as log:
        listener.bind(f"{directory}/ready")
        environment = environment | {"NOTIFY_SOCKET": f"{directory}/ready"}
        engine = subprocess.Popen(argv, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        pidfd = os.pidfd_open(engine.pid)
        try:
            readable, _, _ = select.select([listener.fileno(), pidfd], [], [], START_SECONDS)
        finally:
            os.close(pidfd)
        if listener.fileno() not in readable:
            _end(engine, directory)
            raise EngineFailedError(f"{argv[0]} did not start; the end of its log:\n{(directory / 'log').read_text()[-2000:]}")
    return engine


def _end(engine: subprocess.Popen[bytes], directory: Path) -> None:
    engine.terminate()
    left = wait_for_end([engine.pid], START_SECONDS)
    if left:
        engine.kill()
    engine.wait()
    for mount in reversed(mounts_below(directory)):  # a network namespace; and its data, of one that was ended while it started
        run("umount", "-l", mount.mount_point)
    assert not left, f"dockerd did not end; the end of its log: {(directory / 'log').read_text()[-2000:]}"
