"""Packed pages of multifd: what is packed is unpacked, and nothing else, and never more than that."""

from __future__ import annotations

import random
import tracemalloc
import zlib

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from migrated.errors import RemoteProtocolError
from migrated.wire import packing
from migrated.wire.multifd import PACKET_BYTES, PLAIN, PacketFlag
from migrated.wire.packing import Packer, Unpacker
from migrated.wire.ram import PAGE

METHODS = pytest.mark.parametrize("method", [PacketFlag.ZLIB, PacketFlag.ZSTD])
NAMES = {PacketFlag.ZLIB: "zlib", PacketFlag.ZSTD: "zstd"}


def unpack(unpacker: Unpacker, packed: bytes, size: int) -> bytes:
    out = bytearray(size)
    unpacker.unpack(packed, memoryview(out))
    return bytes(out)


def packer(method: PacketFlag, level: int) -> Packer:
    return packing.packers(method, level, 1)[0]


def unpacker(method: PacketFlag, channels: int) -> Unpacker:
    return packing.unpackers(method, channels)[0]


def refusal(unpacker: Unpacker, packed: bytes, size: int) -> RemoteProtocolError:
    with pytest.raises(RemoteProtocolError) as caught:
        unpack(unpacker, packed, size)
    assert caught.value.section == "multifd"
    return caught.value


@METHODS
@pytest.mark.parametrize("level", [0, 1, 9])
def test_packet_by_packet_over_one_stream(method: PacketFlag, level: int) -> None:
    generator = random.Random(1)
    packets = [
        generator.randbytes(PACKET_BYTES),
        bytes(PAGE),
        b"ab" * PAGE,
        generator.randbytes(PAGE),
        bytes(PACKET_BYTES),
    ]
    sends, receives = packer(method, level), unpacker(method, 2)
    packed = [sends.pack(pages) for pages in packets]
    assert [unpack(receives, data, len(pages)) for data, pages in zip(packed, packets, strict=True)] == packets


def test_what_came_before_helps() -> None:
    page = random.Random(2).randbytes(PAGE)
    for method in NAMES:
        sends = packer(method, 1)
        first, again = sends.pack(page), sends.pack(page)
        assert len(again) < len(first) / 4


def test_the_formats_are_those_of_the_libraries() -> None:
    pages = bytes(range(256)) * 16
    assert zlib.decompressobj().decompress(packer(PacketFlag.ZLIB, 1).pack(pages)) == pages
    assert zstandard.ZstdDecompressor().decompressobj().decompress(packer(PacketFlag.ZSTD, 1).pack(pages)) == pages


@METHODS
def test_a_packet_with_other_than_its_pages(method: PacketFlag) -> None:
    packed = packer(method, 1).pack(bytes(2 * PAGE))
    long = refusal(unpacker(method, 1), packed, PAGE)
    assert long.what == f"packed pages of another length ({NAMES[method]})"
    assert (long.expected, long.found) == ("4096 bytes", "more")
    short = refusal(unpacker(method, 1), packed, 3 * PAGE)
    assert (short.expected, short.found) == ("12288 bytes", "8192 bytes")
    assert refusal(unpacker(method, 1), b"", PAGE).found == "0 bytes"


def test_nothing_is_packed_where_pages_go_as_they_are() -> None:
    assert packing.packers(PLAIN, 1, 3) == packing.unpackers(PLAIN, 3) == []
    assert [packing.METHODS[name] for name in NAMES.values()] == [(method,) for method in NAMES]


@METHODS
def test_bytes_that_were_never_packed(method: PacketFlag) -> None:
    assert f"cannot be unpacked ({NAMES[method]})" in refusal(unpacker(method, 1), b"nonsense" * 9, PAGE).what


@METHODS
def test_a_bomb_costs_no_more_than_a_packet(method: PacketFlag) -> None:
    packed = packer(method, 9).pack(bytes(64 << 20))
    receives = unpacker(method, 1)
    tracemalloc.start()
    try:
        assert refusal(receives, packed, PACKET_BYTES).found == "more"
        assert tracemalloc.get_traced_memory()[1] < 8 * PACKET_BYTES
    finally:
        tracemalloc.stop()


def test_a_stream_that_reaches_too_far_back_is_refused() -> None:
    packed = packer(PacketFlag.ZSTD, 19).pack(bytes(PAGE))
    assert unpack(unpacker(PacketFlag.ZSTD, 1), packed, PAGE) == bytes(PAGE)
    assert "too much memory" in refusal(unpacker(PacketFlag.ZSTD, 255), packed, PAGE).what


@pytest.mark.parametrize(("channels", "expected"), [(1, 32 << 20), (16, 32 << 20), (17, 16 << 20), (255, 2 << 20)])
def test_all_channels_together_have_a_limit(channels: int, expected: int) -> None:
    assert packing.window_bytes(channels) == expected


@given(
    st.sampled_from([PacketFlag.ZLIB, PacketFlag.ZSTD]), st.binary(max_size=500), st.integers(0, 400), st.integers(1, 3)
)
def test_any_bytes_are_pages_or_refused(method: PacketFlag, noise: bytes, at: int, pages: int) -> None:
    whole = packer(method, 1).pack(random.Random(3).randbytes(100) * 41)
    receives = unpacker(method, 1)
    for packed in (whole[:at] + noise, noise, whole):
        try:
            assert len(unpack(receives, packed, pages * PAGE)) == pages * PAGE
        except RemoteProtocolError:
            continue
