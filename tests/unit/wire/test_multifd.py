"""The packets of multifd: bytes as the format has them, every refusal, any bytes."""

from __future__ import annotations

import struct
from uuid import UUID

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrated.errors import RemoteProtocolError
from migrated.wire import multifd
from migrated.wire.multifd import (
    CHECKED_FORM,
    INITIAL_BYTES,
    LONG_FORM,
    PLAIN,
    QEMU_FORM,
    Form,
    Head,
    Initial,
    PacketFlag,
    page_sums,
)
from migrated.wire.ram import PAGE

HEAD_BYTES = QEMU_FORM.head_max_bytes
BLOCKS = {"ram": 64 * PAGE, "rom": PAGE}
OURS = UUID("00112233-4455-6677-8899-aabbccddeeff")


def raw_head(
    *,
    magic: int = 0x11223344,
    version: int = 1,
    flags: int = 0,
    room: int = 128,
    count: int = 1,
    size: int = PAGE,
    name: bytes = b"ram",
    offsets: tuple[int, ...] = (0,),
) -> bytes:
    """A head as the description of the format has it."""
    head = struct.pack(">6IQ32x256s", magic, version, flags, room, count, size, 7, name)
    return head + struct.pack(">128Q", *offsets, *[0] * (128 - len(offsets)))


def parse(raw: bytes, *methods: PacketFlag) -> Head:
    return multifd.parse_head(memoryview(raw), BLOCKS, methods or (PLAIN,), 3)


def refusal(raw: bytes, *methods: PacketFlag) -> str:
    with pytest.raises(RemoteProtocolError) as caught:
        parse(raw, *methods)
    assert caught.value.section == "multifd"
    return caught.value.what


def test_the_initial_packet() -> None:
    raw = multifd.encode_initial(Initial(5, OURS.bytes))
    assert raw == bytes.fromhex("11223344 00000001 00112233445566778899aabbccddeeff 05") + bytes(39)
    assert len(raw) == INITIAL_BYTES
    assert raw[:1] == multifd.FIRST_BYTE
    assert multifd.parse_initial(raw, OURS.bytes) == multifd.parse_initial(raw, None) == Initial(5, OURS.bytes)


@pytest.mark.parametrize(
    ("at", "put", "text"),
    [
        (0, b"\x11\x22\x33\x45", "multifd: received packet magic 11223345 expected 11223344"),
        (4, b"\0\0\0\2", "multifd: received packet version 2 expected 1"),
        (
            8,
            b"\xff",
            (
                "multifd: received uuid 'ff112233-4455-6677-8899-aabbccddeeff' and expected uuid"
                " '00112233-4455-6677-8899-aabbccddeeff' for channel 5"
            ),
        ),
    ],
)
def test_a_wrong_initial_packet(at: int, put: bytes, text: str) -> None:
    raw = bytearray(multifd.encode_initial(Initial(5, OURS.bytes)))
    raw[at : at + len(put)] = put
    with pytest.raises(RemoteProtocolError) as caught:
        multifd.parse_initial(bytes(raw), OURS.bytes)
    assert caught.value.what == text


def test_a_head_is_what_the_format_says() -> None:
    out = np.full(HEAD_BYTES, 0xEE, np.uint8)
    multifd.encode_head(out, "ram", np.array([3, 1]), number=7)
    assert out.tobytes() == raw_head(count=2, size=2 * PAGE, offsets=(3 * PAGE, PAGE))
    assert [QEMU_FORM.head_bytes(count) for count in (0, 2, 128)] == [HEAD_BYTES] * 3 == [1344] * 3


def test_a_sync_is_a_head_of_its_own() -> None:
    out = np.full(HEAD_BYTES, 0xEE, np.uint8)
    multifd.encode_head(out, "", np.empty(0, np.int64), number=7, flags=PacketFlag.SYNC)
    assert out.tobytes() == raw_head(flags=1, count=0, size=0, name=b"", offsets=())
    head = parse(out.tobytes())
    assert (head.sync, len(head.pages), head.size_bytes) == (True, 0, 0)


def test_packed_pages() -> None:
    out = np.empty(HEAD_BYTES, np.uint8)
    multifd.encode_head(out, "rom", np.array([0]), flags=PacketFlag.ZSTD, size_bytes=99)
    head = parse(out.tobytes(), PacketFlag.ZSTD)
    assert (head.sync, head.block, head.pages.tolist(), head.size_bytes) == (False, "rom", [0], 99)
    assert head.packed


def test_packed_or_not_where_the_source_chooses() -> None:
    plain, packed = (parse(raw_head(flags=flags, size=9), PLAIN, PacketFlag.ZSTD) for flags in (0, 4))
    assert (plain.packed, plain.size_bytes) == (False, PAGE)
    assert (packed.packed, packed.size_bytes) == (True, 9)
    assert refusal(raw_head(flags=2), PLAIN, PacketFlag.ZSTD) == "multifd 3: flags received 2 flags expected 4"


def test_what_a_packet_without_pages_leaves_behind_is_not_looked_at() -> None:
    head = parse(raw_head(flags=1, count=0, size=1 << 31, name=b"\xff" * 256, offsets=(1 << 60,)))
    assert (head.sync, head.block, head.size_bytes) == (True, "", 0)


def test_a_sync_with_pages_and_a_size_that_is_not_believed() -> None:
    head = parse(raw_head(flags=1, count=2, size=1 << 31, offsets=(0, 63 * PAGE)))
    assert (head.sync, head.pages.tolist(), head.size_bytes) == (True, [0, 63], 2 * PAGE)


def own_head(form: Form, pages: list[int], sums: list[int] | None = None, flags: PacketFlag = PLAIN) -> bytearray:
    """A head as one daemon writes it for another."""
    out = np.full(form.head_bytes(len(pages)), 0xEE, np.uint8)
    words = np.array(sums, np.uint64) if sums is not None else None
    multifd.encode_head(out, "ram", np.array(pages, np.int64), form, number=7, flags=flags, sums=words)
    return bytearray(out.tobytes())


def parse_own(raw: bytearray, form: Form, *methods: PacketFlag) -> Head:
    return multifd.parse_head(memoryview(raw), BLOCKS, methods or (PLAIN,), 3, form)


@pytest.mark.parametrize(("form", "head_bytes"), [(LONG_FORM, 320 + 2 * 8), (CHECKED_FORM, 320 + 2 * 16)])
def test_between_two_daemons_a_head_is_as_long_as_its_pages_are_many(form: Form, head_bytes: int) -> None:
    sums = [2**64 - 1, 5] if form.checked else None
    raw = own_head(form, [3, 1], sums)
    assert len(raw) == head_bytes
    assert multifd.parse_count(memoryview(raw)[: form.head_min_bytes], form, 3) == 2
    head = parse_own(raw, form)
    assert (head.pages.tolist(), head.size_bytes) == ([3, 1], 2 * PAGE)
    assert (head.sums.tolist() if head.sums is not None else None) == sums


def test_a_packet_of_a_daemon_may_have_more_pages_than_one_of_a_qemu() -> None:
    pages = [page % 64 for page in range(4096)]
    assert len(parse_own(own_head(LONG_FORM, pages), LONG_FORM).pages) == 4096
    with pytest.raises(RemoteProtocolError, match="with 4097 pages and expected maximum pages are 4096"):
        parse_own(bytearray(raw_head(room=4097)), LONG_FORM)


@given(st.integers(0, CHECKED_FORM.head_bytes(3) - 1), st.integers(0, 7))
def test_one_bit_of_a_checked_head(at: int, bit: int) -> None:
    raw = own_head(CHECKED_FORM, [5, 6, 7], [1, 2, 3])
    raw[at] ^= 1 << bit
    with pytest.raises(RemoteProtocolError) as caught:
        parse_own(raw, CHECKED_FORM)
    assert "it changed on the way" in caught.value.what or caught.value.what.startswith("multifd")


def test_packed_pages_between_two_daemons_are_no_more_than_a_qemus() -> None:
    raw = own_head(LONG_FORM, [page % 64 for page in range(129)], flags=PacketFlag.ZSTD)
    with pytest.raises(RemoteProtocolError, match="bytes of 129 packed pages, expected at most 1048576 of 128"):
        parse_own(raw, LONG_FORM, PacketFlag.ZSTD)


def test_the_sum_of_a_page_is_that_of_its_words() -> None:
    rows = np.zeros((3, PAGE), np.uint8)
    rows[1] = 255
    rows[2, 8:16] = 7
    assert page_sums(rows).tolist() == [0, 512 * (2**64 - 1) % 2**64, int.from_bytes(bytes([7] * 8), "little")]


@given(st.integers(0, PAGE // 8 - 1), st.binary(min_size=8, max_size=8))
def test_what_changes_in_one_word_is_another_sum(word: int, put: bytes) -> None:
    before = np.random.default_rng(1).integers(0, 256, (1, PAGE), np.uint8)
    after = before.copy()
    after[0, 8 * word : 8 * word + 8] = np.frombuffer(put, np.uint8)
    assert (page_sums(before)[0] == page_sums(after)[0]) == (before == after).all()


def test_every_refusal() -> None:
    assert refusal(raw_head(magic=0)) == "multifd: received packet magic 0 expected 11223344"
    assert refusal(raw_head(version=9)) == "multifd: received packet version 9 expected 1"
    assert refusal(raw_head(flags=64)) == "multifd 3: unknown flags 40"
    assert "with 129 pages and expected maximum pages are 128" in refusal(raw_head(room=129))
    assert "with 5 normal pages and expected maximum pages are 4" in refusal(raw_head(room=4, count=5))
    assert refusal(raw_head(flags=2)) == "multifd 3: flags received 2 flags expected 0"
    assert refusal(raw_head(), PacketFlag.ZSTD) == "multifd 3: flags received 0 flags expected 4"
    assert refusal(raw_head(name=b"other")) == "multifd: unknown ram block other"
    assert f"offset too long {64 * PAGE} (max {64 * PAGE})" in refusal(raw_head(offsets=(64 * PAGE,)))
    assert "offset too long 1 (max" in refusal(raw_head(offsets=(1,)))
    assert "bytes of 1 packed pages" in refusal(raw_head(flags=4, size=multifd.PACKED_MAX_BYTES + 1), PacketFlag.ZSTD)


def test_a_name_that_is_none() -> None:
    with pytest.raises(RemoteProtocolError, match="a block name is not UTF-8"):
        parse(raw_head(name=b"\xff" * 256))


@given(st.lists(st.integers(0, 63), min_size=1, max_size=128), st.integers(0, 2**64 - 1))
def test_what_is_encoded_is_parsed(pages: list[int], number: int) -> None:
    out = np.empty(HEAD_BYTES, np.uint8)
    multifd.encode_head(out, "ram", np.array(pages), number=number)
    head = parse(out.tobytes())
    assert (head.sync, head.block, head.pages.tolist()) == (False, "ram", pages)
    assert head.size_bytes == len(pages) * PAGE


@given(st.binary(min_size=INITIAL_BYTES, max_size=INITIAL_BYTES), st.booleans())
def test_any_initial_packet_is_parsed_or_refused(raw: bytes, begun: bool) -> None:
    try:
        multifd.parse_initial(raw_head()[:8] + raw[8:] if begun else raw, OURS.bytes)
    except RemoteProtocolError:
        return


@given(st.binary(max_size=HEAD_BYTES), st.integers(0, 3), st.integers(0, 130), st.integers(0, 130))
def test_any_head_is_parsed_within_its_limits_or_refused(rest: bytes, flags: int, room: int, count: int) -> None:
    raw = bytearray(raw_head(flags=flags, room=room, count=count, name=b"ram", offsets=()))
    raw[multifd.OFFSETS_AT :] = rest.ljust(HEAD_BYTES, b"\0")[multifd.OFFSETS_AT :]
    try:
        head = parse(bytes(raw))
    except RemoteProtocolError:
        return
    assert head.size_bytes <= multifd.PACKET_BYTES
    assert (head.pages < 64).all()
