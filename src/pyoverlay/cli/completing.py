"""What a shell completes beyond commands and options: mount points, and paths."""

from __future__ import annotations

import os

import click
from click.shell_completion import CompletionItem


def mount_points(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The live mounts' mount points that begin so, and whatever path the shell finds."""
    from pyoverlay import registry

    points = {os.fsdecode(record.merged) for record in registry.records()}
    return [*(CompletionItem(point) for point in sorted(points) if point.startswith(incomplete)), CompletionItem(incomplete, type="file")]
