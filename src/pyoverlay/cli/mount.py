"""`pyoverlay mount`."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, TextIO

import click
from click.core import ParameterSource

from pyoverlay.cli.completing import paths
from pyoverlay.cli.values import Patience
from pyoverlay.daemon import launch
from pyoverlay.daemon.options import Options, parse, with_directories
from pyoverlay.daemon.request import Request
from pyoverlay.errors import PyoverlayError, Refusal, printable

EPILOG = """\b
Leftmost is on top, as in the kernel's lowerdir= (bubblewrap's order is the reverse). A colon in a
name is written as `\\:`. With -o, SOURCE is what /proc/mounts shows, and without upperdir= the
mount is read-only. Every long option can be set as PYOVERLAY_NAME in the environment.

\b
A FILE for --from has what stands behind `pyoverlay mount`, one mount a line, quoted as in a shell;
lines that begin with # are passed over. If a line cannot be read nothing is mounted; what then
cannot be mounted is reported, and the rest is.

\b
Examples:
  pyoverlay mount /srv/app:/srv/base ~/upper ~/merged
  pyoverlay mount -o lowerdir=/srv/app:/srv/base,upperdir=/srv/up,workdir=/srv/work /mnt
  pyoverlay mount --from overlays.list
"""

# What a line of a --from FILE cannot have: it is for the command as a whole.
_ONCE = ("listed", "foreground", "wait")


class OptionString(click.types.StringParamType):
    """An option string is taken from the environment whole: blanks may be part of a path."""

    def split_envvar_value(self, rv: str) -> list[str]:
        return [rv]


@click.command(epilog=EPILOG)
@click.argument("directories", nargs=-1, metavar="LOWER[:LOWER...] UPPER MERGED | [SOURCE] MERGED", shell_complete=paths)
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
    shell_complete=paths,
    envvar="PYOVERLAY_WORKDIR",
    help="Work directory, beside UPPER on its file system.  [default: .UPPER-NAME.pyoverlay-work, made if missing]",
)
@click.option("--from", "listed", type=click.File(errors="surrogateescape"), metavar="FILE", help="Mount what FILE lists (- is stdin).")
@click.option("--foreground", "-f", is_flag=True, envvar="PYOVERLAY_FOREGROUND", help="Stay until unmounted; log to stderr.")
@click.option(
    "--wait",
    type=Patience(),
    default=60,
    show_default=True,
    metavar="SECONDS",
    envvar="PYOVERLAY_WAIT",
    help="How long the mount may take to answer.",
)
@click.option(
    "--log-file", metavar="FILE", shell_complete=paths, envvar="PYOVERLAY_LOG_FILE", help="Log to FILE.  [default: syslog, or stderr]"
)
@click.option(
    "--log-format",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    envvar="PYOVERLAY_LOG_FORMAT",
    help="Text, or JSON a line.",
)
@click.option("--verbose", "-v", count=True, envvar="PYOVERLAY_VERBOSE", help="Log more.")
@click.option("--quiet", "-q", is_flag=True, envvar="PYOVERLAY_QUIET", help="Log errors only.")
@click.pass_context
def command(
    context: click.Context, /, directories: tuple[str, ...], listed: TextIO | None, foreground: bool, wait: float, **others: Any
) -> int:
    """Show LOWER, with what is in UPPER on top of it, at MERGED.

    Changes made in MERGED go to UPPER; a LOWER is never changed. Returns when the mount answers; it lives on in the background until
    `pyoverlay umount MERGED`.
    """
    if listed is not None:
        if _given(context) - {"listed", "wait"}:
            raise click.UsageError("with --from, all but --wait stands in the lines of the file")
        return _mount_each(listed, wait)
    request = _request(directories, **others)
    if foreground:
        launch.mount_in_foreground(replace(request, foreground=True))
    launch.mount(request, wait)
    return 0


def _given(context: click.Context) -> set[str]:
    """The parameters that are on the command line."""
    given = {name for name in context.params if context.get_parameter_source(name) is ParameterSource.COMMANDLINE}
    return given if context.params["directories"] else given - {"directories"}


def _request(
    directories: tuple[str, ...],
    options: tuple[str, ...],
    workdir: str | None,
    log_file: str | None,
    log_format: str,
    verbose: int,
    quiet: bool,
) -> Request:
    chosen, merged = _layers(parse(options), directories, workdir)
    level = 40 if quiet else 10 if verbose else 20
    return Request(chosen, os.fsencode(merged), log_file=log_file, log_level=level, log_format=log_format)


# ── many at once ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _mount_each(file: TextIO, wait: float) -> int:
    """Mount what a file lists. The exit code: that of the first thing that is wrong."""
    lines = [(number, line) for number, line in enumerate(file, start=1) if line.strip() and not line.lstrip().startswith("#")]
    places = [f"{printable(file.name)}:{number}" for number, _ in lines]
    requests, refused = [], []
    for place, (_, line) in zip(places, lines, strict=True):
        try:
            requests.append(_listed(line))
        except (click.ClickException, PyoverlayError, ValueError) as error:
            refused.append(_refuse(place, error))
    if not refused:
        refused = [_refuse(place, error) for place, error in _named_twice(places, requests)]
    if requests and not refused:
        outcomes = zip(places, launch.mount_each(requests, wait), strict=True)
        refused = [_refuse(place, error) for place, error in outcomes if error is not None]
    return refused[0] if refused else 0


def _named_twice(places: Sequence[str], requests: Sequence[Request]) -> Iterator[tuple[str, Refusal]]:
    """The lines whose mount point an earlier one has: mounted at once, one would hide the other before that had answered."""
    first: dict[bytes, str] = {}
    for place, request in zip(places, requests, strict=True):
        earlier = first.setdefault(os.path.realpath(request.merged), place)
        if earlier != place:
            yield place, Refusal(request.merged, f"the mount point of {earlier} too", remedy="name another")


def _listed(line: str) -> Request:
    """The request of a line. Raises what parsing does; ValueError for a quote that is not closed."""
    context = command.make_context("mount", shlex.split(line), help_option_names=[], ignore_unknown_options=False)
    unwanted = sorted(_given(context) & set(_ONCE))
    if unwanted:
        raise click.UsageError(f"--{'from' if unwanted[0] == 'listed' else unwanted[0]} is for the whole command, not for a line")
    chosen = {name: value for name, value in context.params.items() if name not in _ONCE}
    return _request(**chosen)


def _refuse(place: str, error: Exception) -> int:
    """Say what is wrong with a line; the exit code for it."""
    message = error.format_message() if isinstance(error, click.ClickException) else str(error)
    click.echo(f"pyoverlay: {place}: {message}", err=True)
    return error.exit_code if isinstance(error, click.ClickException | PyoverlayError) else 2


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
