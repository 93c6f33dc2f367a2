"""Return path messages: captured bytes, every type, every length check of a QEMU source."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrated.errors import LocalProtocolError
from migrated.model.bitmap import PageBitmap
from migrated.stream.incoming import PIECE_MAX_BYTES
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
        ("4d04 0001", "Received invalid message 0x4d04 length 0x0001"),
        ("4d03 0000", "Received 'X_HANDOVER' message (0x4d03) with incorrect length 0 expecting 1"),
        ("4d02 0001", "Received 'X_FAULTS' message (0x4d02) with incorrect length 1 expecting 340"),
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


def test_requests_and_acknowledgement_as_captured() -> None:
    assert rp.encode_request_pages(0x5000, 0x1000, "ram") == REQUEST_WITH_BLOCK
    assert rp.encode_request_pages(0x6000, 0x1000) == REQUEST_SAME_BLOCK
    assert rp.encode_resume_ack() == bytes.fromhex("0006 0004 00000001")


@given(
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**32 - 1),
    st.none()
    | st.text(st.characters(categories=["L", "N", "P"]), max_size=80).filter(lambda name: len(name.encode()) <= 255),
    CUTS,
)
def test_requests_come_back(start: int, length: int, block: str | None, cuts: list[float]) -> None:
    raw = rp.encode_request_pages(start, length, block)
    assert feed(rp.parse_message(), cut(raw, cuts)) == rp.RequestPages(start, length, block)
    assert len(raw) <= 4 + rp.MESSAGE_MAX_BYTES
    # The short way says the same, wherever it lies, and nothing of a part.
    buf = memoryview(b"?" + raw + b"?")
    assert rp.parse_request(buf, 1) == (start, length, block, 1 + len(raw))
    assert all(rp.parse_request(buf[: 1 + size], 1) is None for size in range(len(raw)))


@pytest.mark.parametrize("raw", MESSAGES)
def test_the_short_way_is_for_requests_only(raw: bytes) -> None:
    found = rp.parse_request(memoryview(raw + bytes(32)), 0)
    assert (found is not None) == isinstance(MESSAGES[raw], rp.RequestPages)


@pytest.mark.parametrize("raw", ["0003 000c", "0003 0201", "0004 000d", "0004 000b"])
def test_the_short_way_leaves_wrong_lengths_to_the_long_one(raw: str) -> None:
    assert rp.parse_request(memoryview(bytes.fromhex(raw) + bytes(600)), 0) is None


def received_bitmap(pages: int) -> Parser[tuple[rp.ReturnMessage, bytes]]:
    message = yield from rp.parse_message()
    assert isinstance(message, rp.ReceivedBitmap)
    return message, (yield from rp.parse_bitmap_body(message.block, pages))


def test_bytes_of_a_received_bitmap() -> None:
    raw = rp.encode_received_bitmap("ram", b"\x05" + bytes(7))
    assert raw == bytes.fromhex("0005 0004 03 72616d  0000000000000008  05000000 00000000  0123456789abcdef")
    assert parse(lambda: received_bitmap(3), raw) == (rp.ReceivedBitmap("ram"), b"\x05" + bytes(7))
    assert_truncation_is_noticed(lambda: received_bitmap(3), raw)


@given(st.integers(0, 2000), st.sets(st.integers(0, 1999)), CUTS)
def test_received_bitmaps_come_back(pages: int, received: set[int], cuts: list[float]) -> None:
    bitmap = PageBitmap(pages)
    bitmap.set_pages(np.array(sorted(page for page in received if page < pages), np.int64))
    raw = rp.encode_received_bitmap("mem0", bitmap.to_bytes())
    _, bits = feed(received_bitmap(pages), cut(raw, cuts))
    found = PageBitmap.from_bytes(pages, bits)
    assert found.count == bitmap.count
    assert found.to_bytes() == bits == bitmap.to_bytes()


def test_a_large_bitmap_is_read_in_pieces_a_stream_can_give() -> None:
    pages = 3 * 8 * rp.BITMAP_PIECE_BYTES + 1
    bitmap = PageBitmap(pages)
    bitmap.set_all()
    raw = rp.encode_received_bitmap("mem0", bitmap.to_bytes())
    body = raw[raw.index(b"mem0") + 4 :]
    assert feed(rp.parse_bitmap_body("mem0", pages), [body]) == bitmap.to_bytes()
    assert largest_piece(rp.parse_bitmap_body("mem0", pages), body) == rp.BITMAP_PIECE_BYTES
    assert rp.BITMAP_PIECE_BYTES <= PIECE_MAX_BYTES


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        ("0000000000000000", "ramblock 'ram' bitmap size mismatch (0x0 != 0x8)"),
        ("ffffffffffffffff", "ramblock 'ram' bitmap size mismatch (0xffffffffffffffff != 0x8)"),
        ("0000000000000010", "ramblock 'ram' bitmap size mismatch (0x10 != 0x8)"),
        (
            "0000000000000008 0000000000000000 efcdab8967452301",
            "ramblock 'ram' end mark incorrect: 0xefcdab8967452301",
        ),
    ],
)
def test_bitmaps_that_are_refused(raw: str, text: str) -> None:
    assert refusal(lambda: rp.parse_bitmap_body("ram", 64), bytes.fromhex(raw)) == text


def test_a_bitmap_that_is_not_whole_words_is_never_sent() -> None:
    with pytest.raises(LocalProtocolError, match="not 7 bytes"):
        rp.encode_received_bitmap("ram", bytes(7))


@given(st.binary(max_size=60) | st.binary(max_size=20).map(lambda raw: bytes(7) + b"\x10" + raw))
def test_any_bitmap_is_bounded(data: bytes) -> None:
    assert largest_piece(rp.parse_bitmap_body("ram", 100), data) <= 16


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


def test_figures_come_back() -> None:
    words = (*range(rp.FAULT_WORDS - 1), 2**32 - 1)
    assert feed(rp.parse_message(), [rp.encode_faults(words)]) == rp.Faults(words)
