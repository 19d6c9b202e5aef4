"""The data of metacopy files: opened where they lie, held to the digest that the file demands."""

from __future__ import annotations

import errno
import os

from pyoverlay.core import marks
from pyoverlay.core.inode import Data
from pyoverlay.core.layer import Lower
from pyoverlay.core.policy import Verity
from pyoverlay.core.syscalls import Stat


class DataFiles:
    """layers: data-only ones, from the top; owned. Only what a redirect names is ever looked up in them, and none of their marks counts."""

    def __init__(self, layers: tuple[Lower, ...], verity: Verity) -> None:
        self.layers = layers
        self._verity = verity

    def close(self) -> None:
        for layer in self.layers:
            layer.close()

    def open(self, data: Data) -> int:
        """Descriptor that reads. ENOENT: no data-only layer has them; EIO: not what the digest says (ovl_validate_verity)."""
        if data.directory is None:
            layer, fd = self._open_in_data_layers(data.path)
        else:
            layer = data.directory.layer
            fd = layer.open_read(layer.dirfd(data.directory), data.name)
        with layer.cache.closed_on_failure(fd):
            self._check_digest(layer, fd, data.mark)
        return fd

    def _open_in_data_layers(self, path: tuple[bytes, ...]) -> tuple[Lower, int]:
        for layer in self.layers:
            try:
                above = layer.open_descendant(layer.root_fd, path[:-1]) if path[1:] else layer.root_fd
            except (FileNotFoundError, NotADirectoryError):
                continue
            try:
                return layer, layer.open_read(above, path[-1])
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ELOOP, errno.ESTALE):  # a symlink; a directory, a fifo
                    raise
            finally:
                if above != layer.root_fd:
                    os.close(above)
        raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))

    def _check_digest(self, layer: Lower, fd: int, mark: bytes) -> None:
        if self._verity is Verity.OFF:
            return
        wanted = marks.decode_metacopy(mark)
        if wanted is None:
            if self._verity is Verity.REQUIRE:
                raise OSError(errno.EIO, "no digest")
        elif layer.verity(fd) != wanted:
            raise OSError(errno.EIO, "not the digest")

    def blocks(self, data: Data, st: Stat) -> int:
        """Blocks of 512 bytes; a guess while nobody looked for them in a data-only layer (ovl_getattr). st: of the metacopy file."""
        if data.directory is not None:
            layer = data.directory.layer
            found = layer.stat(layer.dirfd(data.directory), data.name)
            if found is not None:
                return found.st_blocks
        return -(-st.st_size // st.st_blksize) * st.st_blksize // 512
