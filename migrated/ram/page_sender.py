"""Pages of a block as records on one connection.

The rule of the file: whoever calls has taken the pages off the bitmap already; a page that changes while it is read is
somebody else's worry (precopy: it is dirty again; postcopy: nothing changes any more).

Pages are read straight into their records (`ram.page_read`). A channel that has room for them gets them out of the
mapping, straight into its buffer: it is a snapshot's, whose blocks are hashed there anyway, and all of it costs a third
less. Pages that are zero become records of nine bytes.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from migrated.model.stats import RamStats
from migrated.ram.deltas import Deltas
from migrated.ram.page_read import read_pages, read_run, zero_pages
from migrated.savevm.ports import RamBlockPort
from migrated.stream.outgoing import OutgoingStream
from migrated.wire.ram import PAGE
from migrated.wire.ram_encoder import RamEncoder, bodies

ZERO_PAGE = bytes(PAGE)
#: Room for the name of a block and the head of a record.
HEAD_BYTES = 512


@dataclass(frozen=True, slots=True, eq=False)
class _Chunk:
    """Pages of a block, which lie in ``raw`` where their records have them."""

    block: RamBlockPort
    pages: NDArray[np.int64]
    raw: NDArray[np.uint8]
    offsets: range

    @property
    def content(self) -> NDArray[np.uint8]:
        """The pages' bytes, shape (n, PAGE)."""
        return bodies(self.raw, self.offsets)

    @property
    def words(self) -> NDArray[np.uint64]:
        """The same as words, shape (n, PAGE / 8)."""
        return np.ndarray(
            (len(self.offsets), PAGE // 8), np.uint64, self.raw, self.offsets.start, (self.offsets.step, 8)
        )

    def only(self, which: NDArray[np.bool_]) -> _Chunk:
        """Return some of the pages, moved together."""
        if which.all():
            return self
        pages, content = self.pages[which], self.content
        content[: len(pages)] = content[which]
        return replace(self, pages=pages, offsets=self.offsets[: len(pages)])


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

    def capacity(self, f: OutgoingStream, block: RamBlockPort) -> int:
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
        chunk = _Chunk(block, pages, self._chunk, self._encoder.body_offsets(block.name, len(pages)))
        self._read(chunk)
        await self._send_read(f, chunk)

    async def send_run(self, f: OutgoingStream, block: RamBlockPort, first: int, count: int) -> None:
        """Read ``count`` pages that follow each other, and send them."""
        end = first + count
        while first < end:
            raw, some = await self._room_for(f, block, end - first)
            offsets = self._encoder.body_offsets(block.name, some)
            chunk = _Chunk(block, np.arange(first, first + some), raw, offsets)
            # Where the holes of huge pages are nobody knows, and to read one in a mapping fills it.
            if raw is self._chunk or block.page_size > PAGE:
                read_run(block, first, chunk.content, self._rows_of(chunk)[:some])
            else:
                chunk.content[:] = block.pages[first : first + some]
            await self._send_read(f, chunk)
            first += some

    async def _room_for(self, f: OutgoingStream, block: RamBlockPort, count: int) -> tuple[NDArray[np.uint8], int]:
        """Return where records of up to ``count`` pages are made, and how many find room there."""
        room = await f.room()
        if room is None:
            return self._chunk, count
        if fitting := self._encoder.max_pages(len(room), block.name):
            return np.frombuffer(room, np.uint8), min(count, fitting)
        return self._chunk, 1  # this one lies across two buffers

    async def _send_read(self, f: OutgoingStream, chunk: _Chunk) -> None:
        zero = zero_pages(chunk.words)
        if not len(zero):
            await self._send_data(f, chunk)
            return
        keep = np.ones(len(chunk.pages), bool)
        keep[zero] = False
        if keep.any():
            await self._send_data(f, chunk.only(keep))
        self.put_zeros(f, chunk.block, chunk.pages[zero])
        await f.drain()

    def one(self, block: RamBlockPort, page: int) -> bytes:
        """Return the record of one page that somebody waits for."""
        content = os.pread(block.memfd, PAGE, page * PAGE)
        if content == ZERO_PAGE:
            return self.zeros(block, np.array([page]))
        self._stats.normal += 1
        return self._encoder.page(block.name, page, content)

    async def _send_data(self, f: OutgoingStream, chunk: _Chunk) -> None:
        """Send pages that are not zero: whole, or what is new in them."""
        if self.deltas is None:
            await self._send_records(f, chunk)
            return
        name = chunk.block.name
        whole, deltas = await self.deltas.split(name, chunk.pages, chunk.content)
        if whole.any():
            await self._send_records(f, chunk.only(whole))
        records = [self._encoder.delta(name, page, delta) for page, delta in deltas]
        self.deltas.sent(records)
        f.put_buffer(b"".join(records))
        await f.drain()

    async def _send_records(self, f: OutgoingStream, chunk: _Chunk) -> None:
        used = self._encoder.page_heads(chunk.block.name, chunk.pages, chunk.raw)
        self._stats.normal += len(chunk.pages)
        if chunk.raw is self._chunk:
            await f.send(chunk.raw[:used].data)
        else:
            await f.fill(used)

    def _read(self, chunk: _Chunk) -> None:
        """Copy pages to where their records have them."""
        read_pages(chunk.block, chunk.pages, chunk.content, lambda: self._rows_of(chunk))

    def _rows_of(self, chunk: _Chunk) -> list[memoryview]:
        """Return the bodies of a chunk as buffers; those of our own move only when a record has to name its block."""
        view, offsets = chunk.raw.data, chunk.offsets
        if chunk.raw is not self._chunk:
            return [view[at : at + PAGE] for at in offsets]
        if self._rows_at.start != offsets.start or len(self._rows) < len(offsets):
            self._rows_at, self._rows = offsets, [view[at : at + PAGE] for at in offsets]
        return self._rows
