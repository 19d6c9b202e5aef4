"""System calls that Python's os module lacks: typed, OSError on failure, no policy.

Each function is named after its system call and follows its man page. ctypes costs about 2 µs a call more than C would (measured against
os.stat, 2026-11); what sits in a hot path is said so at the caller.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from typing import Any, NamedTuple, Protocol

_libc = ctypes.CDLL(None, use_errno=True)
_int, _uint, _long, _ulong = ctypes.c_int, ctypes.c_uint, ctypes.c_long, ctypes.c_ulong
_path, _off, _size, _pointer = ctypes.c_char_p, ctypes.c_int64, ctypes.c_size_t, ctypes.c_void_p

AT_FDCWD = -100
AT_SYMLINK_NOFOLLOW = 0x100
AT_EACCESS = 0x200
AT_SYMLINK_FOLLOW = 0x400
AT_EMPTY_PATH = 0x1000

# include/uapi/linux/openat2.h
RESOLVE_NO_XDEV, RESOLVE_NO_MAGICLINKS, RESOLVE_NO_SYMLINKS = 0x01, 0x02, 0x04
RESOLVE_BENEATH = 0x08

# include/uapi/linux/fs.h
RENAME_NOREPLACE, RENAME_EXCHANGE, RENAME_WHITEOUT = 1, 2, 4
FICLONE = 0x40049409
FS_IOC_GETFSUUID = 0x80111500
FS_IOC_MEASURE_VERITY = 0xC0046686  # include/uapi/linux/fsverity.h

# include/uapi/linux/mount.h
OPEN_TREE_CLONE = 1
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NODEV, MOUNT_ATTR_NOATIME, MOUNT_ATTR__ATIME = 0x01, 0x04, 0x10, 0x70
MNT_DETACH, UMOUNT_NOFOLLOW = 2, 8

_CAPABILITY_HEADER = struct.pack("Ii", 0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this thread

UTIME_NOW, UTIME_OMIT = (1 << 30) - 1, (1 << 30) - 2
NOW = 1 << 100  # ns; no file can have it: the time by the kernel's own clock when the call is made

# System call numbers above 423 are the same on every architecture but alpha (include/uapi/asm-generic/unistd.h).
_SYS_open_tree, _SYS_openat2, _SYS_faccessat2, _SYS_mount_setattr, _SYS_fchmodat2 = 428, 437, 439, 442, 452


class Stat(Protocol):
    """What the core knows of an object by stat(2); os.stat_result is one. Times in ns since the epoch."""

    @property
    def st_mode(self) -> int: ...
    @property
    def st_ino(self) -> int: ...
    @property
    def st_dev(self) -> int: ...
    @property
    def st_nlink(self) -> int: ...
    @property
    def st_uid(self) -> int: ...
    @property
    def st_gid(self) -> int: ...
    @property
    def st_size(self) -> int: ...
    @property
    def st_blocks(self) -> int: ...
    @property
    def st_blksize(self) -> int: ...
    @property
    def st_rdev(self) -> int: ...
    @property
    def st_atime_ns(self) -> int: ...
    @property
    def st_mtime_ns(self) -> int: ...
    @property
    def st_ctime_ns(self) -> int: ...


def _prototype(name: str, *argtypes: Any) -> Any:
    function = getattr(_libc, name)
    function.argtypes = argtypes
    function.restype = _int
    return function


_syscall = _libc.syscall
_syscall.restype = _long
_renameat2 = _prototype("renameat2", _int, _path, _int, _path, _uint)
_utimensat = _prototype("utimensat", _int, _path, _pointer, _int)
_fallocate = _prototype("fallocate64", _int, _int, _off, _off)
_sync_file_range = _prototype("sync_file_range", _int, _off, _off, _uint)
_syncfs = _prototype("syncfs", _int)
_fstatfs = _prototype("fstatfs", _int, _pointer)
_umount2 = _prototype("umount2", _path, _int)
_statx = _prototype("statx", _int, _path, _int, _uint, _pointer)
_name_to_handle_at = _prototype("name_to_handle_at", _int, _path, _pointer, _pointer, _int)
_open_by_handle_at = _prototype("open_by_handle_at", _int, _pointer, _int)
_prctl = _prototype("prctl", _int, _ulong, _ulong, _ulong, _ulong)
_capget = _prototype("capget", _path, _pointer)
_capset = _prototype("capset", _path, _path)
_setfsuid = _prototype("setfsuid", _uint)
_setfsgid = _prototype("setfsgid", _uint)
_linkat = _prototype("linkat", _int, _path, _int, _path, _int)


def _failed(*names: bytes) -> OSError:
    error = ctypes.get_errno()
    return OSError(error, os.strerror(error), *(os.fsdecode(name) for name in names[:1]))


def openat2(dirfd: int, path: bytes, flags: int, resolve: int, mode: int = 0) -> int:
    """openat2(2). O_CLOEXEC is added."""
    how = struct.pack("QQQ", flags | os.O_CLOEXEC, mode, resolve)
    fd: int = _syscall(_long(_SYS_openat2), _long(dirfd), _path(path), _path(how), _size(len(how)))
    if fd < 0:
        raise _failed(path)
    return fd


def renameat2(olddirfd: int, old: bytes, newdirfd: int, new: bytes, flags: int) -> None:
    """renameat2(2)."""
    if _renameat2(olddirfd, old, newdirfd, new, flags):
        raise _failed(old)


def linkat(olddirfd: int, old: bytes, newdirfd: int, new: bytes, flags: int = 0) -> None:
    """linkat(2), with AT_EMPTY_PATH and AT_SYMLINK_FOLLOW, which os.link cannot say."""
    if _linkat(olddirfd, old, newdirfd, new, flags):
        raise _failed(new)


def faccessat2(dirfd: int, name: bytes, mode: int) -> None:
    """faccessat2(2) of a name (not followed) or of dirfd itself, for the effective ids. os.access() keeps the errno to itself."""
    flags = AT_EACCESS | (AT_SYMLINK_NOFOLLOW if name else AT_EMPTY_PATH)
    if _syscall(_long(_SYS_faccessat2), _long(dirfd), _path(name), _long(mode), _long(flags)):
        raise _failed(name)


def fchmodat(dirfd: int, name: bytes, mode: int) -> None:
    """chmod of a name without following it: fchmodat2(2) from Linux 6.6, else through an O_PATH descriptor."""
    if _syscall(_long(_SYS_fchmodat2), _long(dirfd), _path(name), _long(mode), _long(AT_SYMLINK_NOFOLLOW)) == 0:
        return
    if ctypes.get_errno() != errno.ENOSYS:
        raise _failed(name)
    fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dirfd)
    try:
        os.chmod(f"/proc/self/fd/{fd}", mode)
    finally:
        os.close(fd)


def _timespec(time_ns: int | None) -> bytes:
    if time_ns is None:
        return struct.pack("qq", 0, UTIME_OMIT)
    return struct.pack("qq", 0, UTIME_NOW) if time_ns == NOW else struct.pack("qq", *divmod(time_ns, 1_000_000_000))


def utimensat(dirfd: int, name: bytes, atime_ns: int | None, mtime_ns: int | None) -> None:
    """utimensat(2) on the name itself, never on what a symlink points to. None leaves a time alone, NOW is UTIME_NOW. Empty name: dirfd
    itself.
    """
    times = _timespec(atime_ns) + _timespec(mtime_ns)
    if _utimensat(dirfd, name, times, AT_SYMLINK_NOFOLLOW if name else AT_EMPTY_PATH):
        raise _failed(name)


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2), with its mode."""
    if _fallocate(fd, mode, offset, length):
        raise _failed()


def sync_file_range(fd: int) -> None:
    """sync_file_range(2) of the whole file, WAIT_BEFORE | WRITE | WAIT_AFTER: the data is on disk, its metadata may not be."""
    if _sync_file_range(fd, 0, 0, 7):
        raise _failed()


def start_writeback(fd: int, offset: int, length: int) -> None:
    """sync_file_range(2), WRITE: begin to write what is dirty of these bytes, and wait for none of it."""
    if _sync_file_range(fd, offset, length, 2):
        raise _failed()


def syncfs(fd: int) -> None:
    """syncfs(2)."""
    if _syncfs(fd):
        raise _failed()


def fstatfs_type(fd: int) -> int:
    """The file system's magic number, f_type of fstatfs(2), which os.statvfs leaves out."""
    buffer = ctypes.create_string_buffer(256)
    if _fstatfs(fd, buffer):
        raise _failed()
    kind: int = struct.unpack_from("l", buffer)[0]
    return kind & 0xFFFFFFFF  # where a long has 32 bits the larger ones are negative


def umount2(path: bytes, flags: int = 0) -> None:
    """umount2(2). UMOUNT_NOFOLLOW is added."""
    if _umount2(path, flags | UMOUNT_NOFOLLOW):
        raise _failed(path)


def open_tree(dirfd: int, path: bytes, flags: int) -> int:
    """open_tree(2). O_CLOEXEC is added."""
    fd: int = _syscall(_long(_SYS_open_tree), _long(dirfd), _path(path), _long(flags | os.O_CLOEXEC))
    if fd < 0:
        raise _failed(path)
    return fd


def mount_setattr(fd: int, attr_set: int, attr_clr: int) -> None:
    """mount_setattr(2) on the mount of an open_tree descriptor."""
    attributes = struct.pack("QQQQ", attr_set, attr_clr, 0, 0)
    if _syscall(_long(_SYS_mount_setattr), _long(fd), _path(b""), _long(AT_EMPTY_PATH), _path(attributes), _size(len(attributes))):
        raise _failed()


STATX_ATTR_APPEND = 0x20  # include/uapi/linux/stat.h


class Statx(NamedTuple):
    """What statx(2) says beyond stat(2). btime_ns is None where the file system keeps none."""

    btime_ns: int | None
    mount_id: int
    is_mount_root: bool
    attributes: int
    attributes_mask: int


def statx(dirfd: int, name: bytes = b"") -> Statx:
    """statx(2), never following the name; the empty name asks for dirfd itself."""
    buffer = ctypes.create_string_buffer(256)
    if _statx(dirfd, name, AT_EMPTY_PATH | AT_SYMLINK_NOFOLLOW, 0x800 | 0x1000, buffer):  # STATX_BTIME | STATX_MNT_ID
        raise _failed(name)
    mask, _, attributes = struct.unpack_from("IIQ", buffer)
    (attributes_mask,) = struct.unpack_from("Q", buffer, 56)
    seconds, nanoseconds = struct.unpack_from("qI", buffer, 80)
    (mount_id,) = struct.unpack_from("Q", buffer, 144)
    btime = seconds * 1_000_000_000 + nanoseconds if mask & 0x800 else None
    return Statx(btime, mount_id, bool(attributes & 0x2000), attributes, attributes_mask)


class FileHandle(NamedTuple):
    """A file handle of name_to_handle_at(2): the file system's own type number and bytes."""

    type: int
    data: bytes


def name_to_handle_at(dirfd: int, name: bytes = b"") -> FileHandle:
    """name_to_handle_at(2) of a name (not followed) or of dirfd itself. EOPNOTSUPP: this file system has no handles."""
    buffer = ctypes.create_string_buffer(struct.pack("Ii", 128, 0), 8 + 128)
    mount_id = _int()
    if _name_to_handle_at(dirfd, name, buffer, ctypes.byref(mount_id), 0 if name else AT_EMPTY_PATH):
        raise _failed(name)
    size, kind = struct.unpack_from("Ii", buffer)
    return FileHandle(kind, buffer.raw[8 : 8 + size])


def open_by_handle_at(mount_fd: int, handle: FileHandle, flags: int) -> int:
    """open_by_handle_at(2). ESTALE: the object is gone. Wants CAP_DAC_READ_SEARCH."""
    buffer = ctypes.create_string_buffer(struct.pack("Ii", len(handle.data), handle.type) + handle.data)
    fd: int = _open_by_handle_at(mount_fd, buffer, flags | os.O_CLOEXEC)
    if fd < 0:
        raise _failed()
    return fd


def measure_verity(fd: int) -> tuple[int, bytes] | None:
    """FS_IOC_MEASURE_VERITY: (algorithm, digest) of a file; None where it has no fs-verity, or its file system or the kernel has none."""
    try:
        reply = fcntl.ioctl(fd, FS_IOC_MEASURE_VERITY, struct.pack("HH", 0, 64) + bytes(64))
    except OSError as error:
        if error.errno in (errno.ENODATA, errno.ENOTTY, errno.EOPNOTSUPP, errno.ENOSYS):
            return None
        raise
    algorithm, size = struct.unpack_from("HH", reply)
    return algorithm, reply[4 : 4 + size]


def filesystem_uuid(fd: int) -> bytes:
    """The 16 bytes of FS_IOC_GETFSUUID (Linux 6.9); zeros where the file system or the kernel does not say."""
    try:
        reply = fcntl.ioctl(fd, FS_IOC_GETFSUUID, bytes(17))
    except OSError:
        return bytes(16)
    return reply[1:17]


def keep_capabilities_over_setfsuid() -> None:
    """prctl(PR_SET_SECUREBITS, SECBIT_NO_SETUID_FIXUP): after it setfsuid changes who owns what is made, and no capability.

    EPERM without CAP_SETPCAP.
    """
    if _prctl(28, 1 << 2, 0, 0, 0):
        raise _failed()


class Capabilities(NamedTuple):
    """The sets of this thread as bits, by the numbers of include/uapi/linux/capability.h."""

    effective: int
    permitted: int
    inheritable: int


def capget() -> Capabilities:
    """capget(2) of the calling thread."""
    data = ctypes.create_string_buffer(24)
    if _capget(_CAPABILITY_HEADER, data):
        raise _failed()
    words = struct.unpack("6I", data.raw)
    return Capabilities(*(words[number] | words[number + 3] << 32 for number in range(3)))


def capset(wanted: Capabilities) -> None:
    """capset(2) of the calling thread: threads that it starts later have the same. EPERM: something that is not permitted now."""
    low, high = ([bits >> shift & 0xFFFFFFFF for bits in wanted] for shift in (0, 32))
    if _capset(_CAPABILITY_HEADER, struct.pack("6I", *low, *high)):
        raise _failed()


def has_in_bounding_set(capability: int) -> bool:
    """prctl(PR_CAPBSET_READ). EINVAL: this kernel knows no capability of that number."""
    found = _prctl(23, capability, 0, 0, 0)
    if found < 0:
        raise _failed()
    return bool(found)


def drop_from_bounding_set(capability: int) -> None:
    """prctl(PR_CAPBSET_DROP): no program that is executed gets it. EPERM without CAP_SETPCAP."""
    if _prctl(24, capability, 0, 0, 0):
        raise _failed()


def clear_ambient_set() -> None:
    """prctl(PR_CAP_AMBIENT_CLEAR_ALL)."""
    if _prctl(47, 4, 0, 0, 0):
        raise _failed()


def set_no_new_privileges() -> None:
    """prctl(PR_SET_NO_NEW_PRIVS) of the calling thread and of those that it starts later: no set-user-id program works any more."""
    if _prctl(38, 1, 0, 0, 0):
        raise _failed()


def set_dumpable(is_dumpable: bool) -> None:
    """prctl(PR_SET_DUMPABLE): whether the process leaves core files, and may be traced and looked at by its own user."""
    if _prctl(4, int(is_dumpable), 0, 0, 0):
        raise _failed()


def is_dumpable() -> bool:
    """prctl(PR_GET_DUMPABLE): False also for what only root may look at, 2 of fs.suid_dumpable."""
    found: int = _prctl(3, 0, 0, 0, 0)
    return found == 1


def setfsids(uid: int, gid: int) -> None:
    """setfsgid(2) and setfsuid(2) for this thread. EINVAL where an id has no mapping: the calls themselves never say that they failed.

    A thread started meanwhile would keep them for life: call it around one system call, on a thread that starts none.
    """
    _setfsgid(gid)
    _setfsuid(uid)
    if _setfsuid(0xFFFFFFFF) != ctypes.c_int(uid).value or _setfsgid(0xFFFFFFFF) != ctypes.c_int(gid).value:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
