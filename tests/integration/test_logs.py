"""The log of a mount while it runs, read from the stderr of one in the foreground: a line is the event that a test waits for."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

import pytest

from pyoverlay.testing import Directory, File, Overlay, OverlayFactory
from pyoverlay.testing.mounts import MARK, command


@contextmanager
def in_foreground(made: Overlay, *options: str, journal: bool = False) -> Iterator[tuple[subprocess.Popen[str], IO[str]]]:
    """The daemon and its log, whose first line has been read: the mount answers. journal: the log is said to be the journal's."""
    reader, writer = os.pipe()
    status = os.fstat(writer)
    environment = os.environ | {MARK: made.mark} | ({"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"} if journal else {})
    arguments = command("mount", "-f", *options, made.lower, made.writable, made.merged)
    with open(reader, encoding="utf-8") as log, subprocess.Popen(arguments, stderr=writer, text=True, env=environment) as process:
        os.close(writer)
        while "-q" not in options and "mounted, 1 lowers" not in (line := log.readline()):
            assert "-v" in options
            assert " DEBUG " in line
        try:
            yield process, log
        finally:
            process.send_signal(signal.SIGTERM)


def ask_for_what_is_not_there(made: Overlay) -> None:
    with pytest.raises(OSError) as caught:
        os.getxattr(made.merged / "file", "user.none")
    assert caught.value.errno == errno.ENODATA


def test_json_lines_tell_the_course_of_a_mount(overlay: OverlayFactory) -> None:
    made = overlay({"file": "x"}, mount=False)
    with in_foreground(made, "--log-format", "json") as (process, log):
        process.send_signal(signal.SIGTERM)
        lines = [json.loads(line) for line in log]
    assert [line["message"].partition(": ")[0] for line in lines] == ["SIGTERM", str(made.merged)]
    assert {line["pid"] for line in lines} == {process.pid}
    assert {line["level"] for line in lines} == {"info"}
    assert process.returncode == 0


def test_sigusr1_moves_the_level_to_debug_and_back(overlay: OverlayFactory) -> None:
    made = overlay({"file": "x"}, mount=False)
    with in_foreground(made) as (process, log):
        ask_for_what_is_not_there(made)
        process.send_signal(signal.SIGUSR1)
        assert log.readline().endswith("INFO the log's level is now debug\n")
        ask_for_what_is_not_there(made)
        assert " DEBUG getxattr of " in (line := log.readline())
        assert line.endswith(": No data available\n")
        os.chmod(made.merged / "file", 0o600)
        while "copied up" not in (line := log.readline()):
            assert " DEBUG " in line
        process.send_signal(signal.SIGUSR1)
        while "the log's level is now info" not in (line := log.readline()):
            assert " DEBUG " in line
        ask_for_what_is_not_there(made)
        process.send_signal(signal.SIGTERM)
        assert "SIGTERM: unmounting" in log.readline()


def test_sigusr2_says_how_much_a_mount_holds(overlay: OverlayFactory) -> None:
    made = overlay({"a": "", "b": ""}, mount=False)
    with in_foreground(made, "-q") as (process, log):
        while not made.mounted():
            assert process.poll() is None
        os.listdir(made.merged)
        process.send_signal(signal.SIGUSR2)
        assert " inodes known, " in log.readline()


def test_a_stderr_of_the_journal_gets_severities_and_no_times(overlay: OverlayFactory) -> None:
    made = overlay({"file": "x"}, mount=False)
    with in_foreground(made, journal=True) as (process, log):
        process.send_signal(signal.SIGTERM)
        assert log.readline() == f"<6>SIGTERM: unmounting {made.merged}\n"
        assert log.readline() == f"<6>{made.merged}: unmounted\n"


@pytest.mark.root
def test_no_name_from_inside_a_layer_is_logged_unasked(overlay: OverlayFactory) -> None:
    """Whatever happens in the mount, and whatever fails there: a shared log tells nobody what there is."""
    made = overlay({"Secret": Directory(entries={"SecretFile": File(content="SecretContent")}), "file": "x"}, mount=False)
    with in_foreground(made, journal=True) as (process, log):
        secret = made.merged / "Secret"
        ask_for_what_is_not_there(made)
        (secret / "SecretFile").write_text("SecretChange")
        (secret / "SecretFile").rename(secret / "SecretName")
        os.setxattr(secret / "SecretName", "user.SecretAttribute", b"SecretValue")
        os.symlink("SecretTarget", secret / "SecretLink")
        with pytest.raises(OSError):
            os.rmdir(secret)
        with pytest.raises(OSError):
            os.truncate(secret / "SecretName", 1 << 60)
        secret.rename(made.merged / "SecretDirectory")
        process.send_signal(signal.SIGTERM)
        lines = log.read()
    assert "Secret" not in lines
    assert lines.count("\n") == 2


def test_the_level_is_an_option_too(overlay: OverlayFactory) -> None:
    made = overlay({"file": "x"}, mount=False)
    with in_foreground(made, "-v") as (process, log):
        ask_for_what_is_not_there(made)
        while " DEBUG getxattr of " not in (line := log.readline()):
            assert " DEBUG " in line
        process.send_signal(signal.SIGTERM)
        assert any("INFO SIGTERM: unmounting" in line for line in log)
    with in_foreground(made, "-q") as (process, log):
        while not made.mounted():
            assert process.poll() is None
        ask_for_what_is_not_there(made)
        process.send_signal(signal.SIGTERM)
        assert log.read() == ""


def test_a_log_that_nobody_reads_stops_no_mount(overlay: OverlayFactory) -> None:
    """At debug level, on a terminal that Ctrl-S holds: everybody waited for it, and `pyoverlay umount` in vain."""
    made = overlay({"file": "x"}, mount=False)
    with in_foreground(made, "-v") as (process, log):
        for _ in range(2000):
            ask_for_what_is_not_there(made)
        assert (made.merged / "file").read_text() == "x"
        made.umount()
        assert process.wait(10) == 0
        assert " DEBUG getxattr of " in log.read()
