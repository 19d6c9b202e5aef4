"""What podman says of a container that is mounted by our program, and what pyoverlay says of it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from pyoverlay.testing.mounts import command
from tests.interop.engines import IMAGE, Podman

pytestmark = [pytest.mark.root, pytest.mark.container, pytest.mark.timeout(180)]


# What podman puts into every container, and leaves out when it tells what has changed.
PODMANS_OWN = {"A /run", "A /run/.containerenv", *(f"A /etc/{name}" for name in ("hostname", "hosts", "mtab", "resolv.conf"))}


def printed(*arguments: str | Path) -> list[str]:
    return subprocess.run(command(*arguments), check=True, capture_output=True, text=True, timeout=60).stdout.splitlines()


def test_a_container_of_podman_s_is_told_alike(root_podman: Podman) -> None:
    podman = root_podman.podman
    podman("run", "-d", "--name", "box", IMAGE, "sleep", "1000")
    change = "mkdir /d; echo new > /d/new; ln /d/new /d/link; rm /bin/ls; chmod 600 /etc/passwd; rm -r /tmp; mkdir /tmp"
    podman("exec", "box", "sh", "-c", change)
    data = json.loads(podman("inspect", "-f", "{{json .GraphDriver.Data}}", "box"))
    merged = data["MergedDir"]

    ours = json.loads(printed("inspect", "-f", "{{json .GraphDriver.Data}}", merged)[0])
    assert (ours["MergedDir"], ours["UpperDir"], ours["WorkDir"]) == (merged, data["UpperDir"], data["WorkDir"])
    assert [Path(lower).resolve() for lower in ours["LowerDir"].split(":")] == [Path(lower) for lower in data["LowerDir"].split(":")]

    lines, podmans_lines = set(printed("diff", merged)), set(podman("diff", "box").splitlines())
    assert podmans_lines == {"A /d", "A /d/link", "A /d/new", "C /bin", "D /bin/ls", "C /etc", "C /etc/passwd", "C /tmp"}
    assert lines - podmans_lines == PODMANS_OWN
    assert podmans_lines <= lines

    size, _, virtual = printed("ps", "-s", "--filter", f"merged={merged}", "--format", "{{.Size}}")[0].partition(" ")
    podmans, _, podmans_virtual = podman("ps", "-s", "--format", "{{.Size}}").strip().partition(" ")
    assert size == podmans
    assert virtual.startswith("(virtual ")
    assert podmans_virtual.startswith("(virtual ")
