"""`pyoverlay commit`."""

from __future__ import annotations

import os
import sys

import click

from pyoverlay.cli.completing import mount_points, paths
from pyoverlay.cli.progress import progress_bar
from pyoverlay.cli.values import Moment
from pyoverlay.errors import Refusal, printable
from pyoverlay.image import committing, layout
from pyoverlay.image.committing import Kept, Plan, Words
from pyoverlay.report import target
from pyoverlay.report.sizes import human

EPILOG = """\b
The base are the lowers: imported ones give their layers, their image its configuration and history; any
other lower becomes a layer made of it. The image's id is printed. LAYOUT is for podman, skopeo and
buildah, and as a tar archive for `docker load`. A failure leaves it as it was.

\b
Examples:
  pyoverlay commit ~/merged ./app:1.1 -m "with a patch"
  pyoverlay commit -y --mtime 0 ~/merged ./app && tar -C app -c . | docker load
"""


@click.command(epilog=EPILOG)
@click.argument("merged", metavar="MERGED", shell_complete=mount_points)
@click.argument("image", metavar="LAYOUT[:TAG]", shell_complete=paths)
@click.option("--name", metavar="NAME[:TAG]", envvar="PYOVERLAY_NAME", help="What Docker shall call it.  [default: LAYOUT's last part]")
@click.option("--author", "-a", metavar="TEXT", envvar="PYOVERLAY_AUTHOR", help="Who made it.")
@click.option("--message", "-m", metavar="TEXT", envvar="PYOVERLAY_MESSAGE", help="What the image's history says of the change.")
@click.option("--mtime", type=Moment(), metavar="SECONDS", envvar="PYOVERLAY_MTIME", help="Time of everything that is new, since 1970.")
@click.option("--yes", "-y", is_flag=True, help="Replace an image of that TAG without asking.")
@click.option("--dry-run", "-n", is_flag=True, help="Show what would be done, and do nothing.")
def command(
    merged: str, image: str, name: str | None, author: str | None, message: str | None, mtime: int | None, yes: bool, dry_run: bool
) -> None:
    """Add MERGED, what it stands on and what changed in it, as an image to the OCI layout LAYOUT.

    LAYOUT is made if there is none; TAG is `latest` unless given.
    """
    path, tag = _name_and_tag(image, "latest")
    name = "{}:{}".format(*_name_and_tag(name or os.path.basename(os.path.abspath(path)).lower(), tag))
    committing.require_names(os.fsencode(path), tag, name)
    plan = committing.plan(target.find(os.fsencode(merged)))
    is_there = any(layout.tag_of(entry) == tag for entry in layout.read_index(os.fsencode(path))["manifests"])
    if dry_run:
        verb = "replaces" if is_there else "becomes"
        click.echo("\n".join([*_described(plan), f"{verb:<9} {printable(path)}:{tag}, for Docker {name}"]))
        return
    if is_there and not yes:
        _ask(path, tag)
    with progress_bar("Committing", plan.size) as progress:
        digest = committing.commit(plan, os.fsencode(path), tag, name, Words(author, message, mtime), progress)
    click.echo(digest)


def _name_and_tag(image: str, default: str) -> tuple[str, str]:
    """What stands before the tag of `NAME:TAG`, and that; a colon before a slash is a port's, or a directory's."""
    name, colon, tag = image.rpartition(":")
    return (name, tag) if colon and "/" not in tag else (image, default)


def _described(plan: Plan) -> list[str]:
    base = "no image" if plan.base is None else printable(", ".join(plan.base.names)) or "an image without a name"
    lines = [f"base      {base}"]
    for layer in plan.layers:
        if isinstance(layer, Kept):
            lines.append(f"layer     {layer.layer.digest}, as it came")
        else:
            lines.append(f"layer     made of {printable(layer.target.upper)}: {layer.members} entries, {human(layer.size)}")
    return [*lines, f"change    {plan.change.members} entries, {human(plan.change.size)}"]


def _ask(path: str, tag: str) -> None:
    if not sys.stdin.isatty():
        raise Refusal(path, f"there is an image {tag} in it", remedy="replace it with -y, or choose another tag")
    click.confirm(f"Replace the image {tag} in {printable(path)}?", abort=True, err=True)
