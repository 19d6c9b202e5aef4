"""kill -9 between any two system calls: the upper mounts, by us and by the kernel's overlay, and shows the old tree or the new one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pyoverlay.testing import Directory, Symlink, Tree, Whiteout, make_tree
from tests.crash.cases import AT_ONCE, RUNNABLE, WITHOUT_DEVICES
from tests.crash.images import mounted_image
from tests.crash.judges import Bed, difference
from tests.crash.victim import MOUNT, Victims
from tests.unit.merged import Faulty
from tests.unit.wired import WiredFaulty


@pytest.fixture(scope="module")
def bed(own_mounts: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bed]:
    """On a file system of its own: the kernel's overlay syncs the upper's when it is unmounted, and there are many to wait for."""
    with mounted_image("ext4", tmp_path_factory.mktemp("kill")) as image:
        yield Bed(image.point)


@pytest.mark.root
@pytest.mark.parametrize("name", RUNNABLE)
def test_killed_at_any_call_the_tree_is_the_old_or_the_new_one(victims: Victims, bed: Bed, name: str) -> None:
    """The whole tree, not path by path: so nothing is half there, and of what was renamed neither both names nor none."""
    assert_old_or_new(victims, bed, name)


@pytest.mark.root
@pytest.mark.wire
@pytest.mark.parametrize("name", AT_ONCE)
def test_killed_within_one_call_of_the_extension_the_tree_is_the_old_or_the_new_one(victims: Victims, bed: Bed, name: str) -> None:
    assert_old_or_new(victims, bed, name, WiredFaulty)


def assert_old_or_new(victims: Victims, bed: Bed, name: str, faulty: type[Faulty] = Faulty) -> None:
    old, new, calls = bed.old_and_new(name, faulty)
    for at in range(1, len(calls) + 2):
        bed.renew()
        victims.die(bed.base, name, at, lowers=bed.lowers, wired=faulty is WiredFaulty)
        judges = [bed.by_us, bed.by_the_kernel] if at % 2 else [bed.by_the_kernel, bed.by_us]  # who comes first finds the litter
        for judge in judges:
            seen = judge()
            assert seen in (old, new), f"killed before call {at} of {calls}, {judge.__name__}: {difference(seen, old, new)}"
        if at == len(calls) + 1:
            assert bed.by_us() == new, "what was answered is there"


@pytest.mark.root
@pytest.mark.parametrize("name", WITHOUT_DEVICES)
def test_killed_where_whiteouts_are_marked_files(victims: Victims, bed: Bed, name: str) -> None:
    """No system call leaves a marked file behind, so a rename is two steps. In between both names show something, and nothing is lost."""
    old, new, calls = bed.old_and_new(name)
    kept = {entry.digest for entry in old.values()} & {entry.digest for entry in new.values()}
    for at in range(1, len(calls) + 2):
        bed.renew()
        victims.die(bed.base, name, at, lowers=bed.lowers)
        seen = bed.by_us()
        if name.startswith("rename"):
            assert kept <= {entry.digest for entry in seen.values()}
        else:
            assert seen in (old, new), f"killed before call {at} of {calls}: {difference(seen, old, new)}"
    assert bed.by_us() == new


LITTER: Tree = {"#1": "half", "#2": Directory({"closed": Directory({"in": "it"}, mode=0), "link": Symlink("../..")}), "#3": Whiteout()}


@pytest.mark.root
def test_killed_while_it_clears_the_work_directory_the_next_mount_clears_the_rest(victims: Victims, bed: Bed) -> None:
    def litter() -> None:
        bed.renew()
        (bed.base / "work" / "work").mkdir()
        make_tree(bed.base / "work" / "work", LITTER)

    litter()
    counted = Faulty(0, AssertionError())
    bed.view(counted).view.close()
    assert counted.made.count("unlink") + counted.made.count("rmdir") >= 6
    expected = bed.by_us()
    for at in range(1, counted.count + 1):
        litter()
        victims.die(bed.base, MOUNT, at, lowers=bed.lowers)
        assert bed.by_us() == bed.by_the_kernel() == expected
