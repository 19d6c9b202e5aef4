"""kill -9 between any two system calls: the upper mounts, by us and by the kernel's overlay, and shows the old tree or the new one."""

from __future__ import annotations

import pytest

from pyoverlay.testing import Directory, Symlink, Tree, Whiteout, make_tree
from tests.crash.cases import RUNNABLE
from tests.crash.judges import Bed, difference
from tests.crash.victim import MOUNT, Victims
from tests.unit.merged import Faulty


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Bed:
    return Bed(tmp_path_factory.mktemp("bed"))


@pytest.mark.root
@pytest.mark.parametrize("name", RUNNABLE)
def test_killed_at_any_call_the_tree_is_the_old_or_the_new_one(victims: Victims, bed: Bed, name: str) -> None:
    """The whole tree, not path by path: so nothing is half there, and of what was renamed neither both names nor none."""
    old, new, calls = bed.old_and_new(name)
    for at in range(1, len(calls) + 2):
        bed.renew()
        victims.die(bed.base, name, at, lowers=bed.lowers)
        judges = [bed.by_us, bed.by_the_kernel] if at % 2 else [bed.by_the_kernel, bed.by_us]  # who comes first finds the litter
        for judge in judges:
            seen = judge()
            assert seen in (old, new), f"killed before call {at} of {calls}, {judge.__name__}: {difference(seen, old, new)}"
        if at == len(calls) + 1:
            assert bed.by_us() == new, "what was answered is there"


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
