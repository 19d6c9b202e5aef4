"""Joining another mount namespace, for mount(8)'s `-N`."""

from __future__ import annotations

import ctypes
import os

from pyoverlay.errors import NoPrivilege, Refusal

_CLONE_NEWNS = 0x00020000
_libc = ctypes.CDLL(None, use_errno=True)


def enter_mount_namespace(path: str) -> None:
    """Make the mount namespace whose file is at `path` this process's, by setns(2) (in the os module from Python 3.12).

    Raises Refusal, NoPrivilege.
    """
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise Refusal(path, "no such mount namespace", error.errno) from error
    try:
        if _libc.setns(fd, _CLONE_NEWNS) != 0:
            raise NoPrivilege(path, "the mount namespace cannot be entered", ctypes.get_errno())
    finally:
        os.close(fd)
