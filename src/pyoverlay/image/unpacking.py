"""A layer's archive as a directory that can be a lower: nothing of what the archive says is believed.

Every name is walked from the layer's root by openat2, beneath it and through no symlink; each object is made where nothing was. Attributes
of directories are set at the end, so that a closed directory can be filled. What the archive deletes becomes the kernel overlay's marks,
so that the kernel can mount the directory too, or `.wh.` files where the file system has no such marks.
"""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass

from pyoverlay.core import marks, syscalls
from pyoverlay.core.layer import CAPABILITY
from pyoverlay.image.tar_member import Kind, Member
from pyoverlay.image.tar_reader import TarReader
from pyoverlay.report.target import may_read_trusted

_NAME_MAX, _PATH_MAX = 255, 4095
_DEPTH_MAX = 256  # what removes a tree keeps a descriptor open for each step
_OPEN_DIR = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW
_RESOLVE = syscalls.RESOLVE_BENEATH | syscalls.RESOLVE_NO_SYMLINKS | syscalls.RESOLVE_NO_MAGICLINKS | syscalls.RESOLVE_NO_XDEV
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_AUFS_OWN = b".wh..wh."  # aufs's own files (.wh..wh.plnk, .wh..wh.orph), which old layers hold: nobody's data


class Unacceptable(Exception):
    """A member that is not unpacked, and why. remedy: what can be done, None where nothing can."""

    def __init__(self, name: bytes, reason: str, remedy: str | None = None) -> None:
        super().__init__(name, reason)
        self.name = name
        self.reason = reason
        self.remedy = remedy


@dataclass(frozen=True, slots=True)
class Terms:
    """What a layer may hold. members: at most so many, with the directories that none of them names. takes_devices: device nodes are made;
    else refused.
    """

    members: int = 2_000_000
    takes_devices: bool = False


@dataclass(slots=True)
class Unpacked:
    """What was unpacked. members: see Terms. disarmed: of how many an ordinary user could not keep the owner's powers (set-id bits,
    capabilities).
    """

    members: int = 0
    disarmed: int = 0


def unpack(reader: TarReader, root: int, terms: Terms) -> Unpacked:
    """Unpack an archive in the empty directory `root`, an open descriptor.

    Raises Unacceptable, MalformedArchive, and OSError with the member as its filename; the directory then holds a part, to be removed.
    """
    layer = _Layer(root, terms)
    try:
        for member in reader:
            layer.count(member.name)
            try:
                layer.add(member, reader)
            except OSError as error:
                raise _explained(error, member) from error
        layer.finish()
    finally:
        layer.close()
    return layer.done


def _explained(error: OSError, member: Member) -> Exception:
    """What the system says of a hostile name, in words; the rest is an error of the machine's."""
    reasons = {
        errno.ELOOP: "its path leads through a symbolic link",
        errno.EEXIST: "the archive has this name twice",
        errno.ENOTDIR: "its path leads through something that is no directory",
        errno.ENAMETOOLONG: "its name is too long",
    }
    if error.errno in reasons:
        return Unacceptable(member.name, reasons[error.errno])
    return OSError(error.errno, error.strerror, os.fsdecode(member.name))


class _Layer:
    """One directory tree being filled."""

    def __init__(self, root: int, terms: Terms) -> None:
        self.done = Unpacked()
        self._root = root
        self._terms = terms
        self._is_root = os.geteuid() == 0
        self._directories: dict[tuple[bytes, ...], Member | None] = {(): None}
        self._at: tuple[bytes, ...] = ()  # the directory that `_fd` is open on
        self._fd = os.dup(root)
        self._has_files_for_whiteouts = False
        self._takes_trusted = may_read_trusted()
        self._spelling = marks.TRUSTED if self._takes_trusted else marks.USER

    def close(self) -> None:
        os.close(self._fd)

    def count(self, name: bytes) -> None:
        """One more is made."""
        self.done.members += 1
        if self.done.members > self._terms.members:
            raise Unacceptable(name, f"more than {self._terms.members} members", "raise the limit with --max-entries")

    def add(self, member: Member, reader: TarReader) -> None:
        path = _components(member.name)
        if not path:
            if member.kind is not Kind.DIRECTORY:
                raise Unacceptable(member.name, "the root of a layer is a directory")
            self._directories[()] = member
            return
        *above, name = path
        dirfd = self._directory(tuple(above))
        if name.startswith(marks.AUFS_PREFIX):
            self._add_mark(member, dirfd, name)
        elif member.kind is Kind.CHARACTER_DEVICE and member.device == (0, 0):
            self._whiteout(dirfd, name)
        else:
            self._make(member, path, dirfd, reader)

    # -- objects

    def _make(self, member: Member, path: tuple[bytes, ...], dirfd: int, reader: TarReader) -> None:
        name = path[-1]
        was_deleted = self._take_whiteout_away(dirfd, name)
        match member.kind:
            case Kind.DIRECTORY:
                self._make_directory(member, path, dirfd)
                if was_deleted:
                    self._opaque(dirfd, name)
                return
            case Kind.LINK:
                self._link(member, dirfd, name)
                return
            case Kind.FILE:
                self._write(member, dirfd, name, reader)
            case Kind.SYMLINK:
                self._symlink(member, dirfd, name)
            case Kind.FIFO:
                os.mknod(name, stat.S_IFIFO | 0o600, dir_fd=dirfd)
            case Kind.CHARACTER_DEVICE | Kind.BLOCK_DEVICE:
                self._mknod(member, dirfd, name)
        self._set_attributes(member, dirfd, name)

    def _make_directory(self, member: Member, path: tuple[bytes, ...], dirfd: int) -> None:
        """A directory may come twice, or after what is in it: the last word on its attributes counts."""
        if path not in self._directories:
            os.mkdir(path[-1], 0o700, dir_fd=dirfd)
        self._directories[path] = member

    def _write(self, member: Member, dirfd: int, name: bytes, reader: TarReader) -> None:
        fd = os.open(name, _NEW_FILE, 0o600, dir_fd=dirfd)
        try:
            for offset, data in reader.content():
                view = memoryview(data)
                while view:
                    written = os.pwrite(fd, view, offset)
                    view, offset = view[written:], offset + written
            if member.extents is not None:
                os.ftruncate(fd, member.size)
        finally:
            os.close(fd)

    def _symlink(self, member: Member, dirfd: int, name: bytes) -> None:
        if not member.target or b"\0" in member.target:
            raise Unacceptable(member.name, "a symbolic link without a target")
        if len(member.target) > _PATH_MAX:
            raise Unacceptable(member.name, f"a symbolic link's target of more than {_PATH_MAX} bytes")
        os.symlink(member.target, name, dir_fd=dirfd)

    def _mknod(self, member: Member, dirfd: int, name: bytes) -> None:
        if not self._terms.takes_devices:
            remedy = "--devices allows them; whoever can write to the layers can then write to the machine's disks"
            raise Unacceptable(member.name, "a device node", remedy)
        kind = stat.S_IFCHR if member.kind is Kind.CHARACTER_DEVICE else stat.S_IFBLK
        os.mknod(name, kind | 0o600, os.makedev(*member.device), dir_fd=dirfd)

    def _link(self, member: Member, dirfd: int, name: bytes) -> None:
        """Another name of what the archive has already brought; never of anything outside the layer."""
        path = _components(member.target)
        try:
            above = syscalls.openat2(self._root, b"/".join(path[:-1]) or b".", _OPEN_DIR, _RESOLVE)
        except FileNotFoundError:
            above = -1
        try:
            st = None if above < 0 or not path else _lstat(above, path[-1])
            if st is None or stat.S_ISDIR(st.st_mode) or marks.is_whiteout_device(st):
                raise Unacceptable(member.name, f"a hard link to {os.fsdecode(member.target)!r}, which the layer does not have")
            syscalls.linkat(above, path[-1], dirfd, name)
        finally:
            if above >= 0:
                os.close(above)

    # -- attributes

    def _set_attributes(self, member: Member, dirfd: int, name: bytes) -> None:
        """Owner first, since a change of owner takes set-id bits and capabilities away; the times last, since all else moves them."""
        mode, is_symlink = member.mode, member.kind is Kind.SYMLINK
        if self._is_root:
            _chown(dirfd, name, member)
        elif mode & 0o6000 or any(attribute == CAPABILITY for attribute, _ in member.xattrs):
            # Here they would be a user's program running as that user for everybody.
            mode &= 0o1777
            self.done.disarmed += 1
        if not is_symlink:
            syscalls.fchmodat(dirfd, name, mode)
        path = b"/proc/self/fd/%d/%s" % (dirfd, name)
        for attribute, value in member.xattrs:
            if (stored := self._stored_as(attribute, member.kind)) is not None:
                os.setxattr(path, stored, value, follow_symlinks=False)
        syscalls.utimensat(dirfd, name, member.mtime_ns, member.mtime_ns)

    def _stored_as(self, attribute: bytes, kind: Kind) -> bytes | None:
        """The name under which an attribute is kept; None: it is not, or this kind of object has none such (xattr(7)).

        One that the overlay would take for a mark becomes what a program in the mount would have stored: one level deeper, and inert.
        """
        takes_users = kind in (Kind.FILE, Kind.DIRECTORY)
        if takes_users and attribute.startswith((b"user.", b"system.posix_acl_")):
            return marks.escape_xattr(attribute, marks.USER)
        if self._takes_trusted and attribute.startswith(b"trusted."):
            return marks.escape_xattr(attribute, marks.TRUSTED)
        return attribute if self._is_root and attribute == CAPABILITY and kind is Kind.FILE else None

    def finish(self) -> None:
        """Attributes of the directories, the innermost first: setting one's times is the last thing that happens in it."""
        for path in sorted(self._directories, key=len, reverse=True):
            member = self._directories[path] or Member(b"", Kind.DIRECTORY, 0o755, *self._own_ids())
            fd = syscalls.openat2(self._root, b"/".join(path[:-1]) or b".", _OPEN_DIR, _RESOLVE)
            try:
                self._set_attributes(member, fd, path[-1] if path else b".")
            finally:
                os.close(fd)

    def _own_ids(self) -> tuple[int, int]:
        return (0, 0) if self._is_root else (os.geteuid(), os.getegid())

    # -- directories

    def _directory(self, path: tuple[bytes, ...]) -> int:
        """A descriptor of a directory of the layer, kept until another is asked for. What the archive forgot to name above is made."""
        if path == self._at:
            return self._fd
        for depth in range(1, len(path) + 1):
            if path[:depth] not in self._directories:
                self._make_implied(path[:depth])
        fd = syscalls.openat2(self._root, b"/".join(path) or b".", _OPEN_DIR, _RESOLVE)
        os.close(self._fd)
        self._fd, self._at = fd, path
        return fd

    def _make_implied(self, path: tuple[bytes, ...]) -> None:
        if path[-1].startswith(marks.AUFS_PREFIX):
            raise Unacceptable(b"/".join(path), "a directory whose name begins with .wh.")
        self.count(b"/".join(path))
        dirfd = self._directory(path[:-1])
        was_deleted = self._take_whiteout_away(dirfd, path[-1])
        try:
            os.mkdir(path[-1], 0o700, dir_fd=dirfd)
        except FileExistsError:
            if stat.S_ISLNK(os.stat(path[-1], dir_fd=dirfd, follow_symlinks=False).st_mode):
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP)) from None
            raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)) from None
        self._directories[path] = None
        if was_deleted:
            self._opaque(dirfd, path[-1])

    # -- what is deleted. A layer's whiteouts hide what lies below the layer, never what is in it (OCI image specification, layer.md).

    def _add_mark(self, member: Member, dirfd: int, name: bytes) -> None:
        if member.kind is Kind.DIRECTORY:
            raise Unacceptable(member.name, "a directory whose name begins with .wh.")
        if name == marks.AUFS_OPAQUE:
            self._opaque(dirfd, b".")
            return
        hidden = name[len(marks.AUFS_PREFIX) :]
        if hidden in (b"", b".", b".."):
            raise Unacceptable(member.name, "a whiteout of no name")
        if not name.startswith(_AUFS_OWN):
            self._whiteout(dirfd, hidden)

    def _whiteout(self, dirfd: int, name: bytes) -> None:
        st = _lstat(dirfd, name)
        if st is not None:
            if stat.S_ISDIR(st.st_mode):
                self._opaque(dirfd, name)
            return
        try:
            os.mknod(name, stat.S_IFCHR, 0, dir_fd=dirfd)
        except PermissionError:  # an overlay refuses that device to everybody
            _make_empty(dirfd, marks.AUFS_PREFIX + name)
            self._has_files_for_whiteouts = True

    def _take_whiteout_away(self, dirfd: int, name: bytes) -> bool:
        """Before something of that name is made. Was there one?"""
        st = _lstat(dirfd, name)
        if st is not None and marks.is_whiteout_device(st):
            os.unlink(name, dir_fd=dirfd)
            return True
        if self._has_files_for_whiteouts and _lstat(dirfd, marks.AUFS_PREFIX + name) is not None:
            os.unlink(marks.AUFS_PREFIX + name, dir_fd=dirfd)
            return True
        return False

    def _opaque(self, dirfd: int, name: bytes) -> None:
        """Mark a directory. At the root the kernel looks for no mark: there it is a file, which pyoverlay reads."""
        is_top = name == b"." and not self._at
        if not is_top and self._set_opaque(b"/proc/self/fd/%d/%s" % (dirfd, name)):
            return
        fd = syscalls.openat2(dirfd, name, _OPEN_DIR, _RESOLVE)
        try:
            _make_empty(fd, marks.AUFS_OPAQUE)
        finally:
            os.close(fd)

    def _set_opaque(self, path: bytes) -> bool:
        try:
            os.setxattr(path, self._spelling + marks.OPAQUE, b"y", follow_symlinks=False)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP):
                raise
            return False
        return True


def _components(name: bytes) -> tuple[bytes, ...]:
    """The steps of a path inside the layer. Raises Unacceptable where it leads, or could lead, anywhere else."""
    if name.startswith(b"/"):
        raise Unacceptable(name, "an absolute path")
    if b"\0" in name:
        raise Unacceptable(name, "a path with a zero byte")
    path = tuple(component for component in name.split(b"/") if component not in (b"", b"."))
    if b".." in path:
        raise Unacceptable(name, "a path that leads upwards")
    if len(name) > _PATH_MAX or any(len(component) > _NAME_MAX for component in path):
        raise Unacceptable(name, "its name is too long")
    if len(path) > _DEPTH_MAX:
        raise Unacceptable(name, f"a path of more than {_DEPTH_MAX} steps")
    if not name:
        raise Unacceptable(name, "a member without a name")
    return path


def _chown(dirfd: int, name: bytes, member: Member) -> None:
    try:
        os.chown(name, member.uid, member.gid, dir_fd=dirfd, follow_symlinks=False)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        reason = f"its owner, {member.uid}:{member.gid}, is nobody in this user namespace"
        raise Unacceptable(member.name, reason, "import it in one that maps these ids, or as an ordinary user") from error


def _lstat(dirfd: int, name: bytes) -> os.stat_result | None:
    try:
        return os.stat(name, dir_fd=dirfd, follow_symlinks=False)
    except FileNotFoundError:
        return None


def _make_empty(dirfd: int, name: bytes) -> None:
    try:
        os.close(os.open(name, _NEW_FILE, 0o600, dir_fd=dirfd))
    except FileExistsError:
        return
