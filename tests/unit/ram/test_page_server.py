"""Requested pages: at once, once, in order; and when the background holds back for them."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest

from migrated.errors import RemoteProtocolError
from migrated.model.stats import BandwidthMeter, RamStats
from migrated.ram.page_server import BURST_S, HURRIED_CHUNK_PAGES, HURRY_S, NEAR_PAGES, PageServer
from migrated.ram.unsent import Unsent
from migrated.stream.outgoing import OutgoingStream
from migrated.transport.channel import SocketChannel
from migrated.wire.ram import PAGE, EndOfSection, PageRun, RamParser, ZeroRun
from tests.support.memory_block import Block, memory_block

PAGES = 4096
CHUNK = 128


@pytest.fixture
def block() -> Iterator[Block]:
    with memory_block(PAGES) as block:
        for page in range(0, PAGES, 2):
            os.pwrite(block.memfd, bytes([page % 255 + 1]) * PAGE, page * PAGE)
        yield block


class Bench:
    """A server, its clock, and what comes out at the other end."""

    def __init__(self, block: Block) -> None:
        self.now = 1000.0
        self.unsent = Unsent([block])
        self.unsent.dirty["heap"].set_all()
        self.stats = RamStats()
        self.stats.remaining = self.unsent.bytes_left
        self.server = PageServer(self.unsent, self.stats, lambda: self.now, apart=True)
        near, far = socket.socketpair()
        self.near, self.far = SocketChannel(near, "far"), far
        far.setblocking(False)
        self.f = OutgoingStream(self.near, BandwidthMeter())
        self._parser = RamParser({"heap": PAGES * PAGE})
        self._received = bytearray()

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self.server.serve(self.f))
        await asyncio.sleep(0)
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait([task])
            self.near.abort()
            self.far.close()

    def ask(self, page: int, pages: int = 1) -> None:
        self.server.request("heap", page * PAGE, pages * PAGE)

    def arrived(self) -> list[int]:
        """Return the pages that are here now; zeros as -page."""
        try:
            while chunk := self.far.recv(1 << 20):
                self._received += chunk
        except BlockingIOError:
            pass
        events, used = self._parser.parse(memoryview(bytes(self._received)))
        del self._received[:used]
        pages: list[int] = []
        for event in events:
            match event:
                case PageRun(_, numbers, data):
                    assert all(row[0] == page % 255 + 1 for page, row in zip(numbers.tolist(), data, strict=True))
                    pages += numbers.tolist()
                case ZeroRun(_, numbers, 0):
                    pages += (-numbers).tolist()
                case EndOfSection():
                    pages.append(PAGES)
        return pages


async def test_a_page_leaves_in_the_callback_that_asks_for_it(block: Block) -> None:
    bench = Bench(block)
    async with bench.serving():
        bench.ask(6)
        assert bench.arrived() == [6], "nobody had a turn in between"
        bench.ask(9)
        bench.ask(6)
        assert bench.arrived() == [-9], "a page of zeros; and the other one is on its way already"
        assert bench.stats.remaining == (PAGES - 2) * PAGE == bench.unsent.bytes_left
        assert (bench.stats.postcopy_requests, bench.stats.normal, bench.stats.duplicate) == (3, 1, 1)
        await bench.server.end(bench.f)
        assert bench.arrived() == [PAGES]


async def test_a_hole_is_announced(block: Block) -> None:
    bench = Bench(block)
    bench.unsent.dirty["heap"].clear(11)
    bench.unsent.holes["heap"].set(11)
    async with bench.serving():
        bench.ask(11)
        assert bench.arrived() == [-11]
        assert not bench.unsent.holes["heap"].count


async def test_a_range_is_sent_by_the_task(block: Block) -> None:
    bench = Bench(block)
    bench.unsent.dirty["heap"].clear(22)
    async with bench.serving():
        bench.ask(20, 40)
        pages: list[int] = []
        while len(pages) < 39:
            await asyncio.sleep(0)
            pages += bench.arrived()
        assert sorted(map(abs, pages)) == [page for page in range(20, 60) if page != 22]
        assert bench.unsent.page == 60, "the background goes on behind it"


async def test_without_a_connection_of_its_own_a_request_waits_for_whoever_sends(block: Block) -> None:
    bench = Bench(block)
    bench.ask(8)
    assert bench.server.requested.is_set()
    assert bench.arrived() == []
    await bench.server.send_requested(bench.f, bench.server._sender)
    assert bench.arrived() == [8]
    assert not bench.server.requested.is_set()
    bench.near.abort()
    bench.far.close()


async def test_a_full_socket_loses_nothing_and_keeps_the_order(block: Block) -> None:
    bench = Bench(block)
    async with bench.serving():
        asked = list(range(0, PAGES, 2))
        for page in asked:
            bench.ask(page)
        assert bench.near.bytes_sent < len(asked) * PAGE, "all of it fitted: the test shows nothing"
        pages: list[int] = []
        while len(pages) < len(asked):
            pages += bench.arrived()
            await asyncio.sleep(0)
        assert pages == asked


async def test_nonsense_is_refused_and_counted(block: Block) -> None:
    bench = Bench(block)
    with pytest.raises(RemoteProtocolError, match="ram_save_queue_pages no block 'ghost'"):
        bench.server.request("ghost", 0, PAGE)
    bench.near.abort()
    bench.far.close()


async def test_the_background_holds_back_for_touches_here_and_there(block: Block) -> None:
    bench = Bench(block)
    server, share = bench.server, 0
    async with bench.serving():
        assert server.background_pages(CHUNK) == CHUNK
        for step in range(100):
            bench.ask((step + 1) * 611 % PAGES)
            assert server.background_pages(CHUNK) == HURRIED_CHUNK_PAGES, step
            bench.now += HURRY_S / 2
        bench.now += HURRY_S
        assert server.background_pages(CHUNK) == CHUNK, "the burst is over"
        # Who touches without end does not keep it back for longer than it goes on.
        bench.unsent.dirty["heap"].set_all()
        steps = round(4 * BURST_S / (HURRY_S / 2))
        for step in range(steps):
            bench.unsent.dirty["heap"].set((step + 1) * 611 % PAGES)
            bench.ask((step + 1) * 611 % PAGES)
            share += server.background_pages(CHUNK) == HURRIED_CHUNK_PAGES
            bench.now += HURRY_S / 2
            bench.arrived()
            await asyncio.sleep(0)
        assert 0.4 < share / steps < 0.6


async def test_what_comes_next_anyway_is_no_reason_to_hold_back(block: Block) -> None:
    bench = Bench(block)
    async with bench.serving():
        for page in range(0, PAGES, NEAR_PAGES // 2):
            bench.ask(page)
            assert bench.server.background_pages(CHUNK) == CHUNK
