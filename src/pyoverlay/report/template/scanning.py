"""A template's text as tokens: pieces of text, and the words between `{{` and `}}`."""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from enum import Enum

from pyoverlay.report.template.failures import TemplateSyntaxError


class Sort(Enum):
    """What a token is."""

    TEXT = "text"
    OPEN = "{{"
    CLOSE = "}}"
    FIELD = "field"  # .Name
    DOT = "."
    VARIABLE = "variable"  # $name, or $
    WORD = "word"
    LITERAL = "literal"
    SIGN = "sign"  # ( ) | := = ,
    SPACE = "space"
    END = "end of the template"


@dataclass(frozen=True, slots=True)
class Token:
    """text: as written. value: what a literal or a text stands for. offset: where it begins, for messages."""

    sort: Sort
    text: str
    offset: int
    value: object = None


_TOKEN = re.compile(
    r"""
      (?P<space>\s+)
    | (?P<literal>"(?:[^"\\\n]|\\.)*" | `[^`]*` | '(?:[^'\\\n]|\\.[0-9a-fA-F]*)'
        | [+-]?(?:0[xX][0-9a-fA-F_]+|0[bB][01_]+|0[oO][0-7_]+|[0-9][0-9_]*(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?|\.[0-9]+(?:[eE][+-]?[0-9]+)?))
    | (?P<field>\.[^\W\d]\w*)
    | (?P<dot>\.)
    | (?P<variable>\$\w*)
    | (?P<word>[^\W\d]\w*)
    | (?P<sign>:=|[=|(),])
    """,
    re.VERBOSE,
)
_CLOSE = re.compile(r"(\s+-)?}}")
_COMMENT = re.compile(r"/\*.*?\*/(\s+-)?}}", re.DOTALL)
_ESCAPE = re.compile(rb"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|([0-7]{3})|(.))", re.DOTALL)
_ESCAPED = {
    b"a": b"\a", b"b": b"\b", b"f": b"\f", b"n": b"\n", b"r": b"\r", b"t": b"\t", b"v": b"\v", b"\\": b"\\", b'"': b'"', b"'": b"'",
}  # fmt: skip
_CONSTANTS = {"true": True, "false": False, "nil": None}


def place(text: str, offset: int) -> str:
    """`line 2, column 5`, or `column 5` where there is but one line."""
    line = text.count("\n", 0, offset) + 1
    column = offset - (text.rfind("\n", 0, offset) + 1) + 1
    return f"column {column}" if "\n" not in text else f"line {line}, column {column}"


def tokens(text: str) -> Iterator[Token]:
    """The tokens, the last one END. Raises TemplateSyntaxError."""
    position = 0
    while (start := text.find("{{", position)) >= 0:
        inside = start + 2
        trims_before = text[inside : inside + 1] == "-" and text[inside + 1 : inside + 2].isspace()
        piece = text[position:start]
        yield from _text(piece.rstrip() if trims_before else piece, position)
        inside += 2 if trims_before else 0
        comment = _COMMENT.match(text, inside)
        if comment is not None:
            position = comment.end()
            trims_after = comment[1] is not None
        else:
            yield Token(Sort.OPEN, "{{", start)
            position, trims_after = yield from _action(text, inside, start)
        if trims_after:
            position += len(text[position:]) - len(text[position:].lstrip())
    yield from _text(text[position:], position)
    yield Token(Sort.END, "", len(text))


def _text(piece: str, offset: int) -> Iterator[Token]:
    if piece:
        yield Token(Sort.TEXT, piece, offset, piece)


def _action(text: str, position: int, start: int) -> Generator[Token, None, tuple[int, bool]]:
    """The tokens of one action; returns where it ends, and whether the text after it loses its leading space."""
    while True:
        if (close := _CLOSE.match(text, position)) is not None:
            yield Token(Sort.CLOSE, "}}", position)
            return close.end(), close[1] is not None
        found = _TOKEN.match(text, position)
        if found is None:
            if not text[position:].strip() or "\n" in text[position : position + 1]:
                raise TemplateSyntaxError(f"{place(text, start)}: the action is not closed with }}}}")
            raise TemplateSyntaxError(f"{place(text, position)}: unexpected {text[position]!r}")
        yield _token(text, found)
        position = found.end()


def _token(text: str, found: re.Match[str]) -> Token:
    written, offset = found[0], found.start()
    sort = Sort(found.lastgroup) if found.lastgroup != "dot" else Sort.DOT
    if sort is Sort.WORD and written in _CONSTANTS:
        return Token(Sort.LITERAL, written, offset, _CONSTANTS[written])
    if sort is not Sort.LITERAL:
        return Token(sort, written, offset)
    try:
        return Token(sort, written, offset, _value(written))
    except ValueError as error:
        raise TemplateSyntaxError(f"{place(text, offset)}: {written} is no value") from error


def _value(written: str) -> object:
    if written[0] == "`":
        return written[1:-1]
    if written[0] == '"':
        return _unescaped(written[1:-1])
    if written[0] == "'":
        character = _unescaped(written[1:-1])
        if len(character) != 1:
            raise ValueError(written)
        return ord(character) & 0xFF if "\udc80" <= character <= "\udcff" else ord(character)
    return float(written) if re.search(r"[.eE]", written) and not re.match(r"[+-]?0[xX]", written) else int(written, 0)


def _unescaped(text: str) -> str:
    """What a quoted text stands for; bytes that are no UTF-8 as os.fsdecode has them. Raises ValueError."""
    return _ESCAPE.sub(_character, text.encode("utf-8", "surrogateescape")).decode("utf-8", "surrogateescape")


def _character(found: re.Match[bytes]) -> bytes:
    byte, short, long, octal, letter = found.groups()
    if byte is not None or octal is not None:  # a byte, not a character
        return bytes([int(byte, 16) if byte is not None else int(octal, 8)])
    if short is not None or long is not None:
        return chr(int(short or long, 16)).encode()  # ValueError: half of a pair, or beyond the last
    if letter not in _ESCAPED:
        raise ValueError(found[0])
    return _ESCAPED[letter]
