"""What `pyoverlay doctor` asks of the machine: each check tries the thing itself rather than trusting a version number.

A check says what is there, and where something is missing the line that brings it.
"""

from __future__ import annotations

import fcntl
import os
import platform
import re
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum

from pyoverlay import mountinfo
from pyoverlay.core import syscalls
from pyoverlay.core.stack import keeps_order
from pyoverlay.daemon import refusals, versions
from pyoverlay.errors import printable
from pyoverlay.fuse import latency
from pyoverlay.fuse.mountpoint import FUSE_DEVICE, MAKE_MTAB, MTAB

_IN_CONTAINER = "--device /dev/fuse --cap-add SYS_ADMIN --security-opt apparmor=unconfined"


class State(Enum):
    """ON: there. OFF: missing, and no mount without it. WARN: missing or limited, and mounts do without it."""

    ON = "on"
    OFF = "off"
    WARN = "warn"


@dataclass(frozen=True, slots=True)
class Check:
    """One answer. remedy: the line to run or to write, None where nothing is to be done."""

    name: str
    state: State
    detail: str
    remedy: str | None = None


def machine() -> Iterator[Check]:
    """What does not depend on an upper."""
    yield from (check() for check in (_kernel, _device, _privileges, _fusermount, _fuse_conf, _user_namespaces, _apparmor))
    yield from (check() for check in (_library, _extension, _latency, _clones))


def _kernel() -> Check:
    release = platform.release()
    version = tuple(map(int, re.findall(r"\d+", release)[:2]))
    if version < (5, 6):
        return Check("kernel", State.OFF, f"Linux {release} lacks openat2(2)", "use Linux 5.12 or newer")
    return Check("kernel", State.ON, f"Linux {release}")


def _in_container() -> bool:
    return os.path.exists("/.dockerenv") or os.path.exists("/run/.containerenv")


def _device() -> Check:
    try:
        os.close(os.open(FUSE_DEVICE, os.O_RDWR))
    except OSError as error:
        remedy = "sudo chmod 666 /dev/fuse" if isinstance(error, PermissionError) else "sudo modprobe fuse"
        remedy = f"start the container with {_IN_CONTAINER}" if _in_container() else remedy
        return Check(FUSE_DEVICE, State.OFF, f"cannot be opened: {error.strerror}", remedy)
    return Check(FUSE_DEVICE, State.ON, "can be opened")


def _privileges() -> Check:
    if refusals.is_privileged():
        return Check("privileges", State.ON, "root: mounts serve all users, marks are trusted.overlay.*")
    if os.geteuid() == 0:
        detail = "root of a user namespace, or without CAP_SYS_ADMIN: marks are user.overlay.*, redirects are not followed"
        return Check("privileges", State.WARN, detail, f"in a container add {_IN_CONTAINER}" if _in_container() else None)
    detail = "an ordinary user: mounts are one's own, nosuid and nodev; copies of other users' files cannot keep their owner"
    return Check("privileges", State.WARN, detail, "to try things over /usr: -o squash_to_uid=$(id -u),squash_to_gid=$(id -g)")


def _fusermount() -> Check:
    path = shutil.which("fusermount3")
    without = State.WARN if os.geteuid() == 0 else State.OFF
    if path is None:
        return Check("fusermount3", without, "not installed; ordinary users cannot mount", "sudo apt install fuse3")
    if not os.stat(path).st_mode & stat.S_ISUID or os.stat(path).st_uid != 0:
        return Check("fusermount3", without, f"{path} is not set-user-id root", f"sudo chmod u+s {path}")
    if not os.path.exists(MTAB):
        return Check("fusermount3", State.WARN, f"there is no {MTAB}, without which it unmounts nothing for ordinary users", MAKE_MTAB)
    said = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout.strip()
    return Check("fusermount3", State.ON, f"{path}, {said}")


def _fuse_conf() -> Check:
    remedy = "echo user_allow_other | sudo tee -a /etc/fuse.conf"
    try:
        with open("/etc/fuse.conf", encoding="utf-8", errors="replace") as file:
            lines = [line.strip() for line in file]
    except OSError as error:
        return Check("fuse.conf", State.WARN, f"/etc/fuse.conf: {error.strerror}; allow_other is root's alone", remedy)
    most = next((line for line in lines if line.startswith("mount_max")), "mount_max = 1000")
    if "user_allow_other" in lines:
        return Check("fuse.conf", State.ON, f"user_allow_other is set, {most}")
    return Check("fuse.conf", State.WARN, f"no user_allow_other: -o allow_other is root's alone; {most}", remedy)


def _user_namespaces() -> Check:
    name = "user namespaces"
    if _sysctl("kernel/apparmor_restrict_unprivileged_userns") == "1":
        remedy = "sudo sysctl kernel.apparmor_restrict_unprivileged_userns=0"
        return Check(name, State.WARN, "restricted by AppArmor: no `unshare -Urm` for users", remedy)
    if _sysctl("user/max_user_namespaces") == "0" or _sysctl("kernel/unprivileged_userns_clone") == "0":
        return Check(name, State.WARN, "turned off", "sudo sysctl user.max_user_namespaces=15000 kernel.unprivileged_userns_clone=1")
    return Check(name, State.ON, "allowed")


def _sysctl(name: str) -> str | None:
    try:
        with open(f"/proc/sys/{name}", encoding="ascii") as file:
            return file.read().strip()
    except OSError:  # a kernel without it
        return None


def _apparmor() -> Check:
    name = "AppArmor"
    if not os.path.exists("/etc/apparmor.d/fusermount3"):
        return Check(name, State.ON, "no profile for fusermount3")
    detail = "its profile lets fusermount3 mount below $HOME, /mnt, /media, /tmp and $XDG_RUNTIME_DIR only"
    remedy = (
        "for another MERGED, /srv/x: add `mount fstype=@{fuse_types} options=(nosuid,nodev) -> /srv/x/,` and `umount /srv/x/,`"
        " to /etc/apparmor.d/local/fusermount3; then sudo apparmor_parser -r /etc/apparmor.d/fusermount3"
    )
    return Check(name, State.WARN, detail, remedy)


def _library() -> Check:
    name = "pyfuse3"
    try:
        from pyoverlay.fuse.binding import pyfuse3
    except ImportError as error:
        return Check(name, State.OFF, f"cannot be loaded: {error}", "sudo apt install fuse3 python3-pyfuse3, or pip install pyfuse3")
    return Check(name, State.ON, f"{pyfuse3.__version__}, libfuse {versions.libfuse_version() or 'its own'}")


def _extension() -> Check:
    name = "extension"
    try:
        from pyoverlay.fuse.binding import wire, wire_reason
    except ImportError:
        return Check(name, State.WARN, "needs pyfuse3")
    if wire is None:
        remedy = "install with a C compiler: apt install gcc python3-dev, then pip install again"
        return Check(name, State.WARN, f"off: {wire_reason}; slower, and without fallocate, SEEK_HOLE, copy_file_range, chattr", remedy)
    return Check(name, State.ON, "loaded")


def _latency() -> Check:
    name = "waking of processors"
    if not os.access(latency.DEVICE, os.W_OK):
        return Check(name, State.WARN, f"{latency.DEVICE} cannot be opened: clients' processors sleep while they wait")
    if latency.is_wanted_unasked():
        return Check(name, State.ON, "processors stay awake while clients are at work")
    detail = f"{os.cpu_count()} processors are left alone; with -o cpu_latency=on they stay awake while clients are at work"
    return Check(name, State.ON, detail)


def _clones() -> Check:
    name = "read-only clones of layers"
    try:
        fd = syscalls.open_tree(syscalls.AT_FDCWD, b"/proc/self/cwd", syscalls.OPEN_TREE_CLONE)
    except OSError as error:
        return Check(name, State.WARN, f"off ({error.strerror}): lowers are read-only by type alone")
    try:
        syscalls.mount_setattr(fd, syscalls.MOUNT_ATTR_RDONLY, 0)
    except OSError as error:
        return Check(name, State.WARN, f"off ({error.strerror})", "use Linux 5.12 or newer")
    finally:
        os.close(fd)
    return Check(name, State.ON, "a lower cannot be written to, whatever happens")


# ── an upper ────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def upper(path: bytes) -> Iterator[Check]:
    """What the file system of an upper can hold, tried in a directory that is removed again."""
    name, shown = "upper", printable(path)
    if not os.path.isdir(path):
        yield Check(name, State.OFF, f"{shown}: no such directory", f"mkdir {shown}")
        return
    if os.statvfs(path).f_flag & os.ST_RDONLY:
        yield Check(name, State.OFF, f"{shown}: on a read-only file system", "choose another")
        return
    try:
        with _scratch(path) as (scratch, file):
            yield Check(name, State.ON, f"{shown}: on {_file_system(path)}, can be written to")
            yield _xattrs(file)
            yield _reflinks(scratch, file)
            yield _handles(file)
            yield _whiteouts(scratch)
            yield _order(path)
    except OSError as error:
        yield Check(name, State.OFF, f"{shown}: cannot be written to: {error.strerror}", "choose a directory of your own")


@contextmanager
def _scratch(upper: bytes) -> Iterator[tuple[bytes, int]]:
    """A directory and an open file in it, on the upper's file system; beside the upper, so that a live mount does not see them."""
    real = os.path.realpath(upper)
    above = os.path.dirname(real)
    is_beside = os.stat(above).st_dev == os.stat(real).st_dev and os.access(above, os.W_OK)
    with tempfile.TemporaryDirectory(prefix=b".pyoverlay-doctor-", dir=above if is_beside else real) as scratch:
        with open(os.path.join(scratch, b"file"), "wb+") as file:
            yield scratch, file.fileno()


def _file_system(path: bytes) -> str:
    fd = os.open(path, os.O_PATH)
    try:
        among = mountinfo.mounts()
        mount_id = mountinfo.location(fd, among).mount_id
    finally:
        os.close(fd)
    return next((mount.type for mount in among if mount.id == mount_id), "an unknown file system")


def _xattrs(file: int) -> Check:
    spelling = "trusted" if refusals.is_privileged() else "user"
    name = f"{spelling}.* attributes"
    try:
        os.setxattr(file, f"{spelling}.overlay.opaque", b"y")
    except OSError as error:
        return Check(name, State.OFF, f"not taken: {error.strerror}", "choose ext4, xfs, btrfs or tmpfs (for user.*: from Linux 6.6)")
    return Check(name, State.ON, "taken")


def _reflinks(scratch: bytes, file: int) -> Check:
    name = "reflinks"
    os.write(file, bytes(4096))
    try:
        with open(os.path.join(scratch, b"clone"), "wb") as clone:
            fcntl.ioctl(clone, syscalls.FICLONE, file)
    except OSError as error:
        return Check(name, State.WARN, f"none ({error.strerror}): a copy-up copies the data", "xfs and btrfs have them")
    return Check(name, State.ON, "a copy-up from the same file system copies no data")


def _handles(file: int) -> Check:
    name = "file handles"
    try:
        syscalls.name_to_handle_at(file)
    except OSError as error:
        return Check(name, State.WARN, f"none ({error.strerror}): inode numbers of copied-up files change with a remount")
    return Check(name, State.ON, "inode numbers outlive a remount")


def _whiteouts(scratch: bytes) -> Check:
    name = "whiteout devices"
    try:
        os.mknod(os.path.join(scratch, b"whiteout"), stat.S_IFCHR, 0)
    except OSError as error:
        detail = f"refused ({error.strerror}): what a lower has cannot be deleted in the kernel's own spelling"
        return Check(name, State.WARN, detail, "choose ext4, xfs, btrfs or tmpfs, outside of a container's root")
    return Check(name, State.ON, "mknod c 0 0 works")


def _order(path: bytes) -> Check:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        is_kept = keeps_order(fd)
    finally:
        os.close(fd)
    name = "data before names"
    if is_kept:
        return Check(name, State.ON, "kept by the journal: a copy-up waits for its data alone")
    return Check(name, State.WARN, "no journal that keeps it: each copy-up is synced by itself", "ext4 with a journal, or xfs")
