"""The "ram" handler's receiving half: records become pages of the declared blocks.

The rule of the file: **a page's received bit is set after the page is placed**, and nothing runs before every page of
every announced block was received. Blocks are emptied when a machine arrives, so untouched memory stays a hole.

Landing: contiguous runs go by ``pwrite`` into the memfd (no fault, no zeroing of what is overwritten anyway), from a
small contiguous scratch buffer that stays in the cache; scattered pages are stored through the daemon's own mapping.
Runs that follow each other are marked received as one: the bits cost as much as the copying, taken 64 at a time.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from migrated.errors import RemoteProtocolError
from migrated.kernel.memory import punch_hole
from migrated.model.bitmap import PageBitmap
from migrated.model.ramblock import RamBlock, check_block_list
from migrated.model.stats import RamStats
from migrated.savevm.ports import MachinePort, RamBlockPort
from migrated.stream.incoming import IncomingStream
from migrated.wire.ram import PAGE, RAM_VERSION, BlockList, EndOfSection, PageRun, RamEvent, RamParser, ZeroRun

#: Below this mean length, single pages are stored through the mapping instead of one pwrite per run.
SHORT_RUN_PAGES = 8
SCRATCH_PAGES = 256


class RamLoad:
    """State of the "ram" section for one incoming migration at a time."""

    def __init__(self, machine: MachinePort, stats: RamStats, attach_timeout_s: Callable[[], float]) -> None:
        self._machine = machine
        self._stats = stats
        self._attach_timeout_s = attach_timeout_s
        self._reset()

    def _reset(self) -> None:
        self._arrivals: dict[str, _Arrivals] = {}
        self._parser = RamParser({})
        self._scratch = np.empty(0, np.uint8)

    # -- hooks -------------------------------------------------------------------------------------------------

    async def load_setup(self, f: IncomingStream, opaque: Any) -> None:
        """Forget the last load."""
        self._reset()
        self._scratch = np.empty(SCRATCH_PAGES * PAGE, np.uint8)

    async def load_state(self, f: IncomingStream, opaque: Any, version_id: int) -> None:
        """Place every record of one section."""
        if version_id != RAM_VERSION:
            raise RemoteProtocolError(
                "the ram section has another version", section="ram", expected=str(RAM_VERSION), found=str(version_id)
            )
        while True:
            events, used = self._parser.parse(f.peek())
            done = False
            for event in events:
                done = await self._take(event)
            f.consume(used)
            if done:
                return
            if not used or not f.peek():
                await f.fill()

    async def load_cleanup(self, opaque: Any) -> None:
        """Let go of buffers and bitmaps."""
        self._reset()

    # -- for the engine ----------------------------------------------------------------------------------------

    def check_complete(self) -> None:
        """Raise RemoteProtocolError unless every page of every block of the machine has arrived."""
        missing = []
        for block in self._machine.ram_blocks():
            arrivals = self._arrivals.get(block.name)
            pages = block.size_bytes // block.page_size
            if left := pages - (arrivals.count if arrivals else 0):
                missing.append(f"{block.name}: {left} of {pages} pages")
        if missing:
            raise RemoteProtocolError(
                "the stream ended before all memory had arrived", section="ram", found="missing " + "; ".join(missing)
            )

    # -- inside ------------------------------------------------------------------------------------------------

    async def _take(self, event: RamEvent) -> bool:
        match event:
            case PageRun():
                await self._place_pages(event)
            case ZeroRun():
                self._place_zeros(event)
            case BlockList():
                await self._accept_blocks(event)
            case EndOfSection():
                return True
        return False

    async def _accept_blocks(self, announced: BlockList) -> None:
        names = [name for name, _ in announced.blocks]
        await self._machine.wait_declared(names, [], self._attach_timeout_s())
        local = {block.name: block for block in self._machine.ram_blocks()}
        check_block_list(announced.blocks, [RamBlock(b.name, b.size_bytes, b.page_size) for b in local.values()])
        self._stats.total = announced.total
        for name in names:
            block = local[name]
            await asyncio.to_thread(punch_hole, block.memfd, 0, block.size_bytes)
            self._arrivals[name] = _Arrivals(block)
        self._parser.blocks = dict(announced.blocks)

    async def _place_pages(self, run: PageRun) -> None:
        arrivals, pages = self._arrivals[run.block], run.pages
        breaks = np.flatnonzero(np.diff(pages) != 1) + 1
        if not len(breaks):
            first = int(pages[0])
            self._write_run(arrivals.block, first, run.data)
            arrivals.add_run(first, first + len(pages))
        elif len(pages) < SHORT_RUN_PAGES * (len(breaks) + 1):
            arrivals.block.pages[pages] = run.data
            arrivals.add_pages(pages)
        else:
            for start, end in zip([0, *breaks.tolist()], [*breaks.tolist(), len(pages)], strict=True):
                self._write_run(arrivals.block, int(pages[start]), run.data[start:end])
            arrivals.add_pages(pages)
        self._stats.normal += len(pages)
        self._stats.transferred += len(pages) * PAGE

    def _write_run(self, block: RamBlockPort, page: int, data: NDArray[np.uint8]) -> None:
        for start in range(0, len(data), SCRATCH_PAGES):
            part = data[start : start + SCRATCH_PAGES]
            flat = self._scratch[: len(part) * PAGE]
            np.copyto(flat.reshape(-1, PAGE), part)
            written = 0
            while written < len(flat):
                written += os.pwrite(block.memfd, flat.data[written:], (page + start) * PAGE + written)

    def _place_zeros(self, run: ZeroRun) -> None:
        arrivals = self._arrivals[run.block]
        if run.fill:
            # QEMU 7.2 loads any fill byte, though nobody sends one but 0.
            arrivals.block.pages[run.pages] = run.fill
            arrivals.add_pages(run.pages)
        else:
            if len(stale := arrivals.stale(run.pages)):
                arrivals.block.pages[stale] = 0
            arrivals.add_holes(run.pages)
        self._stats.duplicate += len(run.pages)


class _Arrivals:
    """What has arrived of one block. Everything is added after it was placed."""

    def __init__(self, block: RamBlockPort) -> None:
        self.block = block
        self._received = PageBitmap(block.size_bytes // PAGE)
        self._with_data = PageBitmap(block.size_bytes // PAGE)
        self._run = range(0)
        """Pages with data that are not in the bitmaps yet."""

    @property
    def count(self) -> int:
        """How many pages have arrived."""
        self._settle()
        return self._received.count

    def add_run(self, start: int, end: int) -> None:
        """Add the pages start..end-1, which hold data."""
        if start != self._run.stop:
            self._settle()
            self._run = range(start, start)
        self._run = range(self._run.start, end)

    def add_pages(self, pages: NDArray[np.int64]) -> None:
        """Add pages that hold data."""
        self._received.set_pages(pages)
        self._with_data.set_pages(pages)

    def add_holes(self, pages: NDArray[np.int64]) -> None:
        """Add pages that are zero."""
        self._received.set_pages(pages)

    def stale(self, pages: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return which of ``pages`` may hold data from before."""
        self._settle()
        return pages[self._with_data.test_pages(pages)]

    def _settle(self) -> None:
        for bitmap in (self._received, self._with_data):
            bitmap.set_range(self._run.start, self._run.stop)
        self._run = range(0)
