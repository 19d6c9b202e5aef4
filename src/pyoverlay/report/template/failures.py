"""What can go wrong with a template: it does not parse, or it cannot be carried out on what it was given."""

from __future__ import annotations


class TemplateSyntaxError(ValueError):
    """It is no template. The text is one line that says what and where."""


class TemplateFailedError(ValueError):
    """A field that is not there, a function that got what it cannot take."""
