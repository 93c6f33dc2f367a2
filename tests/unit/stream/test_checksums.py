"""Checksums: whatever way the bytes take through both streams, they are summed once, and a changed one is found."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrated.errors import RemoteProtocolError
from migrated.model.stats import BandwidthMeter
from migrated.stream.incoming import IncomingStream
from migrated.stream.outgoing import OutgoingStream
from migrated.transport.memory import MemoryChannel
from migrated.wire.section import CommandHeader, parse_element

#: What is put, and how: buffered, sent as it lies, or buffered and drained.
PIECES = st.lists(
    st.tuples(st.sampled_from(["put", "send", "drain"]), st.binary(min_size=1, max_size=300)), max_size=20
)


async def sent(pieces: list[tuple[str, bytes]]) -> bytes:
    channel = MemoryChannel()
    f = OutgoingStream(channel, BandwidthMeter())
    f.put_buffer(b"before")
    f.begin_checksums()
    for how, data in pieces:
        if how == "send":
            await f.send(data)
        else:
            f.put_buffer(data)
        if how == "drain":
            await f.drain()
        f.put_checksum()
    f.end_checksums()
    f.put_buffer(b"behind")
    await f.drain()
    return bytes(channel.content)


async def received(raw: bytes, pieces: list[tuple[str, bytes]], *, buffer_bytes: int) -> None:
    stream = IncomingStream(MemoryChannel(raw), silence_timeout_s=lambda: 1.0, buffer_bytes=buffer_bytes)
    assert await stream.read_exactly(6) == b"before"
    stream.begin_checksums()
    for how, data in pieces:
        if how == "put":
            assert await stream.read_exactly(len(data)) == data
        else:
            left = len(data)
            while left:
                if not (here := len(stream.peek()[:left])):
                    await stream.fill()
                stream.consume(here)
                left -= here
        await stream.expect_checksum()
    stream.end_checksums()
    await stream.expect_checksum()
    assert await stream.read_exactly(6) == b"behind"


@given(PIECES, st.integers(320, 1000))
async def test_every_byte_is_summed_once(pieces: list[tuple[str, bytes]], buffer_bytes: int) -> None:
    await received(await sent(pieces), pieces, buffer_bytes=buffer_bytes)


@given(st.lists(st.tuples(st.sampled_from(["put", "send"]), st.binary(min_size=1, max_size=50)), min_size=1), st.data())
async def test_a_bit_that_changed_is_found(pieces: list[tuple[str, bytes]], data: st.DataObject) -> None:
    raw = bytearray(await sent(pieces))
    at = data.draw(st.integers(len(b"before"), len(raw) - len(b"behind") - 1))
    raw[at] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises((RemoteProtocolError, AssertionError)):
        await received(bytes(raw), pieces, buffer_bytes=1000)


async def test_it_says_what_is_wrong() -> None:
    raw = bytearray(await sent([("send", b"content")]))
    raw[8] ^= 0x10
    stream = IncomingStream(MemoryChannel(bytes(raw)), silence_timeout_s=lambda: 1.0)
    await stream.read_exactly(6)
    stream.begin_checksums()
    stream.section = "ram (PART)"
    await stream.read_exactly(7)
    with pytest.raises(RemoteProtocolError, match=r"changed on the way, expected checksum [0-9a-f]{16}.*ram \(PART\)"):
        await stream.expect_checksum()


async def test_a_section_without_one() -> None:
    stream = IncomingStream(MemoryChannel(bytes.fromhex("08 0002 0004 00000002")), silence_timeout_s=lambda: 1.0)
    stream.begin_checksums()
    with pytest.raises(RemoteProtocolError, match="without its checksum"):
        await stream.expect_checksum()


async def test_nothing_is_expected_where_none_are_sent() -> None:
    stream = IncomingStream(MemoryChannel(b"\x08\x4d\x05\x00\x08" + bytes(8)), silence_timeout_s=lambda: 1.0)
    await stream.expect_checksum()
    assert isinstance(await stream.run(parse_element(None)), CommandHeader)
    stream.compare(bytes(8))
