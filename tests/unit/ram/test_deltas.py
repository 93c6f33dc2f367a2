"""Pages that are sent again: what is remembered, and that the other end always gets what was last sent."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from migrated.model.stats import BandwidthMeter, DeltaStats, RamStats
from migrated.ram.deltas import Deltas
from migrated.ram.page_sender import PageSender
from migrated.stream.outgoing import OutgoingStream
from migrated.wire.ram import PAGE, PageDelta, PageRun, RamParser, ZeroRun
from migrated.wire.xbzrle import apply_delta
from tests.support.channel import MemoryChannel
from tests.support.memory_block import Block, memory_block

PAGES = 64


@pytest.fixture
def blocks() -> Iterator[list[Block]]:
    """Two blocks, full of anything but zero."""
    random = np.random.default_rng(1)
    with memory_block(PAGES, "first") as first, memory_block(PAGES, "second") as second:
        for block in (first, second):
            block.pages[:] = random.integers(1, 255, block.pages.shape, np.uint8)
        yield [first, second]


class Pair:
    """A sender with a cache, and the memory at the other end."""

    def __init__(self, blocks: list[Block], cache_pages: int) -> None:
        self.stats, self.ram = DeltaStats(), RamStats()
        self.sender = PageSender(self.ram, (PAGES + 1) * PAGE)
        self.sender.deltas = Deltas(blocks, cache_pages * PAGE, self.stats)
        self.there = {block.name: np.zeros((PAGES, PAGE), np.uint8) for block in blocks}
        self.deltas = 0
        self._channel = MemoryChannel()
        self._f = OutgoingStream(self._channel, BandwidthMeter())
        self._parser = RamParser({block.name: block.size_bytes for block in blocks})
        self._read = 0

    async def send(self, block: Block, *pages: int) -> None:
        """Send pages, and load them there."""
        await self.sender.send(self._f, block, np.array(pages))
        await self._f.drain()
        while self._read < len(self._channel.sent):
            events, used = self._parser.parse(memoryview(bytes(self._channel.sent[self._read :])))
            self._read += used
            for event in events:
                match event:
                    case PageRun():
                        self.there[event.block][event.pages] = event.data
                    case ZeroRun():
                        self.there[event.block][event.pages] = 0
                    case PageDelta():
                        self.deltas += 1
                        apply_delta(event.delta, self.there[event.block][event.page])

    def has(self, block: Block, *pages: int) -> bool:
        return all(np.array_equal(self.there[block.name][page], block.pages[page]) for page in pages)


async def test_what_is_sent_again_is_a_delta(blocks: list[Block]) -> None:
    first, _ = blocks
    pair = Pair(blocks, 2 * PAGES)
    await pair.send(first, *range(PAGES))
    assert (pair.deltas, pair.ram.normal) == (0, PAGES)
    first.pages[3, 100] ^= 1
    first.pages[5] ^= 1  # every byte
    await pair.send(first, *range(PAGES))
    assert pair.has(first, *range(PAGES))
    assert (pair.deltas, pair.ram.normal) == (1, PAGES + 1)
    assert pair.stats == replace(
        pair.stats, pages=PAGES - 1, cache_miss=PAGES, overflow=1, looked_up=2 * PAGES, cache_size=2 * PAGES * PAGE
    )
    assert pair.stats.as_dict()["cache-miss-rate"] == 0.5
    assert 0 < pair.stats.bytes < 50
    assert pair.stats.as_dict()["encoding-rate"] == (PAGES - 1) * PAGE / pair.stats.bytes


async def test_a_page_that_was_zero_in_between_goes_whole(blocks: list[Block]) -> None:
    first, _ = blocks
    pair = Pair(blocks, 2 * PAGES)
    await pair.send(first, 7)
    before = first.pages[7].copy()
    first.pages[7] = 0
    await pair.send(first, 7)
    first.pages[7] = before
    first.pages[7, 0] ^= 1
    await pair.send(first, 7)
    assert pair.has(first, 7)
    assert pair.deltas == 0


@pytest.mark.parametrize("cache_pages", [1, 8, PAGES, 2 * PAGES, 1024])
async def test_small_caches_forget_and_never_mix_up(blocks: list[Block], cache_pages: int) -> None:
    pair = Pair(blocks, cache_pages)
    random = np.random.default_rng(cache_pages)
    for _ in range(30):
        block = blocks[random.integers(2)]
        pages = np.unique(random.integers(0, PAGES, 20))
        for page in pages.tolist():
            if random.integers(8):
                block.pages[page, random.integers(0, PAGE, 3)] = random.integers(256)
            else:
                block.pages[page] = 0
        await pair.send(block, *pages.tolist())
        assert pair.has(block, *pages.tolist())
        assert pair.sender.deltas is not None
        pair.sender.deltas.looked()
    assert pair.stats.cache_miss
    assert pair.deltas or cache_pages == 1


async def test_a_pass_through_more_than_the_cache_holds_keeps_what_is_there(blocks: list[Block]) -> None:
    first, second = blocks
    pair = Pair(blocks, PAGES)
    for _ in range(3):
        for block in blocks:
            block.pages[:, 9] ^= 1
            await pair.send(block, *range(PAGES))
    assert (pair.deltas, pair.ram.normal) == (2 * PAGES, 4 * PAGES)
    assert pair.sender.deltas is not None
    # What is not sent any more loses its place after a while.
    for _ in range(3):
        pair.sender.deltas.looked()
        second.pages[:, 9] ^= 1
        await pair.send(second, *range(PAGES))
    assert pair.deltas == 2 * PAGES
    second.pages[:, 9] ^= 1
    await pair.send(second, *range(PAGES))
    assert pair.deltas == 3 * PAGES
    assert pair.has(first, *range(PAGES))
    assert pair.has(second, *range(PAGES))


async def test_in_the_end_nothing_is_remembered(blocks: list[Block]) -> None:
    first, _ = blocks
    pair = Pair(blocks, PAGES)
    assert pair.sender.deltas is not None
    pair.sender.deltas.keeps = False
    await pair.send(first, 1)
    await pair.send(first, 1)
    assert (pair.ram.normal, pair.stats.cache_miss) == (2, 2)


def test_figures_before_anything_was_sent() -> None:
    stats = DeltaStats()
    stats.count(looked_up=5, known=3, overflow=1)
    stats.reset()
    assert stats == DeltaStats()
    assert stats.as_dict()["cache-miss-rate"] == stats.as_dict()["encoding-rate"] == 0
