"""The merged view behaves as ext4 does, wherever the objects come from."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.posix.check import Check
from tests.posix.checks import CHECKS
from tests.posix.conftest import PLACES, Places, prepared
from tests.whoami import IS_ROOT


def _cases() -> Iterator[object]:
    for check in CHECKS:
        for place in PLACES:
            needs_wire = check.needs_wire and place != "ext4"
            yield pytest.param(check, place, id=f"{check.name}-{place}", marks=[pytest.mark.wire] if needs_wire else [])


@pytest.mark.timeout(300)  # the first of them makes the layers of all, some ten thousand objects: over a minute on a disk that is busy
@pytest.mark.parametrize(("check", "place"), list(_cases()))
def test_posix(check: Check, place: str, places: Places) -> None:
    places.revive()
    if not IS_ROOT:
        _skip_what_needs_root(check, place, places)
    check.claim(places.directory(place, check))


def _skip_what_needs_root(check: Check, place: str, places: Places) -> None:
    """The plain file system is the judge: what this user cannot do there is not asked of the view."""
    if check.name in places.not_made:
        pytest.skip("needs root: this user cannot make what the check begins with")
    try:
        check.claim(prepared(places.plain / f"{check.name}-{place}", check))
    except (AssertionError, OSError) as error:
        pytest.skip(f"needs root: does not hold for this user on the plain file system either ({type(error).__name__})")
