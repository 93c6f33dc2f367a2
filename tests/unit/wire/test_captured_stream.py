"""A whole stream of a real QEMU 7.2, read with nothing but this package's parsers, and written again byte for byte."""

from __future__ import annotations

import json

import numpy as np
from hypothesis import given, settings

from migrated.wire import section
from migrated.wire.pull import Parser, feed
from migrated.wire.ram import PAGE, BlockList, EndOfSection, PageRun, RamParser, ZeroRun
from migrated.wire.ram_encoder import RamEncoder, encode_block_list
from migrated.wire.section import Configuration, EndOfFile, SectionHeader, SectionType
from tests.support.ram_records import page_run
from tests.unit.wire.captures import CONTENT, PAGES, STREAM, UUID
from tests.unit.wire.cuts import CUTS, cut, single_bytes

BODY_BYTES = {"timer": 24, "globalstate": 104}
RAM_ID, TIMER_ID, GLOBALSTATE_ID = 2, 0, 4


class Reader:
    """What a loader does, without a machine behind it."""

    def __init__(self) -> None:
        self.memory = np.full((PAGES, PAGE), 0xEE, np.uint8)
        self.told: list[object] = []
        self._parser = RamParser({})
        self._names: dict[int, str] = {}

    def read(self) -> Parser[None]:
        yield from section.parse_stream_header()
        configuration, first = yield from section.parse_preamble()
        self.told.append(configuration)
        element = yield from section.parse_element(first)
        while not isinstance(element, EndOfFile):
            assert isinstance(element, SectionHeader)
            yield from self._section(element)
            element = yield from section.parse_element()
        length = yield from section.parse_vmdescription_length()
        self.told.append(json.loads((yield length)))

    def _section(self, header: SectionHeader) -> Parser[None]:
        self.told.append(header)
        idstr = self._names.setdefault(header.section_id, header.idstr)
        if idstr == "ram":
            yield from self._ram()
        else:
            self.told.append((yield BODY_BYTES[idstr]))
        yield from section.parse_footer(header.section_id, idstr)

    def _ram(self) -> Parser[None]:
        body = b""
        while True:
            body += yield 1
            events, used = self._parser.parse(memoryview(body))
            body = body[used:]
            for event in events:
                match event:
                    case PageRun(pages=pages, data=data):
                        self.memory[pages] = data
                    case ZeroRun(pages=pages, fill=fill):
                        self.memory[pages] = fill
                    case BlockList():
                        self.told.append(event)
                    case EndOfSection():
                        return


def read(chunks: list[bytes]) -> Reader:
    reader = Reader()
    feed(reader.read(), chunks)
    return reader


def memory() -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    pages = np.zeros((PAGES, PAGE), np.uint8)
    for page, content in CONTENT.items():
        pages[page] = np.frombuffer(content, np.uint8)
    return pages


def test_everything_is_understood() -> None:
    reader = read([STREAM])
    assert (reader.memory == memory()).all()
    configuration, start, blocks, part, end, timer, _, globalstate, state, description = reader.told
    assert configuration == Configuration("none", uuid=UUID)
    assert start == SectionHeader(SectionType.START, RAM_ID, "ram", 0, 4)
    assert blocks == BlockList(PAGES * PAGE, (("mem0", PAGES * PAGE),))
    assert part == SectionHeader(SectionType.PART, RAM_ID)
    assert end == SectionHeader(SectionType.END, RAM_ID)
    assert timer == SectionHeader(SectionType.FULL, TIMER_ID, "timer", 0, 2)
    assert globalstate == SectionHeader(SectionType.FULL, GLOBALSTATE_ID, "globalstate", 0, 1)
    assert isinstance(state, bytes)
    assert state[4:].rstrip(b"\0") == b"prelaunch"
    assert isinstance(description, dict)
    assert [device["name"] for device in description["devices"]] == ["timer", "globalstate"]


@settings(max_examples=10)
@given(CUTS)
def test_any_cut_says_the_same(cuts: list[float]) -> None:
    assert read(cut(STREAM, cuts)).told == read([STREAM]).told


def test_byte_by_byte() -> None:
    reader = read(single_bytes(STREAM))
    assert reader.told == read([STREAM]).told
    assert (reader.memory == memory()).all()


def test_the_same_machine_is_written_with_the_same_bytes() -> None:
    told = read([STREAM]).told
    configuration, start, _, part, end, timer, timer_body, globalstate, state, _ = told
    assert isinstance(configuration, Configuration)
    assert isinstance(timer_body, bytes)
    assert isinstance(state, bytes)
    heads = [header for header in (start, part, end, timer, globalstate) if isinstance(header, SectionHeader)]
    heads_raw = [section.encode_section_header(header) for header in heads]
    bodies = [encode_block_list([("mem0", PAGES * PAGE)]), _records(), encode_block_list([])[8:], timer_body, state]
    sections = b"".join(
        head_raw + body + section.encode_footer(head.section_id)
        for head, head_raw, body in zip(heads, heads_raw, bodies, strict=True)
    )
    description = STREAM[STREAM.index(b'{"page_size"') :].decode()
    written = (
        section.encode_stream_header()
        + section.encode_configuration(configuration)
        + sections
        + section.EOF_BYTE
        + section.encode_vmdescription(description)
    )
    assert written == STREAM


def _records() -> bytes:
    """Encode the pages in order, as a QEMU does: runs of zero pages and runs of pages with content."""
    encoder = RamEncoder()
    out = np.empty(PAGES * 4200, np.uint8)
    raw = b""
    content = memory()
    for page in range(PAGES):
        if page in CONTENT:
            used = page_run(encoder, "mem0", np.array([page]), content, out)
            raw += out[:used].tobytes()
        else:
            raw += encoder.zero_run("mem0", np.array([page]))
    return raw + encode_block_list([])[8:]
