"""The "ram" handler's sending half: passes over dirty pages, coded in runs.

The rule of the file: **clear the dirty bit, then read the page** (`PageBitmap.take` clears). A page that changes while
it is read is dirty again and goes once more, so torn copies never survive; the last record of a page wins.

What is a hole in the memfd when the migration starts is announced as zero without being read (reading a hole through a
mapping allocates it). Write tracking is armed first, so a page that appears later is dirty, and every sync takes dirty
pages out of the announced holes before they could overwrite newer content.

Postcopy: from `begin_postcopy` on the machine runs at the other end. What is left in the bitmaps is sent once, what is
requested first (`ram.page_server`); before `begin_background` nothing else.

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
from migrated.model.bitmap import PageBitmap
from migrated.model.stats import DeltaStats, RamStats
from migrated.ram.deltas import Deltas
from migrated.ram.dirty import DirtyLog, StrayWrite
from migrated.ram.holes import split_holes
from migrated.ram.multifd_save import MultifdSave
from migrated.ram.page_sender import PageSender
from migrated.ram.page_server import PageServer
from migrated.ram.unsent import Unsent
from migrated.savevm.handlers import Pending
from migrated.savevm.iothread_lock import IothreadLock
from migrated.savevm.ports import BitmapSource, MachinePort, RamBlockPort
from migrated.stream.outgoing import OutgoingStream
from migrated.wire.postcopy import encode_discards
from migrated.wire.ram import EOS, PAGE
from migrated.wire.ram_encoder import encode_block_list

#: One send: 1 MiB is where loopback and Python stop gaining; small sends are what hurts.
CHUNK_BYTES = 1 << 20
#: Zero records are 9 bytes, so a chunk holds many of them.
ZERO_CHUNK_PAGES = 65536
#: QEMU looks at the clock and leaves ram_save_iterate after 50 ms, so that other handlers get their turn.
ITERATE_MAX_S = 0.050
#: In postcopy: half a millisecond at both ends, for which the first page of somebody who begins to touch may wait.
POSTCOPY_CHUNK_BYTES = 512 << 10
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
        cache_bytes: Callable[[], int] = lambda: 0,
        deltas: DeltaStats | None = None,
        channels: MultifdSave | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._everything = asyncio.Event()
        """Set while all that is left is to be sent, not only what is asked for."""
        self._postcopy_allowed = postcopy
        self._cache_bytes = cache_bytes
        """How much of what was sent is remembered, for deltas; 0 for none."""
        self._delta_stats = deltas or DeltaStats()
        self._machine = machine
        self._lock = lock
        self._stats = stats
        self._on_sync = on_sync
        self._clock = clock
        self.channels = channels or MultifdSave(stats)
        self._reset()

    def _reset(self) -> None:
        self._unsent = Unsent([])
        self._log: DirtyLog | None = None
        self._main_sender = PageSender(self._stats, 0)
        self._sender: PageSender | MultifdSave = self._main_sender
        self._check: asyncio.Future[StrayWrite | None] | None = None
        """Whether the machine really stands still: begun in `begin_postcopy`, beside everything else."""
        self._holes_unknown = False
        self._discarded: dict[str, PageBitmap] = {}
        """What the destination was told to drop before the machine stopped, by block."""
        self._server: PageServer | None = None
        """From `begin_postcopy` on."""
        self._everything.clear()

    # -- hooks -------------------------------------------------------------------------------------------------

    async def save_setup(self, f: OutgoingStream, opaque: Any) -> None:
        """Arm write tracking, mark everything dirty, announce the blocks."""
        self._reset()
        blocks = list(self._machine.ram_blocks())
        self._unsent = Unsent(blocks)
        self._sender = self.channels if self.channels.active else PageSender(self._stats, CHUNK_BYTES)
        self._log = DirtyLog(blocks)
        self._stats.total = sum(block.size_bytes for block in blocks)
        self._stats.page_size = PAGE
        await self._log.start()
        for block in blocks:
            self._unsent.split(block.name, *await asyncio.to_thread(split_holes, block))
        self._update_remaining()
        self._synced(0)
        await self.channels.sync(f)
        sizes = {block.name: block.page_size for block in blocks if f.advised and block.page_size != PAGE}
        f.put_buffer(encode_block_list([(block.name, block.size_bytes) for block in blocks], sizes))

    async def save_live_pending(self, f: OutgoingStream, opaque: Any, threshold_size: int) -> Pending:
        """Count what is dirty; when that is less than the threshold, or nothing, look again first: then it is exact."""
        if self._unsent.wire_bytes < max(threshold_size, 1):
            async with self._lock:
                await self._sync()
            self._remember()
        pending = self._unsent.wire_bytes
        return Pending(compatible=pending) if self._postcopy_allowed() else Pending(precopy_only=pending)

    def _remember(self) -> None:
        """From the first pass's end on, send what is sent again as deltas; or do so no more."""
        wanted, deltas = self._cache_bytes(), self._sender.deltas
        if wanted != (deltas.cache_bytes if deltas is not None else 0):
            self._sender.deltas = Deltas(self._unsent.blocks, wanted, self._delta_stats) if wanted else None
        elif deltas is not None:
            deltas.looked()

    async def has_postcopy(self, opaque: Any) -> bool:
        """Say whether what is left may follow the machine."""
        return self._postcopy_allowed()

    async def save_live_iterate(self, f: OutgoingStream, opaque: Any) -> bool:
        """Send dirty pages until the window's budget or 50 ms are used up, or nothing is left (True)."""
        if self._holes_unknown and self._everything.is_set():
            await self._find_holes()
        server = self._server
        deadline = self._clock() + (POSTCOPY_ITERATE_MAX_S if server else ITERATE_MAX_S)
        done = False
        while not done:
            if server is not None and not server.apart:
                await server.send_requested(f, self._main_sender)
            if self._only_requests or f.rate_limit_exceeded() or self._clock() >= deadline:
                break
            if server is not None:
                await server.let_background()
            done = not await self._send_chunk(f)
        await self._end_section(f)
        return done

    async def _end_section(self, f: OutgoingStream) -> None:
        """End a section, behind everything that channels carry of it; in postcopy they carry nothing."""
        if self.channels.active and self._server is None:
            await self.channels.sync(f)
        f.put_buffer(EOS)

    async def _find_holes(self) -> None:
        self._holes_unknown = False
        for block in self._unsent.blocks:
            self._unsent.narrow(block.name, *await asyncio.to_thread(split_holes, block))

    @property
    def _only_requests(self) -> bool:
        return self._server is not None and not self._everything.is_set()

    async def save_live_complete_precopy(self, f: OutgoingStream, opaque: Any) -> None:
        """Send what the stopped machine left dirty, then prove that nobody writes any more."""
        await self._sync()
        if self._sender.deltas is not None:
            self._sender.deltas.keeps = False
        while await self._send_chunk(f):
            pass
        await self._end_section(f)
        await self.require_stopped()

    async def save_live_complete_postcopy(self, f: OutgoingStream, opaque: Any) -> None:
        """Say that nothing is left."""
        f.put_buffer(EOS)

    async def resume_prepare(self, s: BitmapSource, opaque: Any) -> None:
        """Recovery: what is left to send is what the destination says that it has not."""
        blocks = self._unsent.blocks
        received = await s.received_bitmaps({block.name: block.size_bytes // PAGE for block in blocks})
        for block in blocks:
            dirty, holes = await asyncio.to_thread(split_holes, block)
            arrived = PageBitmap.from_bytes(block.size_bytes // PAGE, received[block.name])
            dirty.subtract(arrived)
            holes.subtract(arrived)
            self._unsent.split(block.name, dirty, holes)
        self._unsent.widen()
        assert self._server is not None
        self._begin_sending(preempt=self._server.apart)
        self._update_remaining()

    async def require_stopped(self) -> None:
        """Prove that nobody writes any more. Raises WorkloadError naming who does."""
        if (stray := await (self._check or self._stray_write())) is not None:
            raise _not_stopped(stray)

    def stopped_so_far(self, late: Callable[[WorkloadError], None]) -> None:
        """Raise WorkloadError if somebody is known to write; what is found out later is told to ``late``."""
        check = self._check
        assert check is not None
        if check.done():
            if (stray := check.result()) is not None:
                raise _not_stopped(stray)
            return

        def tell(check: asyncio.Future[StrayWrite | None]) -> None:
            if check.exception() is None and (stray := check.result()) is not None:
                late(_not_stopped(stray))

        check.add_done_callback(tell)

    async def _stray_write(self, *, clear: bool = False) -> StrayWrite | None:
        assert self._log is not None
        return await self._log.stray_write(clear=clear)

    async def save_cleanup(self, opaque: Any) -> None:
        """Stop tracking and let the buffers go."""
        log, check = self._log, self._check
        self._reset()
        if check is not None:
            await asyncio.wait([check])
        if log is not None:
            await log.stop()

    # -- postcopy ----------------------------------------------------------------------------------------------

    async def discard_early(self, f: OutgoingStream) -> bool:
        """Have the destination drop what is not sent while the machine still runs: that may take it long.

        What is written from now on is dropped, or was already, when it stands still. False where nothing is there.
        """
        if self._unsent.untouched:
            return False
        async with self._lock:
            await self._sync()
        self._unsent.widen()
        for block in self._unsent.blocks:
            self._discarded[block.name] = left = self._unsent.left(block)
            await self._discard(f, block, left)
        return True

    async def _discard(self, f: OutgoingStream, block: RamBlockPort, pages: PageBitmap) -> bool:
        """Have the destination drop these pages; False where there are none."""
        if not pages.count:
            return False
        starts, ends = pages.ranges()
        f.put_buffer(encode_discards(block.name, starts * PAGE, ends * PAGE))
        await f.drain()
        return True

    async def begin_postcopy(self, f: OutgoingStream, *, preempt: bool) -> None:
        """Look at the log for the last time, and have the destination drop what is not sent yet."""
        assert self._log is not None
        self._holes_unknown = self._unsent.untouched
        if self._holes_unknown:
            self._unsent.take_all_for_dirty()  # what the log could say; the holes are looked for once the machine runs
        else:
            await self._sync()
        self._unsent.widen()
        self._check = asyncio.ensure_future(self._stray_write(clear=self._holes_unknown))
        anything = any(pages.count for pages in self._discarded.values())
        for block in self._unsent.blocks:
            left = self._unsent.left(block)
            if block.name in self._discarded:
                left.subtract(self._discarded[block.name])
            anything |= await self._discard(f, block, left)
        if not anything and self._unsent.blocks:
            # A QEMU that listens without ever having discarded loads pages in the wrong way, and hangs.
            nowhere = np.zeros(1, np.int64)
            f.put_buffer(encode_discards(self._unsent.blocks[0].name, nowhere, nowhere))
        self._begin_sending(preempt=preempt)

    def _begin_sending(self, *, preempt: bool) -> None:
        """Begin as on a new connection: nobody knows the last block, nothing is requested."""
        self._sender = self._main_sender = PageSender(self._stats, POSTCOPY_CHUNK_BYTES)
        self._server = PageServer(self._unsent, self._stats, self._clock, apart=preempt)
        self._unsent.rewind()
        self._everything.clear()

    @property
    def server(self) -> PageServer:
        """Where requests go. Raises RemoteProtocolError before `begin_postcopy`."""
        if self._server is None:
            raise RemoteProtocolError("a page is requested before postcopy has begun", section="return path")
        return self._server

    def begin_background(self) -> None:
        """Send everything, not only what is requested."""
        self._everything.set()

    async def wait_work(self, wait_s: float) -> None:
        """Wait for a request, unless those go another way; in the background, for ``wait_s`` at most."""
        server = self.server
        while not self._everything.is_set():
            if not server.apart:
                await _either(server.requested, self._everything)
                return
            await self._everything.wait()
        if wait_s > 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await (asyncio.sleep(wait_s) if server.apart else server.requested.wait())

    def request(self, block: str | None, start: int, length: int) -> None:
        """Send these bytes next. Raises RemoteProtocolError, ChannelError."""
        self.server.request(block, start, length)

    async def serve_urgent(self, f: OutgoingStream) -> None:
        """Send what is requested over a connection of its own, until this is cancelled. Raises ChannelError."""
        await self.server.serve(f)

    async def end_urgent(self, f: OutgoingStream) -> None:
        """Say that nothing more comes over that connection."""
        await self.server.end(f)

    # -- inside ------------------------------------------------------------------------------------------------

    async def _sync(self) -> None:
        assert self._log is not None
        newly = await self._log.sync(self._unsent.dirty)
        self._unsent.forget_holes()
        self._update_remaining()
        self._synced(newly)

    def _synced(self, newly_dirty: int) -> None:
        self._stats.dirty_sync_count += 1
        self._on_sync(newly_dirty)

    def _update_remaining(self) -> None:
        self._stats.remaining = self._unsent.bytes_left

    async def _send_chunk(self, f: OutgoingStream) -> bool:
        """Send one chunk of the next block that has something left; False when nothing is left anywhere."""
        unsent = self._unsent
        # One block more than there are: the last look is at what lies before the cursor in the block it began in.
        for _ in range(len(unsent.blocks) + 1 if unsent.blocks else 0):
            if await self._send_holes(f, unsent.block) or await self._send_pages(f, unsent.block):
                self._update_remaining()
                return True
            unsent.next_block()
        return False

    async def _send_holes(self, f: OutgoingStream, block: RamBlockPort) -> bool:
        holes = self._unsent.holes[block.name]
        if not holes.count:
            return False
        pages, _ = holes.take(0, ZERO_CHUNK_PAGES)
        self._sender.put_zeros(f, block, pages)
        await f.drain()
        return True

    async def _send_pages(self, f: OutgoingStream, block: RamBlockPort) -> bool:
        unsent, dirty = self._unsent, self._unsent.dirty[block.name]
        limit = self._sender.capacity(f, block)
        if self._server is not None:
            if block.page_size > PAGE:
                return await self._server.send_next_host_page(f, self._main_sender)
            limit = self._server.background_pages(limit)
        if (first := dirty.take_run(unsent.page, limit)) is not None:
            unsent.page = first + limit
            await self._sender.send_run(f, block, first, limit)
            return True
        pages, unsent.page = dirty.take(unsent.page, limit)
        if not len(pages):
            return False
        await self._sender.send(f, block, pages)
        return True


def _not_stopped(stray: StrayWrite) -> WorkloadError:
    return WorkloadError(
        stray.workload,
        f"it wrote to block {stray.block} after it said it had stopped"
        f" ({stray.pages} pages, the first is page {stray.page}); on_stop must quiesce every writer",
    )


async def _either(*events: asyncio.Event) -> None:
    waits = {asyncio.ensure_future(event.wait()) for event in events}
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
