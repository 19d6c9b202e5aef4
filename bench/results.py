"""What was measured: medians, ratios, the table. Times in seconds; a ratio is pyoverlay's time divided by another's."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

from bench.workload import Kind, Workload

OURS, PEER, KERNEL = "pyoverlay", "fuse-overlayfs", "kernel"

# What issue after issue is held to: the time of the kernel's overlay, times this.
KERNEL_LIMITS = {Kind.DATA: 1.5, Kind.METADATA: 4.0}


def geometric_mean(ratios: Iterable[float]) -> float:
    """NaN where there are none."""
    logarithms = [math.log(ratio) for ratio in ratios]
    return math.exp(sum(logarithms) / len(logarithms)) if logarithms else math.nan


@dataclass(frozen=True, slots=True)
class Row:
    """One workload's medians by file system."""

    workload: Workload
    medians: dict[str, float]

    def ratio_to(self, other: str) -> float | None:
        """Our time divided by the other's; None where one of the two did not run."""
        if OURS not in self.medians or other not in self.medians:
            return None
        return self.medians[OURS] / self.medians[other]

    @property
    def is_past_the_kernel_limit(self) -> bool:
        ratio = self.ratio_to(KERNEL)
        return ratio is not None and ratio > KERNEL_LIMITS[self.workload.kind]


class Results:
    """Times by workload and file system, in the order in which they came."""

    def __init__(self, filesystems: Sequence[str]) -> None:
        self.filesystems = tuple(filesystems)
        self._times: dict[str, dict[str, list[float]]] = {}
        self._workloads: dict[str, Workload] = {}

    def add(self, workload: Workload, filesystem: str, seconds: float) -> None:
        self._workloads[workload.name] = workload
        self._times.setdefault(workload.name, {}).setdefault(filesystem, []).append(seconds)

    def rows(self) -> Iterator[Row]:
        for name, workload in self._workloads.items():
            yield Row(workload, {filesystem: median(times) for filesystem, times in self._times[name].items()})

    def mean_ratio_to(self, other: str) -> float:
        """Geometric mean over the workloads that ran on both."""
        return geometric_mean(ratio for row in self.rows() if (ratio := row.ratio_to(other)) is not None)

    def table(self) -> str:
        """For a terminal; `*` marks what is slower than fuse-overlayfs, `!` what is past the limit against the kernel."""
        lines = [f"{'workload':42}" + "".join(f"{name:>16}" for name in self.filesystems) + f"{'/ fuse-ovl.':>14}{'/ kernel':>11}"]
        lines += [self._line(row) for row in self.rows()]
        peer, kernel = self.mean_ratio_to(PEER), self.mean_ratio_to(KERNEL)
        lines.append(f"{'geometric mean':42}{'':{16 * len(self.filesystems)}}{peer:>13.2f} {kernel:>10.2f}")
        return "\n".join(lines)

    def _line(self, row: Row) -> str:
        times = "".join(f"{row.medians[name]:>16.3f}" if name in row.medians else f"{'':16}" for name in self.filesystems)
        peer, kernel = row.ratio_to(PEER), row.ratio_to(KERNEL)
        slower = "*" if peer is not None and peer > 1 else " "
        past = "!" if row.is_past_the_kernel_limit else " "
        return f"{row.workload.title:42}{times}{_shown(peer):>13}{slower}{_shown(kernel):>10}{past}".rstrip()

    def markdown(self) -> str:
        """The same as a table for docs/performance.md."""
        lines = [
            "| workload | " + " | ".join(f"{name}, s" for name in self.filesystems) + " | to fuse-overlayfs | to the kernel |",
            "|---|" + "--:|" * (len(self.filesystems) + 2),
        ]
        for row in self.rows():
            times = " | ".join(f"{row.medians[name]:.3f}" if name in row.medians else "" for name in self.filesystems)
            peer, kernel = row.ratio_to(PEER), row.ratio_to(KERNEL)
            slower, past = ("**" if peer is not None and peer > 1 else ""), ("**" if row.is_past_the_kernel_limit else "")
            lines.append(f"| {row.workload.title} | {times} | {slower}{_shown(peer)}{slower} | {past}{_shown(kernel)}{past} |")
        means = f"{self.mean_ratio_to(PEER):.2f} | {self.mean_ratio_to(KERNEL):.2f}"
        lines.append(f"| **geometric mean** | {' | ' * (len(self.filesystems) - 1)} | {means} |")
        return "\n".join(lines)

    def write(self, path: Path, size: str) -> None:
        """As JSON: the machine, every single time, medians and ratios."""
        document = {
            "machine": machine(),
            "size": size,
            "workloads": {
                row.workload.name: {
                    "title": row.workload.title,
                    "kind": row.workload.kind.value,
                    "seconds": self._times[row.workload.name],
                    "median": row.medians,
                    "ratio": {other: row.ratio_to(other) for other in (PEER, KERNEL)},
                }
                for row in self.rows()
            },
            "geometric_mean": {
                other: None if math.isnan(mean := self.mean_ratio_to(other)) else mean for other in (PEER, KERNEL)
            },
        }
        path.write_text(json.dumps(document, indent=1) + "\n")


def _shown(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}"


def machine() -> dict[str, str]:
    """What kind of machine this is, and when: a figure without them says nothing."""
    model = next(
        (line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), ""
    )
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "kernel": platform.release(),
        "processors": f"{len(os.sched_getaffinity(0))} x {model or platform.machine()}",
        "memory": f"{pages / (1 << 30):.0f} GiB",
        "python": platform.python_version(),
    }
