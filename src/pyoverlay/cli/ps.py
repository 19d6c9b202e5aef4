"""`pyoverlay ps`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

import click

from pyoverlay.cli.formats import parsed, rendered, rendered_head, show
from pyoverlay.errors import Refusal, UsageError, printable
from pyoverlay.report import inspect, mounts, ps
from pyoverlay.report.inspect import Inspection
from pyoverlay.report.mounts import Mount
from pyoverlay.report.tables import table
from pyoverlay.report.template import Template

EPILOG = """\b
Root sees everybody's mounts, a user the own ones. No mount is touched: one whose daemon hangs or died is
listed, and STATUS says so. A template is of Go's language over ID, Merged, Upper, Lowers, Work, Pid,
CreatedAt, RunningFor, Status, Options, Size; `table TEMPLATE` makes columns at its tabs. Keys of
--filter: id, merged, upper, lower, status (up, silent, dead), pid.

\b
Examples:
  pyoverlay ps -s
  pyoverlay ps -q --filter status=dead | xargs -rd '\\n' pyoverlay umount --lazy
"""


@click.command(epilog=EPILOG)
@click.option("with_size", "--size", "-s", is_flag=True, help="Show what each upper holds, as docker counts, and with its lowers.")
@click.option("--no-trunc", is_flag=True, help="Cut nothing: whole paths, all lowers.")
@click.option("--quiet", "-q", is_flag=True, help="Show mount points only.")
@click.option("filters", "--filter", multiple=True, metavar="KEY=PATTERN", help="Show those that match; may be given several times.")
@click.option("form", "--format", metavar="TEMPLATE", help="One line for each by this template; `json`: an object a line.")
@click.option("--noheading", is_flag=True, help="Leave the head of the table out.")
@click.option("as_json", "--json", is_flag=True, help="Print one JSON object of pyoverlay's own schema.")
def command(
    with_size: bool, no_trunc: bool, quiet: bool, filters: tuple[str, ...], form: str | None, noheading: bool, as_json: bool
) -> int:
    """List the live mounts."""
    form = form or None  # docker, too, takes an empty one for none
    if sum((quiet, form is not None, as_json)) > 1:
        raise UsageError("--quiet, --format and --json exclude one another")
    found = ps.chosen(mounts.mounts(), filters)
    if quiet:
        for mount in found:
            click.echo(mount.record.merged)
        return 0
    sizes = _Measured(found) if with_size or _asks_for_size(form) else None
    if sizes is not None:
        found = [mount for mount in found if mount.record.id not in sizes.ended]
    if as_json:
        click.echo(json.dumps(_with_sizes(found, sizes), indent=4))
    else:
        rows = [ps.row(mount, sizes.by_id.get(mount.record.id) if sizes else None, is_cut=not no_trunc) for mount in found]
        _show(rows, form, with_size=with_size, heading=not noheading)
    return sizes.failed if sizes else 0


def _asks_for_size(form: str | None) -> bool:
    """By name, or for all there is: `{{json .}}`."""
    return form is not None and re.search(r"\.Size\b|\bjson\s+\.\s*[|}]", form) is not None


class _Measured:
    """Sizes by the mount's id; of a layer that cannot be read a line on stderr instead. ended: mounts that are no longer there."""

    def __init__(self, found: Iterable[Mount]) -> None:
        self.by_id: dict[str, ps.Size] = {}
        self.ended: set[str] = set()
        self.failed = 0
        sizes, unreadable = ps.Sizes(), 0
        for mount in found:
            try:
                size = self.by_id[mount.record.id] = sizes.of(mount)
                unreadable += size.unreadable
            except Refusal as error:
                click.echo(f"pyoverlay: {error}", err=True)
                self.failed = error.exit_code
            except OSError as error:
                if not mounts.mounts(records=[mount.record]):
                    self.ended.add(mount.record.id)
                    continue
                click.echo(f"pyoverlay: {printable(error.filename)}: cannot be measured ({error.strerror})", err=True)
                self.failed = 1
        if unreadable:
            click.echo(f"pyoverlay: {unreadable} directories may not be read by this user and are not counted", err=True)


def _with_sizes(found: Sequence[Mount], sizes: _Measured | None) -> dict[str, Any]:
    told = inspect.as_json(map(Inspection.of, found))
    for one in told["mounts"] if sizes is not None else ():
        size = sizes.by_id.get(one["id"]) if sizes else None
        one["size"] = None if size is None else {"upper": size.upper, "virtual": size.virtual}
    return told


def _show(rows: Sequence[dict[str, str]], form: str | None, *, with_size: bool, heading: bool) -> None:
    if form == "json":
        for row in rows:
            click.echo(json.dumps(row if with_size else {name: text for name, text in row.items() if name != "Size"}))
        return
    template = _template(form, with_size=with_size)
    lines = [rendered(template, row) for row in rows]
    if form is None or form.startswith("table"):
        heads = [rendered_head(template, ps.HEADS)] if heading else []
        lines = table([line.split("\t") for text in (*heads, *lines) for line in text.split("\n")])
    for line in lines:
        show(line)


def _template(form: str | None, *, with_size: bool) -> Template:
    r"""Of a row: as docker has it, `table` may stand in front, blanks around it do not count, and a shell's '\t' is meant as a tab."""
    text = (form or "").removeprefix("table").strip(" ").replace("\\t", "\t").replace("\\n", "\n")
    columns = [*ps.COLUMNS, *(["Size"] if with_size else [])]
    return parsed(text or "\t".join(f"{{{{.{name}}}}}" for name in columns))
