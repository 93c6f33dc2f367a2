"""Return path messages: captured bytes, every type, every length check of a QEMU source."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrated.wire import return_path as rp
from migrated.wire.pull import Parser, feed
from tests.unit.wire.cuts import CUTS, assert_truncation_is_noticed, cut, largest_piece, parse, refusal

# [V] what a 7.2 destination answered: PONG(0x1234), SHUT(0)
CAPTURED = bytes.fromhex("0002 0004 00001234 0001 0004 00000000")
# [V] page requests of a 7.2 destination in postcopy
REQUEST_WITH_BLOCK = bytes.fromhex("0003 0010 0000000000005000 00001000 03") + b"ram"
REQUEST_SAME_BLOCK = bytes.fromhex("0004 000c 0000000000006000 00001000")

MESSAGES: dict[bytes, rp.ReturnMessage] = {
    bytes.fromhex("0001 0004 00000000"): rp.Shut(0),
    bytes.fromhex("0001 0004 00000001"): rp.Shut(1),
    bytes.fromhex("0002 0004 4d494744"): rp.Pong(0x4D494744),
    REQUEST_WITH_BLOCK: rp.RequestPages(0x5000, 0x1000, "ram"),
    REQUEST_SAME_BLOCK: rp.RequestPages(0x6000, 0x1000),
    b"\x00\x05\x00\x07\x06pc.ram": rp.ReceivedBitmap("pc.ram"),
    bytes.fromhex("0006 0004 00000001"): rp.ResumeAck(1),
    bytes.fromhex("0007 0000"): rp.SwitchoverAck(),
    b"\x4d\x01\x00\x07no room": rp.Reason("no room"),
    b"\x4d\x01\x00\x00": rp.Reason(""),
}


def two_messages() -> Parser[list[rp.ReturnMessage]]:
    first = yield from rp.parse_message()
    return [first, (yield from rp.parse_message())]


def test_captured_answer() -> None:
    assert parse(two_messages, CAPTURED) == [rp.Pong(0x1234), rp.Shut(0)]
    assert rp.encode_pong(0x1234) + rp.encode_shut(0) == CAPTURED


@pytest.mark.parametrize("raw", MESSAGES)
def test_every_message(raw: bytes) -> None:
    assert parse(rp.parse_message, raw) == MESSAGES[raw]
    assert_truncation_is_noticed(rp.parse_message, raw)


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        ("0000 0000", "Received invalid message 0x0000 length 0x0000"),
        ("0008 0004 00000000", "Received invalid message 0x0008 length 0x0004"),
        ("4d02 0001", "Received invalid message 0x4d02 length 0x0001"),
        ("0001 0003", "Received 'SHUT' message (0x0001) with incorrect length 3 expecting 4"),
        ("0002 ffff", "Received 'PONG' message (0x0002) with incorrect length 65535 expecting 4"),
        ("0003 000c", "Received 'REQ_PAGES_ID' message (0x0003) with incorrect length 12 expecting 13"),
        ("0003 0201", "Received 'REQ_PAGES_ID' message (0x0003) with incorrect length 513 expecting 512"),
        (
            "0003 000f 0000000000005000 00001000 01 6162",
            "Received 'REQ_PAGES_ID' message (0x0003) with incorrect length 15 expecting 14",
        ),
        ("0004 000d", "Received 'REQ_PAGES' message (0x0004) with incorrect length 13 expecting 12"),
        ("0005 0000", "Received 'RECV_BITMAP' message (0x0005) with incorrect length 0 expecting 1"),
        ("0005 0002 05 61", "Received 'RECV_BITMAP' message (0x0005) with incorrect length 2 expecting 6"),
        ("0005 0002 01 ff", "a block name is not UTF-8"),
        ("0006 0000", "Received 'RESUME_ACK' message (0x0006) with incorrect length 0 expecting 4"),
        ("0007 0001", "Received 'SWITCHOVER_ACK' message (0x0007) with incorrect length 1 expecting 0"),
        ("4d01 0201", "Received 'X_REASON' message (0x4d01) with incorrect length 513 expecting 512"),
    ],
)
def test_refusals(raw: str, text: str) -> None:
    assert refusal(rp.parse_message, bytes.fromhex(raw)) == text


@given(st.text(max_size=600), CUTS)
def test_reason_is_cut_between_characters(text: str, cuts: list[float]) -> None:
    raw = rp.encode_reason(text)
    assert len(raw) <= 4 + rp.REASON_MAX_BYTES
    message = feed(rp.parse_message(), cut(raw, cuts))
    assert isinstance(message, rp.Reason)
    shown = "".join(character if character.isprintable() else "?" for character in text)
    assert shown.startswith(message.text)
    rest = text[len(message.text) :]
    assert not rest or len((text[: len(message.text)] + rest[0]).encode()) > rp.REASON_MAX_BYTES


def test_reason_survives_what_is_not_text() -> None:
    assert parse(rp.parse_message, b"\x4d\x01\x00\x03a\xffb") == rp.Reason("a\N{REPLACEMENT CHARACTER}b")
    assert parse(rp.parse_message, b"\x4d\x01\x00\x06\x1b[2J\0\n") == rp.Reason("?[2J??")
    assert rp.encode_reason("\ud800") == b"\x4d\x01\x00\x01?"


@given(st.binary(max_size=600) | st.sampled_from(list(MESSAGES)).map(lambda raw: raw[:3] + b"\xff" + raw[4:]))
def test_any_bytes_are_bounded(data: bytes) -> None:
    assert largest_piece(rp.parse_message(), data) <= rp.MESSAGE_MAX_BYTES
