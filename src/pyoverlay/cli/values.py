"""What options take besides text and numbers."""

from __future__ import annotations

import re

import click


class Size(click.ParamType):
    """A number of bytes: `4096`, `64G`."""

    name = "size"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        match = re.fullmatch(r"(\d+)([KMGT]?)(?:i?B)?", str(value), re.IGNORECASE)
        if match is None:
            self.fail(f"{value!r} is no size; write 4096, 500M or 64G", param, ctx)
        return int(match[1]) << 10 * " KMGT".index(match[2].upper() or " ")


class Patience(click.FloatRange):
    """Seconds to wait: no more than what poll(2), which counts milliseconds, can wait for."""

    LONGEST = 1_000_000

    def __init__(self) -> None:
        super().__init__(0)

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        seconds = float(super().convert(value, param, ctx))
        if not seconds <= self.LONGEST:  # nor is "nan"
            self.fail(f"{value} is no number of seconds up to {self.LONGEST}", param, ctx)
        return seconds


class Moment(click.ParamType):
    """Seconds since 1970, before or after, of a year that a date can have."""

    name = "integer"
    FIRST, LAST = -62_135_596_800, 253_402_300_799

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        seconds = int(click.INT.convert(value, param, ctx))
        if not self.FIRST <= seconds <= self.LAST:
            self.fail(f"{value} is in no year from 1 to 9999", param, ctx)
        return seconds
