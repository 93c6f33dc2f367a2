"""Postcopy commands: captured bytes, every check of a QEMU destination, many ranges at once."""

from __future__ import annotations

from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from migrated.errors import LocalProtocolError, RemoteProtocolError
from migrated.wire import postcopy
from migrated.wire.command import Command, check_command
from migrated.wire.postcopy import Advise, Discard
from migrated.wire.pull import Parser, feed
from migrated.wire.section import CommandHeader, parse_element
from tests.unit.wire.cuts import CUTS, assert_truncation_is_noticed, cut, largest_piece, parse

# [V] a discard as a 7.2 source sends it: block pc.ram, 0x3e00000 bytes from 0x200000
CAPTURED_DISCARD = bytes.fromhex("08 0006 0019 00 06 70632e72616d 00 0000000000200000 0000000003e00000")
NAMES = st.text(st.characters(categories=["L", "N", "P"]), min_size=1, max_size=60)


def array(*numbers: int) -> NDArray[np.int64]:
    return np.array(numbers, np.int64)


def payload(element: bytes, command: Command) -> bytes:
    """Return the payload of one COMMAND element, however it arrives."""
    header = parse(parse_element, element)
    assert isinstance(header, CommandHeader)
    assert check_command(header) is command
    return header.payload


def several(count: int) -> Parser[list[CommandHeader]]:
    headers = []
    for _ in range(count):
        header = yield from parse_element()
        assert isinstance(header, CommandHeader)
        headers.append(header)
    return headers


# -- advise ----------------------------------------------------------------------------------------------------


def test_advise() -> None:
    raw = postcopy.encode_advise(0x201000, 0x1000)
    assert raw == bytes.fromhex("08 0003 0010 0000000000201000 0000000000001000")
    assert postcopy.parse_advise(payload(raw, Command.POSTCOPY_ADVISE)) == Advise(0x201000, 0x1000)
    assert postcopy.parse_advise(b"") is None
    assert_truncation_is_noticed(parse_element, raw)


@pytest.mark.parametrize("length", [1, 8, 15, 17, 32])
def test_advise_of_another_length(length: int) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        postcopy.parse_advise(bytes(length))
    assert caught.value.what == f"CMD_POSTCOPY_ADVISE invalid length ({length})"


HERE = Advise(0x1000, 0x1000)


@pytest.mark.parametrize(
    ("there", "here", "text"),
    [
        (None, HERE, "RAM postcopy is enabled but have 0 byte advise"),
        (HERE, None, "RAM postcopy is disabled but have 16 byte advise"),
        (Advise(0x201000, 0x1000), HERE, "Postcopy needs matching RAM page sizes (s=201000 d=1000)"),
        (Advise(0, 0x1000), HERE, "Postcopy needs matching RAM page sizes (s=0 d=1000)"),
        (Advise(0x1000, 0x4000), HERE, "Postcopy needs matching target page sizes (s=16384 d=4096)"),
    ],
)
def test_advice_that_does_not_fit(there: Advise | None, here: Advise | None, text: str) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        postcopy.check_advise(there, here)
    assert caught.value.what == text


def test_advice_that_fits() -> None:
    postcopy.check_advise(HERE, Advise(0x1000, 0x1000))
    postcopy.check_advise(None, None)
    for sizes in (0x1000, 0x200000, 0x201000):
        postcopy.check_advise(Advise(sizes, 0x1000), Advise(0x201000, 0x1000))


# -- discard ---------------------------------------------------------------------------------------------------


def test_discard_as_captured() -> None:
    assert postcopy.encode_discards("pc.ram", array(0x200000), array(0x4000000)) == CAPTURED_DISCARD
    found = postcopy.parse_discard(payload(CAPTURED_DISCARD, Command.POSTCOPY_RAM_DISCARD))
    assert found == Discard("pc.ram", ((0x200000, 0x3E00000),))
    assert_truncation_is_noticed(parse_element, CAPTURED_DISCARD)


# The end of a range has to fit into 63 bits.
@given(NAMES, st.lists(st.tuples(st.integers(0, 2**62), st.integers(0, 2**62 - 1)), max_size=50), CUTS)
def test_discards_come_back(block: str, ranges: list[tuple[int, int]], cuts: list[float]) -> None:
    starts = array(*(start for start, _ in ranges))
    raw = postcopy.encode_discards(block, starts, starts + array(*(length for _, length in ranges)))
    count = -(-len(ranges) // postcopy.RANGES_PER_DISCARD)
    headers = feed(several(count), cut(raw, cuts))
    assert all(check_command(header) is Command.POSTCOPY_RAM_DISCARD for header in headers)
    found = [postcopy.parse_discard(header.payload) for header in headers]
    assert all(discard.block == block for discard in found)
    assert [one for discard in found for one in discard.ranges] == ranges
    assert [len(discard.ranges) for discard in found[:-1]] == [12] * (count - 1 if count else 0)
    assert sum(5 + len(header.payload) for header in headers) == len(raw)


def test_a_hundred_thousand_ranges() -> None:
    starts = np.arange(100_000) * 8192
    raw = postcopy.encode_discards("mem0", starts, starts + 4096)
    found = [postcopy.parse_discard(header.payload) for header in feed(several(8334), [raw])]
    ranges = [one for discard in found for one in discard.ranges]
    assert ranges == [(start, 4096) for start in range(0, 100_000 * 8192, 8192)]


def test_an_empty_range_is_enough_for_a_qemu() -> None:
    raw = postcopy.encode_discards("mem0", array(0), array(0))
    assert postcopy.parse_discard(payload(raw, Command.POSTCOPY_RAM_DISCARD)) == Discard("mem0", ((0, 0),))
    assert postcopy.encode_discards("mem0", array(), array()) == b""


@pytest.mark.parametrize(
    ("starts", "ends"),
    [([4096], [0]), ([-4096], [0]), ([0], [4096, 8192]), ([[0]], [[4096]])],
)
def test_what_is_no_range_is_never_sent(starts: list[int], ends: list[int]) -> None:
    with pytest.raises(LocalProtocolError, match="'mem0' are no ranges"):
        postcopy.encode_discards("mem0", np.array(starts), np.array(ends))


def test_discards_need_a_block() -> None:
    with pytest.raises(LocalProtocolError, match="needs the name"):
        postcopy.encode_discards("", array(0), array(4096))
    with pytest.raises(LocalProtocolError, match="255 bytes"):
        postcopy.encode_discards("x" * 256, array(0), array(4096))
    longest = postcopy.encode_discards("x" * 255, np.zeros(12, np.int64), np.zeros(12, np.int64))
    assert len(postcopy.parse_discard(payload(longest, Command.POSTCOPY_RAM_DISCARD)).ranges) == 12


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (bytes(19), "CMD_POSTCOPY_RAM_DISCARD invalid length (19)"),
        (b"\x01\x01a\x00" + bytes(16), "CMD_POSTCOPY_RAM_DISCARD invalid version (1)"),
        (b"\x00\x12a\x00" + bytes(16), "CMD_POSTCOPY_RAM_DISCARD Failed to read RAMBlock ID"),
        (b"\x00\xffa\x00" + bytes(16), "CMD_POSTCOPY_RAM_DISCARD Failed to read RAMBlock ID"),
        (b"\x00\x01a\x07" + bytes(16), "CMD_POSTCOPY_RAM_DISCARD missing nil (7)"),
        (b"\x00\x01a\x00" + bytes(17), "CMD_POSTCOPY_RAM_DISCARD invalid length (17)"),
        (b"\x00\x01\xff\x00" + bytes(16), "a block name is not UTF-8"),
    ],
)
def test_discards_that_are_refused(raw: bytes, text: str) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        postcopy.parse_discard(raw)
    assert caught.value.what == text


def test_more_ranges_than_qemu_sends_are_taken() -> None:
    assert len(postcopy.parse_discard(b"\x00\x01a\x00" + bytes(4095 * 16)).ranges) == 4095
    assert postcopy.parse_discard(b"\x00\x11" + b"a" * 17 + b"\x00") == Discard("a" * 17, ())


# -- packaged, received bitmap ---------------------------------------------------------------------------------


def test_packaged() -> None:
    raw = postcopy.encode_packaged(0x3039)
    assert raw == bytes.fromhex("08 0007 0004 00003039")
    assert postcopy.parse_packaged(payload(raw, Command.PACKAGED)) == 0x3039
    most = postcopy.PACKAGE_MAX_BYTES
    assert postcopy.parse_packaged(payload(postcopy.encode_packaged(most), Command.PACKAGED)) == most
    with pytest.raises(RemoteProtocolError) as caught:
        postcopy.parse_packaged(b"\xff\xff\xff\xff")
    assert caught.value.what == "Unreasonably large packaged state: 4294967295"
    with pytest.raises(LocalProtocolError, match="at most 268435456 bytes, not 268435457"):
        postcopy.encode_packaged(most + 1)


def test_recv_bitmap_as_captured() -> None:
    raw = postcopy.encode_recv_bitmap("pc.ram")
    assert raw == bytes.fromhex("08 000a 0007 06") + b"pc.ram"
    assert postcopy.parse_recv_bitmap(payload(raw, Command.RECV_BITMAP)) == "pc.ram"


@pytest.mark.parametrize("raw", [b"", b"\x02a", b"\x00a", b"\x01ab"])
def test_recv_bitmap_of_another_length(raw: bytes) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        postcopy.parse_recv_bitmap(raw)
    assert caught.value.what == f"RECV_BITMAP: invalid payload length ({len(raw)})"


@given(NAMES)
def test_recv_bitmap_comes_back(block: str) -> None:
    assert postcopy.parse_recv_bitmap(payload(postcopy.encode_recv_bitmap(block), Command.RECV_BITMAP)) == block


# -- any bytes -------------------------------------------------------------------------------------------------


@given(st.binary(max_size=200) | st.binary(max_size=80).map(lambda raw: b"\x00\x01a\x00" + raw))
def test_any_payload_is_judged(raw: bytes) -> None:
    for parse_payload in (
        postcopy.parse_advise,
        postcopy.parse_discard,
        postcopy.parse_packaged,
        postcopy.parse_recv_bitmap,
    ):
        with suppress(RemoteProtocolError):
            parse_payload(raw)


@given(st.binary(max_size=40).map(lambda raw: b"\x08\x00\x06" + raw))
def test_any_command_is_bounded(raw: bytes) -> None:
    assert largest_piece(parse_element(), raw) <= 0xFFFF
