"""`pyoverlay inspect`."""

from __future__ import annotations

import json

import click

from pyoverlay.cli.completing import mount_points
from pyoverlay.cli.formats import parsed, rendered, show
from pyoverlay.errors import PyoverlayError, UsageError
from pyoverlay.report.inspect import Inspection, as_docker, as_json, inspect

EPILOG = """\b
The template language is Go's, with docker's functions: fields, index, pipelines, variables, if, with,
range, comparisons, and json, join, split, title, lower, upper, pad, truncate. A mount whose daemon
hangs or died is told of all the same: State.Status and State.Error say so.

\b
Examples:
  pyoverlay inspect ~/merged
  pyoverlay inspect -f '{{.GraphDriver.Data.UpperDir}}' ~/merged
"""


@click.command(epilog=EPILOG)
@click.argument("merged", nargs=-1, required=True, metavar="MERGED...", shell_complete=mount_points)
@click.option("form", "--format", "-f", metavar="TEMPLATE", help="One line for each by this template, or `json`: the array in one line.")
@click.option("is_json", "--json", is_flag=True, help="Print one JSON object of pyoverlay's own schema.")
def command(merged: tuple[str, ...], form: str | None, is_json: bool) -> int:
    """Tell all there is of each mount, in the shape of `docker inspect`: layers, options, daemon, features, requests."""
    form = form or None  # docker, too, takes an empty one for none
    if is_json and form is not None:
        raise UsageError("--json and --format exclude one another")
    template = parsed(form) if form not in (None, "json") else None
    found: list[Inspection] = []
    failed = 0
    for path in merged:
        try:
            found.append(inspect(path))
        except PyoverlayError as error:
            click.echo(f"pyoverlay: {error}", err=True)
            failed = error.exit_code
    if is_json:
        click.echo(json.dumps(as_json(found), indent=4))
    elif template is not None:
        for mount in found:
            show(rendered(template, as_docker(mount)))
    else:
        array = [as_docker(mount) for mount in found]
        click.echo(json.dumps(array, indent=4) if form is None else json.dumps(array, separators=(",", ":")))
    return failed
