"""Files whose data the kernel's overlay left in a lower (metacopy). They are not followed yet, and must not be taken for holes."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

import pytest

from pyoverlay.testing import OverlayFactory
from tests.posix.check import fails

pytestmark = pytest.mark.root


def test_a_metacopy_file_of_the_kernels_is_eperm_and_never_zeros(overlay: OverlayFactory, tmp_path: Path) -> None:
    for name in ("lower", "upper", "work", "merged"):
        (tmp_path / name).mkdir()
    (tmp_path / "lower" / "f").write_bytes(b"data" * 1000)
    layers = f"lowerdir={tmp_path}/lower,upperdir={tmp_path}/upper,workdir={tmp_path}/work"
    subprocess.run(["mount", "-t", "overlay", "-o", f"{layers},redirect_dir=on,metacopy=on", "none", tmp_path / "merged"], check=True)
    (tmp_path / "merged" / "f").chmod(0o600)
    subprocess.run(["umount", tmp_path / "merged"], check=True)
    assert os.getxattr(tmp_path / "upper" / "f", "trusted.overlay.metacopy") == b""

    here = overlay({}, mount=False)
    here.lowers = (tmp_path / "upper", tmp_path / "lower")
    here.mount()
    with fails(errno.EPERM):
        (here.merged / "f").read_bytes()
    with fails(errno.EPERM), (here.merged / "f").open("ab", buffering=0) as file:
        file.write(b"x")
    assert (here.merged / "f").stat().st_size == 4000
    assert os.listdir(here.writable) == []
