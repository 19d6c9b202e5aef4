"""README.md and docs/writable-layer.md: every command that they show prints what they say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir

import pytest

from pyoverlay.testing import mounts_below

pytestmark = pytest.mark.root

CHECKOUT = Path(__file__).parents[2]
DEMO = "/srv/demo"


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty directory in the place of the page's, with a path short enough for a table, and where whiteouts can be made: a container's
    /var/tmp may lie on an overlay.
    """
    with TemporaryDirectory(prefix="pyo-", dir=min(gettempdir(), "/var/tmp", key=len)) as name:
        monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        monkeypatch.setenv("PYOVERLAY_RUNTIME_DIR", f"{name}/.run")
        yield Path(name)
        for mount in mounts_below(Path(name)):
            subprocess.run(["umount", "-l", mount.mount_point], check=True)


def steps(page: Path) -> list[tuple[str, str]]:
    """Each command of a page, and what it prints; of a Python program the command that writes it down."""
    found: list[tuple[str, str]] = []
    for kind, block in re.findall(r"^```(console|python)\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
        if kind == "python":
            found.append((f"cat > example.py <<'EOF'\n{block}EOF", ""))
        else:
            found += re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", block, re.MULTILINE)
    return found


def comparable(text: str) -> str:
    """Without what is another one each time: ids, pids, ages, digests, and the columns that follow from the length of a path."""
    text = re.sub(r"\b[0-9a-f]{12}\b", "ID", text)
    text = re.sub(r"\b\d+ +Up [\w ]+?(?=  +)", "PID UP", text)
    text = re.sub(r"sha256:[0-9a-f]{64}", "DIGEST", text)
    return re.sub(r" {2,}", "  ", text)


@pytest.mark.parametrize(("page", "least"), [("README.md", 8), ("docs/writable-layer.md", 30)])
def test_the_page_says_what_the_commands_print(demo: Path, page: str, least: int) -> None:
    assert len(steps(CHECKOUT / page)) > least
    for command, output in steps(CHECKOUT / page):
        argv = ["sh", "-c", f"exec 2>&1; {command.replace(DEMO, str(demo))}"]
        result = subprocess.run(argv, check=False, cwd=demo, stdout=subprocess.PIPE, text=True, timeout=30)
        assert comparable(result.stdout.replace(str(demo), DEMO)) == comparable(output), command
