"""docs/pyoverlay.1.md: every command, option and variable that there is, and no option that there is not."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import click
import pytest

from pyoverlay.cli import COMMANDS, group
from pyoverlay.daemon import options

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "pyoverlay.1.md").read_text()


def section(heading: str) -> str:
    """What stands below a heading, up to the next one of its rank or a higher one."""
    rank = heading.index(" ")
    _, found, rest = PAGE.partition(f"\n{heading}\n")
    assert found, f"the page has no {heading}"
    return re.split(rf"^#{{1,{rank}}} ", rest, maxsplit=1, flags=re.MULTILINE)[0]


def command_options(name: str) -> list[click.Option]:
    command = group.get_command(click.Context(group), name)
    assert command is not None
    return [parameter for parameter in command.params if isinstance(parameter, click.Option)]


def test_the_page_has_the_commands_that_there_are() -> None:
    assert set(re.findall(r"^### ([a-z]+)$", section("## COMMANDS"), re.MULTILINE)) == set(COMMANDS)
    assert set(re.findall(r"^    pyoverlay (\w+)", section("## SYNOPSIS"), re.MULTILINE)) == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_page_has_the_options_of_each_command_and_no_others(name: str) -> None:
    words = set(re.findall(r"(?<![\w-])-{1,2}[A-Za-z][\w-]*", section(f"### {name}")))
    there_are = {word for option in command_options(name) for word in option.opts}
    assert there_are - words == set()
    assert {word for word in words - there_are if word.startswith("--")} == set()


def test_the_page_has_every_variable_that_stands_for_an_option() -> None:
    variables = {str(option.envvar) for name in COMMANDS for option in command_options(name) if option.envvar is not None}
    assert variables - set(re.findall(r"`(PYOVERLAY_\w+)`", section("## ENVIRONMENT"))) == set()


def test_the_page_has_every_mount_option() -> None:
    words = set(re.findall(r"[a-z_]+\+?", section("## MOUNT OPTIONS")))
    assert options._FLAGS.keys() | options._VALUES.keys() | options._IGNORED_VALUES | {"lowerdir", "lowerdir+", "datadir+"} <= words


def test_what_man_reads_is_made_of_the_page_as_it_is() -> None:
    """By scripts/manual, which needs pandoc; so that nothing else does, what it made is in the repository."""
    made = (DOCS / "pyoverlay.1").read_text()
    assert f"sha256 {hashlib.sha256(PAGE.encode()).hexdigest()}" in made.splitlines()[0], "run scripts/manual"
