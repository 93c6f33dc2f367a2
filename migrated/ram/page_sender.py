"""Pages of a block as records on one connection.

The rule of the file: whoever calls has taken the pages off the bitmap already; a page that changes while it is read is
somebody else's worry (precopy: it is dirty again; postcopy: nothing changes any more).

Pages in long runs are read by ``preadv`` straight into their records (no fault, no page tables, the GIL is free), and
those straight into the buffer of a channel that has room for them; scattered ones are gathered from the daemon's
mapping. Pages that are zero become records of nine bytes.
"""

from __future__ import annotations

import os

import numpy as np
from numpy.typing import NDArray

from migrated.model.stats import RamStats
from migrated.ram.deltas import Deltas
from migrated.savevm.ports import RamBlockPort
from migrated.stream.outgoing import OutgoingStream
from migrated.wire.ram import PAGE
from migrated.wire.ram_encoder import RamEncoder, bodies

#: From this mean run length on, reading by system call is faster than gathering from the mapping.
LONG_RUN_PAGES = 8
ZERO_PAGE = bytes(PAGE)
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
        self.deltas: Deltas | None = None
        """Where what was sent before is remembered, if it is."""
        self.pages = chunk_bytes // PAGE
        """How many pages fit at least."""

    def capacity(self, block: RamBlockPort) -> int:
        """Return how many pages of a block `send` takes."""
        return self._encoder.max_pages(len(self._chunk), block.name)

    def put_zeros(self, f: OutgoingStream, block: RamBlockPort, pages: NDArray[np.int64]) -> None:
        """Put records that say that pages are zero."""
        f.put_buffer(self.zeros(block, pages))

    def zeros(self, block: RamBlockPort, pages: NDArray[np.int64]) -> bytes:
        """Return records that say that pages are zero."""
        self._stats.duplicate += len(pages)
        if self.deltas is not None:
            self.deltas.forget(block.name, pages)
        return self._encoder.zero_run(block.name, pages)

    async def send(self, f: OutgoingStream, block: RamBlockPort, pages: NDArray[np.int64]) -> None:
        """Read pages and send them."""
        offsets = self._encoder.body_offsets(block.name, len(pages))
        self._read(block, pages, offsets)
        await self._send_read(f, block, pages, self._chunk, offsets)

    async def send_run(self, f: OutgoingStream, block: RamBlockPort, first: int, count: int) -> None:
        """Read ``count`` pages that follow each other, and send them."""
        end = first + count
        while first < end:
            chunk, some = await self._chunk_for(f, block, end - first)
            offsets = self._encoder.body_offsets(block.name, some)
            self._read_run(block, first, chunk, offsets, self._rows_of(chunk, offsets)[:some])
            await self._send_read(f, block, np.arange(first, first + some), chunk, offsets)
            first += some

    async def _chunk_for(self, f: OutgoingStream, block: RamBlockPort, count: int) -> tuple[NDArray[np.uint8], int]:
        """Return where records of up to ``count`` pages are made, and how many find room there."""
        room = await f.room()
        if room is None:
            return self._chunk, count
        if fitting := self._encoder.max_pages(len(room), block.name):
            return np.frombuffer(room, np.uint8), min(count, fitting)
        return self._chunk, 1  # this one lies across two buffers

    async def _send_read(
        self,
        f: OutgoingStream,
        block: RamBlockPort,
        pages: NDArray[np.int64],
        chunk: NDArray[np.uint8],
        offsets: range,
    ) -> None:
        zero = _zero_pages(chunk, offsets)
        if len(zero):
            await self._send_mixed(f, block, pages, chunk, offsets, zero)
        else:
            await self._send_data(f, block, pages, chunk, offsets)

    def one(self, block: RamBlockPort, page: int) -> bytes:
        """Return the record of one page that somebody waits for."""
        content = os.pread(block.memfd, PAGE, page * PAGE)
        if content == ZERO_PAGE:
            return self.zeros(block, np.array([page]))
        self._stats.normal += 1
        return self._encoder.page(block.name, page, content)

    async def _send_mixed(
        self,
        f: OutgoingStream,
        block: RamBlockPort,
        pages: NDArray[np.int64],
        chunk: NDArray[np.uint8],
        offsets: range,
        zero: NDArray[np.int64],
    ) -> None:
        """Send a chunk of which some pages are zero: the others move together."""
        keep = np.ones(len(pages), bool)
        keep[zero] = False
        if keep.any():
            target = bodies(chunk, offsets)
            target[: len(pages) - len(zero)] = target[keep]
            await self._send_data(f, block, pages[keep], chunk, offsets[: len(pages) - len(zero)])
        self.put_zeros(f, block, pages[zero])
        await f.drain()

    async def _send_data(
        self,
        f: OutgoingStream,
        block: RamBlockPort,
        pages: NDArray[np.int64],
        chunk: NDArray[np.uint8],
        offsets: range,
    ) -> None:
        """Send pages that are not zero: whole, or what is new in them."""
        if self.deltas is None:
            await self._send_records(f, block, pages, chunk)
            return
        content = bodies(chunk, offsets)
        whole, deltas = await self.deltas.split(block.name, pages, content)
        if whole.any():
            if not whole.all():
                content[: whole.sum()] = content[whole]
            await self._send_records(f, block, pages[whole], chunk)
        records = [self._encoder.delta(block.name, page, delta) for page, delta in deltas]
        self.deltas.sent(records)
        f.put_buffer(b"".join(records))
        await f.drain()

    async def _send_records(
        self, f: OutgoingStream, block: RamBlockPort, pages: NDArray[np.int64], chunk: NDArray[np.uint8]
    ) -> None:
        used = self._encoder.page_heads(block.name, pages, chunk)
        self._stats.normal += len(pages)
        if chunk is self._chunk:
            await f.send(chunk[:used].data)
        else:
            await f.fill(used)

    def _read(self, block: RamBlockPort, pages: NDArray[np.int64], offsets: range) -> None:
        """Copy pages to where their records have them."""
        breaks = (np.flatnonzero(np.diff(pages) != 1) + 1).tolist()
        if breaks and len(pages) < LONG_RUN_PAGES * (len(breaks) + 1):
            bodies(self._chunk, offsets)[:] = block.pages[pages]
            return
        rows = self._rows_of(self._chunk, offsets)
        for start, end in zip([0, *breaks], [*breaks, len(pages)], strict=True):
            self._read_run(block, int(pages[start]), self._chunk, offsets[start:end], rows[start:end])

    def _read_run(
        self, block: RamBlockPort, first: int, chunk: NDArray[np.uint8], offsets: range, rows: list[memoryview]
    ) -> None:
        if os.preadv(block.memfd, rows, first * PAGE) != len(rows) * PAGE:
            bodies(chunk, offsets)[:] = block.pages[first : first + len(rows)]

    def _rows_of(self, chunk: NDArray[np.uint8], offsets: range) -> list[memoryview]:
        """Return the bodies of a chunk as buffers; those of our own move only when a record has to name its block."""
        view = chunk.data
        if chunk is not self._chunk:
            return [view[at : at + PAGE] for at in offsets]
        if self._rows_at.start != offsets.start or len(self._rows) < len(offsets):
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
