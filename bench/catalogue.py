"""All workloads, in the order of the table."""

from __future__ import annotations

from bench import changing, clients, reading, writing
from bench.workload import Workload

WORKLOADS: tuple[Workload, ...] = (*reading.WORKLOADS, *writing.WORKLOADS, *changing.WORKLOADS, *clients.WORKLOADS)


def named(names: list[str]) -> list[Workload]:
    """The workloads of these names, all where there are none. KeyError: there is no such workload."""
    by_name = {workload.name: workload for workload in WORKLOADS}
    return [by_name[name] for name in names] if names else list(WORKLOADS)
