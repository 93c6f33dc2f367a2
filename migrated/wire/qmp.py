"""QMP framing: bytes of a control socket <-> JSON values, and the lines a server or a client writes.

The rule of the file: whatever arrives, in whatever pieces, becomes values or `Malformed`, in time linear in the bytes
and memory bounded by `MAX_MESSAGE_BYTES`. A value ends where its brackets close, never "at a newline": clients may
split and join as they like. After something that cannot be framed, input is skipped up to the next newline, or up to a
control character or a byte 0xFF, which is how QMP clients ask a server's parser to start afresh.

Source of the format: QEMU's "QMP protocol specification" and the behaviour of QEMU 7.2 (single-quoted strings are
accepted, members must be unique, lines written end in CR LF, everything written is ASCII).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from types import MappingProxyType
from typing import Final

MAX_MESSAGE_BYTES: Final = 1 << 20
"""Longest value accepted. QEMU takes 64 MiB because its commands can carry disk data in base64; the longest sensible
command here is a list of capabilities and parameters of some KiB, so 1 MiB leaves two orders of magnitude."""

BYTES_PER_TOKEN: Final = 32
"""A value may have one bracket, string or comma per so many bytes of the limit, which is QEMU's ratio (2 M in 64 MiB).
It bounds the time that one value can take to decode: a thousand tiny lists cost more than one long string."""

MAX_DEPTH: Final = 512
"""Deepest nesting accepted. QEMU takes 1024; CPython 3.11's JSON codec counts each level against the interpreter's
recursion limit of 1000 which it shares with its callers, so only about half of that can be promised at any stack
depth. No QMP command nests deeper than five levels."""


class Absent(Enum):
    """What stands for "no id was given", because ``null`` is a valid id."""

    ABSENT = auto()


ABSENT: Final = Absent.ABSENT


@dataclass(frozen=True, slots=True)
class Message:
    """One complete JSON value, of any type."""

    value: object


@dataclass(frozen=True, slots=True)
class Malformed:
    """Bytes that are not JSON; ``desc`` is the text of the QMP error that answers them."""

    desc: str


class _Garbage(Exception):
    """The byte at offset ``at`` of the data being fed cannot be part of JSON."""

    def __init__(self, desc: str, at: int) -> None:
        super().__init__(desc)
        self.desc = desc
        self.at = at


class _Unacceptable(ValueError):
    """Valid for Python's JSON codec, not for QMP."""


_CONTROL = rb"\x00-\x08\x0b\x0c\x0e-\x1f\xff"  # everything but tab, newline, carriage return; 0xFF is never UTF-8
_STRUCTURE = re.compile(rb"[{}\[\]\"'" + _CONTROL + rb"]")
_WORD_END = re.compile(rb"[\x00-\x20{}\[\]\"',:\xff]")
_STRING_STOP = {ord('"'): re.compile(rb'["\\\x00-\x1f\xff]'), ord("'"): re.compile(rb"['\\\x00-\x1f\xff]")}
_RESYNC = re.compile(rb"[\n" + _CONTROL + rb"]")
_BLANK = re.compile(rb"[ \t\r\n]+")
_CLOSER = {ord("{"): ord("}"), ord("["): ord("]")}


class JsonStream:
    """Cuts a byte stream into JSON values; feed it whatever was received."""

    def __init__(self, max_bytes: int = MAX_MESSAGE_BYTES) -> None:
        self._max_bytes = max_bytes
        self._max_tokens = max(max_bytes // BYTES_PER_TOKEN, 1)
        self._tokens = 0
        self._text = bytearray()
        self._closers = bytearray()
        self._quote = 0
        self._scan: Callable[[bytes, int], int] = self._between
        self._events: list[Message | Malformed] = []

    def feed(self, data: bytes) -> list[Message | Malformed]:
        """Take the next bytes and return what became complete with them, in order."""
        position = 0
        while position < len(data):
            try:
                position = self._scan(data, position)
            except _Garbage as garbage:
                self._reset()
                self._events.append(Malformed(garbage.desc))
                self._scan = self._skip
                position = garbage.at
        events, self._events = self._events, []
        return events

    @property
    def pending_bytes(self) -> int:
        """Bytes held for a value that is not complete yet."""
        return len(self._text)

    # One method per state: take data from `start` on, return where to go on. Each consumes a byte or changes state.

    def _between(self, data: bytes, start: int) -> int:
        if blank := _BLANK.match(data, start):
            return blank.end()
        if data[start] in b"{[\"'":
            self._scan = self._inside
        elif _WORD_END.match(data, start):
            raise _stray(data, start)
        else:
            self._scan = self._word
        return start

    def _word(self, data: bytes, start: int) -> int:
        match = _WORD_END.search(data, start)
        end = match.start() if match else len(data)
        self._take(data, start, end)
        if match:
            self._finish()
            if isinstance(self._events[-1], Malformed):
                self._scan = self._skip
        return end

    def _inside(self, data: bytes, start: int) -> int:
        match = _STRUCTURE.search(data, start)
        end = match.end() if match else len(data)
        self._take(data, start, end)
        if match:
            self._turn(data, end - 1)
        return end

    def _turn(self, data: bytes, at: int) -> None:
        """Act on the structural byte data[at]."""
        byte = data[at]
        self._tokens += 1
        if self._tokens > self._max_tokens:
            raise _Garbage("JSON token count limit exceeded", at)
        if byte in _CLOSER:
            self._closers.append(_CLOSER[byte])
            if len(self._closers) > MAX_DEPTH:
                raise _Garbage("JSON nesting depth limit exceeded", at)
        elif byte in _STRING_STOP:
            self._quote = byte
            self._scan = self._string
        elif self._closers and byte == self._closers[-1]:
            self._closers.pop()
            self._finish_if_closed()
        else:
            raise _stray(data, at)

    def _string(self, data: bytes, start: int) -> int:
        match = _STRING_STOP[self._quote].search(data, start)
        end = match.end() if match else len(data)
        self._take(data, start, end)
        if match is None:
            return end
        byte = data[end - 1]
        if byte == self._quote:
            self._scan = self._inside
            self._finish_if_closed()
        elif byte == ord("\\"):
            self._scan = self._escape
        else:
            raise _stray(data, end - 1)
        return end

    def _escape(self, data: bytes, start: int) -> int:
        if data[start] < 0x20 or data[start] == 0xFF:
            raise _stray(data, start)
        self._take(data, start, start + 1)
        self._scan = self._string
        return start + 1

    def _skip(self, data: bytes, start: int) -> int:
        match = _RESYNC.search(data, start)
        if match is None:
            return len(data)
        self._scan = self._between
        return match.end()

    # What the states share.

    def _take(self, data: bytes, start: int, end: int) -> None:
        room = self._max_bytes - len(self._text)
        if end - start > room:
            raise _Garbage("JSON token size limit exceeded", start + room)
        self._text += data[start:end]

    def _finish_if_closed(self) -> None:
        if not self._closers:
            self._finish()

    def _finish(self) -> None:
        """Decode the value held. Its end is known, so a malformed one needs no resynchronisation."""
        text = bytes(self._text)
        many = self._tokens + text.count(b",") > self._max_tokens  # commas in strings are counted too: so be it
        event = Malformed("JSON token count limit exceeded") if many else _decode(text)
        self._reset()
        self._events.append(event)

    def _reset(self) -> None:
        self._text = bytearray()
        self._tokens = 0
        self._closers.clear()
        self._scan = self._between


def _stray(data: bytes, at: int) -> _Garbage:
    byte = data[at]
    if byte in b"}],:":
        return _Garbage("JSON parse error, expecting value", at)
    return _Garbage(f"JSON parse error, stray byte 0x{byte:02X}", at)


def _decode(text: bytes) -> Message | Malformed:
    try:
        decoded = (_STRING.sub(_requote, text) if b"'" in text else text).decode("utf-8")
        value = _DECODER.decode(decoded)
        if "\\u" in decoded:
            _check_strings(value)
    except UnicodeDecodeError:
        return Malformed("JSON parse error, invalid UTF-8 sequence in string")
    except json.JSONDecodeError as error:
        return Malformed(f"JSON parse error, {error.msg[:1].lower()}{error.msg[1:]}")
    except ValueError as error:  # _Unacceptable, or an integer too long for int()
        return Malformed(f"JSON parse error, {error}")
    return Message(value)


_STRING = re.compile(rb"\"[^\"\\]*+(?:\\.[^\"\\]*+)*+\"|'[^'\\]*+(?:\\.[^'\\]*+)*+'", re.DOTALL)
_QUOTE_OR_ESCAPE = re.compile(rb"\\.|\"", re.DOTALL)


def _requote(match: re.Match[bytes]) -> bytes:
    """Turn a string in either quotes into the same one in double quotes, without escaped single ones."""
    return b'"' + _QUOTE_OR_ESCAPE.sub(_reescape, match.group()[1:-1]) + b'"'


def _reescape(match: re.Match[bytes]) -> bytes:
    return {b'"': b'\\"', b"\\'": b"'"}.get(match.group(), match.group())


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise _Unacceptable("duplicate key")
    return members


def _refuse_constant(name: str) -> object:
    raise _Unacceptable(f"invalid keyword '{name}'")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise _Unacceptable("number out of range")
    return number


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse_constant, parse_float=_finite)


def _check_strings(value: object) -> None:
    """Refuse what escapes can smuggle into a string: half a surrogate pair, and NUL, which would end a C string."""
    stack = [value]
    while stack:
        match stack.pop():
            case str() as text:
                if "\0" in text or any("\ud800" <= char <= "\udfff" for char in text):
                    raise _Unacceptable("invalid Unicode escape in string")
            case list() as items:
                stack.extend(items)
            case dict() as members:
                stack.extend(members)
                stack.extend(members.values())
            case _:
                pass


# What is written: one line per object, spaced as QEMU spaces it.


def encode_greeting(version: Mapping[str, object], capabilities: Sequence[str] = ()) -> bytes:
    """The line a server opens with; ``version`` is what query-version returns."""
    return _line({"QMP": {"version": version, "capabilities": list(capabilities)}})


def encode_return(value: object, ident: object = ABSENT) -> bytes:
    """A command's result; ``ident`` is the command's id, echoed if it had one."""
    return _line(_with_id({"return": value}, ident))


def encode_error(
    qmp_class: str, desc: str, ident: object = ABSENT, more: Mapping[str, object] = MappingProxyType({})
) -> bytes:
    """A command's refusal; ``more`` are members of the error that QEMU does not have."""
    return _line(_with_id({"error": {"class": qmp_class, "desc": desc, **more}}, ident))


def encode_event(name: str, data: Mapping[str, object], timestamp_us: int) -> bytes:
    """An event; ``timestamp_us`` is the wall clock in microseconds. Empty ``data`` is left out."""
    seconds, microseconds = divmod(timestamp_us, 1_000_000)
    event: dict[str, object] = {"timestamp": {"seconds": seconds, "microseconds": microseconds}, "event": name}
    return _line({**event, "data": data} if data else event)


def encode_command(name: str, arguments: Mapping[str, object], ident: object = ABSENT) -> bytes:
    """A command, as a client sends it."""
    command: dict[str, object] = {"execute": name}
    return _line(_with_id({**command, "arguments": arguments} if arguments else command, ident))


def _with_id(answer: dict[str, object], ident: object) -> dict[str, object]:
    return answer if ident is ABSENT else {**answer, "id": ident}


def _line(value: object) -> bytes:
    return json.dumps(value, allow_nan=False).encode("ascii") + b"\r\n"
