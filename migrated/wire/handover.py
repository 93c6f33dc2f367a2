"""The hand-over between two `migrated` daemons: a peer extension of the stream and of the return path.

The rule of the file: it carries the messages of `model.handover`, and knows nothing of when they are sent. Sent only to
a peer that has shown, by a bit of its features, that it knows them.

    X_OFFER      counted migration id, be64 epoch, u8 checked       source -> destination, commands
                 checked: 1 = a checksum follows each section
    X_COMMIT     the same id and epoch, u8 serves: 1 = memory that is missing still comes
    X_WITHDRAW   the same id and epoch
    X_HANDOVER   u8 answer: 1 ready, 2 active, 3 refused, 4 whole; id and epoch   destination -> source
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from migrated.errors import RemoteProtocolError
from migrated.wire.command import Command, encode_command
from migrated.wire.primitives import decode_name, encode_be64, encode_counted_string

_EPOCH_BYTES = 8
#: A request id may be one; QMP takes no longer ones.
MIGRATION_ID_MAX_BYTES = 64
OFFER_MAX_BYTES = 1 + MIGRATION_ID_MAX_BYTES + _EPOCH_BYTES
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
    WHOLE = 4
    """As active, and nothing of the machine is missing here: the source may let go of its memory."""


@dataclass(frozen=True, slots=True)
class Offer:
    """One attempt to hand a machine over: its id, of up to MIGRATION_ID_MAX_BYTES, and the epoch it would begin."""

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
    return encode_counted_string(offer.migration_id) + encode_be64(offer.epoch)


def decode_handover(payload: bytes) -> Offer:
    """Decode an offer that fills ``payload``. Raises RemoteProtocolError."""
    end = 1 + payload[0] if payload else 1
    if not 1 < end <= 1 + MIGRATION_ID_MAX_BYTES or len(payload) != end + _EPOCH_BYTES:
        raise RemoteProtocolError(
            "a hand-over without an id and an epoch", section="hand-over", expected="a counted id, be64",
            found=f"{len(payload)} bytes",
        )  # fmt: skip
    epoch = int.from_bytes(payload[end:], "big")
    if not 0 < epoch <= EPOCH_MAX:
        raise RemoteProtocolError(
            "a hand-over of an impossible epoch", section="hand-over", expected=f"1 to {EPOCH_MAX}", found=str(epoch)
        )
    return Offer(decode_name(payload[1:end], "a migration id"), epoch)


def decode_with_flag(payload: bytes) -> tuple[Offer, bool]:
    """Decode the payload of X_OFFER or X_COMMIT. Raises RemoteProtocolError."""
    offer, flag = decode_handover(payload[:-1]), payload[-1]
    if flag not in (0, 1):
        raise RemoteProtocolError(
            "a hand-over with an unknown flag", section="hand-over", expected="0 or 1", found=str(flag)
        )
    return offer, bool(flag)


def encode_answer(answer: HandoverAnswer) -> bytes:
    """Encode the body of X_HANDOVER."""
    return bytes([answer.answer]) + handover_payload(answer.offer)


def decode_answer(body: bytes) -> HandoverAnswer:
    """Decode a body of at least one byte. Raises RemoteProtocolError."""
    if body[0] not in Answer._value2member_map_:
        raise RemoteProtocolError(
            "an answer to a hand-over that does not exist", section="return path", expected="1 to 4", found=str(body[0])
        )
    return HandoverAnswer(Answer(body[0]), decode_handover(body[1:]))
