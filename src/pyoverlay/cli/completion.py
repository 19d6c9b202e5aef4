"""`pyoverlay completion`."""

from __future__ import annotations

import click
from click.shell_completion import ShellComplete, get_completion_class

EPILOG = """\b
Examples:
  pyoverlay completion bash > ~/.local/share/bash-completion/completions/pyoverlay
  pyoverlay completion fish > ~/.config/fish/completions/pyoverlay.fish
"""


@click.command(epilog=EPILOG)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def command(ctx: click.Context, shell: str) -> None:
    """Print what makes SHELL complete pyoverlay's commands and options."""
    completion = get_completion_class(shell)
    assert completion is not None
    # The base class's: that of bash looks for a bash first, and fails where there is none.
    click.echo(ShellComplete.source(completion(ctx.find_root().command, {}, "pyoverlay", "_PYOVERLAY_COMPLETE")))
