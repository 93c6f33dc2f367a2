"""The sending half of the "ram" codec: reference bytes, and runs against records made one by one."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from migrated.errors import LocalProtocolError
from migrated.wire.ram import EOS, PAGE, Flag
from migrated.wire.ram_encoder import RamEncoder, encode_block_list
from tests.support.ram_records import page_run

PAGES = 64
SOURCE = np.random.default_rng(7).integers(0, 256, (PAGES, PAGE), np.uint8)


def record(page: int, kind: int, body: bytes, block: str | None = None) -> bytes:
    """Make one record as the reference describes it; without a block it continues the last one."""
    word = page * PAGE | kind
    if block is None:
        return struct.pack(">Q", word | Flag.CONTINUE) + body
    return struct.pack(">Q", word) + bytes([len(block)]) + block.encode() + body


def page_numbers(*pages: int) -> NDArray[np.int64]:
    return np.array(pages, np.int64)


def encode_pages(encoder: RamEncoder, block: str, pages: NDArray[np.int64]) -> bytes:
    out = np.full(PAGES * (PAGE + 8) + 256, 0xEE, np.uint8)
    used = page_run(encoder, block, pages, SOURCE, out)
    assert (out[used:] == 0xEE).all()
    return out[:used].tobytes()


# -- block list ------------------------------------------------------------------------------------------------


def test_block_list_bytes() -> None:
    # [V] a machine without RAM
    assert encode_block_list([]) == bytes.fromhex("0000000000000004 0000000000000010")
    assert encode_block_list([("mem0", 0x10000), ("rom", 0x1000)]) == (
        bytes.fromhex("0000000000011004")
        + b"\x04mem0" + bytes.fromhex("0000000000010000")
        + b"\x03rom" + bytes.fromhex("0000000000001000")
        + EOS
    )  # fmt: skip


def test_block_list_with_a_page_size() -> None:
    """Only of blocks that do not consist of target pages, behind their length."""
    assert encode_block_list([("mem0", 0x400000), ("rom", 0x1000)], {"mem0": 0x200000}) == (
        bytes.fromhex("0000000000401004")
        + b"\x04mem0" + bytes.fromhex("0000000000400000 0000000000200000")
        + b"\x03rom" + bytes.fromhex("0000000000001000")
        + EOS
    )  # fmt: skip


@pytest.mark.parametrize(
    "blocks", [[("", PAGE)], [("a", 0)], [("a", -PAGE)], [("a", 100)], [("a", PAGE), ("a", PAGE)], [("x" * 256, PAGE)]]
)
def test_block_lists_that_cannot_be_sent(blocks: list[tuple[str, int]]) -> None:
    with pytest.raises(LocalProtocolError):
        encode_block_list(blocks)


# -- records ---------------------------------------------------------------------------------------------------


def test_name_goes_with_the_first_record_and_when_the_block_changes() -> None:
    encoder = RamEncoder()
    assert encoder.zero_run("ram", page_numbers(0)) == bytes.fromhex("0000000000000002 03 72616d 00")
    assert encoder.zero_run("ram", page_numbers(1, 2)) == bytes.fromhex("0000000000001022 00 0000000000002022 00")
    assert encode_pages(encoder, "ram", page_numbers(5)) == record(5, Flag.PAGE, SOURCE[5].tobytes())
    assert encode_pages(encoder, "rom", page_numbers(5)) == record(5, Flag.PAGE, SOURCE[5].tobytes(), "rom")
    two = record(3, Flag.ZERO, b"\0", "ram") + record(4, Flag.ZERO, b"\0")
    assert encoder.zero_run("ram", page_numbers(3, 4)) == two


def test_nothing_to_send_changes_nothing() -> None:
    encoder = RamEncoder()
    assert encoder.zero_run("ram", page_numbers()) == b""
    assert encode_pages(encoder, "ram", page_numbers()) == b""
    assert encoder.zero_run("ram", page_numbers(1)) == record(1, Flag.ZERO, b"\0", "ram")


@given(
    st.lists(
        st.tuples(
            st.booleans(),
            st.sampled_from(["ram", "x" * 255, "ä"]),
            st.lists(st.integers(0, PAGES - 1), max_size=PAGES, unique=True)
            | st.tuples(st.integers(0, PAGES), st.integers(0, PAGES)).map(lambda ends: list(range(*ends))),
        ),
        max_size=4,
    )
)
def test_runs_are_the_records_one_by_one(runs: list[tuple[bool, str, list[int]]]) -> None:
    encoder = RamEncoder()
    last: str | None = None
    for zero, block, pages in runs:
        got = (
            encoder.zero_run(block, page_numbers(*pages))
            if zero
            else encode_pages(encoder, block, page_numbers(*pages))
        )
        want = b""
        for page in pages:
            name = None if block == last else block.encode().decode("latin-1")
            body = b"\0" if zero else SOURCE[page].tobytes()
            head = record(page, Flag.ZERO if zero else Flag.PAGE, b"", name if name is None else "")
            if name is not None:
                head = head[:8] + bytes([len(block.encode())]) + block.encode()
            want += head + body
            last = block
        assert got == want


def test_large_offsets() -> None:
    page = (1 << 46) // PAGE - 1
    assert RamEncoder().zero_run("r", page_numbers(page, page))[:8] == struct.pack(">Q", page * PAGE | Flag.ZERO)


def test_room() -> None:
    encoder = RamEncoder()
    assert encoder.max_pages(4 + 2 * (PAGE + 8), "ram") == 2
    assert encoder.max_pages(3 + 2 * (PAGE + 8), "ram") == 1
    assert encoder.max_pages(0, "ram") == 0
    encoder.zero_run("ram", page_numbers(0))
    assert encoder.max_pages(2 * (PAGE + 8), "ram") == 2
    out = np.empty(2 * (PAGE + 8), np.uint8)
    assert page_run(encoder, "ram", page_numbers(1, 2), SOURCE, out) == len(out)
    with pytest.raises(LocalProtocolError, match="3 page records do not fit"):
        page_run(encoder, "ram", page_numbers(1, 2, 3), SOURCE, out)
