"""`pyoverlay mount`."""

from __future__ import annotations

import os
from dataclasses import replace

import click

from pyoverlay.daemon import launch
from pyoverlay.daemon.options import Options, parse, with_directories
from pyoverlay.daemon.request import Request

EPILOG = """\b
Leftmost is on top, as in the kernel's lowerdir= (bubblewrap's order is the reverse). A colon in a
name is written as `\\:`. With -o, SOURCE is what /proc/mounts shows, and without upperdir= the
mount is read-only. Every long option can be set as PYOVERLAY_NAME in the environment.

\b
Examples:
  pyoverlay mount /srv/app:/srv/base ~/upper ~/merged
  pyoverlay mount -o lowerdir=/srv/app:/srv/base,upperdir=/srv/up,workdir=/srv/work /mnt
"""


class OptionString(click.types.StringParamType):
    """An option string is taken from the environment whole: blanks may be part of a path."""

    def split_envvar_value(self, rv: str) -> list[str]:
        return [rv]


@click.command(epilog=EPILOG)
@click.argument("directories", nargs=-1, metavar="LOWER[:LOWER...] UPPER MERGED | [SOURCE] MERGED")
@click.option(
    "options",
    "-o",
    "--options",
    multiple=True,
    type=OptionString(),
    metavar="OPTION[,OPTION...]",
    envvar="PYOVERLAY_OPTIONS",
    help="Mount options, as the kernel's overlay and mount(8) spell them; may be given several times.",
)
@click.option(
    "--workdir",
    metavar="DIR",
    envvar="PYOVERLAY_WORKDIR",
    help="Work directory, beside UPPER on its file system.  [default: .UPPER-NAME.pyoverlay-work, made if missing]",
)
@click.option("--foreground", "-f", is_flag=True, envvar="PYOVERLAY_FOREGROUND", help="Stay until it is unmounted, and log to stderr.")
@click.option(
    "--wait",
    type=click.FloatRange(0),
    default=60,
    show_default=True,
    metavar="SECONDS",
    envvar="PYOVERLAY_WAIT",
    help="How long the mount may take to answer.",
)
@click.option("--log-file", metavar="FILE", envvar="PYOVERLAY_LOG_FILE", help="Log to FILE.  [default: syslog; stderr with -f]")
@click.option(
    "--log-format",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    envvar="PYOVERLAY_LOG_FORMAT",
    help="Lines for people, or a JSON object a line.",
)
@click.option("--verbose", "-v", count=True, envvar="PYOVERLAY_VERBOSE", help="Log more.")
@click.option("--quiet", "-q", is_flag=True, envvar="PYOVERLAY_QUIET", help="Log errors only.")
def command(
    directories: tuple[str, ...],
    options: tuple[str, ...],
    workdir: str | None,
    foreground: bool,
    wait: float,
    log_file: str | None,
    log_format: str,
    verbose: int,
    quiet: bool,
) -> None:
    """Show LOWER, with what is in UPPER on top of it, at MERGED.

    Changes made in MERGED go to UPPER; a LOWER is never changed. Returns when the mount answers; it lives on in the background until
    `pyoverlay umount MERGED`.
    """
    chosen, merged = _layers(parse(options), directories, workdir)
    level = 40 if quiet else 10 if verbose else 20
    request = Request(chosen, os.fsencode(merged), foreground=foreground, log_file=log_file, log_level=level, log_format=log_format)
    if foreground:
        launch.mount_in_foreground(request)
    launch.mount(request, wait)


def _layers(options: Options, directories: tuple[str, ...], work: str | None) -> tuple[Options, str]:
    """The options with their layers, and MERGED: by position, or in the kernel's spelling."""
    if work is not None and options.work is not None:
        raise click.UsageError("the work directory is given twice, by --workdir and by -o workdir=")
    if options.lowers:
        if not 1 <= len(directories) <= 2:
            raise click.UsageError("with -o lowerdir=, give [SOURCE] MERGED and nothing else")
        *source, merged = directories
        if source and options.source is None:
            options = replace(options, source=source[0])
        return with_directories(options, work=work), merged
    if len(directories) != 3:
        raise click.UsageError("give LOWER[:LOWER...] UPPER MERGED, or -o lowerdir=... and MERGED")
    if options.upper is not None:
        raise click.UsageError("the upper is given twice, as an argument and by -o upperdir=")
    lower, upper, merged = directories
    return with_directories(options, lowers=lower, upper=upper, work=work), merged
