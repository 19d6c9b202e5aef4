"""The template language of `--format`. The cases are shared with tests/interop, where docker prints the same for them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyoverlay.report.template import Template, TemplateFailedError, TemplateSyntaxError
from tests.interop.docker_templates import FAILING, MALFORMED, PRINTED, VALUE


@pytest.mark.parametrize(("template", "text"), PRINTED)
def test_what_is_printed(template: str, text: str) -> None:
    assert Template(template).render(VALUE) == text


@pytest.mark.parametrize("template", MALFORMED)
def test_what_no_template_is_says_where(template: str) -> None:
    with pytest.raises(TemplateSyntaxError, match=r"\Acolumn \d+: \S"):
        Template(template)


@pytest.mark.parametrize("template", FAILING)
def test_what_cannot_be_carried_out(template: str) -> None:
    parsed = Template(template)
    with pytest.raises(TemplateFailedError):
        parsed.render(VALUE)


def test_an_unknown_field_is_told_with_those_there_are() -> None:
    with pytest.raises(TemplateFailedError, match=r"\Athere is no field Nope; there is Name, Metadata, Endpoints, TLSMaterial, Storage\Z"):
        Template("{{.Nope}}").render(VALUE)
    with pytest.raises(TemplateFailedError, match=r"\Athere is no field Nope in string default\Z"):
        Template("{{.Name.Nope}}").render(VALUE)


@pytest.mark.parametrize("call", ['printf "%99999999d" 1', 'printf "%.99999999f" 1.5', 'pad "a" 99999999 0', 'truncate "a" 99999999'])
def test_no_more_memory_is_asked_for_than_there_may_be(call: str) -> None:
    template = Template(f"{{{{{call}}}}}")
    with pytest.raises(TemplateFailedError, match=r"number of characters.* 9999999"):
        template.render({})


def test_a_place_in_several_lines() -> None:
    with pytest.raises(TemplateSyntaxError, match=r"\Aline 2, column 5: "):
        Template("a\nb {{nope}}")


@pytest.mark.parametrize("word", ["define", "template", "block"])
def test_templates_of_several_templates_are_refused_by_name(word: str) -> None:
    with pytest.raises(TemplateSyntaxError, match=f"{word} is not supported"):
        Template(f'{{{{{word} "a"}}}}')


def test_nothing_is_no_value() -> None:
    assert Template("{{.}} {{json .}} {{print .}}").render(None) == "<no value> null <nil>"
    assert Template("{{.}}").render({"b": None, "a": [1, None, {"c": True}]}) == "map[a:[1 <nil> map[c:true]] b:<nil>]"


def test_a_field_of_nothing_fails() -> None:
    with pytest.raises(TemplateFailedError, match="there is no field b in nil"):
        Template("{{.a.b}}").render({"a": None})


def test_json_keeps_the_order_of_the_keys() -> None:
    assert Template("{{json .}}").render({"b": 1, "a": {"d": [], "c": None}}) == '{"b":1,"a":{"d":[],"c":null}}'


def test_index_goes_through_dicts() -> None:
    assert Template('{{index . "a" "b"}}').render({"a": {"b": 1}}) == "1"


def test_a_bar_with_nothing_behind_it_is_refused() -> None:
    with pytest.raises(TemplateSyntaxError, match="a value is missing"):
        Template("{{.Name | }}")


def test_and_and_or_evaluate_no_more_than_it_takes() -> None:
    assert Template("{{or .a .nope}} {{and .z .nope}}").render({"a": 1, "z": 0}) == "1 0"


def test_one_template_is_rendered_for_many_values() -> None:
    template = Template("{{$n := len .}}{{$n}}")
    assert [template.render(value) for value in ("", "ab")] == ["0", "2"]


def test_names_that_are_no_utf8_become_marks_in_json() -> None:
    assert Template("{{json .}}").render("a\udcff") == '"a\N{REPLACEMENT CHARACTER}"'


def test_what_is_nested_too_deeply_is_refused() -> None:
    with pytest.raises(TemplateSyntaxError, match="nested too deeply"):
        Template("{{" + "(" * 10_000 + "1" + ")" * 10_000 + "}}")


WORDS = [
    "{{", "}}", "{{- ", " -}}", "{{/*", "*/}}", " ", "if", "else", "end", "with", "range", "break", "continue", "$x", "$", ":=", "=", "|",
    "(", ")", ",", ".", ".Name", ".a", "index", "printf", "json", "len", "slice", "eq", "and", "join", "truncate", '"%d %s"', '"a"', "`",
    "'a'", "1", "-1", "2.5", "true", "nil", "\n", "é",
]  # fmt: skip
ACTIONS = ["if 1", "with .a", "range .a", "end", "else", "$x := .", "$x", ".", "len .", "json . | len", "print . 1"]


def is_printed_or_refused(text: str) -> None:
    """Nothing but the two errors that are told in one line."""
    try:
        Template(text).render({"Name": "n", "a": [1, "b", None, {"c": 2.5}]})
    except (TemplateSyntaxError, TemplateFailedError) as error:
        assert "\n" not in str(error)


@settings(max_examples=1000, deadline=None)
@given(st.lists(st.sampled_from(WORDS), max_size=25).map("".join))
def test_any_text_is_printed_or_refused(text: str) -> None:
    is_printed_or_refused(text)


@settings(max_examples=1000, deadline=None)
@given(st.lists(st.sampled_from(ACTIONS), max_size=12).map(lambda actions: "".join(f"{{{{{action}}}}}" for action in actions)))
def test_any_actions_are_printed_or_refused(text: str) -> None:
    is_printed_or_refused(text)
