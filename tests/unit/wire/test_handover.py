"""The messages of the hand-over: bytes, round trips, and what is refused."""

from __future__ import annotations

import pytest

from migrated.errors import RemoteProtocolError
from migrated.wire.command import Command, check_command
from migrated.wire.handover import (
    Answer,
    HandoverAnswer,
    Offer,
    decode_answer,
    decode_handover,
    decode_with_flag,
    encode_commit,
    encode_offer,
    encode_withdrawal,
)
from migrated.wire.pull import feed
from migrated.wire.return_path import encode_handover_answer, parse_message
from migrated.wire.section import CommandHeader

OFFER = Offer("move-1.2", 7)
PAYLOAD = b"\x08move-1.2" + bytes(7) + b"\x07"


def test_a_withdrawal_is_an_id_and_an_epoch() -> None:
    assert encode_withdrawal(OFFER) == bytes.fromhex("08 4d04 0011") + PAYLOAD
    assert check_command(CommandHeader(Command.X_WITHDRAW, PAYLOAD)) is Command.X_WITHDRAW
    assert decode_handover(PAYLOAD) == OFFER


@pytest.mark.parametrize("checked", [False, True])
def test_an_offer_says_whether_checksums_follow(checked: bool) -> None:
    payload = PAYLOAD + bytes([checked])
    assert encode_offer(OFFER, checked=checked) == bytes.fromhex("08 4d02 0012") + payload
    assert decode_with_flag(payload) == (OFFER, checked)


@pytest.mark.parametrize("serves", [False, True])
def test_a_commit_says_whether_memory_still_comes(serves: bool) -> None:
    payload = PAYLOAD + bytes([serves])
    assert encode_commit(OFFER, serves=serves) == bytes.fromhex("08 4d03 0012") + payload
    assert decode_with_flag(payload) == (OFFER, serves)
    with pytest.raises(RemoteProtocolError, match="an unknown flag"):
        decode_with_flag(PAYLOAD + b"\x02")


@pytest.mark.parametrize("answer", Answer)
def test_an_answer_says_what_it_is_about(answer: Answer) -> None:
    raw = encode_handover_answer(HandoverAnswer(answer, OFFER))
    assert raw == b"\x4d\x03\x00\x12" + bytes([answer]) + PAYLOAD
    assert feed(parse_message(), [raw]) == HandoverAnswer(answer, OFFER)


@pytest.mark.parametrize(
    ("payload", "text"),
    [
        (b"", "without an id"),
        (b"\x00" + bytes(7) + b"\x01", "without an id"),
        (b"\x41" + b"a" * 65 + bytes(7) + b"\x01", "without an id"),
        (PAYLOAD[:-1], "without an id"),
        (PAYLOAD + b"\x00", "without an id"),
        (b"\x01a" + bytes(8), "impossible epoch"),
        (b"\x01a" + b"\xff" * 8, "impossible epoch"),
        (b"\x01\xff" + bytes(7) + b"\x01", "a migration id is not UTF-8"),
    ],
)
def test_nonsense(payload: bytes, text: str) -> None:
    for decode in (lambda: decode_handover(payload), lambda: decode_with_flag(payload + b"\x01")):
        with pytest.raises(RemoteProtocolError, match=text):
            decode()


def test_an_answer_that_does_not_exist() -> None:
    with pytest.raises(RemoteProtocolError, match="does not exist"):
        decode_answer(b"\x05" + PAYLOAD)
