"""Processors that are kept awake: who asks for it, and who does not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pyoverlay.errors import Refusal
from pyoverlay.fuse import latency
from pyoverlay.testing import Overlay, OverlayFactory


def _holds_device(overlay: Overlay) -> bool:
    (daemon,) = overlay.daemons()
    targets = [os.readlink(entry) for entry in Path(f"/proc/{daemon}/fd").iterdir()]
    asked = subprocess.run([sys.executable, "-m", "pyoverlay", "inspect", "--json", overlay.merged], capture_output=True, check=True)
    says_so = json.loads(asked.stdout)["mounts"][0]["features"]["cpu_latency"]
    assert says_so == (latency.DEVICE in targets)
    return latency.DEVICE in targets


@pytest.mark.root
@pytest.mark.wire
def test_the_device_is_open_where_it_is_wanted_and_can_be_had(overlay: OverlayFactory) -> None:
    is_there = os.access(latency.DEVICE, os.W_OK)
    assert not _holds_device(overlay({}, options=("-o", "cpu_latency=off")))
    assert _holds_device(overlay({})) == (is_there and 1 < (os.cpu_count() or 1) <= latency.FEW)
    if is_there:
        assert _holds_device(overlay({}, options=("-o", "cpu_latency=on")))


def test_what_cannot_be_had_is_refused_if_it_is_wanted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(latency, "DEVICE", str(tmp_path / "device"))
    assert latency.open_device(None) == latency.open_device(wanted=False) == -1
    with pytest.raises(Refusal, match=r"device: cannot be asked \(No such file or directory\); leave out cpu_latency=on"):
        latency.open_device(wanted=True)


def test_on_a_large_machine_nothing_is_kept_awake_unasked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    device = tmp_path / "device"
    device.touch()
    monkeypatch.setattr(latency, "DEVICE", str(device))
    opened = {}
    for processors in (1, 2, latency.FEW, latency.FEW + 1):
        monkeypatch.setattr(os, "cpu_count", lambda processors=processors: processors)
        fd = latency.open_device(None)
        opened[processors] = fd >= 0
        if fd >= 0:
            os.close(fd)
    assert opened == {1: False, 2: True, latency.FEW: True, latency.FEW + 1: False}
