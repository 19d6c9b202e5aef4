"""Shell scripts of an ordinary user, for tests that are root's: what a mount without root may do, and what nobody may do through one."""

from __future__ import annotations

import os
import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from pyoverlay import registry
from pyoverlay.testing.mounts import MARK, command

# Debian's nobody: the owner of nothing.
USER = 65534

# For a script: the rest of the line as root of a user namespace of its own, where the user is all there is.
AS_NAMESPACE_ROOT = "unshare -Urm sh -ec"

# For a script: the daemon of its one mount, from the list of mounts that is the user's.
FIND_PID = r"""pid=$(sed 's/.*"pid": \([0-9]*\).*/\1/' run/pyoverlay/*.json);"""


def make_home(path: Path) -> None:
    """The user's directory, with the directories of a mount in it."""
    for directory in ("", "lower", "upper", "merged", "run"):
        (path / directory).mkdir(exist_ok=True)
        os.chown(path / directory, USER, USER)


def with_fuse(home: Path) -> list[str]:
    """What to put before a program that is to have a mount namespace of its own with a /dev/fuse that anybody may open.

    Not every machine lets users open its own: here it is a node of the test's.
    """
    node = home / "fuse"
    if not node.exists():
        os.mknod(node, stat.S_IFCHR, os.makedev(10, 229))
        node.chmod(0o666)
    return ["unshare", "-m", "sh", "-ec", 'mount --bind "$0" /dev/fuse; exec "$@"', str(node)]


AS_USER = ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups"]


def skip_if_out_of_reach() -> None:
    """Skip where an ordinary user may not run this Python, as in a checkout below /root."""
    # By way of a shell: setpriv itself is still root enough to reach what it runs.
    reach = subprocess.run([*AS_USER, "sh", "-c", '"$0" -c ""', sys.executable], check=False, capture_output=True)
    if reach.returncode != 0:
        pytest.skip(f"{sys.executable} is out of an ordinary user's reach")


def as_user(home: Path, script: str) -> subprocess.CompletedProcess[str]:
    """Run a script with `$po` the command line, in a mount namespace of its own."""
    if shutil.which("fusermount3") is None or shutil.which("setpriv") is None:
        pytest.fail("these tests want fusermount3 and setpriv")
    skip_if_out_of_reach()
    environment = {
        "PATH": os.environ["PATH"], "HOME": str(home), "PYTHONPATH": str(Path(registry.__file__).parents[1]), MARK: os.environ[MARK],
        "XDG_RUNTIME_DIR": str(home / "run"), "po": shlex.join(command()),
    }  # fmt: skip
    return subprocess.run(
        [*with_fuse(home), *AS_USER, "sh", "-ec", script],
        check=False, capture_output=True, text=True, timeout=30, cwd=home, env=environment,
    )  # fmt: skip
