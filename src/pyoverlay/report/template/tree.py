"""A parsed template: what each action is made of. Nothing here is carried out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

# ── what has a value ────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Literal:
    """A string, a number, true, false or nil."""

    value: object


@dataclass(frozen=True, slots=True)
class Dot:
    """`.`: what the template, a range or a with is about."""


@dataclass(frozen=True, slots=True)
class Variable:
    """`$name`; `$` is what the whole template is about."""

    name: str


@dataclass(frozen=True, slots=True)
class Field:
    """`.Name` of something."""

    of: Operand
    name: str


@dataclass(frozen=True, slots=True)
class Call:
    """A function and its arguments."""

    function: str
    arguments: tuple[Operand, ...] = ()


@dataclass(frozen=True, slots=True)
class Pipeline:
    """`a | b | c`: what is left of a bar is the last argument of the function to its right."""

    commands: tuple[Operand, ...]


Operand: TypeAlias = Literal | Dot | Variable | Field | Call | Pipeline

# ── what is carried out ─────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Text:
    """Printed as it is."""

    text: str


@dataclass(frozen=True, slots=True)
class Print:
    """`{{pipeline}}`."""

    value: Operand


@dataclass(frozen=True, slots=True)
class Assign:
    """`{{$name := pipeline}}`, or `=` for a variable that is there."""

    name: str
    value: Operand
    is_new: bool


@dataclass(frozen=True, slots=True)
class If:
    """`if`, and `with`, which also moves the dot. name: the variable that gets the value."""

    value: Operand
    body: Body
    otherwise: Body
    moves_dot: bool
    name: str | None = None


@dataclass(frozen=True, slots=True)
class Range:
    """`range`. names: of the variables for index and element, or for the element alone."""

    value: Operand
    body: Body
    otherwise: Body
    names: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Leave:
    """`break`, or `continue`."""

    is_break: bool


Node: TypeAlias = Text | Print | Assign | If | Range | Leave
Body: TypeAlias = Sequence[Node]
