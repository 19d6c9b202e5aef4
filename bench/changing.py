"""Workloads that change what is there: what the upper has, and what a lower has, which copies up or leaves whiteouts."""

# ruff: noqa: D103 # the title of a workload, at the end of this file, says what its steps do

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from bench.workload import Kind, Stage, Workload, expect
from bench.writing import copy_tree, count, read_tree


def _files(directory: Path) -> Iterator[str]:
    return (os.path.join(at, name) for at, _, names in os.walk(directory) for name in names)


def create(stage: Stage) -> None:
    (stage.merged / "old").mkdir()
    for number in range(stage.facts.sizes.renamed_files):
        (stage.merged / "old" / f"{number}").write_bytes(b"%d\n" % number)


def rename(stage: Stage) -> None:
    for number in range(stage.facts.sizes.renamed_files):
        os.rename(stage.merged / "old" / f"{number}", stage.merged / "old" / f"renamed{number}")


def check_renamed(stage: Stage) -> None:
    names = {f"renamed{number}" for number in range(stage.facts.sizes.renamed_files)}
    expect("names as they should be", set(os.listdir(stage.merged / "old")) == names, True)
    expect("content", (stage.merged / "old/renamed7").read_bytes(), b"7\n")


def rename_lower(stage: Stage) -> None:
    for path in list(_files(stage.tree)):
        os.rename(path, path + "-renamed")


def check_renamed_lower(stage: Stage) -> None:
    names = list(_files(stage.tree))
    expect("files", len(names), stage.facts.files)
    expect("files renamed", sum(name.endswith("-renamed") for name in names), stage.facts.files)


def chmod(stage: Stage) -> None:
    stage.run("chmod", "-R", "o-r", stage.tree)


def check_modes(stage: Stage) -> None:
    modes = [os.stat(path).st_mode & stat.S_IROTH for path in _files(stage.tree)]
    expect("files", len(modes), stage.facts.files)
    expect("files still readable", sum(map(bool, modes)), 0)


def append(stage: Stage) -> None:
    for path in _files(stage.tree):
        fd = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.write(fd, b"!")
        os.close(fd)


def check_appended(stage: Stage) -> None:
    size = sum(os.path.getsize(path) for path in _files(stage.tree))
    expect("bytes", size, stage.facts.bytes + stage.facts.files)


def append_to_big(stage: Stage) -> None:
    with (stage.merged / "big").open("ab") as file:
        file.write(b"!")


def check_big_copied(stage: Stage) -> None:
    stage.run("cmp", "-n", str(stage.facts.sizes.read_mib << 20), stage.merged / "big", stage.facts.tar.parent / "base/big")
    expect("size", (stage.merged / "big").stat().st_size, (stage.facts.sizes.read_mib << 20) + 1)


def remove_copy(stage: Stage) -> None:
    stage.run("rm", "-rf", stage.merged / "copy")


def remove_tree(stage: Stage) -> None:
    stage.run("rm", "-rf", stage.tree)


def check_tree_gone(stage: Stage) -> None:
    expect("tree is there", "tree" in os.listdir(stage.merged), False)


def check_copy_gone(stage: Stage) -> None:
    expect("copy is there", "copy" in os.listdir(stage.merged), False)
    expect("files of the tree", count(stage.tree), stage.facts.files)


WORKLOADS = (
    Workload("rename", "rename files of the upper", Kind.METADATA, rename, check_renamed, prepare=create),
    Workload("rename-lower", "rename files of a lower", Kind.METADATA, rename_lower, check_renamed_lower, prepare=read_tree),
    Workload("chmod-lower", "chmod -R of a lower tree", Kind.METADATA, chmod, check_modes, prepare=read_tree),
    Workload("append-lower", "append to each file of a lower tree", Kind.METADATA, append, check_appended, prepare=read_tree),
    Workload("big-copy-up", "copy-up of one large file", Kind.DATA, append_to_big, check_big_copied),
    Workload("rm-upper", "rm -rf of a tree in the upper", Kind.METADATA, remove_copy, check_copy_gone, prepare=copy_tree),
    Workload("rm-lower", "rm -rf of a lower tree", Kind.METADATA, remove_tree, check_tree_gone),
)
