"""The body of the "ram" section as it is read: block list, zero and page records, in runs. Written: `wire.ram_encoder`.

The rule of the file: runs are made and read by numpy on strided views; Python touches a record alone only where the
stream has a single one (a block name, a change of kind, a delta). A record is be64 (byte offset | flags), a counted
block name unless CONTINUE is set, and its body; CONTINUE means the block of the last page record *of the connection*.

Source of the format: QEMU 7.2, "ram" version 4; error texts are QEMU's where QEMU has one.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import IntFlag
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from migrated.errors import RemoteProtocolError
from migrated.wire.primitives import decode_name, encode_be64

RAM_VERSION = 4
PAGE = 4096
PAGE_SHIFT = 12

Pages = NDArray[np.int64]
Bytes = NDArray[np.uint8]


class Flag(IntFlag):
    """The low twelve bits of a record's first word."""

    FULL = 0x001
    ZERO = 0x002
    MEM_SIZE = 0x004
    PAGE = 0x008
    EOS = 0x010
    CONTINUE = 0x020
    XBZRLE = 0x040
    HOOK = 0x080
    COMPRESS_PAGE = 0x100
    MULTIFD_FLUSH = 0x200


_FLAGS_MASK = PAGE - 1
_CONTINUE = int(Flag.CONTINUE)
# The two records that come in runs. Plain numbers: an IntFlag costs a microsecond per operation.
PAGE_FLAG = int(Flag.PAGE)
NEXT_PAGE = int(Flag.PAGE | Flag.CONTINUE)
NEXT_ZERO = int(Flag.ZERO | Flag.CONTINUE)
WORD = np.dtype(">u8")
WORD_BYTES = 8
#: A CONTINUE record: its word and a page, or its word and the fill byte.
PAGE_STRIDE = WORD_BYTES + PAGE
ZERO_STRIDE = WORD_BYTES + 1

#: In front of a delta: how it is encoded, and its length.
DELTA_HEAD = struct.Struct(">BH")
DELTA_ENCODING = 1

#: The longest record there is: a delta as long as a page, with a name of 255 bytes. A parser's buffer holds that.
RECORD_MAX_BYTES = WORD_BYTES + 1 + 255 + DELTA_HEAD.size + PAGE
#: A QEMU guest with very many devices has a few dozen blocks.
BLOCKS_MAX = 4096
#: How many events one call of `parse` makes at most: a stream that changes kind with each record must not keep the
#: event loop for longer than a few milliseconds.
EVENTS_MAX = 512

EOS = encode_be64(Flag.EOS)


# -- events ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class BlockList:
    """The sender's RAM blocks as (name, length in bytes), in its order; the lengths add up to ``total``.

    ``page_sizes`` are those of blocks that do not consist of target pages, as far as the list says so.
    """

    total: int
    blocks: tuple[tuple[str, int], ...]
    page_sizes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class PageRun:
    """Pages with their bytes: ``data`` has shape (n, PAGE) and lies, strided, in the buffer that was parsed."""

    block: str
    pages: Pages
    data: Bytes = field(repr=False)


@dataclass(frozen=True, slots=True, eq=False)
class ZeroRun:
    """Pages filled with one byte value (a QEMU sends only 0)."""

    block: str
    pages: Pages
    fill: int


@dataclass(frozen=True, slots=True, eq=False)
class PageDelta:
    """What is new in a page since it last came (`wire.xbzrle`); it lies in the buffer that was parsed."""

    block: str
    page: int
    delta: memoryview = field(repr=False)


@dataclass(frozen=True, slots=True)
class EndOfSection:
    """The body of this section ends here."""


RamEvent = BlockList | PageRun | ZeroRun | PageDelta | EndOfSection


# -- parsing ---------------------------------------------------------------------------------------------------


class _ShortBufferError(Exception):
    """The buffer ends within a record. Never leaves this file."""


class PageRecord(NamedTuple):
    """The head of a page record: its block, its page, and where its body begins."""

    block: str
    page: int
    body: int


class RamParser:
    """Reads section bodies of one connection out of a buffer that the caller fills.

    ``blocks`` maps the names that page records may use to their lengths; a block list in the stream replaces it. With
    ``says_page_sizes`` that list says behind a length what a block consists of, if those are not target pages (a source
    with huge pages that advised of postcopy).
    """

    def __init__(self, blocks: Mapping[str, int]) -> None:
        self.blocks = blocks
        self._block: str | None = None
        self._list: _BlockListParser | None = None
        self._listed = False
        self.says_page_sizes = False

    def parse(self, buf: memoryview) -> tuple[list[RamEvent], int]:
        """Parse the whole records in ``buf``; return what they say and how many bytes they have.

        Stops behind the end of a section, before an incomplete record, and after EVENTS_MAX events; bytes left over
        are passed again, with more behind them. Events refer to ``buf``: use them before it changes.
        """
        events: list[RamEvent] = []
        consumed = 0
        for event, position in self._events(buf):
            consumed = position
            if event is not None:
                events.append(event)
            if isinstance(event, EndOfSection) or len(events) == EVENTS_MAX:
                break
        return events, consumed

    def parse_page(self, buf: memoryview, at: int) -> PageRecord | None:
        """Parse the page record at ``at``; None for anything else, or where not all of it is there.

        For a page that somebody waits for: `parse` is made for runs, and costs several times as much for one.
        """
        if len(buf) < at + PAGE_STRIDE or self._list is not None:
            return None
        word = int.from_bytes(buf[at : at + WORD_BYTES], "big")
        if word & _FLAGS_MASK & ~_CONTINUE != PAGE_FLAG:
            return None
        try:
            return self._single(buf, at, word, PAGE)
        except _ShortBufferError:
            return None

    def _events(self, buf: memoryview) -> Iterator[tuple[RamEvent | None, int]]:
        """Yield each event with the position behind it, until a record is incomplete."""
        at = 0
        try:
            while True:
                if self._list is not None:
                    event, at = self._next_block(self._list, buf, at)
                else:
                    event, at = self._next_record(buf, at)
                yield event, at
        except _ShortBufferError:
            return

    def _next_record(self, buf: memoryview, at: int) -> tuple[RamEvent | None, int]:
        word = _word(buf, at)
        flags = word & _FLAGS_MASK
        match flags & ~_CONTINUE:
            case Flag.PAGE:
                return self._pages(buf, at, word)
            case Flag.ZERO:
                return self._zeros(buf, at, word)
            case Flag.EOS if word == Flag.EOS:
                return EndOfSection(), at + WORD_BYTES
            case Flag.MEM_SIZE if flags == Flag.MEM_SIZE and not self._listed:
                self._listed = True
                self._list = _BlockListParser(word - flags, says_page_sizes=self.says_page_sizes)
                return None, at + WORD_BYTES
            case Flag.XBZRLE:
                return self._delta(buf, at, word)
            case Flag.COMPRESS_PAGE:
                raise _refusal("Received an unexpected compressed page")
            case _:
                raise _refusal(f"Unknown combination of migration flags: {flags:#x}")

    def _next_block(self, blocks: _BlockListParser, buf: memoryview, at: int) -> tuple[RamEvent | None, int]:
        if (behind := blocks.parse_page_size(buf, at)) > at:
            return None, behind
        if blocks.missing:
            return None, blocks.parse_one(buf, at)
        self._list = None
        self.blocks = dict(blocks.found)
        return BlockList(blocks.total, tuple(blocks.found.items()), blocks.page_sizes), at

    # -- page records ------------------------------------------------------------------------------------------

    def _pages(self, buf: memoryview, at: int, word: int) -> tuple[RamEvent, int]:
        if word & _CONTINUE and _follows(buf, at + PAGE_STRIDE, NEXT_PAGE, PAGE_STRIDE):
            block, length = self._known(self._block)
            words = _run_of_words(buf, at, NEXT_PAGE, PAGE_STRIDE)
            data = np.ndarray((len(words), PAGE), np.uint8, buf, at + WORD_BYTES, (PAGE_STRIDE, 1))
            return PageRun(block, _page_numbers(words, length), data), at + len(words) * PAGE_STRIDE
        record = self._single(buf, at, word, PAGE)
        data = np.ndarray((1, PAGE), np.uint8, buf, record.body)
        return PageRun(record.block, np.array([record.page]), data), record.body + PAGE

    def _zeros(self, buf: memoryview, at: int, word: int) -> tuple[RamEvent, int]:
        if word & _CONTINUE and _follows(buf, at + ZERO_STRIDE, NEXT_ZERO, ZERO_STRIDE):
            block, length = self._known(self._block)
            words = _run_of_words(buf, at, NEXT_ZERO, ZERO_STRIDE)
            pages = _page_numbers(words, length)
            return ZeroRun(block, pages, buf[at + WORD_BYTES]), at + len(words) * ZERO_STRIDE
        record = self._single(buf, at, word, 1)
        return ZeroRun(record.block, np.array([record.page]), buf[record.body]), record.body + 1

    def _delta(self, buf: memoryview, at: int, word: int) -> tuple[RamEvent, int]:
        record = self._single(buf, at, word, DELTA_HEAD.size)
        encoding, length = DELTA_HEAD.unpack_from(buf, record.body)
        if encoding != DELTA_ENCODING:
            expected = f"encoding {DELTA_ENCODING}"
            raise _refusal("Failed to load XBZRLE page - wrong compression!", expected=expected, found=str(encoding))
        if length > PAGE:
            raise _refusal(
                "Failed to load XBZRLE page - len overflow!", expected=f"at most {PAGE} bytes", found=str(length)
            )
        body = record.body + DELTA_HEAD.size
        if len(buf) < body + length:
            raise _ShortBufferError
        return PageDelta(record.block, record.page, buf[body : body + length]), body + length

    def _single(self, buf: memoryview, at: int, word: int, body_bytes: int) -> PageRecord:
        """Parse the head of one record, with a name or without, and remember its block."""
        body = at + WORD_BYTES
        name = self._block
        if not word & _CONTINUE:
            name, body = _counted_string(buf, body)
        block, length = self._known(name)
        offset = word & ~_FLAGS_MASK
        if offset >= length:
            raise _refusal(f"Illegal RAM offset {offset:x}", expected=f"less than {length:x} in block {block}")
        if len(buf) < body + body_bytes:
            raise _ShortBufferError
        self._block = block
        return PageRecord(block, offset >> PAGE_SHIFT, body)

    def _known(self, name: str | None) -> tuple[str, int]:
        if name is None:
            raise _refusal("Ack, bad migration stream!", expected="a block name", found="CONTINUE in the first record")
        if name not in self.blocks:
            raise _refusal(f"Can't find block {name}")
        return name, self.blocks[name]


class _BlockListParser:
    """A block list on its way in: it may be longer than the buffer."""

    def __init__(self, total: int, *, says_page_sizes: bool) -> None:
        self.total = total
        self.missing = total
        self.found: dict[str, int] = {}
        self.page_sizes: dict[str, int] = {}
        self._says_page_sizes = says_page_sizes

    def parse_page_size(self, buf: memoryview, at: int) -> int:
        """Parse what the last block consists of, if that is said, and return the position behind it.

        A word without flags: the next name is not empty, and every record has flags.
        """
        if not self._says_page_sizes or not self.found:
            return at
        if len(buf) <= at:
            raise _ShortBufferError
        if buf[at] or (word := _word(buf, at)) & _FLAGS_MASK:
            return at
        name = next(reversed(self.found))
        if name in self.page_sizes or not word or word & word - 1 or self.found[name] % word:
            raise _refusal(f"bad page size of RAM block '{name}'", expected="a power of two", found=f"{word:#x}")
        self.page_sizes[name] = word
        return at + WORD_BYTES

    def parse_one(self, buf: memoryview, at: int) -> int:
        """Parse one entry and return the position behind it."""
        name, at = _counted_string(buf, at)
        length = _word(buf, at)
        if not name or name in self.found:
            raise _refusal("bad name in the block list", found=repr(name) + " twice" * (name in self.found))
        if not 0 < length <= self.missing or length % PAGE:
            raise _refusal(
                f"bad length of RAM block '{name}'",
                expected=f"a multiple of {PAGE}, at most {self.missing:#x}", found=f"{length:#x}",
            )  # fmt: skip
        if len(self.found) == BLOCKS_MAX:
            raise _refusal("too many RAM blocks", expected=f"at most {BLOCKS_MAX}")
        self.found[name] = length
        self.missing -= length
        return at + WORD_BYTES


def _refusal(what: str, *, expected: str = "", found: str = "") -> RemoteProtocolError:
    return RemoteProtocolError(what, section="ram", expected=expected, found=found)


def _word(buf: memoryview, at: int) -> int:
    if len(buf) < at + WORD_BYTES:
        raise _ShortBufferError
    return int.from_bytes(buf[at : at + WORD_BYTES], "big")


def _counted_string(buf: memoryview, at: int) -> tuple[str, int]:
    if len(buf) <= at or len(buf) < (end := at + 1 + buf[at]):
        raise _ShortBufferError
    return decode_name(bytes(buf[at + 1 : end]), "a block name"), end


# -- runs ------------------------------------------------------------------------------------------------------


def _follows(buf: memoryview, at: int, flags: int, stride: int) -> bool:
    """Say whether a whole record with these flags lies at ``at``."""
    return len(buf) >= at + stride and int.from_bytes(buf[at + 6 : at + WORD_BYTES], "big") & _FLAGS_MASK == flags


def _run_of_words(buf: memoryview, at: int, flags: int, stride: int) -> NDArray[np.uint64]:
    """Return the first words of the whole records from ``at`` on that have these flags (and, if zero, one fill byte).

    Looks further and further ahead, so that a short run in a long buffer costs little.
    """
    available = (len(buf) - at) // stride
    words = np.ndarray(available, WORD, buf, at, (stride,))
    fills = np.ndarray(available, np.uint8, buf, at + WORD_BYTES, (stride,))
    parts: list[NDArray[np.uint64]] = []
    start, step = 0, 64
    while start < available:
        part = words[start : start + step].astype(np.uint64)
        differs = part & np.uint64(_FLAGS_MASK) != flags
        if flags == NEXT_ZERO:
            differs |= fills[start : start + step] != fills[0]
        length = _first(differs)
        parts.append(part[:length])
        if length < len(part):
            break
        start, step = start + step, step * 8
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _first(hits: NDArray[np.bool_]) -> int:
    """Return the index of the first hit, or the length where there is none.

    Not by argmax: that lets the GIL go, and while a thread reads ahead to get it back costs more than all the parsing.
    """
    index = hits.tobytes().find(1)
    return index if index >= 0 else len(hits)


def _page_numbers(words: NDArray[np.uint64], length: int) -> Pages:
    """Return the pages that words name. Raises RemoteProtocolError for one that is not within the block."""
    pages = (words >> np.uint64(PAGE_SHIFT)).view(np.int64)
    if int(pages.max()) >= length // PAGE:
        first = int(pages[_first(pages >= length // PAGE)])
        raise _refusal(f"Illegal RAM offset {first << PAGE_SHIFT:x}", expected=f"less than {length:x}")
    return pages
