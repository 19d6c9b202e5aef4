"""What a shell completes beyond commands and options: mount points, and paths."""

from __future__ import annotations

import os

import click
from click.shell_completion import CompletionItem


def mount_points(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The live mounts' mount points that begin so, and whatever path the shell finds: first, since bash forgets there what came before."""
    from pyoverlay import registry

    # The shells take one name a line.
    points = {os.fsdecode(record.merged) for record in registry.records() if b"\n" not in record.merged}
    return [*paths(ctx, parameter, incomplete), *(CompletionItem(point) for point in sorted(points) if point.startswith(incomplete))]


def paths(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Whatever path the shell finds."""
    return [CompletionItem(incomplete, type="file")]
