"""docker's own template code, asked for the same templates: it needs the client alone."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.interop import engines
from tests.interop.docker_templates import FAILING, MALFORMED, PRINTED

pytestmark = pytest.mark.container


@pytest.fixture
def docker(tmp_path: Path) -> dict[str, str]:
    """The environment of a client that has no configuration and no engine."""
    if (reason := engines.missing("docker")) is not None:
        pytest.skip(reason)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("DOCKER_")}
    return kept | {"DOCKER_CONFIG": str(tmp_path)}


def inspect(template: str, environment: dict[str, str]) -> subprocess.CompletedProcess[bytes]:
    argv = ["docker", "context", "inspect", "-f", template, "default"]
    return subprocess.run(argv, check=False, capture_output=True, env=environment, timeout=30)


@pytest.mark.parametrize(("template", "text"), PRINTED)
def test_docker_prints_the_same(docker: dict[str, str], template: str, text: str) -> None:
    result = inspect(template, docker)
    assert (result.returncode, result.stdout.decode()) == (0, text + "\n")


@pytest.mark.parametrize("template", [*MALFORMED, *FAILING])
def test_docker_refuses_the_same(docker: dict[str, str], template: str) -> None:
    result = inspect(template, docker)
    assert result.returncode != 0
    assert result.stderr != b""
