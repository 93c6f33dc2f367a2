"""The "ram" handler's sending half: passes over dirty pages, coded in runs.

The rule of the file: **clear the dirty bit, then read the page** (`PageBitmap.take` clears). A page that changes while
it is read is dirty again and goes once more, so torn copies never survive; the last record of a page wins.

What is a hole in the memfd when the migration starts is announced as zero without being read (reading a hole through a
mapping allocates it). Write tracking is armed first, so a page that appears later is dirty, and every sync takes dirty
pages out of the announced holes before they could overwrite newer content.

Postcopy: from `begin_postcopy` on the machine runs at the other end. What is left in the bitmaps is sent once, what is
requested first; before `begin_background` nothing else. Chunks are small then: what lies in the socket stands in front
of the next urgent page.

Format: wire.ram. Loop structure: QEMU's ram_save_iterate (50 ms per call, rate limit).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from migrated.errors import RemoteProtocolError, WorkloadError
from migrated.kernel.memory import data_extents
from migrated.model.bitmap import PageBitmap
from migrated.model.stats import RamStats
from migrated.ram.dirty import DirtyLog
from migrated.ram.page_requests import PageRequests
from migrated.ram.page_sender import PageSender
from migrated.savevm.handlers import Pending
from migrated.savevm.iothread_lock import IothreadLock
from migrated.savevm.ports import BitmapSource, MachinePort, RamBlockPort
from migrated.stream.outgoing import OutgoingStream
from migrated.wire.postcopy import encode_discards
from migrated.wire.ram import EOS, PAGE, encode_block_list

#: One send: 1 MiB is where loopback and Python stop gaining; small sends are what hurts.
CHUNK_BYTES = 1 << 20
#: Zero records are 9 bytes, so a chunk holds many of them.
ZERO_CHUNK_PAGES = 65536
ZERO_RECORD_BYTES = 9
#: QEMU looks at the clock and leaves ram_save_iterate after 50 ms, so that other handlers get their turn.
ITERATE_MAX_S = 0.050
#: In postcopy: a loopback sends this in 50 us, a 10 Gbit/s link in 100 us.
POSTCOPY_CHUNK_BYTES = 128 << 10
URGENT_CHUNK_BYTES = 16 << 10
#: In postcopy commands and heartbeats wait for the end of a section.
POSTCOPY_ITERATE_MAX_S = 0.010


class RamSave:
    """State of the "ram" section for one outgoing migration at a time."""

    def __init__(
        self,
        machine: MachinePort,
        lock: IothreadLock,
        stats: RamStats,
        *,
        on_sync: Callable[[int], None],
        postcopy: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.requested = asyncio.Event()
        """Set while something is asked for."""
        self._everything = asyncio.Event()
        """Set while all that is left is to be sent, not only what is asked for."""
        self._postcopy_allowed = postcopy
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
        self._sender = PageSender(self._stats, 0)
        self._urgent = PageSender(self._stats, 0)
        self._requests = PageRequests({})
        self._postcopy = False
        self._preempt = False
        self._urgent_turn = asyncio.Lock()
        self._everything.clear()
        self.requested.clear()

    # -- hooks -------------------------------------------------------------------------------------------------

    async def save_setup(self, f: OutgoingStream, opaque: Any) -> None:
        """Arm write tracking, mark everything dirty, announce the blocks."""
        self._reset()
        self._blocks = list(self._machine.ram_blocks())
        self._sender = PageSender(self._stats, CHUNK_BYTES)
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
        """Count what is dirty; when that is less than the threshold, or nothing, look again first: then it is exact."""
        if self._pending_bytes() < max(threshold_size, 1):
            async with self._lock:
                await self._sync()
        pending = self._pending_bytes()
        return Pending(compatible=pending) if self._postcopy_allowed() else Pending(precopy_only=pending)

    async def has_postcopy(self, opaque: Any) -> bool:
        """Say whether what is left may follow the machine."""
        return self._postcopy_allowed()

    async def save_live_iterate(self, f: OutgoingStream, opaque: Any) -> bool:
        """Send dirty pages until the window's budget or 50 ms are used up, or nothing is left (True)."""
        deadline = self._clock() + (POSTCOPY_ITERATE_MAX_S if self._postcopy else ITERATE_MAX_S)
        done = False
        while not done:
            if self._postcopy and not self._preempt:
                await self._send_requested(f, self._sender)
            if self._only_requests or f.rate_limit_exceeded() or self._clock() >= deadline:
                break
            done = not await self._send_chunk(f)
        f.put_buffer(EOS)
        return done

    @property
    def _only_requests(self) -> bool:
        return self._postcopy and not self._everything.is_set()

    async def save_live_complete_precopy(self, f: OutgoingStream, opaque: Any) -> None:
        """Send what the stopped machine left dirty, then prove that nobody writes any more."""
        await self._sync()
        while await self._send_chunk(f):
            pass
        f.put_buffer(EOS)
        await self._require_stopped()

    async def save_live_complete_postcopy(self, f: OutgoingStream, opaque: Any) -> None:
        """Say that nothing is left."""
        f.put_buffer(EOS)

    async def resume_prepare(self, s: BitmapSource, opaque: Any) -> None:
        """Recovery: what is left to send is what the destination says that it has not."""
        received = await s.received_bitmaps({block.name: block.size_bytes // PAGE for block in self._blocks})
        for block in self._blocks:
            dirty, holes = await asyncio.to_thread(_split_holes, block)
            arrived = PageBitmap.from_bytes(block.size_bytes // PAGE, received[block.name])
            dirty.subtract(arrived)
            holes.subtract(arrived)
            self._dirty[block.name], self._holes[block.name] = dirty, holes
        self._begin_sending()
        self._update_remaining()

    async def _require_stopped(self) -> None:
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

    # -- postcopy ----------------------------------------------------------------------------------------------

    async def begin_postcopy(self, f: OutgoingStream, *, preempt: bool) -> None:
        """Look at the log for the last time, and have the destination drop what is not sent yet."""
        self._preempt = preempt
        await self._sync()
        await self._require_stopped()
        nothing = True
        for block in self._blocks:
            left = PageBitmap(block.size_bytes // PAGE)
            left.or_update(self._dirty[block.name])
            left.or_update(self._holes[block.name])
            if left.count:
                starts, ends = left.ranges()
                f.put_buffer(encode_discards(block.name, starts * PAGE, ends * PAGE))
                await f.drain()
                nothing = False
        if nothing and self._blocks:
            # A QEMU that listens without ever having discarded loads pages in the wrong way, and hangs.
            f.put_buffer(encode_discards(self._blocks[0].name, np.zeros(1, np.int64), np.zeros(1, np.int64)))
        self._begin_sending()

    def _begin_sending(self) -> None:
        """Begin as on a new connection: nobody knows the last block, nothing is requested."""
        self._postcopy = True
        self._sender = PageSender(self._stats, POSTCOPY_CHUNK_BYTES)
        self._urgent = PageSender(self._stats, URGENT_CHUNK_BYTES)
        self._everything.clear()
        self._cursor_block = self._cursor_page = 0
        self._requests = PageRequests({block.name: block.size_bytes for block in self._blocks})
        self.requested.clear()

    def begin_background(self) -> None:
        """Send everything, not only what is requested."""
        self._everything.set()

    async def wait_work(self, wait_s: float) -> None:
        """Wait for a request, unless those go another way; in the background, for ``wait_s`` at most."""
        while not self._everything.is_set():
            if not self._preempt:
                await self._either()
                return
            await self._everything.wait()
        if wait_s > 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await (asyncio.sleep(wait_s) if self._preempt else self.requested.wait())

    async def _either(self) -> None:
        waits = {asyncio.ensure_future(event.wait()) for event in (self.requested, self._everything)}
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    def request(self, block: str | None, start: int, length: int) -> None:
        """Send these bytes next. Raises RemoteProtocolError."""
        if not self._postcopy:
            raise RemoteProtocolError("a page is requested before postcopy has begun", section="return path")
        self._stats.postcopy_requests += 1
        self._requests.add(block, start, length)
        self.requested.set()

    async def serve_urgent(self, f: OutgoingStream) -> None:
        """Send what is requested over a connection of its own, until this is cancelled. Raises ChannelError."""
        while True:
            await self.requested.wait()
            async with self._urgent_turn:
                await self._send_requested(f, self._urgent)

    async def end_urgent(self, f: OutgoingStream) -> None:
        """Say that nothing more comes over that connection."""
        async with self._urgent_turn:
            f.put_buffer(EOS)
            await f.drain()

    async def _send_requested(self, f: OutgoingStream, sender: PageSender) -> None:
        while self._requests:
            name, first, end = self._requests.pop()
            index, block = next((i, block) for i, block in enumerate(self._blocks) if block.name == name)
            for start in range(first, end, sender.pages):
                await self._send_range(f, sender, block, start, min(end, start + sender.pages))
            # Who touched this page touches its neighbours next.
            self._cursor_block, self._cursor_page = index, end
        self.requested.clear()

    async def _send_range(
        self, f: OutgoingStream, sender: PageSender, block: RamBlockPort, first: int, end: int
    ) -> None:
        """Send what is left of a few pages: what is on its way is not sent twice."""
        if end - first == 1 and self._dirty[block.name].test(first):
            self._dirty[block.name].clear_range(first, end)
            await sender.send_one(f, block, first)
            await f.drain()
            self._update_remaining()
            return
        pages = np.arange(first, end)
        data = pages[self._dirty[block.name].test_pages(pages)]
        zeros = pages[self._holes[block.name].test_pages(pages)]
        self._dirty[block.name].clear_range(first, end)
        self._holes[block.name].clear_range(first, end)
        sender.put_zeros(f, block, zeros)
        if len(data):
            await sender.send(f, block, data)
        await f.drain()
        self._update_remaining()

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
        self._sender.put_zeros(f, block, pages)
        await f.drain()
        return True

    async def _send_pages(self, f: OutgoingStream, block: RamBlockPort) -> bool:
        limit = self._sender.capacity(block)
        pages, self._cursor_page = self._dirty[block.name].take(self._cursor_page, limit)
        if not len(pages):
            return False
        await self._sender.send(f, block, pages)
        return True


def _split_holes(block: RamBlockPort) -> tuple[PageBitmap, PageBitmap]:
    """Return (pages with data, holes) of a block as two disjoint bitmaps."""
    total = block.size_bytes // block.page_size
    dirty, holes = PageBitmap(total), PageBitmap(total)
    holes.set_all()
    for start, end in data_extents(block.memfd, 0, block.size_bytes):
        dirty.set_range(start // PAGE, -(-end // PAGE))
        holes.clear_range(start // PAGE, -(-end // PAGE))
    return dirty, holes
