"""An upper as one layer of an image: what changed, as a tar archive that container engines unpack over the layers below.

OCI image specification, layer.md: a whiteout is an empty file `.wh.NAME`, an opaque directory has an empty file `.wh..wh..opq`. Order and
details are those of `docker diff`'s archives: depth first by the name on disk, directories with a slash, no entry for the root, a
whiteout in the place of what it hides, an opaque mark right after its directory; sockets are left out.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from pyoverlay.core import marks
from pyoverlay.core.layer import CAPABILITY, Layer
from pyoverlay.core.view import View
from pyoverlay.errors import Refusal
from pyoverlay.image.changes import Change, Object, Opaque, Whiteout, changes
from pyoverlay.image.tar_member import Kind, Member
from pyoverlay.image.tar_writer import TarWriter
from pyoverlay.report import spelling
from pyoverlay.report.target import Target

_CHUNK = 1 << 20
_KINDS = {
    stat.S_IFREG: Kind.FILE,
    stat.S_IFDIR: Kind.DIRECTORY,
    stat.S_IFLNK: Kind.SYMLINK,
    stat.S_IFCHR: Kind.CHARACTER_DEVICE,
    stat.S_IFBLK: Kind.BLOCK_DEVICE,
    stat.S_IFIFO: Kind.FIFO,
}
# Of the attributes of a machine's own, these alone mean the same elsewhere.
_CARRIED = (CAPABILITY, b"system.posix_acl_access", b"system.posix_acl_default")


@dataclass(frozen=True, slots=True)
class Manner:
    """How a layer is written.

    mtime: seconds since 1970 that every member gets, None: its own. is_sparse: holes are kept as holes, in GNU's format 1.0. Engines
    unpack it, but an image with such a layer cannot be saved again by Docker 20.10: "could not verify layer data".
    """

    mtime: int | None = None
    is_sparse: bool = False


@dataclass(slots=True)
class Written:
    """What was written: the SHA-256 of the archive, and how many sockets were left out."""

    digest: str = ""
    sockets: int = 0


def measure(view: View, target: Target) -> tuple[int, int]:
    """(members, bytes of content) that a layer of this upper would hold, and a refusal before anything is written if it could not."""
    members = content = 0
    for change in changes(view, knows_lowers=target.knows_lowers, name=target.given):
        members += 1
        if isinstance(change, Object):
            _require_readable_marks(change, target)
            if stat.S_ISREG(change.st.st_mode) and change.first is None:
                content += change.st.st_size
    return members, content


def write_layer(
    view: View, target: Target, write: Callable[[bytes], object], manner: Manner, progress: Callable[[int], object] = lambda _: None
) -> Written:
    """Write the layer. `progress` is told of each piece of content, in bytes; what `write` raises is no OSError.

    Raises Refusal, OSError with the path in the layer as its filename.
    """
    written = Written()
    sha256 = hashlib.sha256()

    def take(data: bytes) -> None:
        sha256.update(data)
        write(data)

    archive = TarWriter(take)
    for change in changes(view, knows_lowers=target.knows_lowers, name=target.given):
        if isinstance(change, Object) and stat.S_ISSOCK(change.st.st_mode):
            written.sockets += 1
            continue
        try:
            _add(archive, view, target.given, change, manner, progress)
        except OSError as error:
            raise OSError(error.errno, error.strerror, os.fsdecode(change.path)) from error
    archive.close()
    written.digest = sha256.hexdigest()
    return written


def _add(archive: TarWriter, view: View, given: bytes, change: Change, manner: Manner, progress: Callable[[int], object]) -> None:
    member = _member(change)
    if manner.mtime is not None:
        member = replace(member, mtime_ns=manner.mtime * 1_000_000_000)
    if not isinstance(change, Object) or member.kind is not Kind.FILE:
        archive.add(member)
        return
    fd = _open(view, change)
    try:
        member = replace(member, size=os.fstat(fd).st_size, extents=_extents(fd) if manner.is_sparse else None)
        archive.add(member, _content(fd, member, progress))
    except ValueError as error:
        path = os.path.join(given, change.path)
        raise Refusal(path, f"changed while it was read: {error}", errno.EBUSY, "export again when nobody writes to it") from error
    finally:
        if change.inode is None:
            os.close(fd)


def _member(change: Change) -> Member:
    """A change as a member of a layer, without its content."""
    match change:
        case Whiteout(path):
            above, slash, name = path.rpartition(b"/")
            return Member(above + slash + marks.AUFS_PREFIX + name, Kind.FILE, mode=0o600)
        case Opaque(path, st):
            return Member(path + marks.AUFS_OPAQUE, Kind.FILE, stat.S_IMODE(st.st_mode), st.st_uid, st.st_gid)
        case Object(path, st, place, first):
            kind = _KINDS[stat.S_IFMT(st.st_mode)] if first is None else Kind.LINK
            target = first or (place.layer.readlink(place.dirfd, place.name) if kind is Kind.SYMLINK else b"")
            return Member(
                path,
                kind,
                stat.S_IMODE(st.st_mode),
                st.st_uid,
                st.st_gid,
                st.st_mtime_ns,
                target=target,
                device=(os.major(st.st_rdev), os.minor(st.st_rdev)) if kind.is_device else (0, 0),
                xattrs=() if first is not None else _xattrs(place.layer, place.dirfd, place.name),
            )


def _xattrs(layer: Layer, dirfd: int, name: bytes) -> tuple[tuple[bytes, bytes], ...]:
    """The attributes that go along, in order of name.

    Not the overlay's marks, nor what a program stored under such a name: an engine that unpacks the layer would take them for marks.
    """
    carried = (attribute for attribute in sorted(layer.listxattr(dirfd, name)) if _is_carried(attribute))
    return tuple((attribute, layer.read_xattr(dirfd, name, attribute)) for attribute in carried)


def _is_carried(attribute: bytes) -> bool:
    if attribute.startswith((marks.TRUSTED, marks.USER)):
        return False
    return attribute.startswith((b"user.", b"trusted.")) or attribute in _CARRIED


def _require_readable_marks(found: Object, target: Target) -> None:
    if not target.spelling_is_known and stat.S_ISDIR(found.st.st_mode):
        spelling.require_trusted(found.place.layer, found.place.dirfd, found.place.name, target.given + b"/" + found.path)


def _open(view: View, found: Object) -> int:
    """A descriptor of a file's data."""
    if found.inode is not None:
        return view.data_fd(found.inode)
    return found.place.layer.open_read(found.place.dirfd, found.place.name)


def _extents(fd: int) -> tuple[tuple[int, int], ...] | None:
    """(offset, length) of the data in a file with holes; None where there is none worth the name."""
    size = os.fstat(fd).st_size
    found: list[tuple[int, int]] = []
    end = 0
    while end < size:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:  # a hole up to the end
                raise
            break
        end = min(os.lseek(fd, start, os.SEEK_HOLE), size)
        found.append((start, end - start))
    return None if sum(length for _, length in found) == size else tuple(found)


def _content(fd: int, member: Member, progress: Callable[[int], object]) -> Iterator[bytes]:
    for start, length in ((0, member.size),) if member.extents is None else member.extents:
        offset, end = start, start + length
        while offset < end and (data := os.pread(fd, min(_CHUNK, end - offset), offset)):
            offset += len(data)
            yield data
            progress(len(data))
