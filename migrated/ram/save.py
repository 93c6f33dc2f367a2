"""The "ram" handler's sending half: passes over dirty pages, coded in runs.

The rule of the file: **clear the dirty bit, then read the page** (`PageBitmap.take` clears). A page that changes while
it is read is dirty again and goes once more, so torn copies never survive; the last record of a page wins.

What is a hole in the memfd when the migration starts is announced as zero without being read (reading a hole through a
mapping allocates it). Write tracking is armed first, so a page that appears later is dirty, and every sync takes dirty
pages out of the announced holes before they could overwrite newer content.

Pages in long runs are read by ``preadv`` straight into their records (no fault, no page tables, the GIL is free);
scattered ones are gathered from the daemon's mapping.

Format: wire.ram. Loop structure: QEMU's ram_save_iterate (50 ms per call, rate limit).
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from migrated.errors import WorkloadError
from migrated.kernel.memory import data_extents
from migrated.model.bitmap import PageBitmap
from migrated.model.stats import RamStats
from migrated.ram.dirty import DirtyLog
from migrated.savevm.handlers import Pending
from migrated.savevm.iothread_lock import IothreadLock
from migrated.savevm.ports import MachinePort, RamBlockPort
from migrated.stream.outgoing import OutgoingStream
from migrated.wire.ram import EOS, PAGE, RamEncoder, bodies, encode_block_list

#: One send: 1 MiB is where loopback and Python stop gaining; small sends are what hurts.
CHUNK_BYTES = 1 << 20
#: Zero records are 9 bytes, so a chunk holds many of them.
ZERO_CHUNK_PAGES = 65536
ZERO_RECORD_BYTES = 9
#: From this mean run length on, reading by system call is faster than gathering from the mapping.
LONG_RUN_PAGES = 8
#: QEMU looks at the clock and leaves ram_save_iterate after 50 ms, so that other handlers get their turn.
ITERATE_MAX_S = 0.050


class RamSave:
    """State of the "ram" section for one outgoing migration at a time."""

    def __init__(
        self,
        machine: MachinePort,
        lock: IothreadLock,
        stats: RamStats,
        *,
        on_sync: Callable[[int], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._machine = machine
        self._lock = lock
        self._stats = stats
        self._on_sync = on_sync
        self._clock = clock
        self._reset()

    def _reset(self) -> None:
        self._blocks: list[RamBlockPort] = []
        self._dirty: dict[str, PageBitmap] = {}
        self._holes: dict[str, PageBitmap] = {}
        self._log: DirtyLog | None = None
        self._cursor_block = 0
        self._cursor_page = 0
        self._encoder = RamEncoder()
        self._chunk = np.empty(0, np.uint8)
        self._rows_at = range(0)
        self._rows: list[memoryview] = []

    # -- hooks -------------------------------------------------------------------------------------------------

    async def save_setup(self, f: OutgoingStream, opaque: Any) -> None:
        """Arm write tracking, mark everything dirty, announce the blocks."""
        self._reset()
        self._blocks = list(self._machine.ram_blocks())
        self._chunk = np.empty(CHUNK_BYTES + 512, np.uint8)
        self._log = DirtyLog(self._blocks)
        self._stats.total = sum(block.size_bytes for block in self._blocks)
        self._stats.page_size = PAGE
        await self._log.start()
        for block in self._blocks:
            dirty, holes = await asyncio.to_thread(_split_holes, block)
            self._dirty[block.name], self._holes[block.name] = dirty, holes
        self._update_remaining()
        self._synced(0)
        f.put_buffer(encode_block_list([(block.name, block.size_bytes) for block in self._blocks]))

    async def save_live_pending(self, f: OutgoingStream, opaque: Any, threshold_size: int) -> Pending:
        """Count what is dirty; when that is less than the threshold, look again first, so that it is exact."""
        if self._pending_bytes() < threshold_size:
            async with self._lock:
                await self._sync()
        return Pending(precopy_only=self._pending_bytes())

    async def save_live_iterate(self, f: OutgoingStream, opaque: Any) -> bool:
        """Send dirty pages until the window's budget or 50 ms are used up, or nothing is left (True)."""
        deadline = self._clock() + ITERATE_MAX_S
        done = False
        while not done and not f.rate_limit_exceeded() and self._clock() < deadline:
            done = not await self._send_chunk(f)
        f.put_buffer(EOS)
        return done

    async def save_live_complete_precopy(self, f: OutgoingStream, opaque: Any) -> None:
        """Send what the stopped machine left dirty, then prove that nobody writes any more."""
        await self._sync()
        while await self._send_chunk(f):
            pass
        f.put_buffer(EOS)
        assert self._log is not None
        if (stray := await self._log.stray_write()) is not None:
            raise WorkloadError(
                stray.workload,
                f"it wrote to block {stray.block} after it said it had stopped"
                f" ({stray.pages} pages, the first is page {stray.page}); on_stop must quiesce every writer",
            )

    async def save_cleanup(self, opaque: Any) -> None:
        """Stop tracking and let the buffers go."""
        log = self._log
        self._reset()
        if log is not None:
            await log.stop()

    # -- inside ------------------------------------------------------------------------------------------------

    async def _sync(self) -> None:
        assert self._log is not None
        newly = await self._log.sync(self._dirty)
        for name, holes in self._holes.items():
            if holes.count:
                holes.subtract(self._dirty[name])
        self._update_remaining()
        self._synced(newly)

    def _synced(self, newly_dirty: int) -> None:
        self._stats.dirty_sync_count += 1
        self._on_sync(newly_dirty)

    def _pending_bytes(self) -> int:
        dirty = sum(bitmap.count for bitmap in self._dirty.values())
        return dirty * PAGE + sum(bitmap.count for bitmap in self._holes.values()) * ZERO_RECORD_BYTES

    def _update_remaining(self) -> None:
        bitmaps = [*self._dirty.values(), *self._holes.values()]
        self._stats.remaining = sum(bitmap.count for bitmap in bitmaps) * PAGE

    async def _send_chunk(self, f: OutgoingStream) -> bool:
        """Send one chunk of the next block that has something left; False when nothing is left anywhere."""
        # One block more than there are: the last look is at what lies before the cursor in the block it began in.
        for _ in range(len(self._blocks) + 1 if self._blocks else 0):
            block = self._blocks[self._cursor_block]
            if await self._send_holes(f, block) or await self._send_pages(f, block):
                self._update_remaining()
                return True
            self._cursor_block = (self._cursor_block + 1) % len(self._blocks)
            self._cursor_page = 0
        return False

    async def _send_holes(self, f: OutgoingStream, block: RamBlockPort) -> bool:
        pages, _ = self._holes[block.name].take(0, ZERO_CHUNK_PAGES)
        if not len(pages):
            return False
        self._put_zero_pages(f, block, pages)
        await f.drain()
        return True

    async def _send_pages(self, f: OutgoingStream, block: RamBlockPort) -> bool:
        limit = self._encoder.max_pages(len(self._chunk), block.name)
        pages, self._cursor_page = self._dirty[block.name].take(self._cursor_page, limit)
        if not len(pages):
            return False
        offsets = self._encoder.body_offsets(block.name, len(pages))
        self._read(block, pages, offsets)
        zero = _zero_pages(self._chunk, offsets)
        if len(zero):
            await self._send_mixed(f, block, pages, offsets, zero)
        else:
            await self._send_records(f, block, pages)
        return True

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
        self._put_zero_pages(f, block, pages[zero])
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

    def _put_zero_pages(self, f: OutgoingStream, block: RamBlockPort, pages: NDArray[np.int64]) -> None:
        f.put_buffer(self._encoder.zero_run(block.name, pages))
        self._stats.duplicate += len(pages)


def _split_holes(block: RamBlockPort) -> tuple[PageBitmap, PageBitmap]:
    """Return (pages with data, holes) of a block as two disjoint bitmaps."""
    total = block.size_bytes // block.page_size
    dirty, holes = PageBitmap(total), PageBitmap(total)
    holes.set_all()
    for start, end in data_extents(block.memfd, 0, block.size_bytes):
        dirty.set_range(start // PAGE, -(-end // PAGE))
        holes.clear_range(start // PAGE, -(-end // PAGE))
    return dirty, holes


def _zero_pages(chunk: NDArray[np.uint8], offsets: range) -> NDArray[np.int64]:
    """Return which of the pages at ``offsets`` are all zero. One word rules out nearly every page that is not."""
    words = np.ndarray((len(offsets), PAGE // 8), np.uint64, chunk, offsets.start, (offsets.step, 8))
    maybe = np.flatnonzero(words[:, 0] == 0)
    for word in (PAGE // 16, -1):
        if len(maybe):
            maybe = maybe[words[maybe, word] == 0]
    return maybe[~words[maybe].any(axis=1)] if len(maybe) else maybe
