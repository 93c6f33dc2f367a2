"""The body of the "ram" section as it is written: block list, zero and page records.

The rule of the file: records are made by numpy on strided views of a buffer in which the pages lie already; Python
touches a record alone only where there is a single one. Format: `wire.ram`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from migrated.errors import LocalProtocolError
from migrated.wire.primitives import encode_be64, encode_counted_string
from migrated.wire.ram import (
    DELTA_ENCODING,
    DELTA_HEAD,
    EOS,
    NEXT_PAGE,
    NEXT_ZERO,
    PAGE,
    PAGE_FLAG,
    PAGE_SHIFT,
    PAGE_STRIDE,
    WORD,
    WORD_BYTES,
    Bytes,
    Flag,
    Pages,
)

_ZERO_RECORD = np.dtype([("word", WORD), ("fill", np.uint8)])


def encode_block_list(blocks: Sequence[tuple[str, int]], page_sizes: Mapping[str, int] | None = None) -> bytes:
    """Encode the setup body: all blocks as (name, length in bytes), then EOS.

    ``page_sizes`` are those to be told: of blocks that do not consist of target pages, where postcopy was advised.
    """
    told = page_sizes or {}
    if len({name for name, _ in blocks}) != len(blocks):
        raise LocalProtocolError("two RAM blocks have one name")
    parts = [encode_be64(sum(length for _, length in blocks) | Flag.MEM_SIZE)]
    for name, length in blocks:
        if not name or length <= 0 or length % PAGE:
            raise LocalProtocolError(f"RAM block '{name}' of {length} bytes cannot be announced")
        parts += [encode_counted_string(name), encode_be64(length)]
        parts += [encode_be64(told[name])] if name in told else []
    return b"".join([*parts, EOS])


class RamEncoder:
    """Makes page records for one connection; remembers the block of the last one (CONTINUE)."""

    def __init__(self) -> None:
        self._block: str | None = None

    def max_pages(self, out_size: int, block: str) -> int:
        """Return how many page records of ``block`` fit into ``out_size`` bytes."""
        return max(0, (out_size - len(self._name(block))) // PAGE_STRIDE)

    def _name(self, block: str) -> bytes:
        """Return what the next record says about its block: nothing where it continues the last one."""
        return b"" if block == self._block else encode_counted_string(block)

    def zero_run(self, block: str, pages: Pages) -> bytes:
        """Return zero records for ``pages``."""
        if not len(pages):
            return b""
        records = np.zeros(len(pages), _ZERO_RECORD)
        records["word"] = (pages << PAGE_SHIFT) | NEXT_ZERO
        name = self._name(block)
        self._block = block
        if not name:
            return records.tobytes()
        return encode_be64(int(pages[0]) << PAGE_SHIFT | Flag.ZERO) + name + bytes(1) + records[1:].tobytes()

    def delta(self, block: str, page: int, delta: bytes) -> bytes:
        """Return the record of a page that is known but for ``delta`` (`wire.xbzrle`)."""
        name = self._name(block)
        self._block = block
        word = page << PAGE_SHIFT | Flag.XBZRLE | (0 if name else Flag.CONTINUE)
        return b"".join((encode_be64(word), name, DELTA_HEAD.pack(DELTA_ENCODING, len(delta)), delta))

    def page(self, block: str, page: int, content: bytes) -> bytes:
        """Return the record of one page: what a run of one would be, several times as fast."""
        name = self._name(block)
        self._block = block
        return encode_be64(page << PAGE_SHIFT | (PAGE_FLAG if name else NEXT_PAGE)) + name + content

    def body_offsets(self, block: str, count: int) -> range:
        """Return where in a buffer the bodies of the next ``count`` page records of ``block`` belong.

        Bodies that are put there become records by `page_heads`, if no other record is made in between. The buffer has
        to have room for them (`max_pages`).
        """
        start = len(self._name(block)) + WORD_BYTES
        return range(start, start + count * PAGE_STRIDE, PAGE_STRIDE)

    def page_heads(self, block: str, pages: Pages, out: Bytes) -> int:
        """Write the heads of page records whose bodies are in ``out``; return how many bytes the records take."""
        count = len(pages)
        if count > self.max_pages(len(out), block):
            raise LocalProtocolError(f"{count} page records do not fit into {len(out)} bytes")
        if not count:
            return 0
        name = self._name(block)
        self._block = block
        # The name shifts all records by its length. The word of the first one is written last, before the name.
        end = len(name) + count * PAGE_STRIDE
        words = ((pages << PAGE_SHIFT) | NEXT_PAGE).astype(WORD)
        records = out[len(name) : end].reshape(count, PAGE_STRIDE)
        records[:, :WORD_BYTES] = words.view(np.uint8).reshape(count, WORD_BYTES)
        if name:
            head = encode_be64(int(pages[0]) << PAGE_SHIFT | Flag.PAGE) + name
            out[: len(head)] = np.frombuffer(head, np.uint8)
        return end


def bodies(out: Bytes, offsets: range) -> Bytes:
    """Return the page bodies at ``offsets`` in a buffer, shape (n, PAGE)."""
    return np.ndarray((len(offsets), PAGE), np.uint8, out, offsets.start, (offsets.step, 1))
