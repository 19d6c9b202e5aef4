"""The daemon's log: where it goes, how a line looks, and what is not said where others read."""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyoverlay.daemon import logs
from pyoverlay.daemon.logs import Format, JournalFormatter, JsonFormatter, TextFormatter

NAME = "a name out of the tree"


@pytest.fixture(autouse=True)
def root_logger() -> Iterator[logging.Logger]:
    """As it was, afterwards."""
    root = logging.getLogger()
    level, raises = root.level, logging.raiseExceptions
    yield root
    for handler in ours(root):
        root.removeHandler(handler)
        if isinstance(handler, logs.SyslogHandler):
            handler._socket.close()
        elif isinstance(handler, logs.DescriptorHandler) and handler.fd != sys.stderr.fileno():
            os.close(handler.fd)
    logging.raiseExceptions = raises
    root.setLevel(level)


def ours(root: logging.Logger) -> list[logging.Handler]:
    """The handlers that `set_up` adds; pytest has its own."""
    return [handler for handler in root.handlers if type(handler) in (logs.SyslogHandler, logs.DescriptorHandler, logging.NullHandler)]


def record(message: str, level: int = logging.INFO, error: Exception | None = None) -> logging.LogRecord:
    information = (type(error), error, error.__traceback__) if error is not None else None
    return logging.LogRecord("pyoverlay.fuse", level, __file__, 1, message, (), information)


def bug() -> Exception:
    try:
        raise KeyError(NAME)
    except KeyError as error:
        return error


def test_a_line_for_people_has_time_process_and_level() -> None:
    line = TextFormatter(is_shared=False).format(record("mounted"))
    assert re.fullmatch(rf"\d{{4}}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{{3}}Z pyoverlay\[{os.getpid()}\] INFO mounted", line)
    assert TextFormatter(is_shared=True).format(record("mounted")) == "mounted"


def test_a_line_for_programs_is_one_object() -> None:
    line = JsonFormatter(is_shared=False).format(record("a\nb", logging.ERROR, bug()))
    assert "\n" not in line
    document = json.loads(line)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", document["time"])
    assert (document["level"], document["pid"], document["logger"], document["message"]) == ("error", os.getpid(), "pyoverlay.fuse", "a\nb")
    assert f"KeyError: '{NAME}'" in document["exception"]


@pytest.mark.parametrize("kind", [TextFormatter, JsonFormatter])
def test_where_others_read_an_exception_says_its_kind_and_place_alone(kind: type[TextFormatter], root_logger: logging.Logger) -> None:
    root_logger.setLevel(logging.INFO)
    line = kind(is_shared=True).format(record("lookup failed", logging.ERROR, bug()))
    assert "KeyError" in line
    assert "in bug" in line
    assert NAME not in line
    root_logger.setLevel(logging.DEBUG)
    assert NAME in kind(is_shared=True).format(record("lookup failed", logging.ERROR, bug()))


def test_each_line_of_the_journal_begins_with_its_severity() -> None:
    formatter = JournalFormatter(TextFormatter(is_shared=True))
    lines = formatter.format(record("it failed", logging.ERROR, bug())).splitlines()
    assert lines[0] == "<3>it failed"
    assert len(lines) > 2
    assert all(line.startswith("<3>") for line in lines)
    assert formatter.format(record("mounted")) == "<6>mounted"


def test_syslog_gets_datagrams_with_facility_and_severity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, root_logger: logging.Logger
) -> None:
    monkeypatch.setattr(logs, "_SYSLOG", str(tmp_path / "log"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as syslogd:
        syslogd.bind(str(tmp_path / "log"))
        logs.set_up(foreground=False, file=None, level=logging.INFO)
        logging.getLogger("pyoverlay").info("mounted")
        logging.getLogger("pyoverlay").debug("not asked for")
        logging.getLogger("pyoverlay").critical("lost")
        assert syslogd.recv(1000) == b"<30>pyoverlay[%d]: mounted" % os.getpid()
        assert syslogd.recv(1000) == b"<26>pyoverlay[%d]: lost" % os.getpid()


def test_a_syslog_that_is_full_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "_SYSLOG", str(tmp_path / "log"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as syslogd:
        syslogd.bind(str(tmp_path / "log"))
        logs.set_up(foreground=False, file=None, level=logging.INFO)
        for _ in range(2000):  # past net.unix.max_dgram_qlen; nobody receives
            logging.getLogger("pyoverlay").info("x" * 1000)
        assert syslogd.recv(2000).endswith(b"x" * 1000)


def test_a_machine_without_syslog_logs_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, root_logger: logging.Logger) -> None:
    monkeypatch.setattr(logs, "_SYSLOG", str(tmp_path / "none"))
    logs.set_up(foreground=False, file=None, level=logging.INFO)
    assert [type(handler) for handler in ours(root_logger)] == [logging.NullHandler]


def test_a_log_file_is_its_owner_s_alone_and_is_appended_to(tmp_path: Path, root_logger: logging.Logger) -> None:
    before = os.umask(0)
    try:
        for message in ("one", "two"):
            logs.set_up(foreground=False, file=str(tmp_path / "log"), level=logging.INFO, form=Format.JSON)
            logging.getLogger("pyoverlay").info(message)
            (handler,) = ours(root_logger)
            root_logger.removeHandler(handler)
            assert isinstance(handler, logs.DescriptorHandler)
            os.close(handler.fd)
    finally:
        os.umask(before)
    assert [json.loads(line)["message"] for line in (tmp_path / "log").read_text().splitlines()] == ["one", "two"]
    assert stat.S_IMODE(os.stat(tmp_path / "log").st_mode) == 0o600


@pytest.mark.parametrize(("asked", "first", "second"), [(20, 10, 20), (40, 10, 40), (10, 20, 10)])
def test_the_level_goes_to_debug_and_back(root_logger: logging.Logger, asked: int, first: int, second: int) -> None:
    root_logger.setLevel(asked)
    level = logs.Level()
    level.switch()
    assert root_logger.level == first
    level.switch()
    assert root_logger.level == second


def test_what_was_asked_for_is_said_at_any_level(root_logger: logging.Logger, tmp_path: Path) -> None:
    logs.set_up(foreground=False, file=str(tmp_path / "log"), level=logging.ERROR)
    logs.say("%d inodes", 7)
    assert (tmp_path / "log").read_text().endswith(" INFO 7 inodes\n")


def test_a_log_that_nobody_reads_holds_nobody_up_and_says_later_what_is_missing() -> None:
    """A mount in the foreground stopped with its terminal."""
    reader, writer = os.pipe()
    handler = logs.DescriptorHandler(writer)
    line = record("x" * 99)
    for _ in range(2000):
        handler.emit(line)
    os.set_blocking(reader, False)
    whole = os.read(reader, 1 << 20).decode().splitlines()
    assert set(whole) == {"x" * 99}
    handler.emit(record("read again"))
    assert os.read(reader, 1 << 20).decode() == f"{2000 - len(whole)} lines of the log could not be written\nread again\n"
    handler.emit(record("and again"))
    assert os.read(reader, 1 << 20).decode() == "and again\n"
    os.close(reader)
    handler.emit(record("to nobody"))
    os.close(writer)
