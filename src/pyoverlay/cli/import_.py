"""`pyoverlay import`."""

from __future__ import annotations

import os

import click

from pyoverlay.cli.completing import paths
from pyoverlay.cli.progress import progress_bar
from pyoverlay.cli.values import Size
from pyoverlay.daemon.options import escape
from pyoverlay.errors import UsageError
from pyoverlay.image.importing import Wanted, import_into
from pyoverlay.image.store import Store
from pyoverlay.image.unpacking import Terms

EPILOG = """\b
SOURCE is a `docker save` archive, an OCI layout (directory or archive) or the tar archive of one layer,
gzip or not; - is standard input. Several are put on top of one another, the first lowest. A layer is
unpacked once, whoever has it. Archives are not trusted: what would leave DIR, or is malformed, is refused.

\b
Examples:
  pyoverlay mount "$(pyoverlay import app.tar /srv/images)" ~/upper ~/merged
  pyoverlay import app-layout/ /srv/images
  docker save app:1.0 | pyoverlay import - changes.tar /srv/images
"""


@click.command("import", epilog=EPILOG)
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE... DIR", shell_complete=paths)
@click.option("--tag", metavar="NAME", envvar="PYOVERLAY_TAG", help="Which image, where a SOURCE has several: a name or a tag.")
@click.option("--devices", is_flag=True, envvar="PYOVERLAY_DEVICES", help="Make device nodes; without this they are refused.")
@click.option("--max-size", type=Size(), default="64G", show_default=True, envvar="PYOVERLAY_MAX_SIZE", help="Of one layer, unpacked.")
@click.option("--max-entries", type=click.IntRange(1), default=2_000_000, show_default=True, metavar="N", envvar="PYOVERLAY_MAX_ENTRIES",
              help="Members of one layer.")  # fmt: skip
@click.option("--discard-blobs", is_flag=True, envvar="PYOVERLAY_DISCARD_BLOBS",
              help="Keep the unpacked layers alone: a later commit writes them anew, under other digests.")  # fmt: skip
def command(sources: tuple[str, ...], tag: str | None, devices: bool, max_size: int, max_entries: int, discard_blobs: bool) -> None:
    """Unpack the layers of SOURCE into DIR, and print them as LOWER:LOWER for `pyoverlay mount`."""
    *paths, directory = map(os.fsencode, sources)
    if not paths:
        raise UsageError("give at least one SOURCE, and DIR")
    wanted = Wanted(Terms(max_entries, takes_devices=devices), max_size, tag, keeps_blobs=not discard_blobs)
    imported = import_into(Store.create(directory), paths, wanted, progress_bar)
    if imported.disarmed:
        click.echo(f"pyoverlay: without the set-id bits or capabilities that only root can keep: {imported.disarmed}", err=True)
    click.echo(":".join(map(escape, imported.lowers)))
