"""What Docker says of a container, and what pyoverlay says of the same layers."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pyoverlay.core.policy import Policy
from pyoverlay.report.sizes import human, usage
from pyoverlay.testing import make_tree
from pyoverlay.testing.mounts import command
from tests.interop.docker_diff import CASES, TREE, Case
from tests.interop.engines import IMAGE, Docker

pytestmark = [pytest.mark.root, pytest.mark.container, pytest.mark.timeout(180)]

NAMES = {case.name: f"c{number:02}" for number, case in enumerate(CASES)}


@dataclass(frozen=True)
class Container:
    """A running container in which every case was made, what Docker prints of it, and where its layers lie."""

    lines: list[str]
    upper: Path
    merged: Path
    lowers: str
    size: int
    printed_size: str


@pytest.fixture(scope="module")
def container(shared_docker: Docker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Container]:
    docker = shared_docker.docker
    context = tmp_path_factory.mktemp("context")
    trees = context / "trees"
    trees.mkdir()
    for name in NAMES.values():
        (trees / name).mkdir()
        make_tree(trees / name, TREE)
    subprocess.run(["tar", "-C", trees, "--numeric-owner", "-cf", context / "trees.tar", "."], check=True)
    (context / "Dockerfile").write_text(f"FROM {IMAGE}\nADD trees.tar /\n")
    docker("build", "-q", "--network=none", "-t", "cases", str(context))
    docker("run", "-d", "--name", "cases", "--network=none", "cases", "sleep", "1000")
    data = json.loads(docker("inspect", "cases", "--format", "{{json .GraphDriver.Data}}"))
    for case in CASES:
        case.change(Path(data["MergedDir"]) / NAMES[case.name])
    size = int(docker("inspect", "-s", "-f", "{{.SizeRw}}", "cases"))
    printed_size = docker("ps", "-s", "--format", "{{.Size}}").partition(" ")[0]
    upper, merged = Path(data["UpperDir"]), Path(data["MergedDir"])
    yield Container(docker("diff", "cases").splitlines(), upper, merged, data["LowerDir"], size, printed_size)
    shared_docker.remove_containers()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_docker_diff_prints_the_golden_lines(container: Container, case: Case) -> None:
    name = NAMES[case.name]
    lines = [line for line in container.lines if line[3:].split("/")[0] == name]
    assert sorted(lines) == sorted(case.expected(name, can_move=False))


def test_pyoverlay_diff_of_the_container_s_layers_prints_the_same_lines(container: Container) -> None:
    for argv in (command("diff", "--lower", container.lowers, container.upper), command("diff", container.merged)):
        lines = subprocess.run(argv, check=True, capture_output=True, text=True, timeout=60).stdout.splitlines()
        assert sorted(lines) == sorted(container.lines)


def test_the_upper_is_as_large_as_docker_says_and_printed_so(container: Container) -> None:
    size = usage(os.fsencode(container.upper), Policy(), frozenset()).size
    assert size == container.size == sum(case.size for case in CASES)
    assert human(size) == container.printed_size
