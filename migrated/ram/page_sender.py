"""Pages of a block as records on one connection.

The rule of the file: whoever calls has taken the pages off the bitmap already; a page that changes while it is read is
somebody else's worry (precopy: it is dirty again; postcopy: nothing changes any more).

Pages in long runs are read by ``preadv`` straight into their records (no fault, no page tables, the GIL is free);
scattered ones are gathered from the daemon's mapping. Pages that are zero become records of nine bytes.
"""

from __future__ import annotations

import os

import numpy as np
from numpy.typing import NDArray

from migrated.model.stats import RamStats
from migrated.savevm.ports import RamBlockPort
from migrated.stream.outgoing import OutgoingStream
from migrated.wire.ram import PAGE, RamEncoder, bodies

#: From this mean run length on, reading by system call is faster than gathering from the mapping.
LONG_RUN_PAGES = 8
#: Room for the name of a block and the head of a record.
HEAD_BYTES = 512


class PageSender:
    """One connection's records: remembers the last block, as the other end does. Sends ``chunk_bytes`` at a time."""

    def __init__(self, stats: RamStats, chunk_bytes: int) -> None:
        self._stats = stats
        self._encoder = RamEncoder()
        self._chunk = np.empty(chunk_bytes + HEAD_BYTES, np.uint8)
        self._rows_at = range(0)
        self._rows: list[memoryview] = []
        self.pages = chunk_bytes // PAGE
        """How many pages fit at least."""

    def capacity(self, block: RamBlockPort) -> int:
        """Return how many pages of a block `send` takes."""
        return self._encoder.max_pages(len(self._chunk), block.name)

    def put_zeros(self, f: OutgoingStream, block: RamBlockPort, pages: NDArray[np.int64]) -> None:
        """Put records that say that pages are zero."""
        f.put_buffer(self._encoder.zero_run(block.name, pages))
        self._stats.duplicate += len(pages)

    async def send(self, f: OutgoingStream, block: RamBlockPort, pages: NDArray[np.int64]) -> None:
        """Read pages and send them."""
        offsets = self._encoder.body_offsets(block.name, len(pages))
        self._read(block, pages, offsets)
        zero = _zero_pages(self._chunk, offsets)
        if len(zero):
            await self._send_mixed(f, block, pages, offsets, zero)
        else:
            await self._send_records(f, block, pages)

    async def send_one(self, f: OutgoingStream, block: RamBlockPort, page: int) -> None:
        """Send one page that somebody waits for."""
        content = os.pread(block.memfd, PAGE, page * PAGE)
        if content.count(0) == PAGE:
            self.put_zeros(f, block, np.array([page]))
            return
        self._stats.normal += 1
        await f.send(self._encoder.page(block.name, page, content))

    async def _send_mixed(
        self,
        f: OutgoingStream,
        block: RamBlockPort,
        pages: NDArray[np.int64],
        offsets: range,
        zero: NDArray[np.int64],
    ) -> None:
        """Send a chunk of which some pages are zero: the others move together."""
        keep = np.ones(len(pages), bool)
        keep[zero] = False
        if keep.any():
            target = bodies(self._chunk, offsets)
            target[: len(pages) - len(zero)] = target[keep]
            await self._send_records(f, block, pages[keep])
        self.put_zeros(f, block, pages[zero])
        await f.drain()

    async def _send_records(self, f: OutgoingStream, block: RamBlockPort, pages: NDArray[np.int64]) -> None:
        used = self._encoder.page_heads(block.name, pages, self._chunk)
        self._stats.normal += len(pages)
        await f.send(self._chunk[:used].data)

    def _read(self, block: RamBlockPort, pages: NDArray[np.int64], offsets: range) -> None:
        """Copy pages to where their records have them."""
        breaks = (np.flatnonzero(np.diff(pages) != 1) + 1).tolist()
        if breaks and len(pages) < LONG_RUN_PAGES * (len(breaks) + 1):
            bodies(self._chunk, offsets)[:] = block.pages[pages]
            return
        rows = self._rows_of(offsets)
        for start, end in zip([0, *breaks], [*breaks, len(pages)], strict=True):
            first = int(pages[start])
            if os.preadv(block.memfd, rows[start:end], first * PAGE) != (end - start) * PAGE:
                bodies(self._chunk, offsets[start:end])[:] = block.pages[first : first + end - start]

    def _rows_of(self, offsets: range) -> list[memoryview]:
        """Return the bodies of the chunk as buffers; they move only when a record has to name its block."""
        if self._rows_at.start != offsets.start or len(self._rows) < len(offsets):
            view = self._chunk.data
            self._rows_at, self._rows = offsets, [view[at : at + PAGE] for at in offsets]
        return self._rows


def _zero_pages(chunk: NDArray[np.uint8], offsets: range) -> NDArray[np.int64]:
    """Return which of the pages at ``offsets`` are all zero. One word rules out nearly every page that is not."""
    words = np.ndarray((len(offsets), PAGE // 8), np.uint64, chunk, offsets.start, (offsets.step, 8))
    maybe = np.flatnonzero(words[:, 0] == 0)
    for word in (PAGE // 16, -1):
        if len(maybe):
            maybe = maybe[words[maybe, word] == 0]
    return maybe[~words[maybe].any(axis=1)] if len(maybe) else maybe
