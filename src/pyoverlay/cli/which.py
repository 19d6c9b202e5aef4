"""`pyoverlay which`."""

from __future__ import annotations

import json
import os

import click

from pyoverlay.cli.completing import mount_points
from pyoverlay.errors import PyoverlayError, Refusal
from pyoverlay.report import which
from pyoverlay.report.which import Origin

EPILOG = """\b
Symbolic links in PATH are not followed. Only layers are looked at, so a mount that hangs or is dead
will do. Exit codes: 0 all there, 1 not all are, 2 usage.

\b
Examples:
  pyoverlay which ~/merged/etc/hosts
  pyoverlay which --json ~/merged/bin/*
"""


@click.command(epilog=EPILOG)
@click.argument("paths", nargs=-1, required=True, metavar="MERGED/PATH...", shell_complete=mount_points)
@click.option("as_json", "--json", is_flag=True, help="Print one JSON object.")
def command(paths: tuple[str, ...], as_json: bool) -> int:
    """Say which layer each PATH comes from, whether it was copied up, what it hides, and why."""
    origins: list[Origin] = []
    failed = 0
    for path in map(os.fsencode, paths):
        try:
            origins.append(_origin(path))
            failed |= origins[-1].state == "absent"
        except PyoverlayError as error:
            click.echo(f"pyoverlay: {error}", err=True)
            failed = error.exit_code
    if as_json:
        click.echo(json.dumps(which.as_json(origins), indent=4))
    else:
        for origin in origins:
            click.echo("\n".join(which.lines(origin)))
    return int(failed)


def _origin(path: bytes) -> Origin:
    record, names = which.mount_of(path)
    try:
        layers = which.open_layers(record)
        try:
            return layers.origin(path, names)
        finally:
            layers.view.close()
    except OSError as error:
        raise Refusal.of(error, path) from error
