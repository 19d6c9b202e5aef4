"""The layers that workloads run over, made once a run and the same for every file system.

tree    two lowers: `top` replaces every tenth file of `base`, which holds tree/ (small files), repo/ (a git repository), py/ (Python
        modules) and big (one large file)
many    one file a layer, in directories that all layers have, over `base`
wide    one directory with very many entries
slow    `base` over a layer that takes 20 ms for each answer (slow_lower.py), in which slow/ lies
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sysconfig
import zlib
from pathlib import Path

from bench.workload import ENVIRONMENT, Facts, Sizes

FILES_IN_DIRECTORY = 20
NEEDLE = b"a needle in the haystack\n"
_NEEDLE_EVERY, _REPLACED_EVERY, _LARGE_EVERY = 17, 10, 50
_MIB = 1 << 20

_PACKAGES = ("asyncio", "email", "http", "json", "logging", "unittest", "urllib", "xml", "concurrent", "importlib")
_MODULES = ("argparse", "ast", "csv", "decimal", "difflib", "dis", "fractions", "inspect", "pydoc", "tarfile", "typing", "plistlib")
_IMPORTED = (
    "asyncio email.mime.text email.parser http.server json.tool unittest.mock urllib.request xml.etree.ElementTree xml.dom.minidom "
    "concurrent.futures logging.handlers argparse ast csv decimal difflib dis fractions inspect pydoc tarfile typing plistlib"
).split()


class LayerSets:
    """All layers below one directory."""

    def __init__(self, directory: Path, sizes: Sizes) -> None:
        self.directory = directory
        self.sizes = sizes
        self._random = random.Random(1)  # the same trees in every run
        self._made: set[str] = set()
        base, top = directory / "base", directory / "top"
        base.mkdir()
        top.mkdir()
        self.facts = self._make_base(base, top)

    def lowers(self, name: str) -> list[Path]:
        """The lowers of a set, from the top; made where they are not there yet. For `slow`, the bottom is still to be served slowly."""
        if name not in self._made:
            self._made.add(name)
            {"tree": lambda: None, "many": self._make_many, "wide": self._make_wide, "slow": self._make_slow}[name]()
        base = self.directory / "base"
        match name:
            case "tree":
                return [self.directory / "top", base]
            case "many":
                return [*(self.directory / "many" / f"{number:03}" for number in range(self.sizes.layers - 1)), base]
            case "wide":
                return [self.directory / "wide"]
            case _:
                return [base, self.directory / "slow"]

    # -- the sets

    def _make_base(self, base: Path, top: Path) -> Facts:
        files, directories, total, needles = self._make_tree(base / "tree", top / "tree")
        _make_repository(base / "repo", base / "tree")
        statement = _make_modules(base / "py")
        crc = self._make_big(base / "big", self.sizes.read_mib)
        tar = self.directory / "tree.tar"
        _run("tar", "cf", str(tar), "-C", str(base), "tree")
        return Facts(self.sizes, files, directories, total, needles, crc, statement, tar, self._make_package(base / "tree"))

    def _make_tree(self, base: Path, top: Path) -> tuple[int, int, int, int]:
        """Files, directories (the tree's own too), bytes, files with a needle: of the merged tree."""
        directories, total, needles = 1, 0, 0
        for number in range(self.sizes.files):
            place = Path(f"part{number // (FILES_IN_DIRECTORY * 10)}", f"directory{number // FILES_IN_DIRECTORY}")
            if number % FILES_IN_DIRECTORY == 0:
                directories += 1 + (number % (FILES_IN_DIRECTORY * 10) == 0)
                (base / place).mkdir(parents=True)
            content = self._text(number)
            total += len(content)
            needles += number % _NEEDLE_EVERY == 0
            (base / place / f"file{number}").write_bytes(content)
            if number % _REPLACED_EVERY == 0:
                (top / place).mkdir(parents=True, exist_ok=True)
                (top / place / f"file{number}").write_bytes(content.replace(b"word", b"WORD"))
        return self.sizes.files, directories, total, needles

    def _text(self, number: int) -> bytes:
        """Mostly a few KiB, as in source trees; now and then more."""
        size = 65536 if number % _LARGE_EVERY == 0 else self._random.randrange(200, 8000)
        lines = b"".join(b"%d: a line of words %d\n" % (number, self._random.randrange(1 << 30)) for _ in range(20))
        return (lines * (size // len(lines) + 1))[:size] + (NEEDLE if number % _NEEDLE_EVERY == 0 else b"\n")

    def _make_big(self, path: Path, mib: int) -> int:
        crc = 0
        with path.open("wb") as file:
            for _ in range(mib):
                block = self._random.randbytes(_MIB)
                crc = zlib.crc32(block, crc)
                file.write(block)
        return crc

    def _make_package(self, tree: Path) -> Path:
        """A Debian package with the tree below /opt."""
        root, deb = self.directory / "package", self.directory / "package.deb"
        (root / "DEBIAN").mkdir(parents=True)
        (root / "DEBIAN/control").write_text(
            "Package: bench\nVersion: 1\nArchitecture: all\nMaintainer: nobody <nobody@localhost>\nDescription: files\n"
        )
        shutil.copytree(tree, root / "opt/tree")
        _run("dpkg-deb", "--root-owner-group", "-Zgzip", "-z1", "-b", str(root), str(deb))
        shutil.rmtree(root)
        return deb

    def _make_many(self) -> None:
        for number in range(self.sizes.layers - 1):
            directory = self.directory / "many" / f"{number:03}" / "tree" / f"part{number % 3}"
            directory.mkdir(parents=True)
            (directory / f"of-layer{number}").write_bytes(b"%d\n" % number)

    def _make_wide(self) -> None:
        directory = self.directory / "wide" / "wide"
        directory.mkdir(parents=True)
        for number in range(self.sizes.wide_entries):
            os.close(os.open(directory / f"entry-{number:06}", os.O_CREAT | os.O_WRONLY, 0o644))

    def _make_slow(self) -> None:
        for client in range(4):
            directory = self.directory / "slow" / "slow" / f"client{client}"
            directory.mkdir(parents=True)
            for number in range(self.sizes.slow_files):
                (directory / f"file{number}").write_bytes(self._text(1))


def _make_repository(path: Path, tree: Path) -> None:
    """A repository whose one commit is the tree."""
    shutil.copytree(tree, path)
    _run("git", "init", "-q", "-b", "main", cwd=path)
    _run("git", "add", "-A", cwd=path)
    _run("git", "-c", "user.name=bench", "-c", "user.email=bench@localhost", "-c", "gc.auto=0", "commit", "-q", "-m", "all", cwd=path)


def _make_modules(path: Path) -> str:
    """Part of the standard library, compiled; the statement that imports it."""
    library = Path(sysconfig.get_path("stdlib"))
    path.mkdir()
    for package in _PACKAGES:
        shutil.copytree(library / package, path / package, ignore=shutil.ignore_patterns("test", "tests", "*.pyc"))
    for module in _MODULES:
        shutil.copy(library / f"{module}.py", path)
    _run(os.path.realpath("/proc/self/exe"), "-m", "compileall", "-q", str(path))
    return "import " + ", ".join(_IMPORTED)


def _run(*argv: str, cwd: Path | None = None) -> None:
    subprocess.run(argv, check=True, cwd=cwd, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=ENVIRONMENT)
