"""What the tests of crashes share."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

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


@pytest.fixture
def tell(capsys: pytest.CaptureFixture[str], record_testsuite_property: Callable[[str, object], None]) -> Callable[[str, str], None]:
    """Says a figure where the run is watched, and in its report."""

    def tell(name: str, figure: str) -> None:
        record_testsuite_property(name, figure)
        with capsys.disabled():
            sys.stdout.write(f"\n{name}: {figure}\n")

    return tell
