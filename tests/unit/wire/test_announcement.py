"""The list of sections: the same there and back, over as many commands as it takes, refused where it is none."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrated.errors import LocalProtocolError, RemoteProtocolError
from migrated.wire.announcement import AnnouncedSection, encode_announcement, parse_announcement
from migrated.wire.command import Command, check_command
from migrated.wire.pull import feed
from migrated.wire.section import CommandHeader, parse_element

uint32 = st.integers(0, (1 << 32) - 1)
names = st.text(st.characters(categories=["L", "N", "P"]), min_size=1, max_size=60)
SECTIONS = st.lists(st.builds(AnnouncedSection, names, uint32, uint32, st.booleans()), max_size=20)


def commands(stream: bytes) -> list[bytes]:
    """Return the payloads of the commands in a stream."""
    payloads = []
    while stream:
        header = feed(parse_element(), [stream])
        assert isinstance(header, CommandHeader)
        assert check_command(header) is Command.X_SECTIONS
        payloads.append(header.payload)
        stream = stream[5 + len(header.payload) :]
    return payloads


def test_bytes() -> None:
    sections = [AnnouncedSection("ram", 0, 4, live=True), AnnouncedSection("cpu", 1, 2, live=False)]
    assert encode_announcement(sections) == bytes.fromhex(
        "08 4d01 001b 00 03 72616d 00000000 00000004 01 03 637075 00000001 00000002 04"
    )
    assert str(sections[1]) == "cpu/1"


@given(SECTIONS)
def test_a_list_comes_back(sections: list[AnnouncedSection]) -> None:
    (payload,) = commands(encode_announcement(sections))
    assert parse_announcement(payload) == (sections, False)


def test_a_long_list_goes_on_in_the_next_command() -> None:
    sections = [AnnouncedSection("d" * 250, number, 1, live=False) for number in range(600)]
    parts = [parse_announcement(payload) for payload in commands(encode_announcement(sections))]
    assert [more for _, more in parts] == [True, True, False]
    assert [section for part, _ in parts for section in part] == sections


def test_a_name_that_no_header_could_carry_is_our_bug() -> None:
    with pytest.raises(LocalProtocolError):
        encode_announcement([AnnouncedSection("d" * 256, 0, 1, live=False)])


@pytest.mark.parametrize(
    ("payload", "why"),
    [
        ("", "truncated"),
        ("02", "X_SECTIONS goes on or not, expected 0 or 1, found 2"),
        ("00 03 6370", "truncated"),
        ("00 03 637075 00000001 00000002", "truncated"),
        (
            "00 03 637075 00000001 00000002 02",
            "X_SECTIONS lists no section, expected a name, and 1 or 4, found 'cpu', 2",
        ),
        ("00 00 00000001 00000002 04", "X_SECTIONS lists no section, expected a name, and 1 or 4, found '', 4"),
        ("00 01 0a 00000001 00000002 04", "characters that cannot be printed"),
    ],
)
def test_what_is_no_list(payload: str, why: str) -> None:
    with pytest.raises(RemoteProtocolError, match=why):
        parse_announcement(bytes.fromhex(payload))


@given(st.binary(max_size=64))
def test_any_payload_is_a_list_or_refused(noise: bytes) -> None:
    try:
        sections, more = parse_announcement(noise)
    except RemoteProtocolError:
        return
    (payload,) = commands(encode_announcement(sections))
    assert payload[1:] == noise[1:]
    assert noise[0] == more
