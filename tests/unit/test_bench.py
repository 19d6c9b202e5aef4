"""The benchmark's own correctness: what it computes, that it notices wrong results, and that it leaves nothing behind. No mount."""

from __future__ import annotations

import json
import math
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from bench import changing, reading, writing
from bench.catalogue import WORKLOADS, named
from bench.chart import chart
from bench.filesystems import Kernel, Place
from bench.layers import LayerSets
from bench.measure import compare, measure, scratch
from bench.results import KERNEL, OURS, PEER, Results, geometric_mean
from bench.workload import FULL, QUICK, Caches, Kind, Sizes, Stage, Workload, WrongResult

TINY = Sizes("tiny", 1, 45, 1, 1, 10, 3, 5, 8, 3, 50, 6, 2, 1)
MACHINE = {"date": "2026-01-01", "kernel": "6.1", "processors": "2 x <test>", "memory": "4 GiB", "python": "3.11"}


class Copied:
    """In a mount's place the lowers copied over one another: shows that workloads and their checks agree, without root."""

    def __init__(self, name: str = OURS, without: Sequence[str] = ("py",)) -> None:
        self.name = name
        self._ignore = shutil.ignore_patterns(*without)

    @contextmanager
    def mounted(self, place: Place) -> Iterator[None]:
        for lower in reversed(place.lowers):
            shutil.copytree(lower, place.merged, dirs_exist_ok=True, ignore=self._ignore)
        yield


@pytest.fixture(scope="module")
def layers(tmp_path_factory: pytest.TempPathFactory) -> LayerSets:
    missing = [program for program in ("git", "dpkg-deb", "tar") if shutil.which(program) is None]
    if missing:
        pytest.skip(f"the layers are made with {missing}, which are not installed")
    return LayerSets(tmp_path_factory.mktemp("layers"), TINY)


def workload(name: str, kind: Kind = Kind.METADATA) -> Workload:
    return Workload(name, f"title of {name}", kind, lambda stage: None)


def results(*times: tuple[str, str, float]) -> Results:
    made = Results([KERNEL, PEER, OURS])
    for name, filesystem, seconds in times:
        made.add(workload(name), filesystem, seconds)
    return made


def test_workloads_have_names_of_their_own() -> None:
    assert len({workload.name for workload in WORKLOADS}) == len({workload.title for workload in WORKLOADS}) == len(WORKLOADS)


def test_named_finds_workloads_and_refuses_others() -> None:
    assert [workload.name for workload in named(["cp-a", "find-cold"])] == ["cp-a", "find-cold"]
    assert named([]) == list(WORKLOADS)
    with pytest.raises(KeyError, match="no-such"):
        named(["no-such"])


def test_the_quick_size_is_nowhere_larger_than_the_full_one() -> None:
    for field in ("rounds", "files", "read_mib", "write_mib", "small_writes", "transactions", "wide_entries", "layers"):
        assert getattr(QUICK, field) <= getattr(FULL, field)
    assert (FULL.read_mib, FULL.write_mib, FULL.wide_entries, FULL.layers) == (512, 1024, 100_000, 100)


def test_geometric_mean() -> None:
    assert geometric_mean([0.5, 2.0]) == pytest.approx(1.0)
    assert geometric_mean([0.25, 0.5, 1.0]) == pytest.approx(0.5)
    assert math.isnan(geometric_mean([]))


def test_a_row_has_medians_and_ratios_of_medians() -> None:
    (row,) = results(("a", OURS, 9.0), ("a", OURS, 1.0), ("a", OURS, 2.0), ("a", PEER, 4.0), ("a", KERNEL, 0.25)).rows()
    assert row.medians == {OURS: 2.0, PEER: 4.0, KERNEL: 0.25}
    assert (row.ratio_to(PEER), row.ratio_to(KERNEL)) == (0.5, 8.0)
    assert row.is_past_the_kernel_limit


def test_a_filesystem_that_did_not_run_gives_no_ratio() -> None:
    (row,) = results(("a", OURS, 1.0)).rows()
    assert row.ratio_to(PEER) is None
    assert not row.is_past_the_kernel_limit


def test_the_table_marks_what_is_slower() -> None:
    lines = results(("slow", OURS, 3.0), ("slow", PEER, 2.0), ("fast", OURS, 1.0), ("fast", PEER, 2.0)).table().splitlines()
    assert [line.split()[-1] for line in lines[1:3]] == ["1.50*", "0.50"]
    assert "0.87" in lines[3]  # the root of 1.5 x 0.5


def test_the_markdown_table_has_a_cell_for_each_column() -> None:
    lines = results(("a", OURS, 3.0), ("a", PEER, 2.0), ("a", KERNEL, 1.0)).markdown().splitlines()
    assert {line.count("|") for line in lines} == {7}
    assert "**1.50**" in lines[2]


def test_json_holds_every_time(tmp_path: Path) -> None:
    results(("a", OURS, 3.0), ("a", OURS, 1.0), ("a", PEER, 4.0)).write(tmp_path / "out.json", "tiny")
    document = json.loads((tmp_path / "out.json").read_text())
    assert document["workloads"]["a"]["seconds"] == {OURS: [3.0, 1.0], PEER: [4.0]}
    assert document["workloads"]["a"]["ratio"] == {PEER: 0.5, KERNEL: None}
    assert document["geometric_mean"] == {PEER: 0.5, KERNEL: None}
    assert document["machine"]["kernel"]


def test_the_chart_is_svg_with_a_bar_for_each_ratio() -> None:
    found = results(("a", OURS, 3.0), ("a", PEER, 2.0), ("b", OURS, 1.0), ("b", PEER, 200.0), ("b", KERNEL, 0.1), ("c", OURS, 1.0))
    root = ET.fromstring(chart(found, MACHINE, "tiny"))
    kinds = [element.get("class") for element in root.iter("{http://www.w3.org/2000/svg}rect")]
    assert kinds == ["slower", "faster", "kernel"]
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "2 x <test>" in " ".join(text or "" for text in texts)
    assert "title of c" not in texts


def test_layers_are_what_their_facts_say(layers: LayerSets) -> None:
    facts = layers.facts
    files = [path for path in (layers.directory / "base/tree").rglob("*") if path.is_file()]
    assert len(files) == facts.files == TINY.files
    assert sum(path.stat().st_size for path in files) == facts.bytes
    assert sum(b"needle" in path.read_bytes() for path in files) == facts.needles
    assert len([path for path in (layers.directory / "base/tree").rglob("*") if path.is_dir()]) + 1 == facts.directories


# What needs no root: neither dropped caches nor another user, nor a layer that is a mount itself.
_WITHOUT_ROOT = [each for each in WORKLOADS if each.caches is Caches.WARM and each.user is None and each.layers != "slow"]


@pytest.mark.parametrize("each", _WITHOUT_ROOT, ids=lambda each: each.name)
def test_a_workload_is_content_with_a_plain_directory(layers: LayerSets, each: Workload) -> None:
    # The modules are as many files as all the rest.
    assert measure(Copied(without=() if each.name == "imports" else ("py",)), each, layers) > 0


@pytest.mark.parametrize("step", [reading.find, reading.read, reading.check_big], ids=lambda step: step.__name__)
def test_a_file_that_is_missing_or_short_is_noticed(layers: LayerSets, tmp_path: Path, step: object) -> None:
    shutil.copytree(layers.directory / "base", tmp_path / "merged", ignore=shutil.ignore_patterns("py"))
    (tmp_path / "merged/tree/part0/directory0/file7").unlink()
    with (tmp_path / "merged/big").open("r+b") as file:
        file.truncate(100)
    assert callable(step)
    with pytest.raises(WrongResult, match=r"found .*, expected"):
        step(Stage(tmp_path / "merged", tmp_path, layers.facts))


def test_a_change_that_was_not_made_is_noticed(layers: LayerSets, tmp_path: Path) -> None:
    shutil.copytree(layers.directory / "base", tmp_path / "merged", ignore=shutil.ignore_patterns("py"))
    stage = Stage(tmp_path / "merged", tmp_path, layers.facts)
    for check in (changing.check_modes, changing.check_appended, changing.check_tree_gone, changing.check_renamed_lower):
        with pytest.raises(WrongResult):
            check(stage)
    (stage.merged / "copy").mkdir()
    with pytest.raises(WrongResult, match="exit status 1"):
        writing.check_copy(stage)


def test_a_program_that_fails_is_a_wrong_result(layers: LayerSets, tmp_path: Path) -> None:
    with pytest.raises(WrongResult, match="exit status 3"):
        Stage(tmp_path, tmp_path, layers.facts).run("sh", "-c", "exit 3")


def test_filesystems_take_turns_and_another_one_begins_each_round(layers: LayerSets) -> None:
    order: list[str] = []
    empty = Workload("empty", "nothing", Kind.METADATA, lambda stage: None)
    compare([Copied("a"), Copied("b")], [empty], layers, 2, lambda workload, filesystem, seconds: order.append(filesystem.name))
    assert order == ["a", "b", "b", "a"]


def test_nothing_is_left_of_a_run_that_failed(layers: LayerSets, tmp_path: Path) -> None:
    def fail(stage: Stage) -> None:
        raise WrongResult("on purpose")

    before = sorted(layers.directory.iterdir())
    with pytest.raises(WrongResult, match="on purpose"):
        measure(Copied(), replace(workload("failing"), run=fail), layers)
    assert sorted(layers.directory.iterdir()) == before
    with pytest.raises(WrongResult), scratch(tmp_path):
        raise WrongResult("on purpose")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.root
def test_a_mount_is_unmounted_also_when_its_workload_fails(layers: LayerSets) -> None:
    """nothing_left_by_this_test looks for the mount."""

    def fail(stage: Stage) -> None:
        assert (stage.tree / "part0").is_dir()
        raise WrongResult("on purpose")

    with pytest.raises(WrongResult, match="on purpose"):
        measure(Kernel(), replace(workload("failing"), run=fail), layers)
