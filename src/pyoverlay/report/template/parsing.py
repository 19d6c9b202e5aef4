"""Tokens to a tree. Variables and functions are checked here, so that a template that parses can fail on its values only."""

from __future__ import annotations

from collections.abc import Container

from pyoverlay.report.template.failures import TemplateSyntaxError
from pyoverlay.report.template.scanning import Sort, Token, place, tokens
from pyoverlay.report.template.tree import (
    Assign,
    Body,
    Call,
    Dot,
    Field,
    If,
    Leave,
    Literal,
    Node,
    Operand,
    Pipeline,
    Print,
    Range,
    Text,
    Variable,
)

_BLOCKS = ("if", "with", "range")
_REFUSED = ("define", "template", "block")


def parse(text: str, functions: Container[str]) -> Body:
    """The tree of a template. functions: the names that may be called. Raises TemplateSyntaxError."""
    return _Parser(text, functions).template()


class _Parser:
    def __init__(self, text: str, functions: Container[str]) -> None:
        self._text = text
        self._functions = functions
        self._tokens = list(tokens(text))
        self._next = 0
        self._variables = ["$"]  # in scope
        self._ranges = 0  # around

    # -- tokens

    def _peek(self) -> Token:
        return self._tokens[self._next]

    def _take(self) -> Token:
        token = self._peek()
        self._next += 1
        return token

    def _skip_space(self) -> None:
        while self._peek().sort is Sort.SPACE:
            self._next += 1

    def _is_sign(self, *signs: str) -> bool:
        token = self._peek()
        return token.sort is Sort.SIGN and token.text in signs

    def _error(self, token: Token, what: str) -> TemplateSyntaxError:
        return TemplateSyntaxError(f"{place(self._text, token.offset)}: {what}")

    def _unexpected(self, token: Token, where: str) -> TemplateSyntaxError:
        return self._error(token, f"unexpected {token.text or token.sort.value!r} {where}")

    def _close(self, where: str) -> None:
        self._skip_space()
        token = self._take()
        if token.sort is not Sort.CLOSE:
            raise self._unexpected(token, where)

    # -- bodies

    def template(self) -> Body:
        body, ended_by = self._body()
        if ended_by.sort is not Sort.END:
            raise self._error(ended_by, f"{ended_by.text} without if, with or range")
        return body

    def _body(self) -> tuple[list[Node], Token]:
        """The nodes up to `else`, `end` or the end of the template, and which."""
        nodes: list[Node] = []
        scope = len(self._variables)
        while (ended_by := self._end_of_body()) is None:
            token = self._take()
            nodes.append(Text(token.text) if token.sort is Sort.TEXT else self._action())
        del self._variables[scope:]
        return nodes, ended_by

    def _end_of_body(self) -> Token | None:
        """The END, or the word `else` or `end` that is taken with its `{{`; None if something else comes next."""
        start = self._next
        token = self._take()
        if token.sort is Sort.OPEN:
            self._skip_space()
            token = self._take()
        if token.sort is Sort.END or (token.sort is Sort.WORD and token.text in ("else", "end")):
            return token
        self._next = start
        return None

    def _action(self) -> Node:
        """What stands between `{{`, which is taken, and `}}`."""
        self._skip_space()
        token = self._peek()
        if token.sort is Sort.WORD:
            if token.text in _BLOCKS:
                return self._block(self._take())
            if token.text in ("break", "continue"):
                self._take()
                if not self._ranges:
                    raise self._error(token, f"{token.text} outside of range")
                self._close(f"after {token.text}")
                return Leave(token.text == "break")
            if token.text in _REFUSED:
                raise self._error(token, f"{token.text} is not supported")
        if (assigned := self._assignment()) is not None:
            return assigned
        value = self._pipeline("in an action")
        self._close("in an action")
        return Print(value)

    def _assignment(self) -> Assign | None:
        names, is_new = self._names()
        if not names:
            return None
        if len(names) > 1:
            raise self._error(self._peek(), "two variables are for range alone")
        value = self._pipeline("in an assignment")
        self._close("in an assignment")
        self._declare(names, is_new=is_new)
        return Assign(names[0], value, is_new)

    def _names(self) -> tuple[list[str], bool]:
        """The variables left of `:=` or `=`; none, and nothing is taken, where there is no such sign."""
        start = self._next
        names: list[str] = []
        while self._peek().sort is Sort.VARIABLE:
            names.append(self._take().text)
            self._skip_space()
            if not self._is_sign(","):
                break
            self._take()
            self._skip_space()
        if names and self._is_sign(":=", "="):
            return names, self._take().text == ":="
        self._next = start
        return [], False

    def _declare(self, names: list[str], *, is_new: bool) -> None:
        for name in names:
            if is_new:
                self._variables.append(name)
            elif name not in self._variables:
                raise self._error(self._tokens[self._next - 1], f"undefined variable {name}")

    def _block(self, keyword: Token) -> If | Range:
        """What follows `if`, `with` or `range`, to its `end`."""
        scope = len(self._variables)
        self._skip_space()
        names, is_new = self._names()
        if len(names) > (2 if keyword.text == "range" else 1):
            raise self._error(keyword, f"too many variables for {keyword.text}")
        if names and not is_new:
            raise self._error(keyword, f"{keyword.text} wants := for its variables")
        value = self._pipeline(f"in {keyword.text}")
        self._close(f"in {keyword.text}")
        self._declare(names, is_new=True)
        self._ranges += keyword.text == "range"
        body, ended_by = self._body()
        self._ranges -= keyword.text == "range"
        otherwise: Body = self._else(keyword) if ended_by.text == "else" else ()
        if ended_by.text == "end":
            self._close("after end")
        elif ended_by.sort is Sort.END:
            raise self._error(keyword, f"{keyword.text} without end")
        del self._variables[scope:]
        if keyword.text == "range":
            return Range(value, body, otherwise, tuple(names))
        return If(value, body, otherwise, keyword.text == "with", names[0] if names else None)

    def _else(self, keyword: Token) -> Body:
        """What follows `else`: a body, or `else if`, whose `end` is that of the whole."""
        self._skip_space()
        word = self._peek()
        if word.sort is Sort.WORD and word.text in ("if", "with") and word.text == keyword.text:
            return (self._block(self._take()),)
        self._close("after else")
        body, ended_by = self._body()
        if ended_by.text != "end":
            raise self._error(keyword, f"{keyword.text} without end" if ended_by.sort is Sort.END else "two else in a row")
        self._close("after end")
        return body

    # -- values

    def _pipeline(self, where: str) -> Operand:
        self._skip_space()
        commands = [self._command(where)]
        while self._is_sign("|"):
            bar = self._take()
            self._skip_space()
            command = self._command(where)
            if not isinstance(command, Call):
                raise self._error(bar, "what follows a bar must be a function")
            commands.append(command)
        return commands[0] if len(commands) == 1 else Pipeline(tuple(commands))

    def _command(self, where: str) -> Operand:
        first = self._peek()
        operands: list[Operand] = []
        while not self._is_sign("|", ")") and self._peek().sort is not Sort.CLOSE:
            if operands and self._tokens[self._next - 1].sort is not Sort.SPACE:
                raise self._unexpected(self._peek(), "where a blank belongs")
            operands.append(self._operand(where))
            self._skip_space()
        if not operands:
            raise self._error(first, f"a value is missing {where}")
        called = operands[0]
        if isinstance(called, Call) and not called.arguments and first.sort is Sort.WORD:
            return Call(called.function, tuple(operands[1:]))
        if len(operands) > 1:
            raise self._error(first, f"{first.text} takes no arguments")
        return called

    def _operand(self, where: str) -> Operand:
        operand = self._term(where)
        while self._peek().sort is Sort.FIELD:
            token = self._take()
            if isinstance(operand, Literal):
                raise self._error(token, f"unexpected {token.text} after a constant")
            operand = Field(operand, token.text[1:])
        return operand

    def _term(self, where: str) -> Operand:
        token = self._take()
        match token.sort:
            case Sort.LITERAL:
                return Literal(token.value)
            case Sort.DOT:
                return Dot()
            case Sort.FIELD:
                return Field(Dot(), token.text[1:])
            case Sort.VARIABLE if token.text in self._variables:
                return Variable(token.text)
            case Sort.VARIABLE:
                raise self._error(token, f"undefined variable {token.text}")
            case Sort.WORD if token.text in self._functions:
                return Call(token.text)
            case Sort.WORD:
                raise self._error(token, f"function {token.text!r} not defined")
        if token.sort is Sort.SIGN and token.text == "(":
            value = self._pipeline("in parentheses")
            closing = self._take()
            if closing.sort is not Sort.SIGN or closing.text != ")":
                raise self._error(token, "( is not closed")
            return value
        raise self._unexpected(token, where)
