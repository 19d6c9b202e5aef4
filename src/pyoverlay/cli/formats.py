"""Templates of `--format` on the command line: what is wrong with one is told in one line."""

from __future__ import annotations

import os
from typing import Any

import click

from pyoverlay.errors import PyoverlayError, UsageError, printable
from pyoverlay.report.template import Template, TemplateFailedError, TemplateSyntaxError


def parsed(text: str) -> Template:
    """The template. Raises UsageError for what is none."""
    try:
        return Template(text)
    except TemplateSyntaxError as error:
        raise UsageError(f"--format: {printable(str(error))}") from error


def rendered(template: Template, value: Any) -> str:
    """Its text for a value. Raises PyoverlayError where it asks for what is not there."""
    try:
        return template.render(value)
    except TemplateFailedError as error:
        raise PyoverlayError(f"--format: {printable(str(error))}") from error


def rendered_head(template: Template, heads: Any) -> str:
    """The same of a table's head."""
    try:
        return template.render_head(heads)
    except TemplateFailedError as error:
        raise PyoverlayError(f"--format: {printable(str(error))}") from error


def show(text: str) -> None:
    """Print a line; of names that are no UTF-8 the bytes that they are made of."""
    click.echo(os.fsencode(text))
