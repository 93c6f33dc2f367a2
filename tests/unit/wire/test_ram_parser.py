"""The receiving half of the "ram" codec: captured bytes, any cut, every refusal, any bytes."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrated.errors import RemoteProtocolError
from migrated.wire import ram
from migrated.wire.ram import EOS, PAGE, BlockList, EndOfSection, Flag, PageDelta, PageRun, RamEvent, RamParser, ZeroRun
from migrated.wire.ram_encoder import RamEncoder, encode_block_list
from tests.support.ram_records import page_run
from tests.unit.wire.captures import CONTENT, PAGES, STREAM
from tests.unit.wire.cuts import CUTS, cut, single_bytes

BLOCKS = {"ram": 64 * PAGE, "rom": 4 * PAGE}

#: What one record says: block list, (block, page, content or fill byte), (block, page, "delta", bytes), or the end.
Said = BlockList | tuple[str, int, bytes | int] | tuple[str, int, str, bytes] | EndOfSection


def word(page: int, flags: int) -> bytes:
    return struct.pack(">Q", page * PAGE | flags)


def name(text: str) -> bytes:
    return bytes([len(text.encode())]) + text.encode()


def zero(page: int, block: str | None = None, fill: int = 0) -> bytes:
    head = word(page, Flag.ZERO | Flag.CONTINUE) if block is None else word(page, Flag.ZERO) + name(block)
    return head + bytes([fill])


def full(page: int, content: int, block: str | None = None) -> bytes:
    head = word(page, Flag.PAGE | Flag.CONTINUE) if block is None else word(page, Flag.PAGE) + name(block)
    return head + bytes([content]) * PAGE


def delta(
    page: int, content: bytes, block: str | None = None, *, encoding: int = 1, length: int | None = None
) -> bytes:
    head = word(page, Flag.XBZRLE | Flag.CONTINUE) if block is None else word(page, Flag.XBZRLE) + name(block)
    return head + struct.pack(">BH", encoding, len(content) if length is None else length) + content


def said(event: RamEvent) -> list[Said]:
    """Take an event apart into what each record said; copies, because events only borrow the buffer."""
    match event:
        case PageRun(block, pages, data):
            assert pages.dtype == np.int64
            assert data.shape == (len(pages), PAGE)
            return [(block, page, row.tobytes()) for page, row in zip(pages.tolist(), data, strict=True)]
        case ZeroRun(block, pages, fill):
            assert pages.dtype == np.int64
            return [(block, page, fill) for page in pages.tolist()]
        case PageDelta(block, page, content):
            return [(block, page, "delta", bytes(content))]
        case _:
            return [event]


def parse(chunks: Iterable[bytes], parser: RamParser | None = None) -> list[Said]:
    """Feed chunks as a stream layer would; everything must be used up, and never more than one record kept."""
    parser = parser or RamParser(BLOCKS)
    told: list[Said] = []
    buffer = b""
    for chunk in chunks:
        buffer += chunk
        while True:
            events, used = parser.parse(memoryview(buffer))
            told += [one for event in events for one in said(event)]
            buffer = buffer[used:]
            if not used:
                break
        assert len(buffer) < ram.RECORD_MAX_BYTES
    assert buffer == b""
    return told


def refusal(data: bytes, blocks: dict[str, int] | None = None) -> str:
    with pytest.raises(RemoteProtocolError) as whole:
        parse([data], RamParser(BLOCKS if blocks is None else blocks))
    with pytest.raises(RemoteProtocolError) as pieces:
        parse(single_bytes(data), RamParser(BLOCKS if blocks is None else blocks))
    assert whole.value.section == "ram" or "UTF-8" in whole.value.what
    assert whole.value.what == pieces.value.what
    return whole.value.what


# -- real bytes ------------------------------------------------------------------------------------------------


def test_captured_sections() -> None:
    """[V] START and PART of a real source; in PART the first record carries a name, the others continue."""
    body_end = EOS + b"\x7e"
    start = STREAM.index(b"\x03ram") + 12
    setup_end = STREAM.index(body_end, start) + 8
    part = setup_end + 5 + 5
    part_end = STREAM.index(body_end, part) + 8
    parser = RamParser({})
    announced = BlockList(PAGES * PAGE, (("mem0", PAGES * PAGE),))
    assert parse([STREAM[start:setup_end]], parser) == [announced, EndOfSection()]
    want: list[Said] = [("mem0", page, CONTENT.get(page, 0)) for page in range(PAGES)]
    assert parse([STREAM[part:part_end]], parser) == [*want, EndOfSection()]
    end = part_end + 5 + 5
    assert parse([STREAM[end : end + 8]], parser) == [EndOfSection()]


def test_sender_and_receiver_agree() -> None:
    source = np.random.default_rng(1).integers(0, 256, (64, PAGE), np.uint8)
    encoder = RamEncoder()
    out = np.empty(1 << 20, np.uint8)
    used = page_run(encoder, "ram", np.arange(40), source, out)
    zeros = encoder.zero_run("ram", np.arange(40, 64))
    events, consumed = RamParser(BLOCKS).parse(memoryview(out[:used].tobytes() + zeros + EOS))
    # The named record stands alone, the rest of each run is one event.
    assert [type(event) for event in events] == [PageRun, PageRun, ZeroRun, EndOfSection]
    assert consumed == used + len(zeros) + 8
    told = [one for event in events[:-1] for one in said(event)]
    assert told == [("ram", page, source[page].tobytes() if page < 40 else 0) for page in range(64)]


def test_a_page_that_somebody_waits_for_is_read_without_detours() -> None:
    parser = RamParser(BLOCKS)
    buf = memoryview(full(3, 1, "ram") + full(9, 2) + zero(10) + full(11, 3))
    assert parser.parse_page(buf, 0) == ("ram", 3, 12)
    assert parser.parse_page(buf, 12 + PAGE) == ("ram", 9, 20 + PAGE)
    at = 20 + 2 * PAGE
    assert parser.parse_page(buf, at) is None, "a zero record"
    assert parser.parse_page(buf, at + 9) == ("ram", 11, at + 17)
    assert parser.parse_page(buf, at + 10) is None, "not all of it is there"
    named = memoryview(full(0, 1, "rom"))
    assert parser.parse_page(named[:-1], 0) is None, "its name takes the room"
    assert parser.parse_page(named, 0) == ("rom", 0, 12)
    with pytest.raises(RemoteProtocolError, match="Illegal RAM offset 4000"):
        parser.parse_page(memoryview(full(4, 1)), 0)


def test_no_page_is_read_out_of_a_block_list() -> None:
    parser = RamParser({})
    assert parser.parse(memoryview(struct.pack(">Q", PAGE | Flag.MEM_SIZE))) == ([], 8)
    assert parser.parse_page(memoryview(full(0, 1, "ram")), 0) is None


def test_data_lies_in_the_buffer() -> None:
    buffer = bytearray(full(1, 1, "ram") + full(2, 2) + full(3, 3))
    events, _ = RamParser(BLOCKS).parse(memoryview(buffer))
    buffer[-1] = 0xAA
    last = events[-1]
    assert isinstance(last, PageRun)
    assert last.pages.tolist() == [2, 3]
    assert last.data[1, -1] == 0xAA


# -- cuts ------------------------------------------------------------------------------------------------------


@st.composite
def bodies(draw: st.DrawFn) -> tuple[bytes, list[Said]]:
    """Draw a section body and what it says."""
    raw = [word(68, Flag.MEM_SIZE) + b"".join(name(one) + struct.pack(">Q", size) for one, size in BLOCKS.items())]
    told: list[Said] = [BlockList(68 * PAGE, tuple(BLOCKS.items()))]
    last: str | None = None
    runs = st.tuples(st.sampled_from(["ram", "rom"]), st.booleans(), st.integers(1, 5), st.integers(0, 3))
    for block, is_zero, count, content in draw(st.lists(runs, max_size=6)):
        for _ in range(count):
            page = draw(st.integers(0, BLOCKS[block] // PAGE - 1))
            label = None if block == last and draw(st.integers(0, 9)) else block
            if is_zero:
                raw.append(zero(page, label, content))
                told.append((block, page, content))
            else:
                raw.append(full(page, content, label))
                told.append((block, page, bytes([content]) * PAGE))
            last = block
    return b"".join([*raw, EOS]), [*told, EndOfSection()]


@given(bodies(), CUTS)
def test_any_cut_says_the_same(body: tuple[bytes, list[Said]], cuts: list[float]) -> None:
    raw, told = body
    assert parse([raw]) == told
    assert parse(cut(raw, cuts)) == told


def test_byte_by_byte() -> None:
    raw = full(0, 1, "ram") + zero(1) + zero(2) + zero(3, fill=9) + full(1, 7, "rom") + full(2, 8) + EOS
    assert parse(single_bytes(raw)) == parse([raw])


@pytest.mark.parametrize("count", [63, 64, 65, 200, 5000])
def test_long_runs_are_one_event(count: int) -> None:
    raw = zero(0, "big") + b"".join(zero(page) for page in range(1, count + 1)) + EOS
    events, used = RamParser({"big": 6000 * PAGE}).parse(memoryview(raw))
    assert used == len(raw)
    run = events[1]
    assert isinstance(run, ZeroRun)
    assert run.pages.tolist() == list(range(1, count + 1))
    assert len(events) == 3


@pytest.mark.parametrize("broken_at", [2, 63, 64, 65, 127, 600])
def test_a_run_ends_where_the_kind_or_the_fill_changes(broken_at: int) -> None:
    for other in (full(7, 5), zero(7, fill=5), zero(7, "rom")):
        if other.startswith(word(7, Flag.ZERO) + b"\x03"):
            other = zero(3, "rom")  # noqa: PLW2901 (the rom has four pages)
        records = [zero(page % 64) for page in range(700)]
        records[broken_at] = other
        raw = zero(0, "ram") + b"".join(records[: broken_at + 1]) + zero(1, "ram") + EOS
        told = parse([raw])
        assert len(told) == broken_at + 4
        assert [one[1] for one in told[:-1] if isinstance(one, tuple)][1 : broken_at + 1] == [
            page % 64 for page in range(broken_at)
        ]


def test_stops_behind_each_section() -> None:
    parser = RamParser(BLOCKS)
    raw = zero(0, "ram") + EOS + zero(1)
    events, used = parser.parse(memoryview(raw))
    assert isinstance(events[-1], EndOfSection)
    assert used == len(raw) - 9
    # CONTINUE reaches over the end of a section: it belongs to the connection.
    assert parse([raw[used:]], parser) == [("ram", 1, 0)]


def test_a_restless_stream_is_taken_in_portions() -> None:
    count = 3 * ram.EVENTS_MAX
    raw = zero(0, "ram") + b"".join(zero(page % 64, fill=page % 2) for page in range(count - 1))
    parser = RamParser(BLOCKS)
    events, used = parser.parse(memoryview(raw))
    assert len(events) == ram.EVENTS_MAX
    assert 0 < used < len(raw)
    assert len(parse([raw])) == count


def test_truncation_consumes_nothing_of_the_last_record() -> None:
    raw = full(0, 1, "ram")
    for length in range(len(raw)):
        assert RamParser(BLOCKS).parse(memoryview(raw[:length])) == ([], 0)


# -- block lists -----------------------------------------------------------------------------------------------


def block_list(total_pages: int, entries: list[tuple[bytes, int]]) -> bytes:
    body = b"".join(bytes([len(label)]) + label + struct.pack(">Q", length) for label, length in entries)
    return word(total_pages, Flag.MEM_SIZE) + body


def test_block_list_without_blocks() -> None:
    assert parse([block_list(0, []) + EOS], RamParser({})) == [BlockList(0, ()), EndOfSection()]


def test_block_list_replaces_the_blocks() -> None:
    parser = RamParser({"old": PAGE})
    raw = block_list(2, [(b"new", 2 * PAGE)])
    assert parse([raw + zero(1, "new")], parser) == [BlockList(2 * PAGE, (("new", 2 * PAGE),)), ("new", 1, 0)]
    assert parser.blocks == {"new": 2 * PAGE}
    parser.blocks = {}
    with pytest.raises(RemoteProtocolError, match="Can't find block new"):
        parser.parse(memoryview(zero(0)))


HUGE = 2 << 20


def page_sizes_parser() -> RamParser:
    parser = RamParser({})
    parser.says_page_sizes = True
    return parser


@pytest.mark.parametrize("pieces", [lambda raw: [raw], single_bytes])
def test_block_list_with_page_sizes(pieces: Callable[[bytes], Iterable[bytes]]) -> None:
    blocks = [("mem0", 2 * HUGE), ("rom", PAGE), ("mem1", HUGE)]
    raw = encode_block_list(blocks, {"mem0": HUGE, "mem1": HUGE})
    listed = BlockList(3 * HUGE + PAGE, tuple(blocks), {"mem0": HUGE, "mem1": HUGE})
    assert parse(pieces(raw), page_sizes_parser()) == [listed, EndOfSection()]
    raw = encode_block_list(blocks[:2], {"mem0": HUGE}) + zero(511, "mem0")
    listed = BlockList(2 * HUGE + PAGE, tuple(blocks[:2]), {"mem0": HUGE})
    assert parse(pieces(raw), page_sizes_parser()) == [listed, EndOfSection(), ("mem0", 511, 0)]
    assert parse(pieces(encode_block_list([])), page_sizes_parser()) == [BlockList(0, ()), EndOfSection()]


@pytest.mark.parametrize("said", [[0], [3 << 12], [4 * HUGE], [HUGE, HUGE]], ids=["none", "odd", "too large", "twice"])
def test_page_sizes_that_cannot_be(said: list[int]) -> None:
    raw = block_list(1024, [(b"mem0", 2 * HUGE)]) + b"".join(struct.pack(">Q", size) for size in said) + EOS
    with pytest.raises(RemoteProtocolError, match="bad page size of RAM block 'mem0'"):
        parse([raw], page_sizes_parser())


def test_a_page_size_nobody_advised_of_is_refused() -> None:
    raw = encode_block_list([("mem0", 2 * HUGE), ("mem1", HUGE)], {"mem0": HUGE})
    assert refusal(raw, {}) == "bad name in the block list"


def test_block_list_longer_than_any_buffer() -> None:
    entries = [(b"block-%04d" % index, PAGE) for index in range(ram.BLOCKS_MAX)]
    raw = block_list(len(entries), entries)
    (told,) = parse([raw[at : at + 5000] for at in range(0, len(raw), 5000)], RamParser({}))
    assert isinstance(told, BlockList)
    assert len(told.blocks) == ram.BLOCKS_MAX
    extra = block_list(len(entries) + 1, [*entries, (b"one too many", PAGE)])
    with pytest.raises(RemoteProtocolError, match="too many RAM blocks"):
        parse([extra], RamParser({}))


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (block_list(2, [(b"", PAGE)]), "bad name in the block list"),
        (block_list(2, [(b"a", PAGE), (b"a", PAGE)]), "bad name in the block list"),
        (block_list(2, [(b"\xff", PAGE)]), "a block name is not UTF-8"),
        (block_list(2, [(b"a", 0)]), "bad length of RAM block 'a'"),
        (block_list(2, [(b"a", 100)]), "bad length of RAM block 'a'"),
        (block_list(2, [(b"a", 3 * PAGE)]), "bad length of RAM block 'a'"),
        (block_list(2, [(b"a", 1 << 63)]), "bad length of RAM block 'a'"),
        (block_list(0, []) * 2, "Unknown combination of migration flags: 0x4"),
        (word(0, Flag.MEM_SIZE | Flag.CONTINUE), "Unknown combination of migration flags: 0x24"),
    ],
)
def test_block_list_refusals(raw: bytes, text: str) -> None:
    assert refusal(raw) == text


def test_deltas() -> None:
    stream = delta(3, b"\5\1\xbb", "ram") + delta(4, b"") + full(5, 7) + delta(6, bytes(PAGE)) + EOS
    told: list[Said] = [("ram", 3, "delta", b"\5\1\xbb"), ("ram", 4, "delta", b""), ("ram", 5, bytes([7]) * PAGE)]
    whole = [*told, ("ram", 6, "delta", bytes(PAGE)), EndOfSection()]
    assert parse([stream]) == parse(single_bytes(stream)) == whole


def test_a_delta_as_qemu_has_it() -> None:
    encoder = RamEncoder()
    assert encoder.delta("ram", 3, b"\5\1\xbb") == bytes.fromhex("0000000000003040 03 72616d 01 0003 0501bb")
    assert encoder.delta("ram", 4, b"\0\1\xbb") == bytes.fromhex("0000000000004060 01 0003 0001bb")


# -- records that are refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (word(0, 0), "Unknown combination of migration flags: 0x0"),
        (word(0, Flag.FULL), "Unknown combination of migration flags: 0x1"),
        (word(0, Flag.PAGE | Flag.EOS), "Unknown combination of migration flags: 0x18"),
        (word(0, Flag.PAGE | Flag.ZERO), "Unknown combination of migration flags: 0xa"),
        (word(0, Flag.EOS | Flag.CONTINUE), "Unknown combination of migration flags: 0x30"),
        (word(1, Flag.EOS), "Unknown combination of migration flags: 0x10"),
        (word(0, Flag.XBZRLE | Flag.ZERO), "Unknown combination of migration flags: 0x42"),
        (delta(0, b"", "ram", encoding=2), "Failed to load XBZRLE page - wrong compression!"),
        (delta(0, b"", "ram", length=PAGE + 1), "Failed to load XBZRLE page - len overflow!"),
        (delta(0, b""), "Ack, bad migration stream!"),
        (delta(64, b"", "ram"), "Illegal RAM offset 40000"),
        (word(0, Flag.HOOK), "Unknown combination of migration flags: 0x80"),
        (word(0, Flag.MULTIFD_FLUSH), "Unknown combination of migration flags: 0x200"),
        (word(0, Flag.PAGE | 0x400), "Unknown combination of migration flags: 0x408"),
        (word(0, Flag.COMPRESS_PAGE | Flag.CONTINUE), "Received an unexpected compressed page"),
        (zero(0), "Ack, bad migration stream!"),
        (full(0, 0), "Ack, bad migration stream!"),
        (zero(0, "else"), "Can't find block else"),
        (zero(0, ""), "Can't find block "),
        (word(0, Flag.ZERO) + b"\x01\xff", "a block name is not UTF-8"),
        (zero(4, "rom"), "Illegal RAM offset 4000"),
        (full((1 << 52) - 1, 0, "rom"), "Illegal RAM offset fffffffffffff000"),
        (zero(0, "rom") + zero(4), "Illegal RAM offset 4000"),
    ],
)
def test_refusals(raw: bytes, text: str) -> None:
    assert refusal(raw) == text


@pytest.mark.parametrize("page", [4, 1 << 40, (1 << 52) - 1])
def test_bad_offset_within_a_run(page: int) -> None:
    text = f"Illegal RAM offset {page * PAGE:x}"
    pages = (1, 2, page, 3)
    assert refusal(zero(0, "rom") + b"".join(zero(one) for one in pages)) == text
    assert refusal(full(0, 0, "rom") + b"".join(full(one, 1) for one in pages)) == text


def test_continue_in_a_run_without_a_block() -> None:
    with pytest.raises(RemoteProtocolError, match="Ack, bad migration stream!"):
        RamParser(BLOCKS).parse(memoryview(zero(0) + zero(1)))
    with pytest.raises(RemoteProtocolError, match="Ack, bad migration stream!"):
        RamParser(BLOCKS).parse(memoryview(full(0, 0) + full(1, 0)))


# -- any bytes -------------------------------------------------------------------------------------------------

HEADS = st.builds(word, st.integers(0, 70), st.sampled_from([0x02, 0x22, 0x04, 0x08, 0x28, 0x10, 0x40, 0x3F, 0xFFF]))


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """Draw the bodies of the captured stream, one after the other, with some bytes changed."""
    body_end = EOS + b"\x7e"
    start = STREAM.index(b"\x03ram") + 12
    middle = STREAM.index(body_end, start) + 8
    raw = bytearray(STREAM[start:middle] + STREAM[middle + 10 : STREAM.index(body_end, middle) + 8])
    heads = st.integers(0, 100) | st.integers(0, len(raw) - 1)
    for at in draw(st.lists(heads, min_size=1, max_size=4)):
        raw[at] = draw(st.integers(0, 255))
    return bytes(raw)


PIECES = st.binary(max_size=30) | HEADS | st.just(b"\x03ram") | st.just(bytes(PAGE))


@given(st.lists(PIECES, max_size=12).map(b"".join) | damaged(), CUTS)
def test_any_bytes_give_events_or_a_refusal(data: bytes, cuts: list[float]) -> None:
    parser = RamParser(BLOCKS)
    buffer = b""
    try:
        for chunk in cut(data, cuts):
            buffer += chunk
            while True:
                events, used = parser.parse(memoryview(buffer))
                assert 0 <= used <= len(buffer)
                assert len(events) <= ram.EVENTS_MAX
                assert sum(len(said(event)) for event in events) <= len(buffer) / 8 + 1
                buffer = buffer[used:]
                if not used:
                    break
            assert len(buffer) < ram.RECORD_MAX_BYTES
    except RemoteProtocolError:
        return


def test_flags_do_not_overlap() -> None:
    for lower, higher in pairwise(sorted(Flag)):
        assert lower * 2 == higher
