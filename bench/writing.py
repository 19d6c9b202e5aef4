"""Workloads that make something new."""

# ruff: noqa: D103 # the title of a workload, at the end of this file, says what its steps do

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

from bench.workload import Kind, Stage, Workload, WrongResult, expect

_GIT = ("git", "-c", "safe.directory=*", "-c", "gc.auto=0")


def count(directory: Path) -> int:
    """Regular files below a directory."""
    return sum(len(files) for _, _, files in os.walk(directory))


def _same_as_tree(stage: Stage, directory: Path) -> None:
    stage.run("diff", "-r", stage.tree, directory)


def write_big(stage: Stage) -> None:
    stage.run("dd", "if=/dev/zero", f"of={stage.merged}/new", "bs=1M", f"count={stage.facts.sizes.write_mib}")


def check_written(stage: Stage) -> None:
    st = (stage.merged / "new").stat()
    expect("size", st.st_size, stage.facts.sizes.write_mib << 20)


def write_small(stage: Stage) -> None:
    stage.run("dd", "if=/dev/zero", f"of={stage.merged}/small", "bs=4k", f"count={stage.facts.sizes.small_writes}")


def check_small(stage: Stage) -> None:
    expect("size", (stage.merged / "small").stat().st_size, stage.facts.sizes.small_writes * 4096)


def sync_files(stage: Stage) -> None:
    (stage.merged / "synced").mkdir()
    for number in range(stage.facts.sizes.synced_files):
        fd = os.open(stage.merged / "synced" / f"{number}", os.O_CREAT | os.O_WRONLY, 0o644)
        os.write(fd, b"%d\n" % number)
        os.fsync(fd)
        os.close(fd)


def check_synced(stage: Stage) -> None:
    for number in range(stage.facts.sizes.synced_files):
        expect("content", (stage.merged / "synced" / f"{number}").read_bytes(), b"%d\n" % number)


def copy_tree(stage: Stage) -> None:
    stage.run("cp", "-a", stage.tree, stage.merged / "copy")


def read_tree(stage: Stage) -> None:
    """The source is in memory: what is measured is the writing."""
    stage.shell("find . -type f -exec cat {} + | wc -c")


def check_copy(stage: Stage) -> None:
    _same_as_tree(stage, stage.merged / "copy")


def untar(stage: Stage) -> None:
    (stage.merged / "untarred").mkdir()
    stage.run("tar", "xf", stage.facts.tar, "-C", stage.merged / "untarred")


def check_untarred(stage: Stage) -> None:
    stage.run("tar", "df", stage.facts.tar, "-C", stage.merged / "untarred")


def unpack(stage: Stage) -> None:
    stage.run("dpkg", "-x", stage.facts.deb, stage.merged / "unpacked")


def check_unpacked(stage: Stage) -> None:
    stage.run("tar", "df", stage.facts.tar, "-C", stage.merged / "unpacked/opt")


def start_repository(stage: Stage) -> None:
    stage.run("git", "init", "-q", "-b", "main", stage.tree)


def git_add(stage: Stage) -> None:
    stage.run(*_GIT, "add", "-A", cwd=stage.tree)


def check_added(stage: Stage) -> None:
    expect("files in the index", len(stage.run(*_GIT, "ls-files", cwd=stage.tree).splitlines()), stage.facts.files)
    expect("git fsck", stage.run(*_GIT, "fsck", "--no-dangling", cwd=stage.tree), "")


def create_and_remove(stage: Stage) -> None:
    directory = stage.merged / "created"
    directory.mkdir()
    for number in range(stage.facts.sizes.created_files):
        os.close(os.open(directory / f"{number}", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
    expect("names", len(os.listdir(directory)), stage.facts.sizes.created_files)
    for number in range(stage.facts.sizes.created_files):
        os.unlink(directory / f"{number}")
    directory.rmdir()


def check_removed(stage: Stage) -> None:
    if (stage.merged / "created").exists():
        raise WrongResult("the directory that was removed is still there")


def make_transactions(stage: Stage) -> None:
    database = sqlite3.connect(stage.merged / "database", isolation_level=None)
    try:
        database.execute("create table t (n integer)")
        for number in range(stage.facts.sizes.transactions):
            database.execute("insert into t values (?)", (number,))
    finally:
        database.close()


def check_database(stage: Stage) -> None:
    database = sqlite3.connect(stage.merged / "database")
    try:
        expect("rows", database.execute("select count(*) from t").fetchone()[0], stage.facts.sizes.transactions)
        expect("integrity", database.execute("pragma integrity_check").fetchone()[0], "ok")
    finally:
        database.close()


WORKLOADS = (
    Workload("big-write", "write one large file", Kind.DATA, write_big, check_written),
    Workload("small-writes", "4 KiB writes", Kind.DATA, write_small, check_small),
    Workload("fsync", "create, write and fsync many files", Kind.METADATA, sync_files, check_synced),
    Workload("cp-a", "cp -a of the tree", Kind.METADATA, copy_tree, check_copy, prepare=read_tree),
    Workload("untar", "tar x", Kind.METADATA, untar, check_untarred),
    Workload("dpkg-x", "dpkg -x", Kind.METADATA, unpack, check_unpacked),
    Workload("git-add", "git add of the tree", Kind.METADATA, git_add, check_added, prepare=start_repository),
    Workload("create-remove", "create and remove files", Kind.METADATA, create_and_remove, check_removed),
    Workload("sqlite", "sqlite transactions", Kind.METADATA, make_transactions, check_database),
)
