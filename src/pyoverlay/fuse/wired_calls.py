"""Changes of the upper that the extension makes in one call each, where `core.calls` makes them by single ones."""

from __future__ import annotations

from pyoverlay.core.calls import Caller, Calls, Copied, PlainFile
from pyoverlay.core.policy import Override, Policy
from pyoverlay.core.syscalls import Stat
from pyoverlay.fuse.binding import Wire


class WiredCalls(Calls):
    """`Calls` by the extension `wire`."""

    copies_up_files = True

    def __init__(self, wire: Wire) -> None:
        self._wire = wire

    def make(
        self, dirfd: int, name: bytes, mode: int, caller: Caller, rdev: int = 0, target: bytes = b""
    ) -> tuple[int, Stat | None]:
        return self._wire.make(dirfd, name, mode, caller, rdev, target)

    def copy_up_file(self, file: PlainFile) -> Copied | None:
        copied = self._wire.copy_up_file(*file)
        return None if copied is None else Copied(*copied)


def calls_for(policy: Policy, wire: Wire | None) -> Calls | None:
    """The calls of a mount with the extension; None: it has none of its own. Owners and modes that are kept in an attribute take more."""
    return None if wire is None or policy.override is not Override.NONE else WiredCalls(wire)
