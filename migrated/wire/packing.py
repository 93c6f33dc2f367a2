"""Pages packed and unpacked for a multifd channel, by zlib or zstd.

The rule of the file: one stream for a channel, flushed behind each packet, so that a packet is unpacked as soon as it
is here, and costs less for what came before it. What comes out of a packet is exactly its pages: a byte more or less is
an error, and never takes more memory than that.

Source of the format: QEMU 7.2, multifd-compression (Z_SYNC_FLUSH, ZSTD_e_flush).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import zstandard

from migrated.errors import RemoteProtocolError
from migrated.wire.multifd import PACKED_MAX_BYTES, PACKET_BYTES, PLAIN, PacketFlag

Buffer = bytes | bytearray | memoryview

#: A zstd stream says how far back it reaches, and that much is held for it; level 20, QEMU's highest, wants 32 MiB.
WINDOW_MAX_BYTES = 32 << 20
#: All channels of a migration together: with many of them, levels beyond 10 are refused.
WINDOWS_MAX_BYTES = 512 << 20


class Packer(Protocol):
    """One channel's sending end."""

    def pack(self, pages: Buffer) -> bytes:
        """Return the pages of one packet, packed."""
        ...


class Unpacker(Protocol):
    """One channel's receiving end."""

    def unpack(self, packed: Buffer, out: memoryview) -> None:
        """Fill ``out`` with the pages of one packet. Raises RemoteProtocolError."""
        ...


class ZlibPacker:
    """A deflate stream."""

    def __init__(self, level: int) -> None:
        self._stream = zlib.compressobj(level)

    def pack(self, pages: Buffer) -> bytes:
        """Return the pages of one packet, packed."""
        return self._stream.compress(pages) + self._stream.flush(zlib.Z_SYNC_FLUSH)


class ZlibUnpacker:
    """A deflate stream, read."""

    def __init__(self) -> None:
        self._stream = zlib.decompressobj()

    def unpack(self, packed: Buffer, out: memoryview) -> None:
        """Fill ``out`` with the pages of one packet. Raises RemoteProtocolError."""
        try:
            pages = self._stream.decompress(packed, len(out))
            # What is left is a mark without content; with any, one byte of it is enough to know.
            more = self._stream.decompress(self._stream.unconsumed_tail, 1)
        except zlib.error as error:
            raise _refusal("zlib", str(error)) from error
        if more or len(pages) != len(out):
            raise _length("zlib", len(pages) + len(more), len(out))
        out[:] = pages


class ZstdPacker:
    """A zstd stream."""

    def __init__(self, level: int) -> None:
        self._stream = zstandard.ZstdCompressor(level=level).compressobj()

    def pack(self, pages: Buffer) -> bytes:
        """Return the pages of one packet, packed."""
        return self._stream.compress(pages) + self._stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)


class _Dry(Exception):
    """Nothing is left of a packet. Never leaves this file."""


class _Source:
    """What a zstd stream is read from: one packet at a time, and never an end."""

    packed: Buffer = b""

    def read(self, size: int) -> Buffer:
        """Return the packet, once."""
        if not self.packed:
            raise _Dry
        packed, self.packed = self.packed, b""
        return packed


class ZstdUnpacker:
    """A zstd stream, read."""

    def __init__(self, window_bytes: int) -> None:
        self._source = _Source()
        source: Any = self._source  # all that it needs of a file is `read`
        decompressor = zstandard.ZstdDecompressor(max_window_size=window_bytes)
        self._stream = decompressor.stream_reader(source, read_size=PACKED_MAX_BYTES)
        self._pages = memoryview(bytearray(PACKET_BYTES + 1))

    def unpack(self, packed: Buffer, out: memoryview) -> None:
        """Fill ``out`` with the pages of one packet. Raises RemoteProtocolError."""
        self._source.packed = packed
        room = self._pages[: len(out) + 1]  # for what must not come
        try:
            got = self._stream.readinto1(room)
        except _Dry:
            got = 0
        except zstandard.ZstdError as error:
            raise _refusal("zstd", str(error)) from error
        if got != len(out) or self._source.packed:
            raise _length("zstd", got, len(out))
        out[:] = room[:got]


#: How packets may be packed, by the values of the parameter multifd-compression; what is packed is so by the last.
METHODS: Mapping[str, Sequence[PacketFlag]] = {
    "none": (PLAIN,),
    "zlib": (PacketFlag.ZLIB,),
    "zstd": (PacketFlag.ZSTD,),
    "auto": (PLAIN, PacketFlag.ZSTD),
}


def packers(method: PacketFlag, level: int, channels: int) -> list[Packer]:
    """Return the sending ends of so many channels; none where pages go as they are."""
    makers: Mapping[PacketFlag, Callable[[int], Packer]] = {PacketFlag.ZLIB: ZlibPacker, PacketFlag.ZSTD: ZstdPacker}
    return [makers[method](level) for _ in range(channels)] if method else []


def unpackers(method: PacketFlag, channels: int) -> list[Unpacker]:
    """Return the receiving ends of so many channels; none where pages come as they are."""
    if method is PacketFlag.ZSTD:
        return [ZstdUnpacker(window_bytes(channels)) for _ in range(channels)]
    return [ZlibUnpacker() for _ in range(channels)] if method else []


def window_bytes(channels: int) -> int:
    """Return how far back a zstd stream may reach: a power of two, as the format has it."""
    share = min(WINDOW_MAX_BYTES, WINDOWS_MAX_BYTES // channels)
    return 1 << (share.bit_length() - 1)


def _refusal(method: str, why: str) -> RemoteProtocolError:
    return RemoteProtocolError(f"packed pages cannot be unpacked ({method}): {why}", section="multifd")


def _length(method: str, found: int, expected: int) -> RemoteProtocolError:
    found_text = f"{found} bytes" if found <= expected else "more"
    return RemoteProtocolError(
        f"packed pages of another length ({method})", section="multifd", expected=f"{expected} bytes", found=found_text
    )
