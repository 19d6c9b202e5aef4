"""What the tests of crashes share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.crash.victim import Victims
from tests.posix.system_calls import private_mounts


@pytest.fixture(scope="module")
def own_mounts() -> Iterator[None]:
    """What is mounted here nobody else holds: a file system whose power was cut would else not go, and its image lead to the dead one."""
    with private_mounts():
        yield


@pytest.fixture(scope="module")
def victims(own_mounts: None) -> Iterator[Victims]:
    """Processes to kill."""
    with Victims() as running:
        yield running
