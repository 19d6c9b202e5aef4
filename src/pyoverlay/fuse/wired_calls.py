"""Changes of the upper that the extension makes in one call each, where `core.calls` makes them by single ones."""

from __future__ import annotations

from pyoverlay.core.calls import Calls, Copied, PlainFile
from pyoverlay.core.policy import Override, Policy
from pyoverlay.fuse.binding import Wire


class WiredCalls(Calls):
    """`Calls` by the extension `wire`."""

    copies_up_files = True

    def __init__(self, wire: Wire) -> None:
        self._wire = wire

    def copy_up_file(self, file: PlainFile) -> Copied | None:
        copied = self._wire.copy_up_file(*file)
        return None if copied is None else Copied(*copied)


def calls_for(policy: Policy, wire: Wire | None) -> Calls | None:
    """The calls of a mount with the extension; None: it has none of its own. Owners and modes that are kept in an attribute take more."""
    return None if wire is None or policy.override is not Override.NONE else WiredCalls(wire)
