"""The index: what keeps the names of a lower file one file on disk, as the kernel's overlay does with index=on.

A lower file with several names is copied up to `work/index/NAME`, where NAME is the hexadecimal of its file handle (struct ovl_fb); its
names in the upper are links of that. So whoever meets another of its lower names finds the copy. The copy's mark `nlink` says how many
names the merged view shows, as a difference to the links of the copy ("U+1") or, while those change, of the lower file ("L-1").

Source: Documentation/filesystems/overlayfs.rst, "Index directory"; ovl_get_index_name, ovl_verify_index, ovl_indexdir_cleanup in
fs/overlayfs.
"""

from __future__ import annotations

import binascii
import errno
import logging
import os
import stat

from pyoverlay.core import marks, syscalls
from pyoverlay.core.calls import remove_tree
from pyoverlay.core.inode import Directory, Inode
from pyoverlay.core.layer import Place
from pyoverlay.core.origins import Origins
from pyoverlay.core.syscalls import Stat
from pyoverlay.core.upper import Upper

log = logging.getLogger(__name__)


class IndexRefused(OSError):
    """This upper cannot have this index: strerror is a sentence."""


class Index:
    """fd: descriptor of the index directory; owned."""

    def __init__(self, fd: int, upper: Upper, origins: Origins) -> None:
        self.fd = fd
        self._upper = upper
        self._origins = origins

    def close(self) -> None:
        os.close(self.fd)

    def name_of(self, place: Place) -> bytes | None:
        """The name that a lower object's copy has here; None: its file system has no handles."""
        origin = self._origins.of(place)
        return None if origin is None else _name(origin)

    def copy_of(self, name: bytes, st: Stat) -> Stat | None:
        """What the copy of a lower object, with these attributes, says of itself; None: there is none. EIO: something else is there."""
        found = self._upper.stat(self.fd, name)
        if found is not None and stat.S_IFMT(found.st_mode) != stat.S_IFMT(st.st_mode):
            raise OSError(errno.EIO, "not the copy of its lower file in the index")
        return found

    def of_upper(self, value: bytes, st: Stat) -> bytes:
        """The name here of an upper object, by its mark `origin`; empty: it is not in the index."""
        origin = marks.decode_origin(value)
        name = _name(origin) if origin is not None else b""
        found = self._upper.stat(self.fd, name) if name else None
        return name if found is not None and found.st_ino == st.st_ino else b""

    def links(self, name: bytes, st: Stat, lower_nlink: int) -> int:
        """How many names of the copy the merged view shows; those it has in the upper where its mark does not say (ovl_get_nlink)."""
        value = self._upper.getmark(self.fd, name, marks.NLINK)
        found = marks.decode_nlink(value) if value is not None else None
        links = 0 if found is None else found.difference + (lower_nlink if found.of_lower else st.st_nlink)
        return links if links > 0 else st.st_nlink

    # -- changes

    def settle(self, inode: Inode) -> None:
        """Note the names that show against the links of the copy: both then fall or rise by one with the next system call."""
        self._upper.set_mark(self.fd, inode.index_name, marks.NLINK, marks.encode_nlink(inode.lower_links - 1))

    def add_name(self, inode: Inode, parent: Directory, dirfd: int, name: bytes, lower_nlink: int) -> None:
        """One of the names that only the lower had: a link of the copy. The same names show before, meanwhile and after."""
        upper = self._upper
        links = os.stat(inode.index_name, dir_fd=self.fd, follow_symlinks=False).st_nlink + inode.lower_links - 1
        upper.set_mark(self.fd, inode.index_name, marks.NLINK, marks.encode_nlink(links - lower_nlink, of_lower=True))
        upper.calls.link(self.fd, inode.index_name, dirfd, name)
        inode.add_name(parent, name)
        inode.lower_links -= 1
        self.settle(inode)

    def drop(self, inode: Inode) -> None:
        """No name shows any more."""
        self._upper.discard_at(self.fd, inode.index_name)
        inode.index_name = b""

    # -- when it is opened

    def verify(self, lower_root: Place) -> None:
        """That the upper was never used over another lowest root, nor the index with another upper. ESTALE: it was (ovl_get_indexdir).

        An index that is new is bound to both.
        """
        upper = self._upper
        origin = self._origins.of(lower_root)
        handle = syscalls.name_to_handle_at(upper.root_fd)
        itself = marks.Origin(syscalls.filesystem_uuid(upper.root_fd) if self._origins.with_uuid else bytes(16), handle, is_upper=True)
        if origin is None:
            raise IndexRefused(errno.EOPNOTSUPP, "the lower's file system has no file handles, without which there is no index")
        for fd, mark, expected in ((upper.root_fd, marks.ORIGIN, origin), (self.fd, marks.UPPER, itself)):
            value = upper.getmark(fd, b".", mark)
            if value is None:
                upper.set_mark(fd, b".", mark, marks.encode_origin(expected))
            elif value != marks.encode_origin(expected):
                what = "the upper was used over another lower" if mark is marks.ORIGIN else "the index belongs to another upper"
                raise IndexRefused(errno.ESTALE, what)

    def clean(self) -> None:
        """Remove what leads nowhere: entries whose lower file has changed, copies that no name shows. EINVAL: no index entry at all."""
        for name in self._upper.scan(self.fd):
            if name.startswith(b"#") or self._is_stale(name):
                log.info("index entry %s leads nowhere and is removed", os.fsdecode(name))
                remove_tree(self._upper.calls, self.fd, name)

    def _is_stale(self, name: bytes) -> bool:
        """ovl_verify_index."""
        try:
            value = binascii.unhexlify(name)
        except binascii.Error:
            raise IndexRefused(errno.EINVAL, "something in the directory `index` is no index entry") from None
        origin = marks.decode_origin(value)
        if origin is None:
            raise IndexRefused(errno.EINVAL, "something in the directory `index` is no index entry")
        st = os.stat(name, dir_fd=self.fd, follow_symlinks=False)
        if marks.is_whiteout_device(st) or stat.S_ISDIR(st.st_mode):
            return False
        if self._upper.getmark(self.fd, name, marks.ORIGIN) != value:
            return True
        if st.st_nlink > 1:
            return False
        found = self._origins.find(origin)
        return found is None or found[1].st_nlink == 1 or self._shows_nothing(name, st, found[1].st_nlink)

    def _shows_nothing(self, name: bytes, st: Stat, lower_nlink: int) -> bool:
        value = self._upper.getmark(self.fd, name, marks.NLINK)
        found = marks.decode_nlink(value) if value is not None else None
        return found is None or found.difference + (lower_nlink if found.of_lower else st.st_nlink) <= 0


def _name(origin: marks.Origin) -> bytes:
    return marks.encode_origin(origin).hex().encode()
