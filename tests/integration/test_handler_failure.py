"""A bug in a handler costs its caller one EIO. With plain pyfuse3 it would end the session and leave a dead mount."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from pyoverlay.testing import OverlayFactory, Symlink
from tests.posix.check import fails

BUG = """
from pyoverlay.core.view import View

def readlink(self, inode):
    raise RuntimeError("a bug of ours")

View.readlink = readlink
"""


@pytest.mark.root
@pytest.mark.parametrize("extension", ["1", "0"])
def test_a_bug_in_a_handler_is_eio_and_logged_and_the_mount_goes_on(
    overlay: OverlayFactory, tmp_path: Path, extension: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(BUG)
    log = tmp_path / "log"
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep))
    monkeypatch.setenv("PYOVERLAY_WIRE", extension)
    here = overlay({"link": Symlink("target"), "f": b"content"}, options=["--log-file", str(log)])
    for _ in range(2):
        with fails(errno.EIO):
            os.readlink(here.merged / "link")
    assert (here.merged / "f").read_bytes() == b"content"
    (here.merged / "new").write_bytes(b"works")
    here.umount()
    assert here.writable.joinpath("new").read_bytes() == b"works"
    text = log.read_text()
    assert text.count("RuntimeError: a bug of ours") == 2, text
    assert text.count("readlink failed") == 2, text
