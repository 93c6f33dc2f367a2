"""Requested pages: what somebody at the other end waits for goes first, and once.

The rule of the file: a request is checked before anything is done for it, and a page that is on its way already is not
sent again. Where requests have a connection of their own (postcopy-preempt) a page leaves in the same callback that
read its request: each task that has to be woken in between costs as much as the page.

Who waits for pages here and there is served best when little else is on the way, in the sockets and at the destination,
so the background holds back for a burst of requests; who goes on like that for long is served best by all memory being
there soon, so it does not do so for longer than it does not. Requests for what the background would have sent next
anyway change nothing.

Source of the order: QEMU's ram_save_queue_pages and postcopy-preempt.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import numpy as np

from migrated.model.stats import RamStats
from migrated.ram.page_requests import PageRequests
from migrated.ram.page_sender import PageSender
from migrated.ram.unsent import Unsent
from migrated.savevm.ports import RamBlockPort
from migrated.stream.outgoing import OutgoingStream
from migrated.wire.ram import EOS, PAGE

#: The most that is read for one request.
URGENT_CHUNK_BYTES = 64 << 10
#: Who waited for a page somewhere waits for the next one within a few round trips.
HURRY_S = 0.002
#: So long a burst may be, and so long the background then has its way.
BURST_S = 1.0
#: In a burst the background sends small chunks, one in so much time: still 60 MiB/s.
HURRIED_CHUNK_PAGES = 32
HURRIED_CHUNK_S = 0.001
#: The event loop's timers count milliseconds, and may be one early.
TIMER_S = 0.001
#: A page this close to the cursor is one that the background is about to meet: it had better go fast.
NEAR_PAGES = 256


class PageServer:
    """Requests of one connection to the destination."""

    def __init__(self, unsent: Unsent, stats: RamStats, clock: Callable[[], float], *, apart: bool) -> None:
        self.apart = apart
        """Requested pages have a connection of their own."""
        self.requested = asyncio.Event()
        """Set while something is asked for and not sent."""
        self._unsent = unsent
        self._stats = stats
        self._clock = clock
        self._sender = PageSender(stats, URGENT_CHUNK_BYTES)
        self._requests = PageRequests({block.name: block.size_bytes for block in unsent.blocks})
        self._turn = asyncio.Lock()
        self._stream: OutgoingStream | None = None
        self._burst_began = self._burst_ends = self._next_chunk_at = -BURST_S

    def request(self, block: str | None, start: int, length: int) -> None:
        """Send these bytes next. Raises RemoteProtocolError, ChannelError."""
        self._stats.postcopy_requests += 1
        self._requests.add(block, start, length)
        if self._stream is None or self._turn.locked() or not self._sent_now(self._stream):
            self.requested.set()

    def _sent_now(self, f: OutgoingStream) -> bool:
        """Send single pages without waiting for anything; False where something is left to `serve`."""
        while self._requests:
            name, page, end = self._requests.first
            if end - page > 1 or self._unsent.named(name).page_size > PAGE:
                return False
            self._requests.pop()
            if (record := self._take(self._sender, name, page)) and not f.send_now(record):
                return False
        return True

    def _take(self, sender: PageSender, name: str, page: int) -> bytes:
        """Take one page and return its record; b"" where it is on its way already."""
        unsent = self._unsent
        block = unsent.named(name)
        if unsent.dirty[name].clear(page):
            record = sender.one(block, page)
        elif unsent.holes[name].clear(page):
            record = sender.zeros(block, np.array([page]))
        else:
            return b""
        self._stats.remaining -= PAGE
        # Who touched this page touches its neighbours next.
        distance = unsent.go_behind(name, page)
        if distance is None or distance > NEAR_PAGES:
            self._hurry(self._clock())
        return record

    def _hurry(self, now: float) -> None:
        over = self._burst_began + BURST_S
        if now >= self._burst_ends and (self._burst_ends < over or now >= over + BURST_S):
            self._burst_began = now
        self._burst_ends = min(now + HURRY_S, self._burst_began + BURST_S)

    async def serve(self, f: OutgoingStream) -> None:
        """Send over ``f``, which carries nothing else, until this is cancelled. Raises ChannelError."""
        self._stream = f
        try:
            while True:
                await self.requested.wait()
                async with self._turn:
                    await self.send_requested(f, self._sender)
        finally:
            self._stream = None

    async def end(self, f: OutgoingStream) -> None:
        """Say over ``f`` that nothing more comes."""
        async with self._turn:
            f.put_buffer(EOS)
            await f.drain()

    async def send_requested(self, f: OutgoingStream, sender: PageSender) -> None:
        """Send everything that is asked for."""
        while self._requests:
            name, first, end = self._requests.pop()
            block = self._unsent.named(name)
            if (group := block.page_size // PAGE) > 1:
                for page in range(first // group * group, end, group):
                    await self._send_host_page(f, sender, block, page)
                continue
            if end - first == 1:
                f.put_buffer(self._take(sender, name, first))
                await f.drain()
                continue
            step = sender.capacity(f, block)
            for start in range(first, end, step):
                await self._send_range(f, sender, block, start, min(end, start + step))
            self._unsent.go_behind(name, end - 1)
        await f.drain()  # of what did not go at once
        self.requested.clear()

    async def _send_range(
        self, f: OutgoingStream, sender: PageSender, block: RamBlockPort, first: int, end: int
    ) -> None:
        """Send what is left of a few pages."""
        dirty, holes = self._unsent.dirty[block.name], self._unsent.holes[block.name]
        pages = np.arange(first, end)
        data, zeros = pages[dirty.test_pages(pages)], pages[holes.test_pages(pages)]
        self._stats.remaining -= (dirty.clear_range(first, end) + holes.clear_range(first, end)) * PAGE
        sender.put_zeros(f, block, zeros)
        if len(data):
            await sender.send(f, block, data)
        await f.drain()

    # -- host pages larger than target pages: all of one, or nothing of it, on this connection ------------------

    async def _send_host_page(self, f: OutgoingStream, sender: PageSender, block: RamBlockPort, page: int) -> None:
        if (taken := self._unsent.take_host_page(block, page)) is None:
            return
        first, end, is_hole = taken
        self._stats.remaining -= block.page_size
        self._unsent.go_behind(block.name, end - 1)
        if is_hole:
            sender.put_zeros(f, block, np.arange(first, end))
        else:
            step = sender.capacity(f, block)
            for start in range(first, end, step):
                await sender.send(f, block, np.arange(start, min(end, start + step)))
        await f.drain()

    async def send_next_host_page(self, f: OutgoingStream, sender: PageSender) -> bool:
        """Send the next one of the background's block that is not sent; False where there is none behind the cursor."""
        unsent = self._unsent
        page = unsent.dirty[unsent.block.name].first_from(unsent.page)
        if page is None:
            return False
        await self._send_host_page(f, sender, unsent.block, page)
        return True

    # -- the background ----------------------------------------------------------------------------------------

    async def let_background(self) -> None:
        """Wait until the background may send its next chunk."""
        wait_s = min(self._burst_ends, self._next_chunk_at) - self._clock()
        if wait_s > 0:
            await asyncio.sleep(wait_s + TIMER_S)

    def background_pages(self, limit: int) -> int:
        """Return how many pages the background may send now, ``limit`` at most."""
        now = self._clock()
        if now >= self._burst_ends:
            return limit
        self._next_chunk_at = now + HURRIED_CHUNK_S
        return min(limit, HURRIED_CHUNK_PAGES)
