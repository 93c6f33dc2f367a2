"""The hand-over between two `migrated` daemons: a peer extension of the stream and of the return path.

The rule of the file: it carries the messages of `model.handover`, and knows nothing of when they are sent. Sent only to
a peer that has shown, by a bit of its features, that it knows them.

    X_OFFER      16 bytes migration id, be64 epoch, u8 checked       source -> destination, commands
                 checked: 1 = a checksum follows each section
    X_COMMIT     the same id and epoch, u8 serves: 1 = memory that is missing still comes
    X_WITHDRAW   the same id and epoch
    X_HANDOVER   u8 answer: 1 ready, 2 active, 3 refused; id and epoch     destination -> source
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

from migrated.errors import RemoteProtocolError
from migrated.wire.command import HANDOVER_BYTES, Command, encode_command

_OFFER = struct.Struct(">16sQ")
ANSWER_BYTES = 1 + HANDOVER_BYTES
#: An epoch grows by one with each change of owner.
EPOCH_MAX = 1 << 62


class Answer(IntEnum):
    """What the destination says."""

    READY = 1
    """Everything is here, and the record says so."""
    ACTIVE = 2
    """The machine is this host's."""
    REFUSED = 3
    """This offer was never started here, and never will be."""


@dataclass(frozen=True, slots=True)
class Offer:
    """One attempt to hand a machine over: its id, 32 hexadecimal digits, and the epoch it would begin."""

    migration_id: str
    epoch: int


@dataclass(frozen=True, slots=True)
class HandoverAnswer:
    """One answer, and what it is about."""

    answer: Answer
    offer: Offer


def encode_offer(offer: Offer, *, checked: bool) -> bytes:
    """Encode X_OFFER as a whole element; ``checked``: a checksum follows each section."""
    return encode_command(Command.X_OFFER, handover_payload(offer) + bytes([checked]))


def encode_commit(offer: Offer, *, serves: bool) -> bytes:
    """Encode X_COMMIT as a whole element; ``serves``: memory that is missing at the other end still comes."""
    return encode_command(Command.X_COMMIT, handover_payload(offer) + bytes([serves]))


def encode_withdrawal(offer: Offer) -> bytes:
    """Encode X_WITHDRAW as a whole element."""
    return encode_command(Command.X_WITHDRAW, handover_payload(offer))


def handover_payload(offer: Offer) -> bytes:
    """Return what those commands are about."""
    return _OFFER.pack(bytes.fromhex(offer.migration_id), offer.epoch)


def decode_handover(payload: bytes) -> Offer:
    """Decode a payload whose length was checked. Raises RemoteProtocolError for an epoch that none has."""
    raw, epoch = _OFFER.unpack(payload)
    if not 0 < epoch <= EPOCH_MAX:
        raise RemoteProtocolError(
            "a hand-over of an impossible epoch", section="hand-over", expected=f"1 to {EPOCH_MAX}", found=str(epoch)
        )
    return Offer(raw.hex(), epoch)


def decode_with_flag(payload: bytes) -> tuple[Offer, bool]:
    """Decode the payload of X_OFFER or X_COMMIT, whose length was checked. Raises RemoteProtocolError."""
    if payload[-1] not in (0, 1):
        raise RemoteProtocolError(
            "a hand-over with an unknown flag", section="hand-over", expected="0 or 1", found=str(payload[-1])
        )
    return decode_handover(payload[:-1]), bool(payload[-1])


def encode_answer(answer: HandoverAnswer) -> bytes:
    """Encode the body of X_HANDOVER."""
    return bytes([answer.answer]) + handover_payload(answer.offer)


def decode_answer(body: bytes) -> HandoverAnswer:
    """Decode a body whose length was checked. Raises RemoteProtocolError."""
    if body[0] not in Answer._value2member_map_:
        raise RemoteProtocolError(
            "an answer to a hand-over that does not exist", section="return path", expected="1 to 3", found=str(body[0])
        )
    return HandoverAnswer(Answer(body[0]), decode_handover(body[1:]))
