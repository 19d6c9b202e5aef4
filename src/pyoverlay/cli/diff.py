"""`pyoverlay diff`."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator

import click

from pyoverlay.cli.completing import mount_points, paths
from pyoverlay.daemon.options import lowerdirs
from pyoverlay.errors import UsageError, printable
from pyoverlay.report import diff, target
from pyoverlay.report.changes import Change
from pyoverlay.report.target import Target

EPILOG = """\b
A added, C changed (or something in it), D deleted, by the rules of `docker diff`; with --all also
U, copied up and unchanged. Only the upper is walked, so a mount that hangs or is dead will do.

\b
Examples:
  pyoverlay diff ~/merged
  pyoverlay diff --stat --lower /srv/app:/srv/base /srv/upper
"""


@click.command(epilog=EPILOG)
@click.argument("path", metavar="MERGED|UPPER", shell_complete=mount_points)
@click.option("--lower", metavar="LOWER[:LOWER...]", shell_complete=paths, help="The layers below an UPPER that is not mounted, top first.")
@click.option("--userxattr", is_flag=True, help="The marks of an UPPER that is not mounted are user.overlay.* attributes.")
@click.option("everything", "--all", is_flag=True, help="Show what was copied up without a change, too.")
@click.option("--stat", is_flag=True, help="Show sums by directory instead.")
@click.option("--name-only", is_flag=True, help="Show paths without letters.")
@click.option("as_json", "--json", is_flag=True, help="Print one JSON object.")
@click.option("form", "--format", metavar="json", type=click.Choice(["json"]), help="As podman prints it: paths by kind.")
def command(
    path: str, lower: str | None, userxattr: bool, everything: bool, stat: bool, name_only: bool, as_json: bool, form: str | None
) -> None:
    """Show what changed in MERGED, or in the mount that UPPER is or was the upper of."""
    if sum((stat, name_only, form is not None)) > 1 or (as_json and (name_only or form is not None)):
        raise UsageError("--name-only, --format, and --stat or --json exclude one another")
    lowers, data_lowers = lowerdirs(lower) if lower is not None else ((), ())
    found = target.find(os.fsencode(path), lowers=lowers, data_lowers=data_lowers, userxattr=userxattr)
    _show(found, _changes(found, everything), stat=stat, name_only=name_only, as_json=as_json, as_podman=form is not None)


def _changes(found: Target, everything: bool) -> Iterator[Change]:
    try:
        found.sync()
        yield from diff.changes(found, copy_ups=everything)
    except OSError as error:
        raise found.refusal(error) from error


def _show(found: Target, changes: Iterable[Change], *, stat: bool, name_only: bool, as_json: bool, as_podman: bool) -> None:
    if stat:
        sums = diff.by_directory(changes)
        click.echo(json.dumps(diff.stat_json(found, sums), indent=4) if as_json else "\n".join(map(printable, diff.stat_lines(sums))))
    elif as_json or as_podman:
        click.echo(json.dumps(diff.as_json(found, changes), indent=4) if as_json else json.dumps(diff.as_podman(changes)))
    else:
        # To a terminal only what a terminal may be told; to a program the bytes of the name.
        is_terminal = sys.stdout.isatty()
        for change in changes:
            line = b"/" + change.path if name_only else diff.line(change)
            click.echo(printable(line) if is_terminal else line)
