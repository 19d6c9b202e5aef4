"""The merged view behaves as ext4 does, wherever the objects come from."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.posix.check import Check
from tests.posix.checks import CHECKS
from tests.posix.conftest import PLACES, Places


def _cases() -> Iterator[object]:
    for check in CHECKS:
        for place in PLACES:
            needs_wire = check.needs_wire and place != "ext4"
            yield pytest.param(check, place, id=f"{check.name}-{place}", marks=[pytest.mark.wire] if needs_wire else [])


@pytest.mark.root
@pytest.mark.parametrize(("check", "place"), list(_cases()))
def test_posix(check: Check, place: str, places: Places) -> None:
    places.revive()
    check.claim(places.directory(place, check))
