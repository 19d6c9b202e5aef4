"""The functions of templates: those of Go's text/template and of docker's (templates.go), on plain values."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from pyoverlay.report.template.failures import TemplateFailedError

Value = Any  # None, bool, int, float, str, a list or a dict


def is_true(value: Value) -> bool:
    """Go's truth: neither false, 0, nil nor empty."""
    return bool(value)


def kind(value: Value) -> str:
    """Go's word for what a value is."""
    if value is None:
        return "nil"
    names: dict[type, str] = {bool: "bool", int: "int", float: "float64", str: "string"}
    return names.get(type(value), "map" if isinstance(value, Mapping) else "list")


def shown(value: Value) -> str:
    """As an action prints a value: `<no value>` for nil, [a b] and map[k:v] with sorted keys."""
    return "<no value>" if value is None else _shown_inside(value)


def _shown_inside(value: Value) -> str:
    match value:
        case None:
            return "<nil>"
        case bool():
            return "true" if value else "false"
        case str() | int():
            return str(value)
        case float():
            return f"{value:g}"
        case Mapping():
            return f"map[{' '.join(f'{key}:{_shown_inside(value[key])}' for key in sorted(value))}]"
        case _:
            return f"[{' '.join(map(_shown_inside, value))}]"


# ── of Go ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _bytes(text: str) -> bytes:
    """Go's strings are made of bytes: these are counted, indexed and cut."""
    return text.encode("utf-8", "surrogateescape")


def length(value: Value) -> int:
    """`len`."""
    if isinstance(value, str):
        return len(_bytes(value))
    if isinstance(value, Mapping | Sequence):
        return len(value)
    raise TemplateFailedError(f"len of {kind(value)}")


def index(value: Value, *keys: Value) -> Value:
    """`index x 1 "a"` is x[1]["a"]."""
    for key in keys:
        if isinstance(value, Mapping):
            value = field(value, key) if isinstance(key, str) else _fail(f"a map is not indexed by {kind(key)}")
        elif isinstance(value, Sequence):
            items: Sequence[Value] = _bytes(value) if isinstance(value, str) else value
            value = items[_in_range(key, len(items) - 1)]
        else:
            raise TemplateFailedError(f"index of {kind(value)}")
    return value


def cut(value: Value, *bounds: Value) -> Value:
    """`slice x 1 3` is x[1:3]."""
    if not isinstance(value, Sequence) or len(bounds) > 2:
        raise TemplateFailedError(f"slice of {kind(value)}" if len(bounds) <= 2 else "slice takes at most two bounds")
    if isinstance(value, str):
        return cut(_bytes(value), *bounds).decode("utf-8", "surrogateescape")
    places = [_in_range(bound, len(value)) for bound in bounds]
    first, last = (places + [0, len(value)][len(places) :])[:2]
    if first > last:
        raise TemplateFailedError(f"slice from {first} to {last}")
    return value[first:last]


def _in_range(key: Value, most: int) -> int:
    if not isinstance(key, int) or isinstance(key, bool):
        raise TemplateFailedError(f"a list is not indexed by {kind(key)}")
    if not 0 <= key <= most:
        raise TemplateFailedError(f"index out of range: {key}")
    return key


def _fail(reason: str) -> Value:
    raise TemplateFailedError(reason)


def field(value: Value, name: str) -> Value:
    """A key of a dict, which must be there."""
    if not isinstance(value, Mapping):
        raise TemplateFailedError(f"there is no field {name} in {kind(value)} {shown(value)}")
    if name not in value:
        raise TemplateFailedError(f"there is no field {name}; there is {', '.join(value) or 'none'}")
    return value[name]


def equal(first: Value, *others: Value) -> bool:
    """`eq`: equal to any of the others."""
    if not others:
        raise TemplateFailedError("missing argument for comparison")
    return any(_equal(first, other) for other in others)


def _equal(first: Value, other: Value) -> bool:
    if first is not None and other is not None and _family(first) != _family(other):
        raise TemplateFailedError(f"incompatible types for comparison: {kind(first)} and {kind(other)}")
    return bool(first == other)


def _family(value: Value) -> str:
    return "number" if kind(value) in ("int", "float64") else kind(value)


def compare(judge: Callable[[Value, Value], bool]) -> Callable[[Value, Value], bool]:
    """`lt`, `le`, `gt` or `ge`."""

    def comparison(first: Value, second: Value) -> bool:
        if _family(first) != _family(second) or _family(first) not in ("number", "string"):
            raise TemplateFailedError(f"incompatible types for comparison: {kind(first)} and {kind(second)}")
        return judge(first, second)

    return comparison


def text(*values: Value) -> str:
    """`print`: with a blank between two that are no strings."""
    pieces = [shown_argument(value) for value in values]
    blanks = [" " if not (isinstance(a, str) or isinstance(b, str)) else "" for a, b in pairwise(values)]
    return "".join(piece + blank for piece, blank in zip(pieces, [*blanks, ""], strict=False))


def text_line(*values: Value) -> str:
    """`println`: with a blank between all."""
    return " ".join(map(shown_argument, values)) + "\n"


def shown_argument(value: Value) -> str:
    """As print and printf show a value: nil is `<nil>`."""
    return _shown_inside(value)


_WIDEST = 9_999_999  # characters: about where Go's printf no longer takes a number for a width or a precision
_VERB = re.compile(r"%([-+# 0]*)(\d+)?(?:\.(\d+))?(.)", re.DOTALL)


def formatted(form: Value, *values: Value) -> str:
    """`printf`, with the verbs %s %q %v %d %x %o %b %c %t %f %e %g %%; Go's marks for what does not fit: `%!d(string=a)`."""
    if not isinstance(form, str):
        raise TemplateFailedError(f"printf wants a string first, not {kind(form)}")
    left = list(values)

    def verb(found: re.Match[str]) -> str:
        if found[4] == "%":
            return "%"
        if not left:
            return f"%!{found[4]}(MISSING)"
        return _formatted_one(found, left.pop(0))

    result = _VERB.sub(verb, form)
    if left:
        extra = ", ".join(f"{kind(value)}={shown_argument(value)}" for value in left)
        result += f"%!(EXTRA {extra})"
    return result


def _formatted_one(found: re.Match[str], value: Value) -> str:
    flags, width, precision, verb = found.groups()
    for number in (width, precision):
        if len(number or "") > len(str(_WIDEST)):
            raise TemplateFailedError(f"printf takes no number of characters above {_WIDEST}")
    body = _body(verb, value, precision, flags)
    if body is None:
        return f"%!{verb}({kind(value)}={shown_argument(value)})"
    wide = int(width or 0)
    if "-" in flags:
        return body.ljust(wide)
    is_number = verb in "dxXobfeEgG" and not isinstance(value, str)
    return body.zfill(wide) if "0" in flags and is_number else body.rjust(wide)


def _body(verb: str, value: Value, precision: str | None, flags: str) -> str | None:
    """The value by a verb of printf; None where it does not fit."""
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    digits = f".{precision}" if precision is not None else ""
    match verb:
        case "v":
            return shown_argument(value)
        case "s" if isinstance(value, str):
            return value[: int(precision)] if precision is not None else value
        case "s" if not is_integer and not isinstance(value, bool | float | None):
            return shown_argument(value)
        case "q" if isinstance(value, str):
            return json.dumps(value, ensure_ascii=False)
        case "t" if isinstance(value, bool):
            return shown_argument(value)
        case "d" | "x" | "X" | "o" | "b" if is_integer:
            return ("+" if "+" in flags and value >= 0 else "") + format(value, verb)
        case "c" if is_integer:
            return chr(value) if 0 <= value <= sys.maxunicode and not 0xD800 <= value <= 0xDFFF else "\ufffd"
        case "x" if isinstance(value, str):
            return _bytes(value).hex()
        case "f" | "e" | "g" if isinstance(value, float):
            return format(value, digits + verb)
    return None


# ── of docker ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


def as_json(value: Value) -> str:
    """`json`: in one line, without blanks, nothing escaped that need not be."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _strings(name: str, *values: Value) -> None:
    for value in values:
        if not isinstance(value, str):
            raise TemplateFailedError(f"{name} wants strings, not {kind(value)}")


def join(values: Value, separator: Value) -> str:
    """`join .List ":"`."""
    if isinstance(values, str | Mapping) or not isinstance(values, Sequence):
        raise TemplateFailedError(f"join wants a list first, not {kind(values)}")
    _strings("join", separator, *values)
    return str(separator).join(values)


def split(value: Value, separator: Value) -> list[str]:
    """`split "a:b" ":"`; an empty separator splits between all characters."""
    _strings("split", value, separator)
    return str(value).split(separator) if separator else list(value)


def title(value: Value) -> str:
    """`title`: the first letter of each word large."""
    _strings("title", value)
    return re.sub(r"(?<![\w'])\w", lambda found: found[0].upper(), value)


def pad(value: Value, left: Value, right: Value) -> str:
    """`pad "a" 1 2`: so many blanks on either side, unless it is empty."""
    _strings("pad", value)
    return " " * _count("pad", left) + value + " " * _count("pad", right) if value else ""


def truncate(value: Value, most: Value) -> str:
    """`truncate "abcdef" 3`."""
    _strings("truncate", value)
    return _bytes(value)[: _count("truncate", most)].decode("utf-8", "surrogateescape")


def _count(name: str, value: Value) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _WIDEST:
        raise TemplateFailedError(f"{name} wants a number of characters, up to {_WIDEST}, not {shown(value)}")
    return value


def _cased(name: str, change: Callable[[str], str]) -> Callable[[Value], str]:
    def changed(value: Value) -> str:
        _strings(name, value)
        return change(value)

    return changed


FUNCTIONS: dict[str, Callable[..., Value]] = {
    "not": lambda value: not is_true(value),
    "eq": equal,
    "ne": lambda first, second: not equal(first, second),
    "lt": compare(lambda first, second: first < second),
    "le": compare(lambda first, second: first <= second),
    "gt": compare(lambda first, second: first > second),
    "ge": compare(lambda first, second: first >= second),
    "len": length,
    "index": index,
    "slice": cut,
    "print": text,
    "printf": formatted,
    "println": text_line,
    "json": as_json,
    "split": split,
    "join": join,
    "title": title,
    "lower": _cased("lower", str.lower),
    "upper": _cased("upper", str.upper),
    "pad": pad,
    "truncate": truncate,
}

# docker's, where the head of a table is made (HeaderFunctions): it stays as it is. `pad` pads it like the column.
HEAD_FUNCTIONS: dict[str, Callable[..., Value]] = FUNCTIONS | {
    "json": lambda head: head,
    "split": lambda head, _separator: head,
    "join": lambda head, _separator: head,
    "title": lambda head: head,
    "lower": lambda head: head,
    "upper": lambda head: head,
    "truncate": lambda head, _most: head,
}
