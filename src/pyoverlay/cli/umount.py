"""`pyoverlay umount`."""

from __future__ import annotations

import os

import click

from pyoverlay.cli.completing import mount_points
from pyoverlay.cli.values import Patience
from pyoverlay.daemon.unmounting import unmount
from pyoverlay.errors import PyoverlayError

EPILOG = """\b
Plain umount(8) works too, but returns before the upper is synced.

\b
Examples:
  pyoverlay umount ~/merged
  pyoverlay umount --lazy /srv/a /srv/b
"""


@click.command(epilog=EPILOG)
@click.argument("merged", nargs=-1, required=True, metavar="MERGED...", shell_complete=mount_points)
@click.option("--lazy", "-l", is_flag=True, help="Detach it now, whoever uses it; the daemon serves them until they are done.")
@click.option(
    "--wait",
    type=Patience(),
    default=60,
    show_default=True,
    metavar="SECONDS",
    envvar="PYOVERLAY_WAIT",
    help="How long its daemon may take to end.",
)
def command(merged: tuple[str, ...], lazy: bool, wait: float) -> int:
    """Unmount each MERGED: what was written is on disk, and its daemon gone, when this returns."""
    failed = 0
    for path in merged:
        try:
            if note := unmount(os.fsencode(path), lazily=lazy, wait=wait):
                click.echo(f"pyoverlay: {note}", err=True)
        except PyoverlayError as error:
            click.echo(f"pyoverlay: {error}", err=True)
            failed = error.exit_code
    return failed
