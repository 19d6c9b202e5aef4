"""What happens around a mount unasked: no room for its record, a directory above it renamed, streams closed, limits inherited."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from pyoverlay.testing import Overlay, OverlayFactory
from pyoverlay.testing.mounts import MARK, MountRefusedError, command, wait_for_end
from tests.integration.test_process_life import daemon_of, end_of, umount, using, watched
from tests.integration.unprivileged import as_user


def umounted(made: Overlay, *arguments: str | Path, runtime: Path | None = None) -> tuple[int, str]:
    """What `pyoverlay umount` said, and whose daemon, if it has one, has ended by then."""
    environment = os.environ | ({} if runtime is None else {"PYOVERLAY_RUNTIME_DIR": str(runtime)})
    result = subprocess.run(
        command("umount", *arguments), check=False, capture_output=True, text=True, timeout=30, env=environment
    )
    assert wait_for_end(made.daemons(), 0) == [], "its daemon was not waited for"
    return result.returncode, result.stderr


def test_an_upper_of_a_detached_mount_in_use_is_said_to_be_that(overlay: OverlayFactory) -> None:
    """It was said to be of a mount that has to be unmounted first, and there is none to unmount."""
    made = overlay({"file": "x"})
    pid = daemon_of(made)
    with watched(pid) as poll:
        with using(made.merged):
            assert umount("--lazy", made.merged).returncode == 0
            with pytest.raises(MountRefusedError) as refused:
                made.mount()
            assert str(refused.value) == (
                f"pyoverlay: {made.upper}: the upper is still used by the mount at {made.merged} (pid {pid}), which was detached and serves"
                f" its last users (Device or resource busy); end these, or kill {pid}, or choose another directory"
            )
        end_of(poll)


# ── what is inherited ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_caller_without_standard_streams_gets_its_mount(overlay: OverlayFactory, closed: str) -> None:
    """What the daemon was to be told of got the number of one of them, and was replaced by /dev/null."""
    made = overlay({"file": "x"}, mount=False)
    script = f'exec "$@" {closed}'
    arguments = command("mount", made.lower, made.writable, made.merged)
    result = subprocess.run(["sh", "-c", script, "sh", *arguments], check=False, timeout=30, env=os.environ | {MARK: made.mark})
    assert result.returncode == 0
    assert (made.merged / "file").read_text() == "x"
    made.umount()


@pytest.mark.parametrize("limit", [resource.RLIMIT_FSIZE, resource.RLIMIT_CPU], ids=["size of files", "processor time"])
def test_limits_for_the_callers_programs_are_not_the_daemons(overlay: OverlayFactory, limit: int) -> None:
    """`ulimit -S -f` of the shell that mounts was EFBIG for everybody, and past `ulimit -S -t` the mount was dead."""
    made = overlay({}, mount=False)
    before = resource.getrlimit(limit)
    resource.setrlimit(limit, (1 << 20, before[1]))
    try:
        made.mount()
    finally:
        resource.setrlimit(limit, before)
    assert resource.prlimit(daemon_of(made), limit)[0] == before[1]
    (made.merged / "file").write_bytes(bytes(3 << 20))


def test_a_mount_in_the_background_can_wait_for_its_children_where_its_caller_ignores_them(home: Path) -> None:
    result = as_user(
        home,
        f"{sys.executable} -c 'import os, signal, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN); os.execvp(sys.argv[1], sys.argv[1:])'"
        " $po mount -o allow_other lower upper merged",
    )
    assert result.returncode == 1
    assert "add user_allow_other to /etc/fuse.conf" in result.stderr
