"""Lines in the journal: fields that can be searched for, and today's line where the journal does not take them."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from migrated.daemon.config import Log
from migrated.daemon.journal import CUT_CHARACTERS, MESSAGE_IDS, fields_of, send_fields
from migrated.daemon.log import configure_log
from migrated.migration.history import CurrentId
from tests.support.journal import events_of, parse_fields

pytestmark = pytest.mark.usefixtures("restored_log")


class Journal:
    """A socket in the place of the journal's, and the stream that systemd would have connected to it."""

    def __init__(self, directory: Path) -> None:
        self.path = str(directory / "socket")
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(self.path)
        self.socket.setblocking(False)
        self.stream: TextIO = (directory / "stream").open("w+")

    @property
    def environment(self) -> dict[str, str]:
        status = os.fstat(self.stream.fileno())
        return {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}

    def log(self, settings: Log | None = None) -> Any:
        return configure_log(settings or Log(), self.stream, self.environment, self.path)

    def receive(self) -> dict[str, str]:
        return parse_fields(self.socket.recv(1 << 20))

    def written(self) -> list[str]:
        self.stream.seek(0)
        return self.stream.read().splitlines()

    def close(self) -> None:
        self.socket.close()
        self.stream.close()


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    made = Journal(tmp_path)
    yield made
    made.close()


class Migration:
    migration_id = "of-this-host"


def test_an_event_is_fields(journal: Journal) -> None:
    log = journal.log().bind(machine="kv")
    log.warning("migration_paused", error="the link = gone", migration_id="move-1", role="incoming", nothing=None)
    found = journal.receive()
    assert found == {
        "MESSAGE": 'migration_paused error="the link = gone" migration_id=move-1 role=incoming',
        "PRIORITY": "4",
        "SYSLOG_IDENTIFIER": "migrated",
        "MESSAGE_ID": MESSAGE_IDS["migration_paused"],
        "MIGRATED_EVENT": "migration_paused",
        "MIGRATED_MACHINE": "kv",
        "MIGRATED_MIGRATION_ID": "move-1",
        "MIGRATED_ROLE": "incoming",
        "MIGRATED_ERROR": "the link = gone",
        "CODE_FILE": __file__,
        "CODE_LINE": found["CODE_LINE"],
        "CODE_FUNC": "test_an_event_is_fields",
    }
    assert journal.written() == []


def test_priorities(journal: Journal) -> None:
    log = journal.log(Log(level="debug"))
    for level in ("debug", "info", "warning", "error"):
        getattr(log, level)("x")
    assert [journal.receive()["PRIORITY"] for _ in range(4)] == ["7", "6", "4", "3"]


def test_an_id_that_is_known_only_later_is_the_one_of_that_moment(journal: Journal) -> None:
    migration: Any = Migration()
    log = journal.log()
    with structlog.contextvars.bound_contextvars(migration_id=CurrentId(migration)):
        log.info("one")
        migration.migration_id = "of-its-source"
        log.info("two")
    assert [journal.receive()["MIGRATED_MIGRATION_ID"] for _ in range(2)] == ["of-this-host", "of-its-source"]
    stream = io.StringIO()
    configure_log(Log(format="json"), stream, {}).info("three", migration_id=CurrentId(migration))
    assert json.loads(stream.getvalue())["migration_id"] == "of-its-source"


def test_a_traceback_and_what_libraries_say(journal: Journal) -> None:
    journal.log(Log(level="debug"))
    try:
        raise ValueError("no good")
    except ValueError:
        structlog.get_logger().exception("it_failed")
    failed = journal.receive()
    assert failed["MESSAGE"].startswith("it_failed\nTraceback")
    assert failed["MESSAGE"].endswith("ValueError: no good")
    logging.getLogger("asyncio").warning("odd")
    assert journal.receive()["MIGRATED_TEXT"] == "odd"


def test_where_there_is_no_journal_the_line_goes_where_it_went(journal: Journal) -> None:
    log = journal.log()
    journal.socket.close()
    log.error("x", port=1)
    os.unlink(journal.path)
    log.error("x", port=2)
    lines = journal.written()
    assert [line[:3] for line in lines] == ["<3>", "<3>"]
    found = [json.loads(line[3:]) for line in lines]
    assert [list(line) for line in found] == [["timestamp", "level", "event", "port"]] * 2


def test_a_journal_that_does_not_read_keeps_nobody_waiting(journal: Journal) -> None:
    log = journal.log()
    count = 0
    while not journal.written():
        log.info("x")
        count += 1
    assert count > 1
    assert journal.receive()["MIGRATED_EVENT"] == "x"


def test_what_is_too_long_is_cut(journal: Journal) -> None:
    log = journal.log()
    log.error("x", text="a" * (1 << 22), other="b")
    found = journal.receive()
    assert (found["MIGRATED_TEXT"], found["MIGRATED_OTHER"]) == ("a" * CUT_CHARACTERS, "b")
    assert journal.written() == []


def test_what_does_not_fit_even_then_goes_where_it_went(journal: Journal) -> None:
    fields = {f"MIGRATED_{number}": "a" * CUT_CHARACTERS for number in range(1000)}
    assert not send_fields(journal.path, fields)


def test_json_and_console_are_lines_in_the_journal(journal: Journal) -> None:
    journal.log(Log(format="json")).info("x")
    journal.log(Log(format="console")).info("y")
    one, two = journal.written()
    assert one.startswith("<6>{")
    assert two.startswith("<6>")
    with pytest.raises(BlockingIOError):
        journal.receive()


@given(st.dictionaries(st.text(min_size=1), st.text() | st.integers() | st.lists(st.text()) | st.none()))
def test_whatever_is_said_can_be_read(said: dict[str, Any]) -> None:
    fields = fields_of({"event": "x", "level": "info", **said})
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as there:
        there.bind("")  # a name of the kernel's choice, in the abstract namespace
        assert send_fields(there.getsockname().decode(), fields)
        found = parse_fields(there.recv(1 << 20))
    assert found.keys() == fields.keys()
    assert all(re.fullmatch(r"[A-Z][A-Z0-9_]{0,63}", name) for name in found)


def test_ids_are_128_bits_and_each_is_another() -> None:
    assert all(re.fullmatch(r"[0-9a-f]{32}", one) for one in MESSAGE_IDS.values())
    assert len(set(MESSAGE_IDS.values())) == len(MESSAGE_IDS)


def test_what_journalctl_shows_is_read_as_events() -> None:
    shown = '{"MESSAGE": "x", "MIGRATED_EVENT": "ready", "MIGRATED_MACHINE": "kv"}\n{"MESSAGE": "of systemd"}\n'
    assert events_of(shown) == [{"event": "ready", "machine": "kv"}]
