"""Sizes, times and tables as Docker prints them."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path

import pytest

from pyoverlay.core.policy import Policy
from pyoverlay.errors import Refusal, printable
from pyoverlay.report.sizes import Usage, human, usage
from pyoverlay.report.tables import table
from pyoverlay.report.times import duration, stamp
from pyoverlay.testing import Device, Directory, Fifo, File, HardLink, Symlink, Tree, make_tree, witness

UNPRIVILEGED = Policy(privileged=False)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0B"), (2, "2B"), (999, "999B"), (1000, "1kB"), (1024, "1.02kB"), (2820, "2.82kB"), (35_664, "35.7kB"), (999_499, "999kB"),
        (999_500, "1MB"), (10 << 20, "10.5MB"), (123_000_000, "123MB"), (5 * 10**12, "5TB"),
    ],
)  # fmt: skip
def test_sizes_have_three_digits(size: int, text: str) -> None:
    assert human(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "Less than a second"), (1, "1 second"), (59.9, "59 seconds"), (60, "About a minute"), (119, "About a minute"),
        (120, "2 minutes"), (3599, "59 minutes"), (3600, "About an hour"), (5400, "2 hours"), (47 * 3600, "47 hours"),
        (48 * 3600, "2 days"), (13 * 86400, "13 days"), (14 * 86400, "2 weeks"), (60 * 86400, "2 months"), (730 * 86400, "2 years"),
    ],
)  # fmt: skip
def test_durations_are_about_right(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_stamp_is_in_utc() -> None:
    assert stamp(datetime.fromtimestamp(1_577_836_800.25, UTC)) == "2020-01-01T00:00:00.250000Z"


def test_columns_are_three_apart_and_ten_wide() -> None:
    assert table([["A", "LONGER NAME", "LAST"], ["1", "2", "a much longer text"]]) == [
        "A         LONGER NAME   LAST",
        "1         2             a much longer text",
    ]


def test_rows_may_have_more_or_fewer_cells() -> None:
    assert table([["A", "B", "LAST"], ["alone"], ["1", "2"]]) == ["A         B         LAST", "alone", "1         2"]


@pytest.mark.parametrize(
    ("text", "shown"), [("a\x1b[2J\n", r"a\x1b[2J\x0a"), ("\udcff", r"\xff"), ("\ud83d", r"\xed\xa0\xbd"), ("é…", "é…")]
)
def test_what_a_terminal_may_not_be_told_is_escaped(text: str, shown: str) -> None:
    """A lone half of a surrogate pair can come from JSON that somebody else has written."""
    assert printable(text) == shown
    assert str(Refusal("f", text, remedy=text)) == f"f: {shown}; {shown}"


def test_a_layer_is_as_large_as_its_files_each_once(tmp_path: Path) -> None:
    tree: Tree = {
        "f": "12345", "d": {"sparse": File(size=1 << 20), "same": HardLink("f"), "deep": {"er": b"12"}}, "l": Symlink("target"), "p": Fifo()
    }  # fmt: skip
    make_tree(tmp_path, tree)
    before = witness(tmp_path)
    assert usage(os.fsencode(tmp_path), UNPRIVILEGED, frozenset()) == Usage(5 + (1 << 20) + 2 + 6)
    assert witness(tmp_path) == before


def test_an_upper_inside_a_lower_is_not_the_lower_s(tmp_path: Path) -> None:
    make_tree(tmp_path, {"f": "1", "upper": {"g": "23"}})
    st = os.stat(tmp_path / "upper")
    assert usage(os.fsencode(tmp_path), UNPRIVILEGED, frozenset({(st.st_dev, st.st_ino)})) == Usage(1)


@pytest.mark.root
def test_what_is_no_file_has_no_size(tmp_path: Path) -> None:
    make_tree(tmp_path, {"c": Device("c", 1, 3), "b": Device("b", 7, 200), "w": Device("c", 0, 0), "d": Directory({})})
    assert usage(os.fsencode(tmp_path), Policy(), frozenset()) == Usage(0)
