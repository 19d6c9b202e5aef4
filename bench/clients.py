"""Four clients at once: alone with one another, on a cold tree, and beside one that waits for a slow layer."""

# ruff: noqa: D103 # the title of a workload, at the end of this file, says what its steps do

from __future__ import annotations

import subprocess
import sys

from bench.workload import COMMAND_SECONDS, Caches, Kind, Stage, Workload, expect
from bench.writing import read_tree

_CAT = "find {} -type f -exec cat {{}} + | wc -c"
CLIENTS = 4

# One process: it is gone, and the mount free, when it has been waited for.
_READ_FOR_EVER = """
import os, sys
while True:
    for directory, _, names in os.walk(sys.argv[1]):
        for name in names:
            open(os.path.join(directory, name), "rb").read()
"""


def _shares(stage: Stage) -> list[str]:
    """The directories of the tree, dealt out among the clients."""
    directories = sorted(str(path.relative_to(stage.merged)) for path in stage.tree.glob("*/*"))
    return [" ".join(directories[client::CLIENTS]) for client in range(CLIENTS)]


def read_shares(stage: Stage) -> None:
    printed = stage.together([_CAT.format(share) for share in _shares(stage)])
    expect("bytes read", sum(map(int, printed)), stage.facts.bytes)


def work_on_shares(stage: Stage) -> None:
    """Each reads its share, copies it, and removes the copy."""
    scripts = [
        f"mkdir c{client}; cp -a {share} c{client}; {_CAT.format(f'c{client}')}; rm -rf c{client}"
        for client, share in enumerate(_shares(stage))
    ]
    expect("bytes copied", sum(map(int, stage.together(scripts))), stage.facts.bytes)


def three_beside_a_slow_one(stage: Stage) -> None:
    """Three read their shares while a fourth reads from the slow layer, for as long as the others take."""
    slow = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _READ_FOR_EVER, stage.merged / "slow"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    try:
        printed = stage.together([_CAT.format("tree")] * (CLIENTS - 1))
    finally:
        slow.kill()
        slow.wait(COMMAND_SECONDS)
    expect("bytes read", [int(count) for count in printed], [stage.facts.bytes] * (CLIENTS - 1))


def all_on_the_slow_layer(stage: Stage) -> None:
    printed = stage.together([f"cat slow/client{client}/* | wc -l" for client in range(CLIENTS)])
    expect("clients that read something", sum(int(count) > 0 for count in printed), CLIENTS)


WORKLOADS = (
    Workload("clients", "four clients read, copy and remove", Kind.METADATA, work_on_shares, prepare=read_tree),
    Workload("clients-cold", "four clients read a cold tree", Kind.METADATA, read_shares, caches=Caches.COLD),
    Workload("clients-beside-slow", "three clients beside one on a slow layer", Kind.METADATA, three_beside_a_slow_one, layers="slow"),
    Workload("clients-on-slow", "four clients on a slow layer", Kind.METADATA, all_on_the_slow_layer, layers="slow"),
)
