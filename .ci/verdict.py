"""Adds up the JUnit reports of .ci/run, fails on a skip that is not allowed and on a suite without tests.

    verdict.py ALLOWED-SKIPS.toml RESULTS-DIRECTORY SECONDS

RESULTS holds NAME.suite for each suite that was started and NAME.xml when it has reported.
"""

import sys
import tomllib
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path


@dataclass(frozen=True)
class Skip:
    """A test that did not run; also a pattern of such."""

    suite: str
    test: str
    reason: str

    def is_allowed_by(self, pattern: dict[str, str]) -> bool:
        return all(fnmatchcase(getattr(self, key), pattern[key]) for key in ("suite", "test", "reason"))


def outcome(case: ET.Element) -> str:
    """What became of a test, in pytest's words."""
    for child in case:
        if child.tag == "failure":
            return "failed"
        if child.tag == "error":
            return "errors"
        if child.tag == "skipped":
            return "xfailed" if child.get("type") == "pytest.xfail" else "skipped"
    return "passed"


def skips(suite: str, report: ET.Element) -> Iterator[Skip]:
    """The tests of a report that did not run."""
    for case in report.iter("testcase"):
        skipped = case.find("skipped")
        if skipped is not None and outcome(case) == "skipped":
            name = f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}"
            yield Skip(suite, name, skipped.get("message", ""))


def main(allowed_file: str, results: str, seconds: str) -> int:
    """Print what is wrong and a closing line in pytest's form; 1 if anything is."""
    allowed = tomllib.loads(Path(allowed_file).read_text()).get("skip", [])
    total: Counter[str] = Counter()
    wrong = []
    for started in sorted(Path(results).glob("*.suite")):
        suite, path = started.stem, started.with_suffix(".xml")
        if not path.exists():
            wrong.append(f"{suite}: no report, so no test is known to have run")
            continue
        report = ET.parse(path).getroot()
        counts = Counter(outcome(case) for case in report.iter("testcase"))
        total += counts
        if not counts["passed"]:
            wrong.append(f"{suite}: no test passed")
        wrong += [
            f"{skip.suite}: {skip.test} was skipped and must not be: {skip.reason}"
            for skip in skips(suite, report)
            if not any(skip.is_allowed_by(pattern) for pattern in allowed)
        ]
    for line in wrong:
        print(line)
    words = ", ".join(f"{total[word]} {word}" for word in ("failed", "passed", "skipped", "xfailed", "errors") if total[word])
    print(f"===== {words or 'no tests ran'} in {int(seconds)}.00s =====")
    return 1 if wrong or total["failed"] or total["errors"] else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
