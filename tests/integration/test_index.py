"""index=on, uuid= and volatile: what they write is the kernel's, read by it and read from it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pyoverlay.testing import HardLink, MountRefusedError, Overlay, OverlayFactory, Symlink, Tree, snapshot
from tests.integration.looks import litter, mark
from tests.integration.test_hardlinks import drop_caches
from tests.posix.kernel_overlay import KernelOverlay

pytestmark = pytest.mark.root

LOWER: Tree = {
    "a": "content",
    "b": HardLink("a"),
    "d": {"c": HardLink("a")},
    "x": "other",
    "y": HardLink("x"),
    "big": "0" * (1 << 20),
    "bigger": HardLink("big"),
    "s": Symlink("a"),
    "t": HardLink("s"),
}
ROOT = Path(".")
UUID, NLINK = "trusted.overlay.uuid", "trusted.overlay.nlink"


def by_the_kernel(overlay: Overlay, *options: str) -> KernelOverlay:
    """The kernel's overlay over the same layers and the same work directory."""
    overlay.work.mkdir(exist_ok=True)
    return KernelOverlay(overlay.lowers, overlay.writable, overlay.merged, ("redirect_dir=on", *options), work_directory=overlay.work)


def change(merged: Path) -> None:
    with (merged / "b").open("r+") as file:
        file.write("CON")
    (merged / "x").chmod(0o600)
    (merged / "x").unlink()
    os.link(merged / "d" / "c", merged / "e")
    (merged / "a").rename(merged / "d" / "a")
    (merged / "bigger").unlink()
    os.utime(merged / "s", ns=(1, 2), follow_symlinks=False)
    (merged / "big").rename(merged / "y")


def index(overlay: Overlay) -> dict[str, bytes | None]:
    directory = overlay.work / "index"
    # "#..." is the kernel's: the whiteout that its others are links of.
    return {name: mark(directory / name, NLINK) for name in os.listdir(directory) if not name.startswith("#")}


def look(merged: Path) -> tuple[object, ...]:
    """The tree, and the number of each object."""
    return snapshot(merged), {path: os.lstat(merged / path).st_ino for path in ("d/a", "b", "d/c", "e", "s", "t", "y")}


@pytest.mark.parametrize("first", ["ours", "the kernel's"])
def test_names_of_a_lower_file_stay_one_file_whoever_mounts(overlay: OverlayFactory, first: str) -> None:
    here = overlay(LOWER, options=("-o", "index=on"), mount=False)
    kernel = by_the_kernel(here, "index=on", "xino=on")
    one, other = (here, kernel) if first == "ours" else (kernel, here)
    one.mount()
    change(here.merged)
    expected = look(here.merged)
    drop_caches()
    assert look(here.merged) == expected
    one.umount()
    entries = index(here)
    other.mount()
    assert look(here.merged)[0] == expected[0]
    assert os.stat(here.merged / "b").st_nlink == 4
    with (here.merged / "d" / "c").open("a") as file:
        file.write("!")
    assert (here.merged / "e").read_text() == "CONtent!"
    (here.merged / "t").unlink()
    (here.merged / "y").unlink()
    final = snapshot(here.merged)
    other.umount()
    assert len(entries) == 3
    assert len(index(here)) == 2
    one.mount()
    assert snapshot(here.merged) == final
    one.umount()


def test_both_write_the_same_form(overlay: OverlayFactory) -> None:
    found = []
    for kernels in (False, True):
        here = overlay(LOWER, options=("-o", "index=on"), mount=False)
        side = by_the_kernel(here, "index=on") if kernels else here
        side.mount()
        change(here.merged)
        side.umount()
        found.append(sorted((value or b"")[:1] for value in index(here).values()))
        for name in index(here):
            assert bytes.fromhex(name) == mark(here.work / "index" / name, "trusted.overlay.origin")
        assert mark(here.work / "index", "trusted.overlay.upper") is not None
        assert mark(here.writable, "trusted.overlay.origin") is not None
    assert found[0] == found[1]


def test_an_upper_over_another_lower_is_refused_by_both(overlay: OverlayFactory) -> None:
    here = overlay(LOWER, options=("-o", "index=on"))
    here.umount()
    here.lowers = overlay(LOWER, mount=False).lowers
    with pytest.raises(MountRefusedError, match="used over another lower"):
        here.mount()
    with pytest.raises(OSError, match="Stale file handle"):
        by_the_kernel(here, "index=on").mount()
    here.options = ()
    here.mount()


def test_a_refused_mount_leaves_no_index_and_no_work_directory(overlay: OverlayFactory) -> None:
    here = overlay(LOWER, options=("-o", "index=on"), mount=False)
    os.setxattr(here.writable, "trusted.overlay.origin", b"of another lower")
    with pytest.raises(MountRefusedError, match="used over another lower"):
        here.mount()
    assert not here.work.exists()


def test_nothing_is_left_in_the_work_directory(overlay: OverlayFactory) -> None:
    here = overlay(LOWER, options=("-o", "index=on"))
    change(here.merged)
    for name in ("d/a", "b", "d/c", "e", "s", "t", "y"):
        (here.merged / name).unlink()
    here.umount()
    assert index(here) == {}
    assert litter(here) == []


@pytest.mark.parametrize("option", ["on", "auto", "null", "off"])
def test_an_upper_gets_the_uuid_that_the_kernel_would_give_it(overlay: OverlayFactory, option: str) -> None:
    written = {}
    for kernels in (False, True):
        new, old = overlay({"f": "f"}, options=("-o", f"uuid={option}"), mount=False), overlay({"f": "f"}, mount=False)
        old.options = ("-o", f"uuid={option}")
        os.setxattr(old.writable, "trusted.overlay.impure", b"y")
        uuids: list[bytes | None] = []
        for here in (new, old):
            side = by_the_kernel(here, f"uuid={option}") if kernels else here
            for _ in range(2):
                side.mount()
                side.umount()
                uuids.append(mark(here.writable, UUID))
        assert uuids[0] == uuids[1]  # one that is there stays
        assert uuids[2] == uuids[3]
        written[kernels] = [value and len(value) for value in uuids]
    assert written[False] == written[True]


def test_without_the_option_no_uuid_is_written(overlay: OverlayFactory) -> None:
    here = overlay({"f": "f"})
    assert mark(here.writable, UUID) is None


def mounted(side: Overlay | KernelOverlay) -> None:
    side.mount()
    (side.merged / "new").write_text("new")
    side.umount()


@pytest.mark.parametrize("maker", ["ours", "the kernel's"])
def test_after_a_volatile_mount_both_refuse_the_upper_until_the_mark_is_removed(overlay: OverlayFactory, maker: str) -> None:
    here = overlay({"f": "f"}, options=("-o", "volatile"), mount=False)
    kernel = by_the_kernel(here, "index=off", "volatile")
    mounted(here if maker == "ours" else kernel)
    marker = here.work / "work" / "incompat" / "volatile"
    assert os.listdir(marker) == ["dirty"]
    with pytest.raises(MountRefusedError, match=f"rm -r {marker}"):
        here.mount()
    with pytest.raises(OSError, match="Invalid argument"):
        kernel.mount()
    (marker / "dirty").unlink()
    marker.rmdir()
    for side in (here, kernel):
        side.options = tuple(option for option in side.options if option not in ("-o", "volatile"))
        mounted(side)
    assert not marker.exists()


@pytest.mark.parametrize("option", ["xino=on", "xino=off", "xino=auto"])
def test_numbers_are_unique_and_lasting_whatever_xino_says(overlay: OverlayFactory, option: str) -> None:
    here = overlay({"f": "f", "g": "g"}, options=("-o", option))
    before = {name: os.stat(here.merged / name).st_ino for name in ("f", "g")}
    (here.merged / "f").chmod(0o600)
    here.remount()
    assert {name: os.stat(here.merged / name).st_ino for name in ("f", "g")} == before
    assert len({os.stat(here.merged / name).st_dev for name in (".", "f", "g")}) == 1
