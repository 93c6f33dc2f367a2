"""The dirty log where a writer comes late, leaves early, or a look at the log is cancelled."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from migrated.model.bitmap import PageBitmap
from migrated.ram.dirty import DirtyLog
from migrated.savevm.ports import TrackedMapping

PAGES = 16
PAGE = 4096
#: A workload without a userfaultfd: its writes are found by comparing pages.
HASHED = TrackedMapping("plain", 0x10000, PAGES * PAGE, -1, -1)


class Block:
    """A RamBlockPort in this process's own memory."""

    name = "heap"
    size_bytes = PAGES * PAGE
    page_size = PAGE
    memfd = -1

    def __init__(self, *mappings: TrackedMapping) -> None:
        self.mappings: Sequence[TrackedMapping] = mappings
        self.memory = np.zeros((PAGES, PAGE), np.uint8)
        self.gate = threading.Event()
        self.gate.set()
        self.looking = threading.Event()

    @property
    def pages(self) -> NDArray[np.uint8]:
        self.looking.set()
        self.gate.wait()
        return self.memory


async def test_a_workload_without_userfaultfd_that_comes_late_is_watched_too() -> None:
    block = Block()
    log, dirty = DirtyLog([block]), PageBitmap(PAGES)
    await log.start()
    block.mappings = [HASHED]
    block.memory[3] = 1
    assert await log.sync({"heap": dirty}) == PAGES, "whatever it wrote until now was not seen"
    dirty.clear_all()
    block.memory[5] = 1
    await log.sync({"heap": dirty})
    assert dirty.take(0, PAGES)[0].tolist() == [5]
    block.memory[7] = 1
    stray = await log.stray_write()
    assert stray is not None
    assert (stray.page, stray.pages) == (7, 1)


async def test_one_that_comes_after_the_last_look_counts_as_a_stray_writer() -> None:
    block = Block()
    log = DirtyLog([block])
    await log.start()
    await log.sync({"heap": PageBitmap(PAGES)})
    block.mappings = [HASHED]
    stray = await log.stray_write()
    assert stray is not None
    assert (stray.workload, stray.pages) == ("plain", PAGES)


async def test_a_cancelled_look_ends_before_the_cancellation_is_delivered() -> None:
    """A thread left behind would clear the log of the next migration under its hands."""
    block = Block(HASHED)
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
