"""What a `migrated` source is going to do, and what stands in the way: a peer extension, before anything moves.

The rule of the file: JSON in pieces, bounded before it is decoded, and never sent to a peer that has not shown, by a
bit of its features, that it knows it. Members that nobody here knows are ignored, missing ones have a default or are
refused: the two sides may be of different age. Names and texts can be shown on a terminal.

    X_PREFLIGHT, command and message of the return path: u8 more, a piece of JSON       more: 1 = another one follows
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, TypeVar

import msgspec

from migrated.errors import Blocker, RemoteProtocolError
from migrated.wire.command import PAYLOAD_MAX_BYTES, Command, encode_command
from migrated.wire.primitives import printable

#: What the daemons say to each other beyond QEMU's stream; raised with every change that an older one would misread.
PROTOCOL = 1
#: 4096 sections with names of 255 bytes are a little over 1 MiB.
REQUIREMENTS_MAX_BYTES = 4 << 20
#: Every block, device and setting may be a blocker, with a sentence each.
ANSWER_MAX_BYTES = 4 << 20
BLOCKS_MAX = 4096
#: Four times as many devices as workloads may declare.
SECTIONS_MAX = 4096
SETTINGS_MAX = 1024
_SECTION = "preflight"
_MORE = 1

_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=255)]
_Text = Annotated[str, msgspec.Meta(max_length=1024)]
_Count = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
#: 64 TiB, as no block is larger; so a sum of them all still fits 64 bits.
_Size = Annotated[int, msgspec.Meta(ge=0, le=1 << 46)]
_Number = Annotated[int, msgspec.Meta(ge=0, le=(1 << 32) - 1)]


class BlockNeed(msgspec.Struct, frozen=True):
    """One RAM block; ``used_bytes`` of it are not holes."""

    name: _Name
    size_bytes: _Size
    page_size: _Size
    used_bytes: _Size = 0


class SectionNeed(msgspec.Struct, frozen=True):
    """One handler: ``live``, in parts from START to END, or all at once; ``active``: it would send now."""

    idstr: _Name
    instance_id: _Number
    version_id: _Number
    live: bool
    active: bool = True

    def __str__(self) -> str:
        return f"{self.idstr}/{self.instance_id}"


class Requirements(msgspec.Struct, frozen=True):
    """What the source is going to send, and how."""

    protocol: _Count
    tool: _Text
    dry_run: bool
    """Only asked: nothing follows, whatever the answer."""
    migration_id: _Text
    name: _Text
    machine_type: _Text
    uuid: _Text | None
    clock_ms: _Count
    """The source's wall clock, since the epoch."""
    blocks: Annotated[list[BlockNeed], msgspec.Meta(max_length=BLOCKS_MAX)]
    sections: Annotated[list[SectionNeed], msgspec.Meta(max_length=SECTIONS_MAX)]
    capabilities: Annotated[dict[_Name, bool], msgspec.Meta(max_length=SETTINGS_MAX)]
    parameters: Annotated[dict[_Name, bool | int | str], msgspec.Meta(max_length=SETTINGS_MAX)]


class Answer(msgspec.Struct, frozen=True):
    """What the destination says to it."""

    tool: _Text
    name: _Text
    blockers: list[Blocker]
    preempt: bool = False
    """The connection for requested pages was taken."""


class Pieces:
    """Puts together what came in pieces: at most ``most`` bytes, and only once."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._raw = bytearray()
        self._complete = False

    def take(self, payload: bytes) -> bytes | None:
        """Take a piece; return all of it with the last one. Raises RemoteProtocolError."""
        if self._complete:
            raise _refused("X_PREFLIGHT behind the last one")
        if not payload or payload[0] not in (0, _MORE):
            raise _refused("X_PREFLIGHT goes on or not", expected="0 or 1", found=payload[:1].hex() or "nothing")
        self._raw += payload[1:]
        if len(self._raw) > self._most:
            raise _refused("X_PREFLIGHT is too long", expected=f"at most {self._most} bytes", found="more")
        self._complete = not payload[0]
        return bytes(self._raw) if self._complete else None


def encode_requirements(requirements: Requirements) -> bytes:
    """Encode as one command or several."""
    return b"".join(encode_command(Command.X_PREFLIGHT, piece) for piece in _pieces(requirements))


def parse_requirements(raw: bytes) -> Requirements:
    """Parse what a source said. Raises RemoteProtocolError."""
    requirements = _decode(raw, Requirements)
    names = [block.name for block in requirements.blocks] + [section.idstr for section in requirements.sections]
    names += [requirements.name, requirements.tool, requirements.machine_type, requirements.migration_id]
    names += [requirements.uuid or "", *requirements.capabilities, *requirements.parameters]
    if odd := next((name for name in names if not name.isprintable()), None):
        raise _refused("a name has characters that cannot be printed", found=repr(odd))
    return requirements


def answer_pieces(answer: Answer) -> list[bytes]:
    """Encode as the bodies of one message or several."""
    return list(_pieces(answer))


def parse_answer(raw: bytes) -> Answer:
    """Parse what a destination said; "?" stands for what a terminal could stumble over. Raises RemoteProtocolError."""
    answer = _decode(raw, Answer)
    blockers = [
        Blocker(_shown(one.id), _shown(one.side), _shown(one.text), _shown(one.next_step), one.warning)
        for one in answer.blockers
    ]
    return Answer(_shown(answer.tool), _shown(answer.name), blockers, answer.preempt)


def _shown(text: str) -> str:
    return printable(text.encode(errors="replace"))


def _pieces(value: Requirements | Answer) -> Iterator[bytes]:
    raw = msgspec.json.encode(value)
    step = PAYLOAD_MAX_BYTES - 1
    for at in range(0, len(raw), step):
        yield bytes([_MORE * (at + step < len(raw))]) + raw[at : at + step]


T = TypeVar("T", Requirements, Answer)


def _decode(raw: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(raw, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _refused("X_PREFLIGHT cannot be understood", found=str(error)) from error


def _refused(what: str, *, expected: str = "", found: str = "") -> RemoteProtocolError:
    return RemoteProtocolError(what, section=_SECTION, expected=expected, found=found)
