"""The directory that is mounted over: attaching a FUSE connection to it, asking it for an answer, taking it out again.

After the mount answers no path that could lead through it is passed to the kernel: the daemon would wait for itself, in a sleep that
no signal ends (MERGED may hold /usr, /proc or our own code). So the directory above is held, the mount is reached by its last name
from there, and the list of mounts is read from a descriptor taken before.

With root's privileges mount(2) and umount2(2) are called directly, which gives an errno where libfuse would print a line. An
ordinary user goes through fusermount3, and its part of unmounting is done by a small process that was started before: the daemon
itself may by then have given up the right to run a set-user-id program (PR_SET_NO_NEW_PRIVS).
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from pyoverlay import mountinfo
from pyoverlay.core import syscalls
from pyoverlay.errors import NoPrivilege, Refusal, printable

FUSE_DEVICE = "/dev/fuse"

# include/uapi/linux/mount.h
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_SYNCHRONOUS = 1, 2, 4, 8, 16
_MS_DIRSYNC, _MS_NOATIME, _MS_NODIRATIME = 128, 1024, 2048

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class MountOptions:
    """The generic options of mount(8), each as it shall be; default_permissions always is."""

    source: str = "pyoverlay"
    subtype: str = "pyoverlay"
    allow_other: bool = False
    read_only: bool = False
    suid: bool = False
    dev: bool = False
    exec: bool = True
    sync: bool = False
    dirsync: bool = False
    noatime: bool = False
    nodiratime: bool = False

    @property
    def flags(self) -> int:
        """For mount(2)."""
        chosen = {
            _MS_RDONLY: self.read_only,
            _MS_NOSUID: not self.suid,
            _MS_NODEV: not self.dev,
            _MS_NOEXEC: not self.exec,
            _MS_SYNCHRONOUS: self.sync,
            _MS_DIRSYNC: self.dirsync,
            _MS_NOATIME: self.noatime,
            _MS_NODIRATIME: self.nodiratime,
        }
        return sum(flag for flag, is_set in chosen.items() if is_set)

    @property
    def words(self) -> str:
        """For fusermount3, which splits at commas and takes a backslash before one."""
        source = self.source.replace("\\", "\\\\").replace(",", "\\,")
        chosen = {
            "ro": self.read_only,
            "noexec": not self.exec,
            "sync": self.sync,
            "dirsync": self.dirsync,
            "noatime": self.noatime,
            "allow_other": self.allow_other,
        }
        return ",".join(
            [*(word for word, is_set in chosen.items() if is_set), "nosuid", "nodev", "default_permissions",
             f"subtype={self.subtype}", f"fsname={source}"]
        )  # fmt: skip


class MountPoint:
    """An existing directory, and what is mounted on it once `attach` was called. `close` lets go of it.

    path: absolute, without symlinks. Raises OSError for a directory above that cannot be opened.
    """

    def __init__(self, path: bytes) -> None:
        self.path = path
        self._name = os.path.basename(path)
        self._above = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY)
        self._mountinfo = mountinfo.open_mountinfo()
        self.mount: mountinfo.Mount | None = None

    def close(self) -> None:
        """Let go of the directory above: its file system can be unmounted."""
        os.close(self._mountinfo)
        os.close(self._above)

    def open_connection(self) -> int:
        """A descriptor for `attach`, which makes it the connection; its number can be handed out before. Raises Refusal."""
        return _open_fuse_device()

    def attach(self, fd: int, options: MountOptions) -> None:
        """Mount, with `fd`, from `open_connection`, as the connection; requests wait until somebody reads it.

        Raises Refusal. Nothing is asked of the new mount here.
        """
        self._attach(fd, options)
        self.mount = mountinfo.topmost(self.path, mountinfo.mounts(self._mountinfo))

    def _attach(self, fd: int, options: MountOptions) -> None:
        mode = os.stat(self.path).st_mode
        data = f"fd={fd},rootmode={mode:o},user_id={os.geteuid()},group_id={os.getegid()},default_permissions"
        data += ",allow_other" if options.allow_other else ""
        source, kind = os.fsencode(options.source), os.fsencode(f"fuse.{options.subtype}")
        if _libc.mount(source, self.path, kind, ctypes.c_ulong(options.flags), data.encode()) != 0:
            raise _mount_refused(self.path, ctypes.get_errno())

    def wait_for_answer(self) -> None:
        """Return when the mount answers. Blocks: for a thread, while the session serves."""
        fd = self._open_root()
        try:
            os.fstat(fd)
            os.statvfs(fd)
        finally:
            os.close(fd)

    def sync(self) -> None:
        """Have every dirty page of the mount written, which are requests to this session. Blocks: for a thread, while it serves."""
        fd = self._open_root()
        try:
            syscalls.syncfs(fd)
        finally:
            os.close(fd)

    def unmount(self, *, lazily: bool = False) -> None:
        """Take the mount out of the tree; OSError EBUSY if somebody uses it, unless `lazily`, or something covers it. Blocks: for a thread,
        while it serves.

        The last reference makes the kernel write dirty pages, which are requests to this session.
        """
        self._unmount(*self._place(), lazily=lazily)

    def _unmount(self, name: bytes, dirfd: int | None, *, lazily: bool) -> None:
        if dirfd is not None:
            os.fchdir(dirfd)  # umount2(2) takes no directory descriptor
        syscalls.umount2(name, syscalls.MNT_DETACH if lazily else 0)

    @property
    def is_mounted(self) -> bool:
        """What was attached is still there."""
        return self._where() is not None

    def _where(self) -> bytes | None:
        """Where the list of mounts says that it is: the path changes with the name of a directory above, and when a mount is moved."""
        mount = self.mount
        among = mountinfo.mounts(self._mountinfo) if mount is not None else []
        return next((other.point for other in among if mount is not None and other.id == mount.id), None)

    def _place(self) -> tuple[bytes, int | None]:
        """A name that leads to the mount, and the directory that this begins at. OSError EBUSY: something else is mounted over it."""
        if self._leads_here(self._name, self._above):
            return self._name, self._above
        where = self._where()
        if where is None or not self._leads_here(where, None):
            raise OSError(errno.EBUSY, "something else is mounted over it", os.fsdecode(self.path))
        return where, None

    def _leads_here(self, name: bytes, dirfd: int | None) -> bool:
        """An O_PATH descriptor of the root of a mount asks nothing of it."""
        try:
            fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dirfd)
        except OSError:
            return False
        try:
            return self.mount is not None and mountinfo.mount_id(fd, self._mountinfo) == self.mount.id
        finally:
            os.close(fd)

    def _open_root(self) -> int:
        name, dirfd = self._place()
        return os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=dirfd)


class UserMountPoint(MountPoint):
    """A mount point of an ordinary user, through fusermount3."""

    def __init__(self, path: bytes) -> None:
        self._program = fusermount()
        self._one_at_a_time = threading.Lock()
        super().__init__(path)
        # Reads one word a line and answers with the exit status; ends with its standard input. A session of its own: the
        # terminal's interrupt is for the daemon, which then wants this process. It is in the directory above, whatever that is called then.
        with _startable("/bin/sh"):
            self._unmounter = subprocess.Popen(
                ["/bin/sh", "-c", 'while read -r how; do "$0" $how -- "$1" >/dev/null 2>&1; echo $?; done', self._program, self._name],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=f"/proc/self/fd/{self._above}",
                start_new_session=True,
            )  # fmt: skip

    def close(self) -> None:
        """End the small process too."""
        assert self._unmounter.stdin is not None
        assert self._unmounter.stdout is not None
        self._unmounter.stdin.close()
        self._unmounter.stdout.close()
        self._unmounter.wait()
        super().close()

    def _attach(self, fd: int, options: MountOptions) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with ours:
            with theirs, _startable(self._program):
                result = subprocess.run(
                    ["fusermount3", "-o", options.words, "--", self.path], executable=self._program,
                    env=os.environ | {"_FUSE_COMMFD": str(theirs.fileno())},
                    pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL, capture_output=True, check=False,
                )  # fmt: skip
            if result.returncode != 0:
                raise _fusermount_refused(self.path, result.stderr)
            _, (connection, *_), _, _ = socket.recv_fds(ours, 1, 1)
        os.dup2(connection, fd, inheritable=False)
        os.close(connection)

    def _unmount(self, name: bytes, dirfd: int | None, *, lazily: bool) -> None:
        assert self._unmounter.stdin is not None
        assert self._unmounter.stdout is not None
        # A thread that was left alone at the end of the session may still wait for its answer: of two that read lines one loses its own.
        with self._one_at_a_time:
            self._unmounter.stdin.write(b"-u -z\n" if lazily else b"-u\n")
            self._unmounter.stdin.flush()
            status = self._unmounter.stdout.readline()
        if status != b"0\n":
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), os.fsdecode(self.path))


@contextmanager
def _startable(program: str) -> Iterator[None]:
    """Refusal where there is no process to be had for a program."""
    try:
        yield
    except BlockingIOError as error:
        remedy = "raise the limit of processes (ulimit -u; pids.max of a container)"
        raise Refusal(program, "cannot be started", error.errno, remedy) from error


def open_mount_point(path: bytes) -> MountPoint:
    """The mount point at `path` for this user. Raises OSError, or NoPrivilege for a user without fusermount3."""
    return MountPoint(path) if os.geteuid() == 0 else UserMountPoint(path)


MTAB = "/etc/mtab"
"""What fusermount3 reads to see whose a mount is. A system that was unpacked and never booted may have none (debootstrap)."""

MAKE_MTAB = f"as root: ln -s /proc/self/mounts {MTAB}"


def fusermount() -> str:
    """The path of fusermount3. Raises NoPrivilege if there is none."""
    program = shutil.which("fusermount3")
    if program is None:
        raise NoPrivilege("fusermount3", "not found, and only root mounts without it", errno.ENOENT, "install it: apt install fuse3")
    return program


def _open_fuse_device() -> int:
    """A descriptor of /dev/fuse, not connected to anything yet. Raises Refusal that says how to get there."""
    try:
        return os.open(FUSE_DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise Refusal(FUSE_DEVICE, "no FUSE here", error.errno, "modprobe fuse; in a container add --device /dev/fuse") from error
    except PermissionError as error:
        remedy = "chmod 666 /dev/fuse; in a container add --device /dev/fuse"
        raise NoPrivilege(FUSE_DEVICE, "may not be opened", error.errno, remedy) from error
    except OSError as error:
        is_limit = error.errno in (errno.EMFILE, errno.ENFILE)
        remedy = "raise the limit of open files (ulimit -n)" if is_limit else "modprobe fuse; in a container add --device /dev/fuse"
        raise Refusal(FUSE_DEVICE, "cannot be opened", error.errno, remedy) from error


def _mount_refused(path: bytes, code: int) -> Refusal:
    if code == errno.EPERM:
        remedy = "run it as root, as a user with fusermount3, or in `unshare -Urm`; in a container add --cap-add SYS_ADMIN"
        return NoPrivilege(path, "no privilege to mount", code, remedy)
    if code == errno.ENODEV:
        return Refusal(path, "the kernel has no FUSE", code, "modprobe fuse")
    return Refusal(path, "cannot be mounted over", code)


def _fusermount_refused(path: bytes, said: bytes) -> Refusal:
    lines = [line for line in said.decode(errors="replace").splitlines() if line.strip()]
    reason = printable(lines[-1].strip()) if lines else "fusermount3 failed without a word"
    if "user_allow_other" in reason:
        return NoPrivilege(path, reason, None, "add user_allow_other to /etc/fuse.conf, or leave allow_other out")
    return NoPrivilege(path, reason)
