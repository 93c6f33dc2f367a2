"""The frame of the stream: reference bytes, a captured stream, every refusal, any bytes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrated.errors import LocalProtocolError
from migrated.wire import section
from migrated.wire.pull import Parser, feed
from migrated.wire.section import (
    CommandHeader,
    Configuration,
    EndOfFile,
    SectionHeader,
    SectionType,
    parse_element,
    parse_preamble,
)
from tests.unit.wire.captures import STREAM, UUID
from tests.unit.wire.cuts import CUTS, assert_truncation_is_noticed, cut, largest_piece, parse, refusal

NAMES = st.text(max_size=60).filter(str.isprintable)
U32 = st.integers(0, 2**32 - 1)

# [V] subsections as a 7.2 source writes them
UUID_SUBSECTION = b"\x05\x12configuration/uuid\0\0\0\x01" + UUID
SHARED_SUBSECTION = b"\x05\x1aconfiguration/capabilities\0\0\0\x01\0\0\0\x01\x0fx-ignore-shared"
NONE = bytes.fromhex("07 00000004") + b"none"


# -- stream header ---------------------------------------------------------------------------------------------


def test_stream_header() -> None:
    raw = section.encode_stream_header()
    assert raw == STREAM[:8] == b"QEVM\0\0\0\x03"
    assert parse(section.parse_stream_header, raw) is None
    assert_truncation_is_noticed(section.parse_stream_header, raw)


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"HTTP/1.1", "Not a migration stream"),
        (b"QEVM\0\0\0\x02", "SaveVM v2 format is obsolete and don't work anymore"),
        (b"QEVM\0\0\0\x04", "Unsupported migration stream version"),
        (b"QEVM\xff\xff\xff\xff", "Unsupported migration stream version"),
    ],
)
def test_stream_header_refusals(raw: bytes, text: str) -> None:
    assert refusal(section.parse_stream_header, raw) == text


# -- configuration ---------------------------------------------------------------------------------------------

CONFIGURATIONS = {
    NONE: Configuration("none"),
    NONE + UUID_SUBSECTION: Configuration("none", uuid=UUID),
    NONE + SHARED_SUBSECTION: Configuration("none", capabilities=("x-ignore-shared",)),
    NONE + SHARED_SUBSECTION + UUID_SUBSECTION: Configuration("none", UUID, ("x-ignore-shared",)),
    NONE + b"\x05\x1econfiguration/target-page-bits\0\0\0\x01\0\0\0\x0c": Configuration("none", target_page_bits=12),
    b"\x07\0\0\0\0": Configuration(""),
}


@pytest.mark.parametrize("raw", CONFIGURATIONS)
def test_configuration_bytes(raw: bytes) -> None:
    assert section.encode_configuration(CONFIGURATIONS[raw]) == raw
    assert parse(parse_preamble, raw + b"\x01") == (CONFIGURATIONS[raw], 1)
    assert_truncation_is_noticed(parse_preamble, raw + b"\x01")


def test_subsections_may_come_in_another_order() -> None:
    raw = NONE + UUID_SUBSECTION + SHARED_SUBSECTION + b"\x08"
    assert parse(parse_preamble, raw) == (Configuration("none", UUID, ("x-ignore-shared",)), 8)


@given(
    st.builds(
        Configuration,
        NAMES,
        st.none() | st.binary(min_size=16, max_size=16),
        st.lists(NAMES, max_size=5).map(tuple),
        st.none() | U32,
    ),
    st.integers(0, 255).filter(lambda kind: kind != SectionType.SUBSECTION),
    CUTS,
)
def test_configuration_comes_back(configuration: Configuration, following: int, cuts: list[float]) -> None:
    raw = section.encode_configuration(configuration) + bytes([following])
    assert feed(parse_preamble(), cut(raw, cuts)) == (configuration, following)


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"\x01", "Configuration section missing"),
        (bytes.fromhex("07 00000100"), "machine type name is too long"),
        (bytes.fromhex("07 ffffffff"), "machine type name is too long"),
        (bytes.fromhex("07 00000001 ff"), "the machine type name is not UTF-8"),
        (NONE + b"\x05\x04else", "unknown subsection"),
        (NONE + UUID_SUBSECTION + UUID_SUBSECTION, "subsection sent twice"),
        (NONE + b"\x05\x12configuration/uuid\0\0\0\x02", "unsupported version of subsection configuration/uuid"),
        (NONE + SHARED_SUBSECTION[:-20] + b"\0\0\0\x41", "list of capabilities is too long"),
        (NONE + SHARED_SUBSECTION[:-20] + b"\x80\0\0\0", "list of capabilities is too long"),
    ],
)
def test_configuration_refusals(raw: bytes, text: str) -> None:
    assert refusal(parse_preamble, raw) == text


def test_configurations_that_cannot_be_sent() -> None:
    with pytest.raises(LocalProtocolError, match="255 bytes"):
        section.encode_configuration(Configuration("x" * 256))
    with pytest.raises(LocalProtocolError, match="a UUID has 16 bytes, not 3"):
        section.encode_configuration(Configuration("none", uuid=b"abc"))


# -- elements --------------------------------------------------------------------------------------------------

ELEMENTS: dict[bytes, section.Element] = {
    # [V] the first bytes of a real ram section
    bytes.fromhex("01 00000002 03 72616d 00000000 00000004"): SectionHeader(SectionType.START, 2, "ram", 0, 4),
    bytes.fromhex("04 00000000 05") + b"timer" + bytes.fromhex("00000000 00000002"): SectionHeader(
        SectionType.FULL, 0, "timer", 0, 2
    ),
    bytes.fromhex("02 01020304"): SectionHeader(SectionType.PART, 0x01020304),
    bytes.fromhex("03 ffffffff"): SectionHeader(SectionType.END, 0xFFFFFFFF),
    bytes.fromhex("08 0001 0000"): CommandHeader(1, b""),
    bytes.fromhex("08 0002 0004 00000001"): CommandHeader(2, b"\0\0\0\x01"),
    b"\0": EndOfFile(),
}


@pytest.mark.parametrize("raw", ELEMENTS)
def test_elements(raw: bytes) -> None:
    element = ELEMENTS[raw]
    assert parse(parse_element, raw) == element
    assert feed(parse_element(raw[0]), [raw[1:]]) == element
    assert_truncation_is_noticed(parse_element, raw)
    if isinstance(element, SectionHeader):
        assert section.encode_section_header(element) == raw


@given(st.sampled_from(sorted(section.SECTION_KINDS)), U32, NAMES.filter(bool), U32, U32, CUTS)
def test_section_headers_come_back(
    kind: SectionType, section_id: int, idstr: str, instance_id: int, version_id: int, cuts: list[float]
) -> None:
    header = SectionHeader(kind, section_id, idstr, instance_id, version_id)
    if kind not in section.FULL_HEADER_KINDS:
        header = SectionHeader(kind, section_id)
    assert feed(parse_element(), cut(section.encode_section_header(header), cuts)) == header


@pytest.mark.parametrize("kind", [5, 6, 7, 9, 0x7E, 0xFF])
def test_unknown_element(kind: int) -> None:
    assert refusal(parse_element, bytes([kind])) == f"Unknown savevm section type {kind}"


def test_section_without_a_name() -> None:
    raw = bytes.fromhex("04 00000007 00")
    assert refusal(parse_element, raw) == "Unable to read ID string for section 7"


def test_what_is_no_section() -> None:
    with pytest.raises(LocalProtocolError, match="COMMAND is not a section"):
        section.encode_section_header(SectionHeader(SectionType.COMMAND, 1))


def ram_footer() -> Parser[None]:
    return section.parse_footer(2, "ram")


def test_footer() -> None:
    raw = section.encode_footer(2)
    assert raw == bytes.fromhex("7e 00000002")
    assert parse(ram_footer, raw) is None
    assert_truncation_is_noticed(ram_footer, raw)
    assert refusal(ram_footer, b"\x02") == "Missing section footer for ram"
    text = "Mismatched section id in footer for ram - read 0x103 expected 0x2"
    assert refusal(ram_footer, bytes.fromhex("7e 00000103")) == text


# -- the end ---------------------------------------------------------------------------------------------------


def test_vmdescription() -> None:
    # [V] "06 00000000" is enough for a real destination
    assert section.encode_vmdescription("") == bytes.fromhex("06 00000000")
    raw = section.encode_vmdescription('{"page_size": 4096}')
    assert raw == b'\x06\0\0\0\x13{"page_size": 4096}'
    assert parse(section.parse_vmdescription_length, raw) == 0x13
    assert_truncation_is_noticed(section.parse_vmdescription_length, raw[:5])


@pytest.mark.parametrize(
    ("length", "sent"),
    [
        (0x7A, 0x7A),
        (0x7B, 0x7C),
        (0x17B, 0x17C),
        (0x7AFF, 0x7AFF),
        (0x7B00, 0x7C00),
        (0x7B7B, 0x7C00),
        (0x7C7B, 0x7C7C),
        (0x7B0000, 0x7C0000),
    ],
)
def test_vmdescription_length_has_no_brace(length: int, sent: int) -> None:
    text = '{"' + "x" * (length - 4) + '"}'
    raw = section.encode_vmdescription(text)
    assert feed(section.parse_vmdescription_length(), [raw]) == sent == len(raw) - 5
    assert b"{" not in raw[:5]
    assert raw.endswith(b"}")
    assert raw[5:-1].decode().rstrip() + "}" == text


def test_vmdescriptions_that_cannot_be_sent() -> None:
    with pytest.raises(LocalProtocolError, match="NUL"):
        section.encode_vmdescription("{\0}")
    with pytest.raises(LocalProtocolError, match="at most"):
        section.encode_vmdescription(" " * (section.VMDESCRIPTION_MAX_BYTES + 1))


def test_vmdescription_refusals() -> None:
    parser = section.parse_vmdescription_length
    assert refusal(parser, b"\x04") == "Expected vmdescription section, but got 4"
    assert refusal(parser, bytes.fromhex("06 04000001")) == "VMDESCRIPTION is too long"
    assert refusal(parser, bytes.fromhex("06 ffffffff")) == "VMDESCRIPTION is too long"
    assert parse(parser, bytes.fromhex("06 04000000")) == section.VMDESCRIPTION_MAX_BYTES


# -- any bytes -------------------------------------------------------------------------------------------------

PARSERS: list[Callable[[], Parser[object]]] = [
    section.parse_stream_header,
    parse_preamble,
    parse_element,
    ram_footer,
    section.parse_vmdescription_length,
]
SEEDS = [STREAM[:200], *CONFIGURATIONS, *ELEMENTS]


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """Draw good bytes with some of them changed."""
    raw = bytearray(draw(st.sampled_from(SEEDS)))
    for at in draw(st.lists(st.integers(0, len(raw) - 1), max_size=4)):
        raw[at] = draw(st.integers(0, 255))
    return bytes(raw)


@pytest.mark.parametrize("parser", PARSERS)
@given(data=st.binary(max_size=300) | damaged())
def test_any_bytes_are_bounded(parser: Callable[[], Parser[object]], data: bytes) -> None:
    assert largest_piece(parser(), data) <= 0xFFFF
