"""`pyoverlay export`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import click

from pyoverlay.cli.completing import mount_points, paths
from pyoverlay.cli.progress import progress_bar
from pyoverlay.cli.values import Moment
from pyoverlay.daemon.options import lowerdirs
from pyoverlay.errors import UsageError
from pyoverlay.image import exporting, publishing
from pyoverlay.image.exporting import Manner, Written
from pyoverlay.report import target
from pyoverlay.report.target import Target

EPILOG = """\b
The same upper gives the same bytes. Sockets are left out; overlay marks and security.* attributes other
than security.capability are not carried. A mount may be in use, but a file that changes while it is
read is refused.

\b
Examples:
  pyoverlay export ~/merged -o layer.tar
  pyoverlay export --mtime 0 ~/merged | docker import - changes
"""


@click.command(epilog=EPILOG)
@click.argument("path", metavar="MERGED|UPPER", shell_complete=mount_points)
@click.option("output", "-o", "--output", metavar="FILE", shell_complete=paths,
              help="Write to FILE, which appears when it is whole.  [default: stdout]")  # fmt: skip
@click.option("--mtime", type=Moment(), metavar="SECONDS", envvar="PYOVERLAY_MTIME", help="Time that every member gets, since 1970.")
@click.option("--sparse", is_flag=True, envvar="PYOVERLAY_SPARSE", help="Keep holes, in GNU's format; Docker cannot save what it got so.")
@click.option("--lower", metavar="LOWER[:LOWER...]", shell_complete=paths, help="The layers below an UPPER that is not mounted, top first.")
@click.option("--userxattr", is_flag=True, help="The marks of an UPPER that is not mounted are user.overlay.* attributes.")
def command(path: str, output: str | None, mtime: int | None, sparse: bool, lower: str | None, userxattr: bool) -> None:
    """Write what changed, in MERGED or in an UPPER, as one layer of an image: a tar archive.

    What was deleted is a `.wh.` file, as OCI and Docker have it; a renamed directory is there whole.
    """
    lowers, data_lowers = lowerdirs(lower) if lower is not None else ((), ())
    found = target.find(os.fsencode(path), lowers=lowers, data_lowers=data_lowers, userxattr=userxattr)
    manner = Manner(mtime, is_sparse=sparse)
    if output is not None:
        with publishing.replacing(os.fsencode(os.path.abspath(output)), 0o666) as file:
            written = _export(found, publishing.writing(file, os.fsencode(output)), manner)
    elif sys.stdout.isatty():
        raise UsageError("a layer is not written to a terminal: name a file with -o, or redirect the output")
    else:
        written = _export(found, sys.stdout.buffer.write, manner)
        sys.stdout.buffer.flush()
    if written.sockets:
        click.echo(f"pyoverlay: sockets left out, which no archive can hold: {written.sockets}", err=True)


def _export(found: Target, write: Callable[[bytes], object], manner: Manner) -> Written:
    try:
        found.sync()
        view = found.open()
        try:
            _, content = exporting.measure(view, found)
            with progress_bar("Exporting", content) as progress:
                return exporting.write_layer(view, found, write, manner, progress)
        finally:
            view.close()
    except OSError as error:
        raise found.refusal(error) from error
