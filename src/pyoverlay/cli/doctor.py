"""`pyoverlay doctor`."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence

import click

from pyoverlay import __version__
from pyoverlay.cli.completing import paths
from pyoverlay.daemon import checks
from pyoverlay.daemon.checks import Check, State

EPILOG = """\b
Exit codes: 0 a mount is possible, 1 something it needs is off.

\b
Examples:
  pyoverlay doctor
  pyoverlay doctor --json /srv/upper
"""


@click.command(epilog=EPILOG)
@click.argument("upper", required=False, metavar="[UPPER]", shell_complete=paths)
@click.option("as_json", "--json", is_flag=True, help="Print one JSON object instead of text.")
def command(upper: str | None, as_json: bool) -> int:
    """Say what is on, what is off, and how to get it: on this machine, and in the file system of UPPER."""
    found = [*checks.machine(), *(checks.upper(os.fsencode(upper)) if upper is not None else ())]
    click.echo(_json(found) if as_json else _text(found))
    return int(any(check.state is State.OFF for check in found))


def _text(found: Sequence[Check]) -> str:
    width = max(len(check.name) for check in found)
    lines = []
    for check in found:
        lines.append(f"{check.state.value:<4}  {check.name:<{width}}  {check.detail}")
        if check.remedy is not None:
            lines.append(f"{'':<{width + 8}}-> {check.remedy}")
    return "\n".join(lines)


def _json(found: Sequence[Check]) -> str:
    checked = [{"name": c.name, "state": c.state.value, "detail": c.detail, "remedy": c.remedy} for c in found]
    return json.dumps({"schema": 1, "pyoverlay": __version__, "checks": checked}, indent=4)
