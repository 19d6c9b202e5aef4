"""What overlays were attacked with, a class a test: nobody gets through a mount what they could not get without it.

Each test is named after the report of the class; the report was of another overlay, or of the tools around one.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pyoverlay.testing import Device, File, Overlay, OverlayFactory, make_tree

pytestmark = pytest.mark.root

CAPABILITY = "security.capability"
# struct vfs_cap_data of <linux/capability.h>: cap_net_raw permitted and effective, revision 2.
NET_RAW = struct.pack("<IIIII", 0x02000001, 1 << 13, 0, 0, 0)


@contextmanager
def mounted_with(flags: str, place: Path) -> Iterator[Path]:
    """A file system of a stick, or of somebody else: a tmpfs with mount flags."""
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], check=True)
    try:
        suid, capable = File(content="program", mode=0o6755), File(content="program", mode=0o755, xattrs={CAPABILITY: NET_RAW})
        make_tree(place, {"suid": suid, "capable": capable, "null": Device(kind="c", major=1, minor=3)})
        subprocess.run(["mount", "-o", f"remount,bind,{flags}", place], check=True)
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


def over(lower: Path, beside: Path, *options: str) -> Overlay:
    """A mount over a directory that the test brings along."""
    for name in ("upper", "merged"):
        (beside / name).mkdir()
    overlay = Overlay((lower,), beside / "upper", beside / "merged", options)
    overlay.mount()
    return overlay


@pytest.fixture
def stick(tmp_path: Path) -> Iterator[Overlay]:
    """A mount that honours set-user-id bits and devices, by request, over a lower whose own mount does not."""
    with mounted_with("nosuid,nodev", tmp_path / "stick") as lower:
        overlay = over(lower, tmp_path, "-o", "suid,dev")
        try:
            yield overlay
        finally:
            overlay.close()


def test_cve_2021_3847_capabilities_of_a_nosuid_lower_are_not_copied_up(stick: Overlay) -> None:
    os.chmod(stick.merged / "capable", 0o755)
    copy = stick.writable / "capable"
    assert CAPABILITY not in os.listxattr(copy)
    assert copy.read_text() == "program"


def test_cve_2016_1576_set_id_bits_of_a_nosuid_lower_are_not_copied_up(stick: Overlay) -> None:
    os.utime(stick.merged / "suid")
    assert stat.S_IMODE(os.stat(stick.writable / "suid").st_mode) == 0o755


def test_a_device_of_a_nodev_lower_is_not_copied_up(stick: Overlay) -> None:
    with pytest.raises(PermissionError):
        os.chmod(stick.merged / "null", 0o666)
    assert os.listdir(stick.writable) == []
    os.unlink(stick.merged / "null")


def test_what_the_mount_of_a_lower_denies_the_overlay_does_not_give_unasked(tmp_path: Path) -> None:
    with mounted_with("nosuid,nodev", tmp_path / "stick") as lower:
        overlay = over(lower, tmp_path)
        try:
            mount = overlay.mounted()
            assert mount is not None
            assert {"nosuid", "nodev"} <= set(mount.options.split(","))
            with pytest.raises(PermissionError) as caught:
                os.open(overlay.merged / "null", os.O_RDONLY)
            assert caught.value.errno == errno.EACCES
        finally:
            overlay.close()


def test_over_other_lowers_root_s_mounts_have_suid_and_dev(overlay: OverlayFactory) -> None:
    mount = overlay({"suid": File(mode=0o4755)}).mounted()
    assert mount is not None
    assert not {"nosuid", "nodev"} & set(mount.options.split(","))
