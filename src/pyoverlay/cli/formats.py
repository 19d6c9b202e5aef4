"""Templates of `--format` on the command line: what is wrong with one is told in one line."""

from __future__ import annotations

from typing import Any

from pyoverlay.errors import PyoverlayError, UsageError, printable
from pyoverlay.report.template import Template, TemplateFailedError, TemplateSyntaxError


def parsed(text: str) -> Template:
    """The template. Raises UsageError for what is none."""
    try:
        return Template(text)
    except TemplateSyntaxError as error:
        raise UsageError(f"--format: {printable(str(error))}") from error


def rendered(template: Template, value: Any) -> str:
    """Its text for a value, fit to be printed. Raises PyoverlayError where it asks for what is not there."""
    try:
        text = template.render(value)
    except TemplateFailedError as error:
        raise PyoverlayError(f"--format: {printable(str(error))}") from error
    return text
