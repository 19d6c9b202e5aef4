"""How many sequences are drawn, and which: a fixed choice, or another for each seed.

PYOVERLAY_SEQUENCES=N     sequences through the core; a tenth of them are run through mounts (.ci/run: 2000)
PYOVERLAY_SEED=N          other sequences than the fixed ones
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

from hypothesis import HealthCheck, Phase, seed, settings

SEQUENCES = int(os.environ.get("PYOVERLAY_SEQUENCES", "200"))
SEED = os.environ.get("PYOVERLAY_SEED")

Test = TypeVar("Test", bound=Callable[..., Any])


def drawn(count: int) -> Callable[[Test], Test]:
    """Run a hypothesis test `count` times; a failure is shrunk. Nothing is remembered from run to run."""
    chosen = settings(
        max_examples=count,
        derandomize=SEED is None,
        database=None,
        deadline=None,
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
        print_blob=False,
    )

    def decorate(test: Test) -> Test:
        return chosen(test if SEED is None else seed(int(SEED))(test))

    return decorate
