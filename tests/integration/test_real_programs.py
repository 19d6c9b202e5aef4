"""Real programs on real input, with the machine's own /usr as the lower: what they leave is what they leave on ext4.

Each program runs twice in a mount namespace of its own, at the same path, /usr/local/src: once with the merged view bound over /usr, so
that the program itself, its libraries and its input come out of the view as well, and once on a directory of ext4.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from pyoverlay.testing import Entry, Overlay, snapshot
from tests.integration.looks import litter

pytestmark = [pytest.mark.root, pytest.mark.timeout(240)]

WORK = Path("/usr/local/src")

# Fixed, so that what programs write about themselves does not differ from run to run.
ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/nonexistent",
    "LC_ALL": "C.UTF-8",
    "SOURCE_DATE_EPOCH": "1000000000",
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_CONFIG_COUNT": "1",
    "GIT_CONFIG_KEY_0": "pack.threads",  # several threads share out the deltas by chance
    "GIT_CONFIG_VALUE_0": "1",
    "GIT_AUTHOR_NAME": "A",
    "GIT_AUTHOR_EMAIL": "a@example.org",
    "GIT_AUTHOR_DATE": "2001-09-09T01:46:40Z",
    "GIT_COMMITTER_NAME": "A",
    "GIT_COMMITTER_EMAIL": "a@example.org",
    "GIT_COMMITTER_DATE": "2001-09-09T01:46:40Z",
    "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    "PIP_NO_CACHE_DIR": "1",
    "PIP_ROOT_USER_ACTION": "ignore",
}


@dataclass(slots=True)
class Twice:
    """The same commands, in the view and on ext4."""

    overlay: Overlay
    plain: Path
    since_ns: int

    @property
    def in_view(self) -> Path:
        return self.overlay.merged / WORK.relative_to("/usr")

    def run(self, script: str) -> None:
        """Run a shell script in both, in /usr/local/src; AssertionError with its output if it fails in either."""
        self._run(f"mount --bind {self.plain} {WORK}", script, "ext4")
        self._run(f"mount --rbind {self.overlay.merged} /usr", script, "the view")

    def _run(self, bind: str, script: str, where: str) -> None:
        whole = f"set -e\n{bind}\ncd {WORK}\n{script}"
        done = subprocess.run(
            ["unshare", "--mount", "--propagation", "private", "sh", "-c", whole],
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        assert done.returncode == 0, f"in {where}: exit status {done.returncode}\n{done.stdout}\n{done.stderr}"

    def compare(self, name: str, *, apart_from: tuple[str, ...] = ()) -> dict[bytes, Entry]:
        """Assert that `name` in /usr/local/src is the same tree in both; return it. Times of this run count as one time."""
        expected, got = (self._tree(place / name, apart_from) for place in (self.plain, self.in_view))
        assert expected.keys() == got.keys()
        for path, entry in expected.items():
            assert got[path] == entry, path
        return got

    def _tree(self, directory: Path, apart_from: tuple[str, ...]) -> dict[bytes, Entry]:
        left_out = tuple(map(os.fsencode, apart_from))
        return {
            path: replace(entry, mtime_ns=min(entry.mtime_ns, self.since_ns))
            for path, entry in snapshot(directory).items()
            if not path.endswith(left_out or (b"\0",))
        }


@pytest.fixture
def twice(tmp_path: Path) -> Iterator[Twice]:
    """Both places, empty. The machine's own /usr is watched by its own mtimes: the upper alone may hold what was done."""
    upper, merged, plain = (tmp_path / name for name in ("upper", "merged", "plain"))
    for directory in (upper, merged, plain):
        directory.mkdir()
    if not WORK.is_dir():
        pytest.skip(f"{WORK} does not exist here")
    before = sorted(os.listdir(WORK)), os.stat(WORK).st_mtime_ns
    overlay = Overlay((Path("/usr"),), upper, merged)
    overlay.mount()
    try:
        yield Twice(overlay, plain, time.time_ns())
    finally:
        overlay.close()
    assert litter(overlay) == []
    assert (sorted(os.listdir(WORK)), os.stat(WORK).st_mtime_ns) == before


def needs(*programs: str) -> None:
    missing = [program for program in programs if shutil.which(program, path=ENVIRONMENT["PATH"]) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")


def test_git_clone_of_a_local_repository(twice: Twice, tmp_path: Path) -> None:
    needs("git")
    origin = tmp_path / "origin"
    _make_repository(origin)
    twice.run(
        f"git -c safe.directory='*' clone -q file://{origin} clone\n"
        "cd clone\n"
        "git fsck --strict\n"
        'test -z "$(git status --porcelain)"\n'
        "git checkout -q -b topic HEAD~20\n"
        "echo changed > file7\n"
        "git commit -q -a -m topic\n"
        "git rebase -q master\n"
        "git gc -q --prune=now\n"
        'test -z "$(git status --porcelain)"\n'
        "git fsck --strict\n"
        "git cat-file --batch-all-objects --batch-check > objects\n"
    )
    # The index notes each file's inode number and ctime. A pack's deltas, and so its name, are by chance: on one ext4, 4 of 25 runs of
    # this script made another pack. The objects in it are what is compared.
    tree = twice.compare("clone", apart_from=(".git/index", ".pack", ".idx", ".git/objects/info/packs"))
    assert b"file49" in tree
    assert tree[b"script"].mode == 0o755
    assert tree[b"link"].target == b"file1"


def _make_repository(path: Path) -> None:
    def git(*arguments: str) -> None:
        subprocess.run(["git", *arguments], cwd=path, env=ENVIRONMENT, check=True)

    path.mkdir()
    git("init", "-q", "-b", "master")
    (path / "script").write_text("#!/bin/sh\n")
    (path / "script").chmod(0o755)
    (path / "link").symlink_to("file1")
    for number in range(50):
        (path / f"file{number}").write_text(f"{number}\n" * 100)
        git("add", "-A")
        git("commit", "-q", "-m", f"{number}")


def test_pip_install_into_a_virtual_environment(twice: Twice, tmp_path: Path) -> None:
    """`venv` installs pip itself, some hundred modules, from the wheel that comes with Python; then a wheel of ours."""
    needs("python3")
    python = shutil.which("python3", path=ENVIRONMENT["PATH"])
    if subprocess.run([str(python), "-c", "import ensurepip"], check=False, capture_output=True).returncode:
        pytest.skip(f"{python} has no ensurepip (Debian: apt-get install python3-venv)")
    wheel = _make_wheel(tmp_path)
    twice.run(
        f"{python} -m venv environment\n"
        f"environment/bin/pip install -q --no-index {wheel}\n"
        'test "$(environment/bin/hello)" = "hello from the wheel"\n'
        "environment/bin/pip check\n"
    )
    tree = twice.compare("environment")
    assert tree[b"bin/hello"].mode == 0o755
    assert len(tree) > 300


def _make_wheel(directory: Path) -> Path:
    wheel = directory / "hello-1.0-py3-none-any.whl"
    about = "Metadata-Version: 2.1\nName: hello\nVersion: 1.0\n"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in {
            "hello/__init__.py": 'def main():\n    print("hello from the wheel")\n',
            "hello/data/table.json": json.dumps(list(range(1000))),
            "hello-1.0.dist-info/METADATA": about,
            "hello-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            "hello-1.0.dist-info/entry_points.txt": "[console_scripts]\nhello = hello:main\n",
            "hello-1.0.dist-info/RECORD": "",
        }.items():
            archive.writestr(zipfile.ZipInfo(name, (2001, 9, 9, 1, 46, 40)), content)
    return wheel


MAKEFILE = """
CFLAGS = -O1 -g -Wall
program: main.o libparts.a
\t$(CC) -o $@ main.o -L. -lparts -lm
libparts.a: $(patsubst %.c,%.o,$(wildcard part*.c))
\t$(AR) rcs $@ $^
install: program
\tinstall -D -m 4755 program $(DESTDIR)/bin/program
\tln $(DESTDIR)/bin/program $(DESTDIR)/bin/linked
\tln -s program $(DESTDIR)/bin/alias
\tinstall -D -m 644 parts.h $(DESTDIR)/include/parts.h
"""


def test_compile_of_a_small_c_project(twice: Twice, tmp_path: Path) -> None:
    needs("cc", "make")
    project = tmp_path / "project"
    project.mkdir()
    (project / "Makefile").write_text(MAKEFILE)
    parts = range(8)
    (project / "parts.h").write_text("".join(f"double part{number}(double);\n" for number in parts))
    for number in parts:
        body = f'#include <math.h>\n#include "parts.h"\ndouble part{number}(double x) {{ return pow(x, {number}); }}\n'
        (project / f"part{number}.c").write_text(body)
    calls = " + ".join(f"part{number}(2)" for number in parts)
    (project / "main.c").write_text(f'#include <stdio.h>\n#include "parts.h"\nint main(void) {{ printf("%g\\n", {calls}); return 0; }}\n')
    twice.run(
        f"cp -a {project} project\n"
        "make -C project -j2\n"
        "make -C project install DESTDIR=../installed\n"
        'test "$(installed/bin/linked)" = 255\n'
        "touch -d 2001-09-09 project/part3.c\n"
        "rm project/part3.o\n"
        "make -C project\n"
        "make -C project -q program\n"
    )
    twice.compare("project")
    tree = twice.compare("installed")
    assert tree[b"bin/program"].mode == 0o4755
    assert tree[b"bin/linked"].nlink == 2
    assert tree[b"bin/linked"].first_name == b"bin/linked"
    assert tree[b"bin/program"].first_name == b"bin/linked"


def test_packages_of_the_distribution_unpack(twice: Twice) -> None:
    """`apt-get download` in the view and on ext4 (it becomes the user _apt for that), then `dpkg -x`."""
    needs("apt-get", "dpkg")
    packages = ("hostname", "tzdata", "passwd")
    reachable = subprocess.run(["apt-get", "download", "--print-uris", *packages], env=ENVIRONMENT, check=False, capture_output=True)
    if reachable.returncode != 0 or not _downloads(packages, twice.plain):
        pytest.skip("the distribution's archive cannot be reached, or no package lists are there (apt-get update)")
    twice.run(
        f"mkdir -m 777 debs\ncd debs\napt-get -q download {' '.join(packages)}\ncd ..\nfor deb in debs/*.deb; do dpkg -x $deb root; done\n"
    )
    twice.compare("debs")
    tree = twice.compare("root")
    assert tree[b"usr/bin/passwd"].mode == 0o4755
    assert len(tree) > 500


def _downloads(packages: tuple[str, ...], directory: Path) -> bool:
    """Whether one of them comes: an index may be there and the archive not."""
    done = subprocess.run(["apt-get", "-q", "download", packages[0]], cwd=directory, env=ENVIRONMENT, check=False, capture_output=True)
    for deb in directory.glob("*.deb"):
        deb.unlink()
    return done.returncode == 0


def test_a_package_made_of_installed_files_unpacks_over_the_installed_ones(twice: Twice, tmp_path: Path) -> None:
    """The files of a package replace themselves in the view, as an upgrade does: by tar, unlink, hard link and rename."""
    needs("dpkg", "dpkg-deb")
    package = tmp_path / "package"
    _make_package(package, "coreutils")
    subprocess.run(
        ["dpkg-deb", "-b", "--root-owner-group", package, tmp_path / "made.deb"], check=True, capture_output=True, env=ENVIRONMENT
    )
    twice.run(f"dpkg -x {tmp_path}/made.deb root")
    tree = twice.compare("root")
    assert b"usr/bin/cat" in tree
    contents = subprocess.run(
        ["dpkg-deb", "--fsys-tarfile", tmp_path / "made.deb"], check=True, capture_output=True, env=ENVIRONMENT
    ).stdout
    subprocess.run(["tar", "-x", "-C", twice.overlay.merged, "--strip-components=2", "./usr"], input=contents, check=True)
    seen, expected = snapshot(twice.overlay.merged / "bin"), snapshot(twice.plain / "root" / "usr" / "bin")
    for path, entry in expected.items():
        if path != b".":
            assert replace(seen[path], first_name=b"") == replace(entry, first_name=b""), path
    assert set(os.listdir(twice.overlay.writable / "bin")) == {os.fsdecode(path) for path in expected if path != b"."}


def _make_package(directory: Path, installed: str) -> None:
    listed = subprocess.run(["dpkg", "-L", installed], check=True, capture_output=True, text=True, env=ENVIRONMENT).stdout.split("\n")
    (directory / "DEBIAN").mkdir(parents=True)
    (directory / "DEBIAN" / "control").write_text(
        "Package: made\nVersion: 1\nArchitecture: all\nMaintainer: a <a@example.org>\nDescription: made\n"
    )
    for path in listed:
        source = Path(path if path.startswith("/usr/") else "/usr" + path)
        if path.startswith("/") and (source.is_file() or source.is_symlink()):
            target = directory / str(source).lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target, follow_symlinks=False)
