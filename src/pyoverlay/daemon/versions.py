"""What is installed, for `--version`: neither trio nor pyfuse3 is loaded to find out."""

from __future__ import annotations

import ctypes
import sys
from importlib import metadata

from pyoverlay import __version__

# 3.17 changed the soname; a wheel of pyfuse3 may bring a libfuse of its own, which only pyfuse3 can find.
_LIBFUSE = ("libfuse3.so.4", "libfuse3.so.3")


def lines() -> list[str]:
    """One line each, as container engines show them in their reports."""
    return [
        f"pyoverlay {__version__}",
        f"pyfuse3 {pyfuse3_version()}",
        f"FUSE library version {libfuse_version() or 'unknown: pyfuse3 has its own'}",
        f"Python {'.'.join(map(str, sys.version_info[:3]))}",
    ]


def pyfuse3_version() -> str:
    """The installed pyfuse3's version, `not installed` without one."""
    try:
        return metadata.version("pyfuse3")
    except metadata.PackageNotFoundError:
        return "not installed"


def libfuse() -> ctypes.CDLL | None:
    """The system's libfuse 3, None if there is none."""
    for name in _LIBFUSE:
        try:
            return ctypes.CDLL(name)
        except OSError:  # not this one
            continue
    return None


def libfuse_version() -> str | None:
    """The system's libfuse 3's version, None if there is none."""
    library = libfuse()
    if library is None:
        return None
    library.fuse_pkgversion.restype = ctypes.c_char_p
    version: bytes = library.fuse_pkgversion()
    return version.decode()


def print_protocol() -> None:
    """Have libfuse print `using FUSE kernel interface version 7.N`; it tells nobody but stdout."""
    library = libfuse()
    if library is not None:
        sys.stdout.flush()
        library.fuse_lowlevel_version()
        ctypes.CDLL(None).fflush(None)
