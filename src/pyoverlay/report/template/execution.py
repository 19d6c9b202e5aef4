"""Carrying out a parsed template."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain

from pyoverlay.report.template.failures import TemplateFailedError, TemplateSyntaxError
from pyoverlay.report.template.functions import FUNCTIONS, HEAD_FUNCTIONS, Value, field, is_true, kind, shown
from pyoverlay.report.template.parsing import parse
from pyoverlay.report.template.tree import (
    Assign,
    Body,
    Call,
    Dot,
    Field,
    If,
    Leave,
    Literal,
    Operand,
    Pipeline,
    Print,
    Range,
    Text,
    Variable,
)

_LAZY = ("and", "or")  # they evaluate no more of their arguments than it takes
_MISSING = object()


class Template:
    """A template that parsed. Raises TemplateSyntaxError for one that does not."""

    def __init__(self, text: str) -> None:
        try:
            self._body = parse(text, {*FUNCTIONS, *_LAZY})
        except RecursionError:
            raise TemplateSyntaxError("nested too deeply") from None

    def render(self, value: Value) -> str:
        """The text for one value. Raises TemplateFailedError, and gives no text then."""
        return "".join(_Execution(value, FUNCTIONS).carry_out(self._body, value))

    def render_head(self, heads: Value) -> str:
        """The head of a table whose rows this renders: what docker's functions would make of a value, they do not make of its head."""
        return "".join(_Execution(heads, HEAD_FUNCTIONS).carry_out(self._body, heads))


class _Break(Exception):  # no error
    """`break`."""


class _Continue(Exception):  # no error
    """`continue`."""


class _Execution:
    def __init__(self, value: Value, functions: Mapping[str, Callable[..., Value]]) -> None:
        self._functions = functions
        self._variables: list[list[Value]] = [["$", value]]  # name and value; a later one hides an earlier one of its name

    def carry_out(self, body: Body, dot: Value) -> Iterator[str]:
        scope = len(self._variables)
        try:
            for node in body:
                match node:
                    case Text(text):
                        yield text
                    case Print(value):
                        yield shown(self._value(value, dot))
                    case Assign(name, value, is_new):
                        self._assign(name, self._value(value, dot), is_new=is_new)
                    case If():
                        yield from self._if(node, dot)
                    case Range():
                        yield from self._range(node, dot)
                    case Leave(is_break):
                        raise _Break if is_break else _Continue
        finally:
            del self._variables[scope:]

    def _assign(self, name: str, value: Value, *, is_new: bool) -> None:
        if is_new:
            self._variables.append([name, value])
        else:
            self._variable(name)[1] = value

    def _variable(self, name: str) -> list[Value]:
        return next(variable for variable in reversed(self._variables) if variable[0] == name)

    def _if(self, node: If, dot: Value) -> Iterator[str]:
        value = self._value(node.value, dot)
        scope = len(self._variables)
        if node.name is not None:
            self._assign(node.name, value, is_new=True)
        inside = value if node.moves_dot else dot
        yield from self.carry_out(node.body, inside) if is_true(value) else self.carry_out(node.otherwise, dot)
        del self._variables[scope:]

    def _range(self, node: Range, dot: Value) -> Iterator[str]:
        pairs = _pairs(self._value(node.value, dot))
        if not pairs:
            yield from self.carry_out(node.otherwise, dot)
        scope = len(self._variables)
        for pair in pairs:
            del self._variables[scope:]
            for name, value in zip(node.names, pair if len(node.names) == 2 else pair[1:], strict=False):
                self._assign(name, value, is_new=True)
            try:
                yield from self.carry_out(node.body, pair[1])
            except _Continue:
                continue
            except _Break:
                break
        del self._variables[scope:]

    def _value(self, operand: Operand, dot: Value, piped: Value = _MISSING) -> Value:
        match operand:
            case Literal(value):
                return value
            case Dot():
                return dot
            case Variable(name):
                return self._variable(name)[1]
            case Field(of, name):
                return field(self._value(of, dot), name)
            case Pipeline(commands):
                value = piped
                for command in commands:
                    value = self._value(command, dot, value)
                return value
            case Call(function, arguments):
                return self._called(function, arguments, dot, piped)

    def _called(self, function: str, arguments: Sequence[Operand], dot: Value, piped: Value) -> Value:
        values: Iterator[Value] = (self._value(argument, dot) for argument in arguments)
        if piped is not _MISSING:
            values = chain(values, [piped])
        if function in _LAZY:
            return _first_to_decide(function, values)
        given = list(values)
        try:
            inspect.signature(self._functions[function]).bind(*given)
        except TypeError:
            raise TemplateFailedError(f"wrong number of arguments for {function}: {len(given)}") from None
        return self._functions[function](*given)


def _first_to_decide(function: str, values: Iterator[Value]) -> Value:
    """`or`: the first true value, else the last; `and`: the first false one, else the last. What follows is not evaluated."""
    last: Value = _MISSING
    for last in values:
        if is_true(last) is (function == "or"):
            break
    if last is _MISSING:
        raise TemplateFailedError(f"wrong number of arguments for {function}: 0")
    return last


def _pairs(value: Value) -> list[tuple[Value, Value]]:
    """Index and element, or key and value in the order of the keys."""
    if isinstance(value, Mapping):
        return sorted(value.items())
    if value is None:
        return []
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TemplateFailedError(f"range over {kind(value)}")
    return list(enumerate(value))
