"""A power cut at any step of any operation: the file system below stops without writing its log out, is repaired by a mount, and shows
the tree before or after. Just before the cut somebody else's fsync has put on disk every name given so far: what had better not
be visible yet is then.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pyoverlay.core.policy import Fsync
from tests.crash.cases import AT_ONCE, DURABLE, PUBLISHED
from tests.crash.images import Image, mounted_image
from tests.crash.judges import Bed, difference
from tests.crash.victim import Victims
from tests.unit.merged import Faulty
from tests.unit.wired import WiredFaulty

pytestmark = [pytest.mark.root, pytest.mark.timeout(180)]


@dataclass(slots=True, kw_only=True)
class ImageBed(Bed):
    image: Image


KINDS = pytest.mark.parametrize("bed", ["ext4", "xfs", "xfs, cloned"], indirect=True)


@pytest.fixture(scope="module")
def bed(own_mounts: None, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ImageBed]:
    """Lowers elsewhere, so that data is copied; on xfs, beside the upper, a copy-up shares the blocks."""
    directory = tmp_path_factory.mktemp("power")
    with mounted_image(request.param.split(",")[0], directory) as image:
        yield ImageBed(image.point, None if "cloned" in request.param else directory, image=image)


def cut(
    victims: Victims,
    bed: ImageBed,
    name: str,
    at: int,
    *,
    how: str = "commit and cut",
    fsync: Fsync = Fsync.ORDERED,
    wired: bool = False,
) -> None:
    bed.renew()
    victims.die(bed.base, name, at, lowers=bed.lowers, how=how, fsync=fsync, wired=wired)
    bed.image.remount()


def assert_old_or_new(victims: Victims, bed: ImageBed, name: str, steps: range | None = None, faulty: type[Faulty] = Faulty) -> None:
    """steps: before which calls the power is cut; None for once, after the last."""
    old, new, calls = bed.old_and_new(name, faulty)
    for at in steps or [len(calls) + 1]:
        if at > len(calls) + 1:
            break
        cut(victims, bed, name, at, wired=faulty is WiredFaulty)
        for judge in (bed.by_us, bed.by_the_kernel):
            seen = judge()
            assert seen in (old, new), f"cut before call {at} of {calls}, {judge.__name__}: {difference(seen, old, new)}"
        bed.image.check()


@pytest.mark.parametrize("bed", ["ext4"], indirect=True)
@pytest.mark.parametrize("name", PUBLISHED)
def test_after_a_power_cut_the_tree_is_the_old_or_the_new_one(victims: Victims, bed: ImageBed, name: str) -> None:
    assert_old_or_new(victims, bed, name)


FEW = ["write_to_a_lower_file", "create_over_a_whiteout", "rename_of_a_merged_directory_over_an_emptied_one"]


@KINDS
@pytest.mark.parametrize("name", [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in PUBLISHED])
def test_after_a_power_cut_at_any_call_the_tree_is_the_old_or_the_new_one(victims: Victims, bed: ImageBed, name: str) -> None:
    assert_old_or_new(victims, bed, name, range(1, 100))


@pytest.mark.wire
@KINDS
@pytest.mark.parametrize("name", [AT_ONCE[0], *(pytest.param(name, marks=pytest.mark.slow) for name in AT_ONCE[1:])])
def test_after_a_power_cut_within_one_call_of_the_extension_too(victims: Victims, bed: ImageBed, name: str) -> None:
    assert_old_or_new(victims, bed, name, range(1, 100), WiredFaulty)


@KINDS
@pytest.mark.parametrize("fsync", [Fsync.ORDERED, Fsync.STRICT], ids=["ordered", "strict"])
@pytest.mark.parametrize("name", DURABLE)
def test_what_fsync_confirmed_is_there_after_a_power_cut(victims: Victims, bed: ImageBed, name: str, fsync: Fsync) -> None:
    """Without anybody else's fsync that would have put it on disk too."""
    _, new, calls = bed.old_and_new(name)
    cut(victims, bed, name, len(calls) + 1, how="cut", fsync=fsync)
    assert bed.by_us() == bed.by_the_kernel() == new
    bed.image.check()


def test_without_an_order_a_power_cut_leaves_a_file_without_its_content(victims: Victims, tmp_path: Path) -> None:
    """What `volatile` gives up, and what shows that the cuts above cut."""
    name = "chmod_of_a_lower_file"
    with mounted_image("ext4", tmp_path) as image:
        bed = ImageBed(image.point, image=image)
        old, new, calls = bed.old_and_new(name)
        cut(victims, bed, name, len(calls) + 1, fsync=Fsync.VOLATILE)
        seen = bed.by_us()
        assert seen not in (old, new)
        assert seen[b"file"].digest != old[b"file"].digest
        image.check()
