"""The return path: what the destination says to the source on the same socket.

The rule of the file: a message is refused by its head alone, before its body is asked for. Message: be16 type, be16
length, body; no magic, no preamble. Source: QEMU's MIG_RP messages; error texts are QEMU's.

RECV_BITMAP is special: the bitmap follows *behind* the message and is not counted in its length; whoever gets a
`ReceivedBitmap` reads it next, with `parse_bitmap_body`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum

from migrated.errors import LocalProtocolError, RemoteProtocolError
from migrated.wire.handover import OFFER_MAX_BYTES, HandoverAnswer, decode_answer, encode_answer
from migrated.wire.primitives import (
    decode_name,
    encode_be16,
    encode_be32,
    encode_be64,
    encode_counted_string,
    parse_be16,
    parse_be64,
    printable,
)
from migrated.wire.pull import Parser

#: QEMU's source reads a message into a buffer of this size.
MESSAGE_MAX_BYTES = 512
#: Only between two `migrated` daemons: what does not fit goes on in the next message.
PREFLIGHT_MAX_BYTES = 0xFFFF
#: Room for a sentence, with some of MESSAGE_MAX_BYTES left for later.
REASON_MAX_BYTES = 500
#: Numbers in X_FAULTS: requests, and for each of three classes count, p50, p99, maximum and 24 buckets.
FAULT_WORDS = 1 + 3 * (4 + 24)
#: What RESUME_ACK says; a QEMU takes any other value for an error.
RESUME_OK = 1
#: Behind a bitmap, so that a size both sides misunderstood alike is noticed.
BITMAP_END_MARK = 0x0123456789ABCDEF
_BITMAP_WORD_BYTES = 8
_BITMAP_WORD_BITS = 64
#: A bitmap is read in pieces of this size: that of 1 TiB has 32 MiB, far beyond what a stream gives in one piece.
BITMAP_PIECE_BYTES = 64 << 10


class Message(IntEnum):
    """Type of a message; the names are QEMU's, those with X_ are peer extensions."""

    SHUT = 1
    PONG = 2
    REQ_PAGES_ID = 3
    REQ_PAGES = 4
    RECV_BITMAP = 5
    RESUME_ACK = 6
    SWITCHOVER_ACK = 7
    X_REASON = 0x4D01
    X_FAULTS = 0x4D02
    X_HANDOVER = 0x4D03
    X_PREFLIGHT = 0x4D10


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


@dataclass(frozen=True, slots=True)
class Faults:
    """Figures of a postcopy so far (`model.faults`); only between two `migrated` daemons."""

    words: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PreflightPiece:
    """A piece of the answer to a preflight (`wire.preflight`); only between two `migrated` daemons."""

    body: bytes


ReturnMessage = (
    PreflightPiece
    | HandoverAnswer
    | Faults
    | Shut
    | Pong
    | RequestPages
    | ReceivedBitmap
    | ResumeAck
    | SwitchoverAck
    | Reason
)

_REQUEST = struct.Struct(">HHQI")
_HEAD_BYTES = 4
_REQ_PAGES_BYTES = 12
_REQ_PAGES_ID_BYTES = _REQ_PAGES_BYTES + 1
# Plain numbers: comparing an IntEnum costs as much as reading a message.
_REQ_PAGES, _REQ_PAGES_ID = int(Message.REQ_PAGES), int(Message.REQ_PAGES_ID)


def _encode(kind: Message, body: bytes) -> bytes:
    return encode_be16(kind) + encode_be16(len(body)) + body


def encode_shut(status: int) -> bytes:
    return _encode(Message.SHUT, encode_be32(status))


def encode_pong(value: int) -> bytes:
    return _encode(Message.PONG, encode_be32(value))


def encode_request_pages(start: int, length: int, block: str | None = None) -> bytes:
    """Encode a request for bytes of a block; None for the block of the last request on this connection."""
    if block is None:
        return _REQUEST.pack(_REQ_PAGES, _REQ_PAGES_BYTES, start, length)
    name = encode_counted_string(block)
    return _REQUEST.pack(_REQ_PAGES_ID, _REQ_PAGES_BYTES + len(name), start, length) + name


def encode_received_bitmap(block: str, bits: bytes) -> bytes:
    """Encode which pages of a block were received, with what follows the message; ``bits`` are packed, 1 = received."""
    if len(bits) % _BITMAP_WORD_BYTES:
        raise LocalProtocolError(f"a received bitmap has whole words of 8 bytes, not {len(bits)} bytes")
    message = _encode(Message.RECV_BITMAP, encode_counted_string(block))
    return b"".join((message, encode_be64(len(bits)), bits, encode_be64(BITMAP_END_MARK)))


def encode_resume_ack() -> bytes:
    return _encode(Message.RESUME_ACK, encode_be32(RESUME_OK))


def encode_faults(words: Sequence[int]) -> bytes:
    """Encode the figures of a postcopy (`model.faults`); only for a `migrated` source."""
    return _encode(Message.X_FAULTS, struct.pack(f">{FAULT_WORDS}I", *words))


def encode_handover_answer(answer: HandoverAnswer) -> bytes:
    """Encode what the destination says about an offer; only for a `migrated` source."""
    return _encode(Message.X_HANDOVER, encode_answer(answer))


def encode_preflight(body: bytes) -> bytes:
    """Encode a piece of the answer to a preflight."""
    return _encode(Message.X_PREFLIGHT, body)


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


def parse_request(buf: memoryview, at: int) -> tuple[int, int, str | None, int] | None:
    """Parse the request at ``at``: (start, length, block or None, where it ends).

    None for anything else, a part of one, and one whose length is wrong: those are for `parse_message`, which costs
    several times as much. Somebody waits for what is asked for here.
    """
    if len(buf) < at + _REQUEST.size:
        return None
    number, size, start, length = _REQUEST.unpack_from(buf, at)
    if number == _REQ_PAGES and size == _REQ_PAGES_BYTES:
        return start, length, None, at + _REQUEST.size
    end = at + _HEAD_BYTES + size
    if number != _REQ_PAGES_ID or not _REQ_PAGES_ID_BYTES <= size <= MESSAGE_MAX_BYTES or len(buf) < end:
        return None
    return start, length, _counted(Message.REQ_PAGES_ID, bytes(buf[at + _HEAD_BYTES : end]), _REQ_PAGES_BYTES), end


def parse_bitmap_body(block: str, pages: int) -> Parser[bytes]:
    """Read what follows a RECV_BITMAP message: the packed bitmap of a block that has ``pages`` pages here.

    Raises RemoteProtocolError for another size, before any of it is asked for, and for a wrong end mark.
    """
    expected = -(-pages // _BITMAP_WORD_BITS) * _BITMAP_WORD_BYTES
    size = yield from parse_be64()
    if size != expected:
        raise RemoteProtocolError(
            f"ramblock '{block}' bitmap size mismatch ({size:#x} != {expected:#x})", section="return path"
        )
    bits = bytearray()
    while len(bits) < size:
        bits += yield min(BITMAP_PIECE_BYTES, size - len(bits))
    mark = yield from parse_be64()
    if mark != BITMAP_END_MARK:
        raise RemoteProtocolError(
            f"ramblock '{block}' end mark incorrect: {mark:#x}",
            section="return path",
            expected=f"{BITMAP_END_MARK:#x}",
        )
    return bytes(bits)


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
    Message.X_HANDOVER: (1, 1 + OFFER_MAX_BYTES, decode_answer),
    Message.X_FAULTS: (4 * FAULT_WORDS, 4 * FAULT_WORDS, lambda body: Faults(struct.unpack(f">{FAULT_WORDS}I", body))),
    Message.X_PREFLIGHT: (1, PREFLIGHT_MAX_BYTES, PreflightPiece),
    # The text goes to an operator: a bad byte in it must not hide the rest.
    Message.X_REASON: (0, MESSAGE_MAX_BYTES, lambda body: Reason(printable(body))),
}
