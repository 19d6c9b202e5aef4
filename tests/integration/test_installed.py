"""The project as people get it: built into a wheel, installed, its programs run. Builds in a copy, with no index and no network."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

import pyoverlay
from pyoverlay.testing import Overlay, OverlayFactory, is_whiteout

CHECKOUT = Path(__file__).parents[2]
BUILD_INPUTS = ("pyproject.toml", "README.md", "LICENSE", "setup.py")
SECONDS = 120

pytestmark = pytest.mark.timeout(2 * SECONDS)


def run(*argv: str | Path, env: Mapping[str, str] | None = None) -> str:
    """The output of a program that has to succeed."""
    result = subprocess.run(argv, check=False, capture_output=True, text=True, env=env, stdin=subprocess.DEVNULL, timeout=SECONDS)
    assert result.returncode == 0, f"{argv}: exit status {result.returncode}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def without_compiler() -> dict[str, str]:
    """The environment of a machine without a compiler. CC and LDSHARED would bring one back, and so would a PATH that has one."""
    dropped = {"CC", "CXX", "LDSHARED", "CFLAGS", "LDFLAGS"}
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return kept | {"PATH": "/nonexistent", "CC": "/nonexistent/cc", "LDSHARED": "/nonexistent/cc -shared"}


def build_wheel(directory: Path, env: Mapping[str, str]) -> Path:
    copy = directory / "copy"
    copy.mkdir()
    for name in BUILD_INPUTS:
        if (CHECKOUT / name).exists():
            shutil.copy(CHECKOUT / name, copy)
    shutil.copytree(CHECKOUT / "docs", copy / "docs")
    shutil.copytree(CHECKOUT / "src", copy / "src", ignore=shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "-q", "--no-index"]
    run(*pip, "--no-build-isolation", "--no-deps", "-w", directory, copy, env=env)
    (wheel,) = directory.glob("pyoverlay-*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel_without_compiler(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"), without_compiler())


@pytest.fixture(scope="module")
def python_without_compiler(tmp_path_factory: pytest.TempPathFactory, wheel_without_compiler: Path) -> Path:
    """The Python of a new virtual environment with that wheel in it; pyfuse3, trio and click are this environment's."""
    venv = tmp_path_factory.mktemp("venv")
    run(sys.executable, "-m", "venv", "--system-site-packages", venv)
    python = venv / "bin" / "python"
    run(python, "-m", "pip", "--disable-pip-version-check", "install", "-q", "--no-index", "--no-deps", wheel_without_compiler)
    packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    # Below the new environment's own packages in sys.path: the wheel under test comes first.
    (packages / "tests-environment.pth").write_text(f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n")
    return python


def test_wheel_has_types_and_no_sources_of_the_extension(wheel_without_compiler: Path) -> None:
    names = zipfile.ZipFile(wheel_without_compiler).namelist()
    assert "pyoverlay/py.typed" in names
    assert [name for name in names if name.endswith((".c", ".h", ".so"))] == []
    installed = {name for name in names if name.endswith((".py", ".pyi"))}
    sources = {str(path.relative_to(CHECKOUT / "src")) for path in (CHECKOUT / "src").rglob("*.py*") if path.suffix in {".py", ".pyi"}}
    assert installed == sources


def test_the_manual_is_installed_where_man_looks_beside_the_program(python_without_compiler: Path) -> None:
    share = python_without_compiler.parents[1] / "share" / "man"
    assert (share / "man1" / "pyoverlay.1").read_text() == (CHECKOUT / "docs" / "pyoverlay.1").read_text()
    assert (share / "man8" / "mount.fuse.pyoverlay.8").read_text() == ".so man1/pyoverlay.1\n"


def test_source_distribution_has_the_repository(tmp_path: Path) -> None:
    """Debian 12's setuptools left the headers out, without which the optional extension is silently not built; and the tests."""
    copy, unwanted = tmp_path / "copy", ("*.so", "*.egg-info", "__pycache__", ".git", ".venvs", ".wheels", ".*_cache", ".hypothesis")
    shutil.copytree(CHECKOUT, copy, ignore=shutil.ignore_patterns(*unwanted))
    build = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, tmp_path], check=True, cwd=copy, capture_output=True, timeout=SECONDS)
    (archive,) = tmp_path.glob("pyoverlay-*.tar.gz")
    with tarfile.open(archive) as file:
        packed = {name.partition("/")[2] for name in file.getnames()}
    for directory in (".ci", "bench", "docs", "scripts", "src/pyoverlay", "tests"):
        ours = {str(path.relative_to(copy)) for path in (copy / directory).rglob("*") if path.is_file()}
        assert ours
        assert ours - packed == set()


def test_installation_needs_three_packages_and_no_more() -> None:
    requirements = importlib.metadata.requires("pyoverlay") or []
    at_run_time = {re.split(r"[ (<>=~!]", requirement)[0] for requirement in requirements if "extra ==" not in requirement}
    assert at_run_time == {"pyfuse3", "trio", "click"}


def test_version_is_the_same_everywhere() -> None:
    assert importlib.metadata.version("pyoverlay") == pyoverlay.__version__
    assert pyoverlay.__version__ in run(program("pyoverlay"), "--version")


def program(name: str) -> Path:
    """A console script of the environment that the tests run in."""
    path = Path(sysconfig.get_path("scripts")) / name
    assert path.exists(), f"{name} is not installed in {path.parent}; scripts/test installs the project"
    return path


def test_help_of_the_installed_program_has_an_example() -> None:
    assert "pyoverlay mount " in run(program("pyoverlay"), "--help")


def test_mount_program_is_installed() -> None:
    """Without arguments it is used wrongly, which mount(8) calls 1."""
    result = subprocess.run([program("mount.fuse.pyoverlay")], check=False, capture_output=True, text=True, timeout=SECONDS)
    assert result.returncode == 1
    assert result.stderr.count("\n") >= 1
    assert "Traceback" not in result.stderr


def change_each_way(overlay: Overlay) -> None:
    """Edit, delete and add in the merged view, and see each where it belongs."""
    (overlay.merged / "edited").write_text("new")
    (overlay.merged / "deleted").unlink()
    (overlay.merged / "added").write_text("added")
    assert sorted(os.listdir(overlay.merged)) == ["added", "edited"]
    assert (overlay.merged / "edited").read_text() == "new"
    assert (overlay.writable / "edited").read_text() == "new"
    assert (overlay.writable / "added").read_text() == "added"


def test_installed_package_mounts(overlay: OverlayFactory) -> None:
    change_each_way(overlay({"edited": "old", "deleted": "old"}))


def test_installed_package_leaves_a_whiteout(overlay: OverlayFactory) -> None:
    mounted = overlay({"deleted": "old"})
    (mounted.merged / "deleted").unlink()
    assert is_whiteout(mounted.writable / "deleted")


def test_installed_without_a_compiler_it_mounts(overlay: OverlayFactory, python_without_compiler: Path) -> None:
    find_extension = "import importlib.util as u; print(u.find_spec('pyoverlay.fuse._wire'))"
    assert run(python_without_compiler, "-P", "-c", find_extension, env=without_pythonpath()).strip() == "None"
    mounted = overlay({"edited": "old", "deleted": "old"}, mount=False)
    mounted.python = str(python_without_compiler)
    mounted.environment = without_pythonpath()
    mounted.mount()
    change_each_way(mounted)


def without_pythonpath() -> dict[str, str]:
    """PYTHONPATH would put a checkout's sources, and an extension built there, before what is installed."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
