"""The only `import pyfuse3` of the project, and of the extension that must be loaded before it.

    from pyoverlay.fuse.binding import pyfuse3, wire, wire_reason

`wire` is the module `pyoverlay.fuse._wire`, or None; then `wire_reason` says why, in words for `pyoverlay doctor`, and pyfuse3 works as it
would without us. `PYOVERLAY_WIRE=0` in the environment turns the extension off.
"""

import importlib
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast

from pyoverlay.core.reads import Reads
from pyoverlay.core.syscalls import Stat

if TYPE_CHECKING:
    from pyoverlay.fuse import _wire
    from pyoverlay.fuse._wire import LaneCounts

    _the_module_is_a_wire: "Wire" = _wire

__all__ = ["Wire", "pyfuse3", "wire", "wire_reason"]

Request = tuple[int, int, int, int, int, int, bytes]
"""Opcode, unique, node, uid, gid, pid, body."""


class Requests(Protocol):
    """The extension's part that says what is asked, and of whom."""

    def serve(
        self,
        init: Callable[[bytes, bytes], bytes] | None,
        interrupt: Callable[[int], None] | None,
        opcodes: Iterable[int],
        direct: dict[int, Callable[..., Any]] = ...,
        failed_page: Callable[[int], None] | None = ...,
        /,
    ) -> None: ...
    def whole_request(self) -> Request: ...


class Idle(Protocol):
    """The extension's part that says whether anything is asked at all."""

    def is_idle(self) -> bool: ...


class Forgetting(Protocol):
    """The extension's part that asks the kernel to forget inodes and names."""

    def notify_inval_entry(self, parent: int, name: bytes, /) -> None: ...
    def notify_prune(self, nodes: Sequence[int], /) -> None: ...


class Wire(Reads, Requests, Idle, Forgetting, Protocol):
    """The extension's functions, for annotations; `_wire.pyi` says what each does."""

    def request(self) -> Request: ...
    def lane(self, node: int, read_fd: int, write_fd: int, links: int = -1, waits: int = 0, server: int = 0, /) -> None: ...
    def latency(self, fd: int, /) -> None: ...
    def no_xattr(self, node: int, absent: bool, lists_nothing: bool = False, /) -> None: ...
    def written(self, node: int = 0, /) -> bool: ...
    def counts(self) -> "tuple[dict[int, int], LaneCounts]": ...
    def hold(self, change: int, /) -> None: ...
    def is_active(self) -> bool: ...
    def is_interposed(self) -> bool: ...
    def finds_libfuse(self) -> bool: ...
    def notify_inval_inode(self, node: int, offset: int, length: int, /) -> None: ...
    def watch_calls(self, watch: Callable[[str], int] | None, /) -> None: ...
    @property
    def copy_up_file(self) -> Callable[..., tuple[int, int, bool, bool, int] | None]: ...
    def make(
        self, dirfd: int, name: bytes, mode: int, caller: tuple[int, int, int], rdev: int, target: bytes, /
    ) -> tuple[int, Stat | None]: ...


def _load_wire() -> tuple[Wire | None, str]:
    """The extension in the process's global scope, where the dynamic linker looks first when it binds pyfuse3's calls."""
    if os.environ.get("PYOVERLAY_WIRE") == "0":
        return None, "turned off by PYOVERLAY_WIRE=0"
    if "pyfuse3" in sys.modules:
        return None, "pyfuse3 was imported before pyoverlay.fuse.binding"
    flags = sys.getdlopenflags()
    sys.setdlopenflags(os.RTLD_NOW | os.RTLD_GLOBAL)
    try:
        loaded = cast(Wire, importlib.import_module("pyoverlay.fuse._wire"))
    except ImportError as error:
        return None, f"the extension could not be loaded: {error}"
    finally:
        sys.setdlopenflags(flags)
    if not loaded.is_interposed():
        return None, "another library of this process defines libfuse's functions first"
    return loaded, ""


wire, wire_reason = _load_wire()

import pyfuse3  # noqa: E402  (after the extension: what pyfuse3 binds to is settled when it is loaded)

if wire is not None and not wire.finds_libfuse():
    wire, wire_reason = None, "pyfuse3 does not use a shared libfuse 3"
