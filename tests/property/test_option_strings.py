"""Any option string is understood or refused in one line, and any path survives being written into one."""

from __future__ import annotations

import os

from hypothesis import given, settings
from hypothesis import strategies as st

from pyoverlay.daemon import options
from pyoverlay.errors import OptionRefused

NAMES = st.sampled_from([*options._FLAGS, *options._VALUES, *options._NOT_YET, *options._IGNORED_VALUES, "lowerdir", "lowerdir+", "x-", ""])
VALUES = st.text("\\:,=\"'/abc019+-. \n\0é\udcff", max_size=20)
ANYTHING = st.text(max_size=60)
OPTION = st.one_of(NAMES, VALUES, ANYTHING, st.builds("{}={}".format, NAMES, st.one_of(VALUES, ANYTHING)))
PATHS = st.binary(min_size=1, max_size=40).filter(lambda path: b"\0" not in path)


@settings(max_examples=1000, deadline=None)
@given(st.lists(st.lists(OPTION, max_size=6).map(",".join), max_size=3))
def test_any_string_is_options_or_refused_in_one_line(strings: list[str]) -> None:
    try:
        parsed = options.parse(strings)
    except OptionRefused as refusal:
        assert "\n" not in str(refusal)
        assert "\0" not in str(refusal)
        return
    assert all(b"\0" not in path for path in (*parsed.lowers, parsed.upper or b"", parsed.work or b""))
    assert parsed == options.parse(strings)


@settings(max_examples=500, deadline=None)
@given(st.lists(PATHS, min_size=1, max_size=5))
def test_any_paths_come_back_from_lowerdir(paths: list[bytes]) -> None:
    assert options.parse(["ro,lowerdir=" + ":".join(map(options.escape, paths)) + ",noatime"]).lowers == tuple(paths)


@settings(max_examples=500, deadline=None)
@given(ANYTHING | VALUES)
def test_splitting_loses_nothing_but_commas(string: str) -> None:
    assert ",".join(options.split(string)).replace(",", "") == string.replace(",", "")


@settings(max_examples=300, deadline=None)
@given(PATHS)
def test_an_upper_s_path_comes_back_too(path: bytes) -> None:
    assert options.parse([f"lowerdir=/l,upperdir={options.escape(path)}"]).upper == os.fsencode(os.fsdecode(path))
