"""The dirty log where a writer comes late, leaves early, or a look at the log is cancelled."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from migrated.model.bitmap import PageBitmap
from migrated.ram.dirty import DirtyLog
from migrated.savevm.ports import TrackedMapping
from tests.support.memory_block import Block as MemoryBlock
from tests.support.memory_block import memory_block

PAGES = 16
PAGE = 4096
#: A workload without a userfaultfd: its writes are found by comparing pages.
HASHED = TrackedMapping("plain", 0x10000, PAGES * PAGE, -1, -1)


class Block:
    """A RamBlockPort; whoever looks at its memory waits at a gate."""

    name = "heap"
    size_bytes = PAGES * PAGE
    page_size = PAGE

    def __init__(self, memory: MemoryBlock) -> None:
        self.mappings: Sequence[TrackedMapping] = ()
        self._memory = memory
        self.gate = threading.Event()
        self.gate.set()
        self.looking = threading.Event()

    @property
    def memfd(self) -> int:
        self.looking.set()
        self.gate.wait()
        return self._memory.memfd

    @property
    def pages(self) -> NDArray[np.uint8]:
        raise AssertionError("to read a hole in a mapping fills it")

    def write(self, page: int) -> None:
        self._memory.pages[page] = 1

    @property
    def used_bytes(self) -> int:
        return os.fstat(self._memory.memfd).st_blocks * 512


@pytest.fixture
def block() -> Iterator[Block]:
    with memory_block(PAGES) as memory:
        yield Block(memory)


async def test_a_workload_without_userfaultfd_that_comes_late_is_watched_too(block: Block) -> None:
    log, dirty = DirtyLog([block]), PageBitmap(PAGES)
    await log.start()
    block.mappings = [HASHED]
    block.write(3)
    assert await log.sync({"heap": dirty}) == PAGES, "whatever it wrote until now was not seen"
    dirty.clear_all()
    block.write(5)
    await log.sync({"heap": dirty})
    assert dirty.take(0, PAGES)[0].tolist() == [5]
    block.write(7)
    stray = await log.stray_write()
    assert stray is not None
    assert (stray.page, stray.pages) == (7, 1)
    assert block.used_bytes == 3 * PAGE, "holes stay holes"


async def test_one_that_comes_after_the_last_look_counts_as_a_stray_writer(block: Block) -> None:
    log = DirtyLog([block])
    await log.start()
    await log.sync({"heap": PageBitmap(PAGES)})
    block.mappings = [HASHED]
    stray = await log.stray_write()
    assert stray is not None
    assert (stray.workload, stray.pages) == ("plain", PAGES)


async def test_a_cancelled_look_ends_before_the_cancellation_is_delivered(block: Block) -> None:
    """A thread left behind would clear the log of the next migration under its hands."""
    block.mappings = [HASHED]
    log = DirtyLog([block])
    await log.start()
    block.gate.clear()
    block.looking.clear()
    looking = asyncio.create_task(log.sync({"heap": PageBitmap(PAGES)}))
    await asyncio.to_thread(block.looking.wait)
    for _ in range(2):
        looking.cancel()
        await asyncio.wait([looking], timeout=0.05)
        assert not looking.done()
    block.gate.set()
    await asyncio.wait([looking])
    assert looking.cancelled()
