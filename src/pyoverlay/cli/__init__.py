"""The command line: one module a command. Parses, calls, prints; what is done is done in `daemon` and `report`.

Exit codes: 0 done, 1 refused (one line on stderr says what, why, and what to do), 2 usage.
"""

from __future__ import annotations

import errno
import importlib
import keyword
import os
import sys
from typing import Any, NoReturn

import click

from pyoverlay.cli import standard_streams
from pyoverlay.errors import PyoverlayError, Refusal

# Modules are loaded when their command is named: `pyoverlay --help` and completion stay quick.
COMMANDS = {
    "mount": "Mount an overlay.",
    "umount": "Unmount overlays; what was written is on disk when it returns.",
    "ps": "List the live mounts, and how much each has changed.",
    "inspect": "Tell all there is of a mount: layers, options, daemon, requests.",
    "diff": "Show what changed.",
    "which": "Say which layer a path comes from, and what it hides.",
    "import": "Unpack images and layers into directories that can be lowers.",
    "commit": "Make an image of a mount: its base, and what changed on top.",
    "export": "Write what changed as one layer of an image.",
    "doctor": "Check what this machine, and an upper, can do.",
    "completion": "Print the completion script of a shell.",
}

EPILOG = """\b
Exit codes: 0 done, 1 refused with a reason, 2 usage.

\b
Examples:
  pyoverlay mount /usr ~/upper ~/merged
  pyoverlay umount ~/merged
"""


class Commands(click.Group):
    """Finds a command's module by its name."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = cmd_name + "_" if keyword.iskeyword(cmd_name) else cmd_name
        command: click.Command = importlib.import_module(f"pyoverlay.cli.{module}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


def _show_version(ctx: click.Context, parameter: click.Parameter, is_wanted: bool) -> None:
    if not is_wanted or ctx.resilient_parsing:
        return
    from pyoverlay.daemon import versions

    click.echo("\n".join(versions.lines()))
    versions.print_protocol()
    ctx.exit()


@click.group(cls=Commands, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--version", is_flag=True, expose_value=False, is_eager=True, callback=_show_version, help="Show what is installed, and exit."
)
def group() -> None:
    """Stack read-only directories under a writable one, and work in the merged view.

    The lowers are never changed; what is added, changed or deleted in MERGED is kept in UPPER, in the kernel overlay's own format.
    """


def main() -> NoReturn:
    """The console script."""
    standard_streams.prepare()
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str], **extra: Any) -> int:
    """One command; its exit code. Errors are shown here and nowhere else."""
    try:
        result = group.main(args=arguments, prog_name="pyoverlay", standalone_mode=False, **extra)
    except click.UsageError as error:
        _show_usage_error(error)
        return 2
    except click.ClickException as error:
        click.echo(f"pyoverlay: {error.format_message()}", err=True)
        return error.exit_code
    except click.Abort:
        return 130
    except PyoverlayError as error:
        click.echo(f"pyoverlay: {error}", err=True)
        return error.exit_code
    except standard_streams.ReaderHasGone:
        return 1
    except FileNotFoundError:
        if _is_somewhere():
            raise
        click.echo(f"pyoverlay: {Refusal('.', 'the current directory was removed', errno.ENOENT, 'change to one that is there')}", err=True)
        return 1
    return result if isinstance(result, int) else 0


def _is_somewhere() -> bool:
    """Whether the current directory is still there: no relative path leads anywhere else."""
    try:
        os.getcwd()
    except FileNotFoundError:
        return False
    return True


def _show_usage_error(error: click.UsageError) -> None:
    command = error.ctx.command_path if error.ctx is not None else "pyoverlay"
    click.echo(f"pyoverlay: {error.format_message()}", err=True)
    if error.ctx is not None:
        click.echo(error.ctx.get_usage(), err=True)
    click.echo(f"Run '{command} --help' for more information.", err=True)
