"""The journal's own protocol: an event of the log as fields that can be searched for.

The rule of the file: to log never fails the daemon and never waits. What the journal cannot take now is given back, and
goes where it went before there was a journal.

    journalctl MIGRATED_MIGRATION_ID=...      every line of one migration, at either host

Source: systemd's "Native Journal Protocol", systemd.journal-fields(7).
"""

from __future__ import annotations

import contextlib
import errno
import json
import re
import socket
from collections.abc import Iterator, Mapping
from typing import Any

import structlog
from structlog.processors import CallsiteParameter, CallsiteParameterAdder
from structlog.typing import EventDict, Processor, WrappedLogger

SOCKET = "/run/systemd/journal/socket"
#: Of a value in a line that does not fit into one datagram (some 200 KiB).
CUT_CHARACTERS = 2048
#: syslog(3) priorities.
PRIORITIES = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}

#: The events that somebody may wait for. An id, once released, keeps its meaning for ever (journalctl MESSAGE_ID=...).
MESSAGE_IDS: Mapping[str, str] = {
    "migration_status": "d1937d68c50b48cd998e577b3e33fa9b",
    "migration_failed": "29668598cec64fd599127c036dbb6d27",
    "migration_paused": "449516f512e8413bb00a08fd4ee98b32",
    "migration_interrupted": "b27d503d41214957a6e9ca665967548b",
    "postcopy_given_up": "05dfd79b29fa4d1c99c5011e7b5636c5",
    "commit_not_delivered": "f7f904b0167b4aeba7218d353b1abdf4",
    "handover_settled": "1143560362d44d8692709844b0f92b34",
    "stray_write_after_commit": "8734c711c7854c048c1d32d523e584c4",
    "outcome_unknown": "ba57fb8342e945509a241b345e75ee8a",
    "outcome_resolved_by_operator": "c4711223cf754333a005c51ef2863ab7",
    "record_not_written": "a93fdf5ec3f14b12ab915f364f9ea356",
    "memory_incomplete": "a955515fa25a43a98324e63d7db06d0b",
    "workload_left": "c95c95e6e1574b41a7358a991c413022",
    "certificate_expires": "a4130fa0fcf04e2a8c1167cfd67950a7",
    "certificate_expired": "6b9cdb0542e749eca11769eedbcc0182",
    "cannot_start": "ac25ea6d7ae94fe095a7e9fdd0bdba29",
}

#: Where an event was raised, under the names that the journal has for it.
_CODE = {"pathname": "CODE_FILE", "lineno": "CODE_LINE", "func_name": "CODE_FUNC"}
#: Not in the text: the unit's name says the machine, and the journal has priorities of its own.
_NOT_IN_TEXT = frozenset({"machine", "level", "event", "exception"})
_NOT_IN_NAMES = re.compile(r"[^A-Z0-9_]")
_NAME_MAX = 64


def journal_processors(path: str) -> list[Processor]:
    """Return what hands events to the journal at ``path``; behind it come those that it did not take."""
    where = (CallsiteParameter.PATHNAME, CallsiteParameter.LINENO, CallsiteParameter.FUNC_NAME)
    return [CallsiteParameterAdder(where), _ToJournal(path)]


class _ToJournal:
    """The processor at whose end an event is in the journal, or as it was."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __call__(self, logger: WrappedLogger, method: str, event: EventDict) -> EventDict:
        where = {field: event.pop(name) for name, field in _CODE.items() if name in event}
        fields = {**fields_of(event), **{field: str(value) for field, value in where.items()}}
        if send_fields(self._path, fields):
            raise structlog.DropEvent
        return event


def fields_of(event: Mapping[str, Any]) -> dict[str, str]:
    """Return an event as the journal's fields."""
    name = str(event.get("event", ""))
    fields = {
        "MESSAGE": _text(name, event),
        "PRIORITY": str(PRIORITIES.get(str(event.get("level")), PRIORITIES["info"])),
        "SYSLOG_IDENTIFIER": "migrated",
        **({"MESSAGE_ID": MESSAGE_IDS[name]} if name in MESSAGE_IDS else {}),
    }
    own = {_field_name(key): _value(value) for key, value in event.items() if key != "level" and value is not None}
    return {**own, **fields}


def _text(name: str, event: Mapping[str, Any]) -> str:
    """Return what people read: the event, and what was said with it."""
    told = {key: value for key, value in event.items() if key not in _NOT_IN_TEXT and value is not None}
    line = " ".join([name, *(f"{key}={_quoted(_value(value))}" for key, value in told.items())])
    return f"{line}\n{event['exception']}" if "exception" in event else line


def _quoted(text: str) -> str:
    return text if re.fullmatch(r"[^\s\"=]+", text) else json.dumps(text, ensure_ascii=False)


def _value(value: object) -> str:
    if isinstance(value, dict | list | tuple):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)


def _field_name(key: str) -> str:
    return "MIGRATED_" + _NOT_IN_NAMES.sub("_", key.upper())[: _NAME_MAX - len("MIGRATED_")]


def send_fields(path: str, fields: Mapping[str, str]) -> bool:
    """Hand fields to the journal; False where it is not there, or cannot take them now."""
    kind = socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
    try:
        with contextlib.closing(socket.socket(socket.AF_UNIX, kind)) as sock:
            for attempt in (fields, {name: value[:CUT_CHARACTERS] for name, value in fields.items()}):
                try:
                    sock.sendto(b"".join(_encoded(attempt)), path)
                except OSError as error:
                    if error.errno not in (errno.EMSGSIZE, errno.ENOBUFS):
                        raise
                else:
                    return True
    except OSError:
        return False
    return False


def _encoded(fields: Mapping[str, str]) -> Iterator[bytes]:
    """Return fields as they are sent: NAME=VALUE, or, with a line feed in the value, its length in front of it."""
    for name, text in fields.items():
        value = text.encode("utf-8", "replace")
        if b"\n" in value:
            yield name.encode() + b"\n" + len(value).to_bytes(8, "little") + value + b"\n"
        else:
            yield name.encode() + b"=" + value + b"\n"
