"""The list of checks: importing this package fills it."""

from tests.posix.check import CHECKS
from tests.posix.checks import (
    attributes,
    extended,
    listing,
    locking,
    making,
    mapping,
    names,
    opening,
    privilege,
    removing,
    renaming,
)

__all__ = [
    "CHECKS",
    "attributes",
    "extended",
    "listing",
    "locking",
    "making",
    "mapping",
    "names",
    "opening",
    "privilege",
    "removing",
    "renaming",
]
