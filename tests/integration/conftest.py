"""A mount for each module whose tests bring their layers along (see `looks.layers`), and a directory in it for each test.

PYOVERLAY_TESTS_OVER=kernel runs those tests over the kernel's overlay instead (tests/posix/peers.py): what is said there of the format must
hold for both.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pyoverlay.testing import Overlay, Tree, make_tree, mounts_below
from tests.integration.looks import Here, Layers, litter
from tests.integration.unprivileged import make_home
from tests.posix.kernel_overlay import KernelOverlay
from tests.posix.peers import overlay_under_test
from tests.whoami import IS_ROOT


def layers_of(module: object) -> dict[str, Layers]:
    """The layers that the tests of a module ask for, by the name of the test; those that root alone can make are root's."""
    found = {}
    for name, value in vars(module).items():
        wanted = getattr(value, "layers", None)
        if isinstance(wanted, Layers) and (IS_ROOT or not _is_for_root(value)):
            found[name] = wanted
    return found


def _is_for_root(test: object) -> bool:
    return any(mark.name == "root" for mark in getattr(test, "pytestmark", ()))


@pytest.fixture(scope="module")
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Overlay | KernelOverlay]:
    """The mount that the tests of this module share."""
    with _mounted(layers_of(request.module), tmp_path_factory.mktemp("shared")) as overlay:
        yield overlay


@contextmanager
def _mounted(wanted: dict[str, Layers], base: Path) -> Iterator[Overlay | KernelOverlay]:
    depth = max(len(layers.lowers) for layers in wanted.values())
    lowers = tuple(_directory(base / f"lower{number}") for number in range(depth))
    upper, merged = _directory(base / "upper"), _directory(base / "merged")
    for name, layers in wanted.items():
        for number, lower in enumerate(lowers):
            _fill(lower / name, layers.lowers[number] if number < len(layers.lowers) else {})
        if layers.upper is not None:
            _fill(upper / name, layers.upper)
    overlay = overlay_under_test(lowers, upper, merged)
    overlay.mount()
    try:
        yield overlay
    finally:
        overlay.close()


def _directory(path: Path) -> Path:
    path.mkdir()
    return path


def _fill(path: Path, tree: Tree) -> None:
    path.mkdir()
    make_tree(path, tree)


@pytest.fixture
def alone(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Here]:
    """As `here`, in a mount of its own: for tests that mount again, or that may end the mount."""
    name = request.node.originalname
    with _mounted({name: layers_of(request.module)[name]}, tmp_path) as overlay:
        yield from _checked(Here(overlay, name))


@pytest.fixture
def here(request: pytest.FixtureRequest, shared: Overlay | KernelOverlay) -> Iterator[Here]:
    """The directory of this test in the shared mount. Afterwards no lower was touched and nothing lies about in the work directory."""
    if not shared.mounted():
        shared.mount()
    yield from _checked(Here(shared, request.node.originalname))


def _checked(here: Here) -> Iterator[Here]:
    yield here
    here.assert_lowers_untouched()
    if isinstance(here.overlay, Overlay):
        assert litter(here.overlay) == []


@pytest.fixture
def home() -> Iterator[Path]:
    """A directory of an ordinary user: pytest's own are for root alone."""
    with tempfile.TemporaryDirectory(prefix="pyoverlay-user-", dir="/var/tmp") as name:
        make_home(Path(name))
        yield Path(name)
        assert mounts_below(Path(name)) == []
