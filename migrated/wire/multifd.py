"""Multifd: the packets of the channels that carry pages beside the main stream.

The rule of the file: a packet is a head and the bytes of its pages, back to back. Nothing in a head is believed before
it is compared with a limit: a packet has at most as many pages as its form has room for.

    channel  initial packet: be32 magic, be32 version, 16 bytes uuid, u8 number, zeros up to INITIAL_BYTES
             [ be32 magic, be32 version, be32 flags, be32 room in pages, be32 pages, be32 bytes that follow,
               be64 packet number, 24 bytes unused, be64 checksum, 256 bytes block name,
               be64 offset of each page, be64 sum of each page, the bytes ]*

A QEMU's form has no checksum (zero) and no sums, and its array of offsets is always as long as there is room; what a
QEMU 7.2 leaves there, and in a packet without pages in size and name, is not looked at. Between two daemons packets are
longer, arrays are as long as there are pages, and with checksums each page has its sum and the head its XXH3, the word
itself taken as zero. A page that is still written to may differ from its sum: it comes again then (`ram.multifd_load`).

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
from xxhash import xxh3_64_digest

from migrated.errors import CHANGED, RemoteProtocolError
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
CHECKSUM_AT = 56
CHECKSUM_BYTES = 8
#: Between two daemons: 16 MiB, for which what is done in Python hardly counts.
LONG_PACKET_PAGES = 4096

_INITIAL = struct.Struct(">II16sB39x")
_HEAD = struct.Struct(f">IIIIIIQ24x{CHECKSUM_BYTES}s{NAME_BYTES}s")
_WORD = np.dtype(">u8")
_SUM_WORD = np.dtype("<u8")
Sums = NDArray[np.uint64]
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
NO_CHECKSUM = bytes(CHECKSUM_BYTES)
#: What packed pages may take: they may get longer by it, but not by much.
PACKED_MAX_BYTES = 2 * PACKET_BYTES


@dataclass(frozen=True, slots=True)
class Form:
    """How the packets of a channel are made."""

    room: int
    """Pages of a packet, at most."""
    fixed: bool = False
    """The array of offsets is as long as there is room, and not as there are pages."""
    checked: bool = False
    """Each page has a sum, and each head a checksum."""

    def head_bytes(self, count: int) -> int:
        """Return how long the head of a packet with ``count`` pages is."""
        return OFFSETS_AT + 8 * (self.room if self.fixed else count) * (2 if self.checked else 1)

    @property
    def head_min_bytes(self) -> int:
        """What is there of each head."""
        return self.head_bytes(0)

    @property
    def head_max_bytes(self) -> int:
        """What a head takes at most."""
        return self.head_bytes(self.room)


QEMU_FORM = Form(PACKET_PAGES, fixed=True)
#: Between two daemons.
LONG_FORM = Form(LONG_PACKET_PAGES)
CHECKED_FORM = Form(LONG_PACKET_PAGES, checked=True)


def form_of(*, qemu: bool, checked: bool) -> Form:
    """Return the form of packets between a daemon and a QEMU, or between two daemons."""
    if qemu:
        return QEMU_FORM
    return CHECKED_FORM if checked else LONG_FORM


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
    sums: Sums | None = None
    """What `page_sums` said of the pages at the source."""


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
    form: Form = QEMU_FORM,
    *,
    number: int = 0,
    flags: PacketFlag = PLAIN,
    size_bytes: int | None = None,
    sums: Sums | None = None,
) -> None:
    """Write the head of a packet with these pages, none of them for a SYNC, to ``out``, which is as long as it is.

    ``size_bytes``: how much follows, where it is packed. ``sums``: of the pages, where the form has them.
    """
    size = len(pages) * PAGE if size_bytes is None else size_bytes
    head = _HEAD.pack(MAGIC, VERSION, flags, form.room, len(pages), size, number, NO_CHECKSUM, block.encode())
    out[:OFFSETS_AT] = np.frombuffer(head, np.uint8)
    words = out[OFFSETS_AT:].view(_WORD)
    words[: len(pages)] = pages << PAGE_SHIFT
    words[len(pages) :] = sums if form.checked and sums is not None else 0
    if form.checked:
        out[CHECKSUM_AT : CHECKSUM_AT + CHECKSUM_BYTES] = np.frombuffer(xxh3_64_digest(out.data), np.uint8)


def parse_count(raw: memoryview, form: Form, channel: int) -> int:
    """Return how many pages the head has that begins with ``raw``, at least OFFSETS_AT bytes of it.

    Raises RemoteProtocolError.
    """
    magic, version, flags, room, count, *_ = _HEAD.unpack_from(raw)
    _check_begin(magic, version)
    if flags & ~_KNOWN:
        raise _refusal(f"multifd {channel}: unknown flags {flags:x}")
    if room > form.room:
        raise _refusal(f"multifd: received packet with {room} pages and expected maximum pages are {form.room}")
    if count > room:
        raise _refusal(f"multifd: received packet with {count} normal pages and expected maximum pages are {room}")
    return int(count)


def parse_head(
    raw: memoryview,
    blocks: Mapping[str, int],
    methods: Sequence[PacketFlag],
    channel: int,
    form: Form = QEMU_FORM,
) -> Head:
    """Parse the head of a packet of a channel whose pages are packed by one of ``methods``, whole.

    ``blocks`` maps names to lengths in bytes. The checksum's word in ``raw`` is zero afterwards, where there is one.
    Raises RemoteProtocolError.
    """
    count = parse_count(raw, form, channel)
    if form.checked:
        _check_head(raw)
    _, _, flags, _, _, size, _, _, name = _HEAD.unpack_from(raw)
    sync = bool(flags & _SYNC)
    if not count:
        return Head(sync)
    method = flags & _METHODS
    if method not in methods:
        raise _refusal(f"multifd {channel}: flags received {method:x} flags expected {methods[-1]:x}")
    block = decode_name(name.partition(b"\0")[0], "a block name")
    if block not in blocks:
        raise _refusal(f"multifd: unknown ram block {block}")
    if method and (size > PACKED_MAX_BYTES or count > PACKET_PAGES):
        raise _refusal(
            f"multifd {channel}: {size} bytes of {count} packed pages",
            expected=f"at most {PACKED_MAX_BYTES} of {PACKET_PAGES}",
        )
    pages = _parse_pages(raw, count, blocks[block])
    sums = np.frombuffer(raw, _WORD, count, OFFSETS_AT + 8 * count).astype(np.uint64) if form.checked else None
    return Head(sync, block, pages, size if method else count * PAGE, bool(method), sums)


def _check_head(raw: memoryview) -> None:
    end = CHECKSUM_AT + CHECKSUM_BYTES
    checksum = bytes(raw[CHECKSUM_AT:end])
    raw[CHECKSUM_AT:end] = NO_CHECKSUM
    if (found := xxh3_64_digest(raw)) != checksum:
        raise _refusal(CHANGED, expected=f"checksum {checksum.hex()}", found=found.hex())


def _parse_pages(raw: memoryview, count: int, length: int) -> Pages:
    offsets = np.frombuffer(raw, _WORD, count, OFFSETS_AT).astype(np.uint64)
    wrong = (offsets > np.uint64(length - PAGE)) | (offsets & np.uint64(PAGE - 1) != 0)
    if wrong.any():
        raise _refusal(
            f"multifd: offset too long {offsets[wrong][0]} (max {length})", expected="whole pages within the block"
        )
    pages: NDArray[np.int64] = (offsets >> np.uint64(PAGE_SHIFT)).view(np.int64)
    return pages


def page_sums(rows: Bytes) -> Sums:
    """Return a sum for each page, a row of ``rows`` each: of its little-endian words of 64 bits, whatever overflows.

    It costs no more than reading the page does; a checksum that is made page by page in Python costs three times that.
    """
    sums: Sums = np.add.reduce(rows.view(_SUM_WORD), axis=1, dtype=np.uint64)
    return sums


def _check_begin(magic: int, version: int) -> None:
    if magic != MAGIC:
        raise _refusal(f"multifd: received packet magic {magic:x} expected {MAGIC:x}")
    if version != VERSION:
        raise _refusal(f"multifd: received packet version {version} expected {VERSION}")


def _refusal(what: str, *, expected: str = "", found: str = "") -> RemoteProtocolError:
    return RemoteProtocolError(what, section="multifd", expected=expected, found=found)
