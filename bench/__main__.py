"""The command line: `python -m bench --help`."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import FrameType
from typing import NoReturn

from bench.catalogue import named
from bench.chart import chart
from bench.filesystems import FileSystem, FuseOverlayfs, Kernel, Pyoverlay
from bench.layers import LayerSets
from bench.measure import compare, fresh_filesystem, scratch
from bench.profiling import explain
from bench.results import Results, machine
from bench.workload import FULL, QUICK, Sizes, Workload, WrongResult

# Not TMPDIR's default: where /tmp is in memory there is nothing cold.
_DEFAULT_PLACE = os.environ.get("TMPDIR", "/var/tmp")


def main() -> int:
    """The exit status: 0, 1 for a wrong result, 2 for what cannot be run here."""
    arguments = _parsed()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _end)  # through every `finally`: nothing stays mounted
    sizes = FULL if arguments.full else QUICK
    try:
        workloads = named(arguments.only + arguments.profile)
    except KeyError as error:
        return _refused(f"there is no workload {error}; --list shows those there are")
    if arguments.list:
        print(*(f"{workload.name:22} {workload.title}" for workload in workloads), sep="\n")
        return 0
    if os.geteuid() != 0:
        return _refused("run it as root: it mounts the kernel's overlay and drops the caches")
    filesystems = _filesystems(arguments)
    try:
        with scratch(arguments.fs) as place, _place_of_layers(place, arguments.image) as directory:
            layers = LayerSets(directory, sizes)
            if arguments.profile:
                for workload in workloads:
                    print(explain(workload, layers, arguments.option))
                return 0
            results = compare(filesystems, workloads, layers, arguments.rounds or sizes.rounds, _report)
    except WrongResult as error:
        print(f"bench: wrong result: {error}", file=sys.stderr)
        return 1
    _publish(results, arguments, sizes)
    return 0


def _end(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)


def _place_of_layers(place: Path, image: str | None) -> AbstractContextManager[Path]:
    return nullcontext(place) if image is None else fresh_filesystem(place, image)


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/benchmark",
        description="Time workloads on the kernel's overlayfs, fuse-overlayfs and pyoverlay, over the same layers.",
        epilog="Needs root. A slow result fails nothing; a wrong one ends the run with status 1.",
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="small trees, under 3 minutes (the default)")
    size.add_argument("--full", action="store_true", help="large trees and files, about 20 minutes")
    parser.add_argument("--only", metavar="NAME", action="append", default=[], help="this workload; may be repeated")
    parser.add_argument("--rounds", metavar="N", type=int, help="how often each runs on each file system (quick: 1, full: 3)")
    parser.add_argument("--fs", metavar="DIR", type=Path, default=Path(_DEFAULT_PLACE), help=f"where the layers lie ({_DEFAULT_PLACE})")
    parser.add_argument("--image", choices=("ext4", "xfs"), help="make a fresh file system for the layers, in a file below --fs")
    parser.add_argument("--fuse-overlayfs", metavar="PROGRAM", default="fuse-overlayfs", help="another one than PATH's")
    parser.add_argument("--option", metavar="ARGUMENT", action="append", default=[], help="for `pyoverlay mount`")
    parser.add_argument("--without", metavar="NAME", action="append", default=[], help="leave a file system out: kernel, fuse-overlayfs")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write every time there")
    parser.add_argument("--svg", metavar="FILE", type=Path, help="write the chart there")
    parser.add_argument("--markdown", metavar="FILE", type=Path, help="write the table there, for docs/performance.md")
    parser.add_argument("--profile", metavar="NAME", action="append", default=[], help="count its requests and profile the daemon")
    parser.add_argument("--list", action="store_true", help="list the workloads and stop")
    return parser.parse_args()


def _filesystems(arguments: argparse.Namespace) -> list[FileSystem]:
    filesystems: list[FileSystem] = [Kernel(), FuseOverlayfs(arguments.fuse_overlayfs), Pyoverlay(arguments.option)]
    if shutil.which(arguments.fuse_overlayfs) is None and "fuse-overlayfs" not in arguments.without:
        print(f"bench: {arguments.fuse_overlayfs} is not installed: nothing is compared with it", file=sys.stderr)
        arguments.without.append("fuse-overlayfs")
    return [filesystem for filesystem in filesystems if filesystem.name not in arguments.without]


_BEGIN = time.monotonic()


def _report(workload: Workload, filesystem: FileSystem, seconds: float) -> None:
    print(f"{time.monotonic() - _BEGIN:7.1f}  {workload.name:22} {filesystem.name:16} {seconds:9.3f} s", file=sys.stderr, flush=True)


def _publish(results: Results, arguments: argparse.Namespace, sizes: Sizes) -> None:
    here = machine()
    print(", ".join(f"{what} {value}" for what, value in here.items()) + f", {sizes.name} size")
    print(results.table())
    print("*: slower than fuse-overlayfs   !: past 1.5 (data) or 4 (metadata) times the kernel's overlayfs")
    if arguments.json is not None:
        results.write(arguments.json, sizes.name)
    if arguments.svg is not None:
        arguments.svg.write_text(chart(results, here, sizes.name))
    if arguments.markdown is not None:
        arguments.markdown.write_text(results.markdown() + "\n")


def _refused(reason: str) -> int:
    print(f"bench: {reason}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
