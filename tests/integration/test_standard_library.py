"""Python's own tests of what touches files: in a merged directory each ends as it does on the file system below."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from pyoverlay.testing import OverlayFactory
from tests.posix.system_calls import MS_BIND, mount, umount

SHORT = ("test_os", "test_tempfile", "test_dbm", "test_dbm_dumb", "test_dbm_gnu", "test_dbm_ndbm", "test_sqlite3", "test_posix")
REST = ("test_shutil", "test_mailbox", "test_zipfile", "test_pathlib")

Outcomes = dict[str, str]


def interpreters() -> Iterator[Path]:
    """Pythons that may have the package `test`: distributions leave it out, so what a person built comes after this one."""
    yield Path(os.path.realpath(sys.executable))
    for name in ("python3.11", "python3.12", "python3.13"):
        if (found := shutil.which(name)) is not None:
            yield Path(found)
    yield from sorted(Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")).glob("versions/3.1[1-9].*/bin/python3"))


@pytest.fixture(scope="module")
def python() -> Path:
    for candidate in interpreters():
        if subprocess.run([candidate, "-P", "-c", "import test.test_os"], capture_output=True, check=False).returncode == 0:
            return candidate
    pytest.skip("no Python here has the package `test`")


def start(python: Path, directory: Path, report: Path, modules: tuple[str, ...]) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "TMPDIR": str(directory)}
    command = [str(python), "-P", "-m", "test", "--tempdir", str(directory), "--junit-xml", str(report), *modules]
    return subprocess.Popen(command, cwd=directory, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def outcomes(report: Path) -> Outcomes:
    """Test to what became of it, with the reason where there is one."""
    return {case.attrib["name"]: _outcome(case) for case in ET.parse(report).iter("testcase")}


def _outcome(case: ET.Element) -> str:
    for kind in ("skipped", "failure", "error"):
        if (found := case.find(kind)) is not None:
            return f"{kind}: {(found.text or '').strip().splitlines()[-1:]}"
    return "passed"


@contextmanager
def at_a_short_path(directory: Path) -> Iterator[Path]:
    """The same directory, where the name of a socket in it is not too long."""
    with tempfile.TemporaryDirectory() as short:
        mount(str(directory), short, "none", MS_BIND)
        try:
            yield Path(short)
        finally:
            umount(short)


@pytest.mark.root
@pytest.mark.timeout(600)
@pytest.mark.parametrize("modules", [SHORT, pytest.param(REST, marks=pytest.mark.slow)], ids=["short", "rest"])
def test_pythons_own_tests_end_in_a_merged_directory_as_they_do_below(
    overlay: OverlayFactory, tmp_path: Path, python: Path, modules: tuple[str, ...]
) -> None:
    below = tmp_path / "below"
    below.mkdir()
    merged = overlay({"tests": {}}).merged / "tests"
    reports = tmp_path / "below.xml", tmp_path / "merged.xml"
    with at_a_short_path(below) as one, at_a_short_path(merged) as other:
        runs = [start(python, directory, report, modules) for directory, report in zip((one, other), reports, strict=True)]
        for run in runs:
            run.wait()
    expected, got = map(outcomes, reports)
    assert len(expected) > 400
    assert {name: (expected.get(name), got.get(name)) for name in expected.keys() | got.keys() if expected.get(name) != got.get(name)} == {}
