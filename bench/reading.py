"""Workloads that change nothing."""

# ruff: noqa: D103 # the title of a workload, at the end of this file, says what its steps do

from __future__ import annotations

import sys
import zlib

from bench.workload import NOBODY, Caches, Kind, Stage, Workload, expect

_FIND = r"find . -printf '%s %m %p\n' | wc -l"
_CAT = "find . -type f -exec cat {} + | wc -c"
_GIT = ("git", "--no-optional-locks", "-c", "safe.directory=*")
_IMPORTER = "import sys; sys.path.insert(0, sys.argv[1]); "


def find(stage: Stage) -> None:
    expect("entries found", int(stage.shell(_FIND)), stage.facts.files + stage.facts.directories)


def read(stage: Stage) -> None:
    expect("bytes read", int(stage.shell(_CAT)), stage.facts.bytes)


def grep(stage: Stage) -> None:
    expect("files with a needle", int(stage.shell("grep -rl needle . | wc -l")), stage.facts.needles)


def import_modules(stage: Stage) -> None:
    py = stage.merged / "py"
    check = f"; assert inspect.__file__.startswith({str(py)!r}), inspect.__file__"
    for _ in range(stage.facts.sizes.import_runs):
        stage.run(sys.executable, "-I", "-S", "-X", "frozen_modules=off", "-c", _IMPORTER + stage.facts.modules + check, py)


def read_big(stage: Stage) -> None:
    stage.run("dd", f"if={stage.merged}/big", "of=/dev/null", "bs=1M")


def check_big(stage: Stage) -> None:
    crc = 0
    with (stage.merged / "big").open("rb") as file:
        while block := file.read(1 << 20):
            crc = zlib.crc32(block, crc)
    expect("checksum of the large file", crc, stage.facts.big_crc)


def refresh_index(stage: Stage) -> None:
    """The index holds what the files looked like elsewhere: without this every status would read them all."""
    user, stage.user = stage.user, None
    stage.run("git", "-c", "safe.directory=*", "status", "--porcelain", cwd=stage.merged / "repo")
    stage.user = user


def git_status(stage: Stage) -> None:
    expect("git status", stage.run(*_GIT, "status", "--porcelain", cwd=stage.merged / "repo"), "")


def find_in_many(stage: Stage) -> None:
    parts = min(3, stage.facts.sizes.layers - 1)
    new_parts = sum(not part < (stage.facts.sizes.files + 199) // 200 for part in range(parts))
    entries = stage.facts.files + stage.facts.directories + stage.facts.sizes.layers - 1 + new_parts
    expect("entries found", int(stage.shell(_FIND)), entries)


def list_wide(stage: Stage) -> None:
    found = stage.shell("ls -f | wc -l", cwd=stage.merged / "wide")
    expect("names listed", int(found), stage.facts.sizes.wide_entries + 2)


def find_wide(stage: Stage) -> None:
    expect("entries found", int(stage.shell(_FIND, cwd=stage.merged / "wide")), stage.facts.sizes.wide_entries + 1)


COLD = Caches.COLD
WORKLOADS = (
    Workload("find-cold", "find -printf, cold", Kind.METADATA, find, caches=COLD),
    Workload("find-warm", "find -printf, warm", Kind.METADATA, find, prepare=find),
    Workload("read-cold", "read every file, cold", Kind.METADATA, read, caches=COLD),
    Workload("read-warm", "read every file, warm", Kind.METADATA, read, prepare=read),
    Workload("grep", "grep -r, warm", Kind.METADATA, grep, prepare=grep),
    Workload("imports", "Python imports", Kind.METADATA, import_modules, prepare=import_modules),
    Workload("big-read-cold", "read one large file, cold", Kind.DATA, read_big, check_big, caches=COLD),
    Workload("big-read-warm", "read one large file, warm", Kind.DATA, read_big, check_big, prepare=read_big),
    Workload("git-status", "git status, warm", Kind.METADATA, git_status, prepare=refresh_index),
    Workload("user-find", "find as an ordinary user, warm", Kind.METADATA, find, prepare=find, user=NOBODY),
    Workload("user-read", "read every file as an ordinary user, warm", Kind.METADATA, read, prepare=find, user=NOBODY),
    Workload("user-git-status", "git status as an ordinary user", Kind.METADATA, git_status, prepare=refresh_index, user=NOBODY),
    Workload("user-imports", "Python imports as an ordinary user", Kind.METADATA, import_modules, user=NOBODY),
    Workload("many-layers-cold", "find over 100 layers, cold", Kind.METADATA, find_in_many, caches=COLD, layers="many"),
    Workload("many-layers", "find over 100 layers, first time", Kind.METADATA, find_in_many, layers="many"),
    Workload("wide-list", "list a very large directory, cold", Kind.METADATA, list_wide, caches=COLD, layers="wide"),
    Workload("wide-find-cold", "find in a very large directory, cold", Kind.METADATA, find_wide, caches=COLD, layers="wide"),
    Workload("wide-find-warm", "find in a very large directory, warm", Kind.METADATA, find_wide, prepare=find_wide, layers="wide"),
)
