"""Multifd: the packets of the channels that carry pages beside the main stream.

The rule of the file: a packet is one head of HEAD_BYTES, whole also when it says little, and the bytes of its pages,
back to back. Nothing in a head is believed before it is compared with a limit: a packet is at most PACKET_PAGES pages.

    channel  initial packet: be32 magic, be32 version, 16 bytes uuid, u8 number, zeros up to INITIAL_BYTES
             [ be32 magic, be32 version, be32 flags, be32 room in pages, be32 pages, be32 bytes that follow,
               be64 packet number, 32 bytes unused, 256 bytes block name, 128 x be64 offset, the bytes ]*

A QEMU 7.2 leaves in a packet without pages what the one before had in size, name and offsets: none of it is looked at.
Between two `migrated` daemons the last unused word is the XXH3 of the whole packet, with zero in that place.

Source of the format: QEMU 7.2, multifd; error texts are QEMU's where QEMU has one.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntFlag
from uuid import UUID

import numpy as np
from numpy.typing import NDArray

from migrated.errors import RemoteProtocolError
from migrated.wire.primitives import decode_name
from migrated.wire.ram import PAGE, PAGE_SHIFT, Bytes, Pages

MAGIC = 0x11223344
VERSION = 1
#: By which a connection is known for one of these, before anything of it was read.
FIRST_BYTE = MAGIC.to_bytes(4, "big")[:1]
NO_UUID = bytes(16)

INITIAL_BYTES = 64
NAME_BYTES = 256
#: 512 KiB of pages, as QEMU has it.
PACKET_PAGES = 128
PACKET_BYTES = PACKET_PAGES * PAGE
OFFSETS_AT = 64 + NAME_BYTES
HEAD_BYTES = OFFSETS_AT + 8 * PACKET_PAGES
CHECKSUM_AT = 56
CHECKSUM_BYTES = 8

_INITIAL = struct.Struct(">II16sB39x")
_HEAD = struct.Struct(f">IIIIIIQ24x{CHECKSUM_BYTES}s{NAME_BYTES}s")
_WORD = np.dtype(">u8")
assert _INITIAL.size == INITIAL_BYTES
assert _HEAD.size == OFFSETS_AT


class PacketFlag(IntFlag):
    """What a packet is: the method by which its pages are packed, and whether its channel waits behind it."""

    SYNC = 1
    ZLIB = 2
    ZSTD = 4


#: As a number: an enum's operators cost ten times as much.
_SYNC = int(PacketFlag.SYNC)
_METHODS = 7 << 1
_KNOWN = _SYNC | _METHODS
#: Pages as they are.
PLAIN = PacketFlag(0)
#: What packed pages may take: they may get longer by it, but not by much.
PACKED_MAX_BYTES = 2 * PACKET_BYTES


@dataclass(frozen=True, slots=True)
class Initial:
    """How a channel begins: whose it is, and its number."""

    number: int
    uuid: bytes = NO_UUID


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """What a packet says: pages of one block, of which ``size_bytes`` follow, and whether its channel waits then."""

    sync: bool
    block: str = ""
    pages: Pages = field(default_factory=lambda: np.empty(0, np.int64))
    size_bytes: int = 0
    packed: bool = False
    checksum: bytes = bytes(CHECKSUM_BYTES)


def encode_initial(initial: Initial) -> bytes:
    """Encode the first packet of a channel."""
    return _INITIAL.pack(MAGIC, VERSION, initial.uuid, initial.number)


def parse_initial(raw: bytes, uuid: bytes | None) -> Initial:
    """Parse INITIAL_BYTES. ``uuid`` is what it has to be; None where this host's machine has none."""
    magic, version, received, number = _INITIAL.unpack(raw)
    _check_begin(magic, version)
    if uuid is not None and received != uuid:
        texts = str(UUID(bytes=received)), str(UUID(bytes=uuid))
        raise _refusal(f"multifd: received uuid '{texts[0]}' and expected uuid '{texts[1]}' for channel {number}")
    return Initial(number, received)


def encode_head(
    out: Bytes,
    block: str,
    pages: Pages,
    *,
    number: int = 0,
    flags: PacketFlag = PLAIN,
    size_bytes: int | None = None,
) -> None:
    """Write the head of a packet with these pages, none of them for a SYNC, to the front of ``out``.

    ``size_bytes``: how much follows, where it is packed.
    """
    size = len(pages) * PAGE if size_bytes is None else size_bytes
    head = _HEAD.pack(
        MAGIC, VERSION, flags, PACKET_PAGES, len(pages), size, number, bytes(CHECKSUM_BYTES), block.encode()
    )
    out[:OFFSETS_AT] = np.frombuffer(head, np.uint8)
    offsets = out[OFFSETS_AT:HEAD_BYTES].view(_WORD)
    offsets[: len(pages)] = pages << PAGE_SHIFT
    offsets[len(pages) :] = 0


def parse_head(raw: memoryview, blocks: Mapping[str, int], methods: Sequence[PacketFlag], channel: int) -> Head:
    """Parse HEAD_BYTES of a channel whose pages are packed by one of ``methods``.

    ``blocks`` maps names to lengths in bytes. Raises RemoteProtocolError.
    """
    magic, version, flags, room, count, size, _, checksum, name = _HEAD.unpack_from(raw)
    _check_begin(magic, version)
    if flags & ~_KNOWN:
        raise _refusal(f"multifd {channel}: unknown flags {flags:x}")
    if room > PACKET_PAGES:
        raise _refusal(f"multifd: received packet with {room} pages and expected maximum pages are {PACKET_PAGES}")
    if count > room:
        raise _refusal(f"multifd: received packet with {count} normal pages and expected maximum pages are {room}")
    sync = bool(flags & _SYNC)
    if not count:
        return Head(sync, checksum=checksum)
    method = flags & _METHODS
    if method not in methods:
        raise _refusal(f"multifd {channel}: flags received {method:x} flags expected {methods[-1]:x}")
    block = decode_name(name.partition(b"\0")[0], "a block name")
    if block not in blocks:
        raise _refusal(f"multifd: unknown ram block {block}")
    if method and size > PACKED_MAX_BYTES:
        raise _refusal(f"multifd {channel}: {size} bytes of packed pages", expected=f"at most {PACKED_MAX_BYTES}")
    pages = _parse_pages(raw, count, blocks[block])
    return Head(sync, block, pages, size if method else count * PAGE, bool(method), checksum)


def _parse_pages(raw: memoryview, count: int, length: int) -> Pages:
    offsets = np.frombuffer(raw, _WORD, count, OFFSETS_AT).astype(np.uint64)
    wrong = (offsets > np.uint64(length - PAGE)) | (offsets & np.uint64(PAGE - 1) != 0)
    if wrong.any():
        raise _refusal(
            f"multifd: offset too long {offsets[wrong][0]} (max {length})", expected="whole pages within the block"
        )
    pages: NDArray[np.int64] = (offsets >> np.uint64(PAGE_SHIFT)).view(np.int64)
    return pages


def _check_begin(magic: int, version: int) -> None:
    if magic != MAGIC:
        raise _refusal(f"multifd: received packet magic {magic:x} expected {MAGIC:x}")
    if version != VERSION:
        raise _refusal(f"multifd: received packet version {version} expected {VERSION}")


def _refusal(what: str, *, expected: str = "") -> RemoteProtocolError:
    return RemoteProtocolError(what, section="multifd", expected=expected)
