"""The return path: what the destination says to the source on the same socket.

The rule of the file: a message is refused by its head alone, before its body is asked for. Message: be16 type, be16
length, body; no magic, no preamble. Source: QEMU's MIG_RP messages; error texts are QEMU's.

RECV_BITMAP is special: the bitmap follows *behind* the message and is not counted in its length; whoever gets a
`ReceivedBitmap` reads it next.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

from migrated.errors import RemoteProtocolError
from migrated.wire.primitives import decode_name, encode_be16, encode_be32, parse_be16, printable
from migrated.wire.pull import Parser

#: QEMU's source reads a message into a buffer of this size.
MESSAGE_MAX_BYTES = 512
#: Room for a sentence, with some of MESSAGE_MAX_BYTES left for later.
REASON_MAX_BYTES = 500


class Message(IntEnum):
    """Type of a message; the names are QEMU's, X_REASON is a peer extension."""

    SHUT = 1
    PONG = 2
    REQ_PAGES_ID = 3
    REQ_PAGES = 4
    RECV_BITMAP = 5
    RESUME_ACK = 6
    SWITCHOVER_ACK = 7
    X_REASON = 0x4D01


@dataclass(frozen=True, slots=True)
class Shut:
    """The last message: 0 = everything was loaded, anything else = the destination saw an error."""

    status: int


@dataclass(frozen=True, slots=True)
class Pong:
    """The echo of a PING."""

    value: int


@dataclass(frozen=True, slots=True)
class RequestPages:
    """Pages the destination waits for, in bytes; ``block`` is None for the block of the last request that named one."""

    start: int
    length: int
    block: str | None = None


@dataclass(frozen=True, slots=True)
class ReceivedBitmap:
    """Announces the received bitmap of a block, which follows."""

    block: str


@dataclass(frozen=True, slots=True)
class ResumeAck:
    """Postcopy goes on; any value but 1 is an error."""

    value: int


@dataclass(frozen=True, slots=True)
class SwitchoverAck:
    """The destination agrees to the switchover (QEMU 8.1)."""


@dataclass(frozen=True, slots=True)
class Reason:
    """Why the destination is about to refuse; only between two `migrated` daemons, before SHUT(1)."""

    text: str


ReturnMessage = Shut | Pong | RequestPages | ReceivedBitmap | ResumeAck | SwitchoverAck | Reason

_REQ_PAGES_BYTES = 12
_REQ_PAGES_ID_BYTES = _REQ_PAGES_BYTES + 1


def _encode(kind: Message, body: bytes) -> bytes:
    return encode_be16(kind) + encode_be16(len(body)) + body


def encode_shut(status: int) -> bytes:
    return _encode(Message.SHUT, encode_be32(status))


def encode_pong(value: int) -> bytes:
    return _encode(Message.PONG, encode_be32(value))


def encode_reason(text: str) -> bytes:
    """Encode why we refuse, cut to REASON_MAX_BYTES at a character boundary."""
    # A cut through a character leaves an incomplete sequence at the end, which "ignore" drops; nothing else is invalid.
    raw = text.encode(errors="replace")[:REASON_MAX_BYTES].decode(errors="ignore").encode()
    return _encode(Message.X_REASON, raw)


def parse_message() -> Parser[ReturnMessage]:
    """Read one message. Raises RemoteProtocolError as QEMU's source does: unknown type, wrong length."""
    number = yield from parse_be16()
    length = yield from parse_be16()
    if number not in _TABLE:
        raise RemoteProtocolError(f"Received invalid message {number:#06x} length {length:#06x}", section="return path")
    kind = Message(number)
    least, most, build = _TABLE[kind]
    if not least <= length <= most:
        raise _bad_length(kind, length, least if length < least else most)
    return build((yield length) if length else b"")


def _bad_length(kind: Message, length: int, expected: int) -> RemoteProtocolError:
    return RemoteProtocolError(
        f"Received '{kind.name}' message ({kind:#06x}) with incorrect length {length} expecting {expected}",
        section="return path",
    )


def _number(body: bytes) -> int:
    return int.from_bytes(body, "big")


def _request(body: bytes) -> RequestPages:
    block = None
    if len(body) > _REQ_PAGES_BYTES:
        block = _counted(Message.REQ_PAGES_ID, body, _REQ_PAGES_BYTES)
    return RequestPages(_number(body[:8]), _number(body[8:12]), block)


def _received_bitmap(body: bytes) -> ReceivedBitmap:
    return ReceivedBitmap(_counted(Message.RECV_BITMAP, body, 0))


def _counted(kind: Message, body: bytes, offset: int) -> str:
    """Decode the counted block name that must fill ``body`` from ``offset`` to its end."""
    end = offset + 1 + body[offset]
    if end != len(body):
        raise _bad_length(kind, len(body), end)
    return decode_name(body[offset + 1 :], "a block name")


#: Least and most body bytes, and what a body becomes.
_TABLE: dict[int, tuple[int, int, Callable[[bytes], ReturnMessage]]] = {
    Message.SHUT: (4, 4, lambda body: Shut(_number(body))),
    Message.PONG: (4, 4, lambda body: Pong(_number(body))),
    Message.REQ_PAGES_ID: (_REQ_PAGES_ID_BYTES, MESSAGE_MAX_BYTES, _request),
    Message.REQ_PAGES: (_REQ_PAGES_BYTES, _REQ_PAGES_BYTES, _request),
    Message.RECV_BITMAP: (1, MESSAGE_MAX_BYTES, _received_bitmap),
    Message.RESUME_ACK: (4, 4, lambda body: ResumeAck(_number(body))),
    Message.SWITCHOVER_ACK: (0, 0, lambda _: SwitchoverAck()),
    # The text goes to an operator: a bad byte in it must not hide the rest.
    Message.X_REASON: (0, MESSAGE_MAX_BYTES, lambda body: Reason(printable(body))),
}
