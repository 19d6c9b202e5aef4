"""The merged view behaves as ext4 does, wherever the objects come from."""

from __future__ import annotations

import pytest

from tests.posix.check import Check
from tests.posix.checks import CHECKS
from tests.posix.conftest import PLACES, Places


@pytest.mark.root
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_posix(check: Check, place: str, places: Places) -> None:
    places.revive()
    check.claim(places.directory(place, check))
