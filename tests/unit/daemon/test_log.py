"""What a log line looks like, where it goes, and when it carries a traceback."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import os
from pathlib import Path
from typing import Any, TextIO, cast

import pytest
import structlog
from structlog.typing import FilteringBoundLogger

from migrated.daemon.config import Log
from migrated.daemon.log import configure_log

pytestmark = pytest.mark.usefixtures("restored_log")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def fail(log: FilteringBoundLogger) -> None:
    try:
        raise ValueError("no good")
    except ValueError:
        log.exception("it_failed")


def test_json_off_a_terminal_with_context_and_a_fixed_beginning() -> None:
    stream = io.StringIO()
    log = configure_log(Log(), stream, {}).bind(machine="kv")
    log.info("ready", port=7400, path=Path("/x"))
    (line,) = lines(stream)
    assert list(line) == ["timestamp", "level", "event", "machine", "port", "path"]
    assert (line["level"], line["event"], line["machine"], line["port"]) == ("info", "ready", "kv", 7400)
    assert line["timestamp"].endswith("Z")


async def test_each_daemon_of_a_process_has_its_machine_in_every_line() -> None:
    stream = io.StringIO()
    configure_log(Log(), stream, {})

    async def daemon(name: str) -> None:
        with structlog.contextvars.bound_contextvars(machine=name):
            async with asyncio.TaskGroup() as jobs:
                jobs.create_task(asyncio.to_thread(structlog.get_logger().info, "from_a_thread"))
            logging.getLogger("asyncio").warning("from a library")

    await asyncio.gather(daemon("a"), daemon("b"))
    found = lines(stream)
    assert sorted(line["machine"] for line in found) == ["a", "a", "b", "b"]
    assert list(found[0])[:4] == ["timestamp", "level", "event", "machine"]


def test_a_terminal_gets_text_with_colours_unless_told_otherwise() -> None:
    for environment, coloured in (({}, True), ({"NO_COLOR": "1"}, False)):
        stream = Terminal()
        configure_log(Log(), stream, environment).info("ready")
        assert "ready" in stream.getvalue()
        assert ("\x1b[" in stream.getvalue()) is coloured
    stream = Terminal()
    configure_log(Log(format="json"), stream, {}).info("ready")
    assert lines(stream)[0]["event"] == "ready"


def test_levels() -> None:
    stream = io.StringIO()
    log = configure_log(Log(level="warning"), stream, {})
    log.info("unheard")
    log.warning("heard")
    assert [line["event"] for line in lines(stream)] == ["heard"]


def test_an_exception_is_one_line_and_a_traceback_only_at_debug() -> None:
    stream = io.StringIO()
    fail(configure_log(Log(), stream, {}))
    (line,) = lines(stream)
    assert line["exception"] == "ValueError: no good"
    assert line["raised_at"].startswith("test_log.py:")
    assert "Traceback" not in stream.getvalue()
    stream = io.StringIO()
    fail(configure_log(Log(level="debug"), stream, {}))
    (line,) = lines(stream)
    assert "Traceback" in line["exception"]
    assert "ValueError: no good" in line["exception"]


@pytest.mark.parametrize("info", [None, False, (None, None, None)])
def test_no_exception_is_no_exception(info: object) -> None:
    stream = io.StringIO()
    configure_log(Log(), stream, {}).error("plain", exc_info=info)
    assert "exception" not in lines(stream)[0]


def test_an_exception_that_is_handed_over() -> None:
    stream = io.StringIO()
    configure_log(Log(), stream, {}).error("told", exc_info=ValueError("never raised"))
    (line,) = lines(stream)
    assert line["exception"] == "ValueError: never raised"
    assert "raised_at" not in line


def journal(path: Path) -> tuple[TextIO, dict[str, str]]:
    stream = path.open("w+")
    status = os.fstat(stream.fileno())
    return stream, {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}


def test_lines_for_the_journal_begin_with_their_priority(tmp_path: Path) -> None:
    stream, environment = journal(tmp_path / "journal")
    with stream:
        log = configure_log(Log(level="debug", format="json"), stream, environment)
        for level in ("debug", "info", "warning", "error"):
            getattr(log, level)("x")
        stream.seek(0)
        written = stream.read().splitlines()
    assert [line[:4] for line in written] == ["<7>{", "<6>{", "<4>{", "<3>{"]


def test_no_priorities_where_the_output_was_redirected(tmp_path: Path) -> None:
    stream, environment = journal(tmp_path / "journal")
    stream.close()
    with (tmp_path / "elsewhere").open("w+") as other:
        configure_log(Log(), other, environment | {"INVOCATION_ID": "0"}).info("x")
        other.seek(0)
        assert other.read().startswith("{")


def test_every_line_of_a_console_traceback_has_the_priority(tmp_path: Path) -> None:
    stream, environment = journal(tmp_path / "journal")
    with stream:
        fail(configure_log(Log(level="debug", format="console"), stream, environment))
        stream.seek(0)
        written = stream.read().splitlines()
    assert len(written) > 3
    assert all(line.startswith("<3>") for line in written)


async def test_what_asyncio_complains_about_is_logged_as_an_event() -> None:
    stream = io.StringIO()
    configure_log(Log(), stream, {})
    asyncio.get_running_loop().call_exception_handler({"message": "odd", "exception": ValueError("lost")})
    (line,) = lines(stream)
    assert (line["event"], line["level"], line["logger"]) == ("library_message", "error", "asyncio")
    assert line["text"].startswith("odd")
    assert line["exception"] == "ValueError: lost"


def test_loggers_of_other_modules_end_up_in_the_same_place() -> None:
    stream = io.StringIO()
    configure_log(Log(), stream, {})
    cast("FilteringBoundLogger", structlog.get_logger()).warning("from_afar")
    assert lines(stream)[0]["event"] == "from_afar"
