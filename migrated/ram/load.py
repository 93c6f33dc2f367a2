"""The "ram" handler's receiving half: records become pages of the declared blocks.

The rule of the file: **a page's received bit is set after the page is placed**, and nothing runs before every page of
every announced block was received: what was in a block before is overwritten, or is a hole again (`ram.arrivals`).

Postcopy: once the stream is advised of it, the workloads' mappings catch touches of missing pages. From `listen` on
pages are placed through those (`ram.place`), and no page that is missing is read or written here. Pages that are zero
stay holes until somebody touches them.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from migrated.errors import KernelError, MigratedError, RemoteProtocolError
from migrated.kernel import userfault
from migrated.kernel.memory import data_extents
from migrated.model.bitmap import consecutive
from migrated.model.faults import FaultFigures
from migrated.model.ramblock import RamBlock, check_block_list
from migrated.model.stats import RamStats
from migrated.ram.arrivals import Arrivals
from migrated.ram.fault_service import FaultService
from migrated.ram.holes import make_holes, punch
from migrated.ram.host_pages import HostPages
from migrated.ram.landing import BlockLanding, check_doubts
from migrated.ram.multifd_load import MultifdLoad
from migrated.ram.obstacles import can_wait, cannot_wait, huge_pages_unasked
from migrated.ram.place import copy_pages
from migrated.savevm.ports import MachinePort, RamBlockPort, TrackedMapping
from migrated.stream.incoming import IncomingStream
from migrated.wire.ram import (
    PAGE,
    RAM_VERSION,
    BlockList,
    EndOfSection,
    PageDelta,
    PageRun,
    RamEvent,
    RamParser,
    ZeroRun,
)
from migrated.wire.xbzrle import apply_delta

#: One UFFDIO_COPY: long enough that what is done in Python for it hardly counts.
COPY_PAGES = 128
#: The same while threads wait again and again.
URGENT_COPY_PAGES = 16


class RamLoad:
    """State of the "ram" section for one incoming migration at a time."""

    def __init__(
        self,
        machine: MachinePort,
        stats: RamStats,
        attach_timeout_s: Callable[[], float],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.channels = MultifdLoad()
        """For pages alone, where there are some."""
        self._machine = machine
        self._stats = stats
        self._attach_timeout_s = attach_timeout_s
        self._clock = clock
        self.faults: FaultFigures | None = None
        self._service: FaultService | None = None
        self._reset()

    def _reset(self) -> None:
        self._advised = False
        self._started = False
        self._registered: list[TrackedMapping] = []
        self._arrivals: dict[str, Arrivals] = {}
        self._parser = RamParser({})
        self._host_pages = HostPages(self._place_host_page)
        self._scratch = np.empty(0, np.uint8)

    # -- hooks -------------------------------------------------------------------------------------------------

    async def load_setup(self, f: IncomingStream, opaque: Any) -> None:
        """Forget the last load."""
        self._reset()
        self.faults = None
        self._scratch = np.empty(COPY_PAGES * PAGE, np.uint8)

    async def load_state(self, f: IncomingStream, opaque: Any, version_id: int) -> None:
        """Place every record of one section."""
        if version_id != RAM_VERSION:
            raise RemoteProtocolError(
                "the ram section has another version", section="ram", expected=str(RAM_VERSION), found=str(version_id)
            )
        await self._load(f)
        await self.channels.sync()

    async def _load(self, f: IncomingStream) -> None:
        while not await self._load_some(f, self._parser, self._host_pages):
            if not f.peek():
                await f.fill()

    async def _load_some(self, f: IncomingStream, parser: RamParser, host_pages: HostPages) -> bool:
        """Place what is buffered; True at the end of a section."""
        while True:
            events, used = parser.parse(f.peek())
            done = False
            for event in events:
                done = await self._take(event, host_pages)
            f.consume(used)
            if used:
                return done
            await f.fill()

    async def load_cleanup(self, opaque: Any) -> None:
        """Let go of buffers and bitmaps. A machine that runs keeps its registrations: who waits must not read zeros."""
        if self._service is not None:
            self._service.stop()
            self._service = None
        if not self._started:
            self._unregister()
        self._reset()

    # -- for the engine ----------------------------------------------------------------------------------------

    def check_complete(self) -> None:
        """Raise RemoteProtocolError unless every page of every block of the machine has arrived."""
        missing = []
        for block in self._machine.ram_blocks():
            arrivals = self._arrivals.get(block.name)
            pages = block.size_bytes // PAGE
            if left := pages - (arrivals.count if arrivals else 0):
                missing.append(f"{block.name}: {left} of {pages} pages")
        if missing:
            raise RemoteProtocolError(
                "the stream ended before all memory had arrived", section="ram", found="missing " + "; ".join(missing)
            )
        check_doubts(self._arrivals)

    # -- postcopy ----------------------------------------------------------------------------------------------

    def obstacles(self) -> list[MigratedError]:
        """Return what stands against postcopy: huge pages that come unasked, mappings that cannot wait for pages."""
        huge = huge_pages_unasked()
        mappings = {m.workload: m for block in self._machine.ram_blocks() for m in block.mappings if not can_wait(m)}
        return [*([huge] if huge else []), *map(cannot_wait, mappings.values())]

    def advise(self, page_sizes: int) -> None:
        """Catch touches of missing pages as soon as there are blocks. Raises KernelError."""
        if (huge := huge_pages_unasked()) is not None:
            raise huge
        self._advised = True
        self._parser.says_page_sizes = page_sizes != PAGE

    async def discard(self, block: str, ranges: Sequence[tuple[int, int]]) -> None:
        """Drop pages that arrived, or may have."""
        arrivals = self._arrivals_of(block)
        size = arrivals.block.size_bytes
        for start, length in ranges:
            if start % arrivals.block.page_size or length % arrivals.block.page_size or start + length > size:
                raise RemoteProtocolError(
                    f"discard of a wrong range of RAM block {block}",
                    expected=f"whole pages below {size:#x}",
                    found=f"{length:#x} bytes from {start:#x}",
                )
        if not arrivals.count:
            return  # emptied when it was announced, and nobody has touched it since
        await asyncio.to_thread(punch, arrivals.block, ranges)
        for start, length in ranges:
            arrivals.remove(start // PAGE, (start + length) // PAGE)

    def listen(self, request: Callable[[str, int, int], None]) -> None:
        """Serve faults from here on. Whoever maps a block now would read what is missing as zeros: nobody may."""
        check_doubts(self._arrivals)
        self._machine.bar("its machine runs, and a part of its memory has not arrived")
        blocks = [arrivals.block for arrivals in self._arrivals.values()]
        self._service = FaultService(blocks, self._is_received, request, self._clock)
        self.faults = self._service.figures
        self._service.start()
        self.channels.listen()

    async def load_urgent(self, f: IncomingStream) -> None:
        """Place what was requested: whole pages where they arrive, whatever else there is in its turn."""
        f.section = "requested pages"
        parser, host_pages = self._new_parser(), HostPages(self._place_host_page)

        def place(buf: memoryview) -> int:
            placed, address = 0, f.front_address
            while (record := parser.parse_page(buf, placed)) is not None:
                name, page, body = record
                if self._arrivals[name].host_pages > 1:
                    break  # a part of one
                self._place_one(self._arrivals[name], page, address + body)
                placed = body + PAGE
            return placed

        done = False
        while not done:
            await f.take_at_once(place)
            done = await self._load_some(f, parser, host_pages)

    def _place_one(self, arrivals: Arrivals, page: int, source: int) -> None:
        """Place the page that lies at address ``source``, and let go on who waited for it."""
        assert self._service is not None
        woken = copy_pages(arrivals.block, page, source, 1, arrivals.has)
        arrivals.add_page(page)
        self._service.placed_page(arrivals.block.name, page, woken)
        self._account(1)

    def _place_host_page(self, arrivals: Arrivals, first: int, data: NDArray[np.uint8] | None) -> None:
        """Place a whole huge page; None for zeros, which stay a hole until they are touched."""
        end = first + arrivals.host_pages
        if data is not None:
            self._copy(arrivals, first, data)
            self._account(end - first)
            return
        assert self._service is not None
        arrivals.add_holes(np.arange(first, end))
        self._service.placed_holes(arrivals.block.name)
        self._stats.duplicate += end - first

    def _new_parser(self) -> RamParser:
        return RamParser({name: arrivals.block.size_bytes for name, arrivals in self._arrivals.items()})

    def started(self) -> None:
        """The machine runs here."""
        self._started = True

    def reconnected(self) -> None:
        """Forget what was half received on the connection that broke."""
        self._parser = self._new_parser()
        self._host_pages = HostPages(self._place_host_page)

    def request_again(self) -> None:
        """Ask again for what somebody waits for."""
        if self._service is not None:
            self._service.request_again()

    def received(self, block: str) -> bytes:
        """Return the received bitmap of a block."""
        return self._arrivals_of(block).received.to_bytes()

    async def finish(self) -> None:
        """Stop serving: every page is here. Twice does no harm."""
        self.check_complete()
        if self._service is not None:
            self._service.stop()
            self._service = None
        self._unregister()

    def _arrivals_of(self, block: str) -> Arrivals:
        if block not in self._arrivals:
            raise RemoteProtocolError(f"Can't find block {block}", expected=", ".join(self._arrivals), found=block)
        return self._arrivals[block]

    def _is_received(self, block: str, page: int) -> bool:
        return self._arrivals[block].has(page)

    def _register(self, block: RamBlockPort) -> None:
        for mapping in block.mappings:
            if not can_wait(mapping):
                raise cannot_wait(mapping)
            userfault.register(mapping.userfault, mapping.address, mapping.length, userfault.MODE_MISSING)
            self._registered.append(mapping)

    def _unregister(self) -> None:
        if self._registered:
            self._machine.bar("")
        registered, self._registered = self._registered, []
        for mapping in registered:
            with contextlib.suppress(KernelError):  # gone, and its registration with it
                userfault.unregister(mapping.userfault, mapping.address, mapping.length)

    # -- inside ------------------------------------------------------------------------------------------------

    async def _take(self, event: RamEvent, host_pages: HostPages) -> bool:
        match event:
            case PageRun() | ZeroRun() if self._service is not None and self._arrivals[event.block].host_pages > 1:
                host_pages.take(self._arrivals[event.block], event)
            case PageRun():
                await self._place_pages(event)
            case ZeroRun():
                await self._place_zeros(event)
            case PageDelta():
                self._apply(event)
            case BlockList():
                await self._accept_blocks(event)
            case EndOfSection():
                return True
        return False

    async def _accept_blocks(self, announced: BlockList) -> None:
        names = [name for name, _ in announced.blocks]
        await self._machine.wait_declared(names, [], self._attach_timeout_s())
        local = {block.name: block for block in self._machine.ram_blocks()}
        here = [RamBlock(b.name, b.size_bytes, b.page_size) for b in local.values()]
        check_block_list(announced.blocks, here, announced.page_sizes if self._advised else None)
        self._stats.total = announced.total
        for name in names:
            block = local[name]
            if self._advised:
                self._register(block)
            self._arrivals[name] = await asyncio.to_thread(self._make_room, block)
        self._parser.blocks = dict(announced.blocks)
        self.channels.accept(self._parser.blocks, BlockLanding(self._arrivals, self._account))

    def _make_room(self, block: RamBlockPort) -> Arrivals:
        """Have a block ready for what arrives. Memory that is there is kept to be overwritten: new one costs more.

        In postcopy everything has to be missing, and huge pages cannot be given back in part.
        """
        arrivals = Arrivals(block)
        if self._advised or block.page_size > PAGE:
            punch(block, [(0, block.size_bytes)])
        else:
            arrivals.keep(data_extents(block.memfd, 0, block.size_bytes))
        return arrivals

    async def _place_pages(self, run: PageRun) -> None:
        if self._service is None:
            self._arrivals[run.block].land(run.pages, run.data)
            self._account(len(run.pages))
            return
        for start, end in consecutive(run.pages):
            await self._copy_run(self._arrivals[run.block], int(run.pages[start]), run.data[start:end])
        self._account(len(run.pages))

    def _apply(self, event: PageDelta) -> None:
        arrivals = self._arrivals[event.block]
        if self._service is not None or not arrivals.has(event.page):
            raise RemoteProtocolError(
                f"an XBZRLE page for page {event.page} of block {event.block}",
                section="ram",
                expected="one for a page that has arrived, before postcopy",
                found="one in postcopy" if self._service is not None else "one for a page that has not",
            )
        apply_delta(event.delta, arrivals.block.pages[event.page])
        arrivals.add_page(event.page)
        self._stats.transferred += len(event.delta)

    def _account(self, pages: int) -> None:
        self._stats.normal += pages
        self._stats.transferred += pages * PAGE

    async def _copy_run(self, arrivals: Arrivals, page: int, data: NDArray[np.uint8]) -> None:
        """Place a run in a machine that listens or runs."""
        assert self._service is not None
        start = 0
        while start < len(data):
            hurries = self._service.hurries
            limit = URGENT_COPY_PAGES if hurries else COPY_PAGES
            part = data[start : start + limit]
            flat = self._scratch[: len(part) * PAGE].reshape(-1, PAGE)
            np.copyto(flat, part)
            self._copy(arrivals, page + start, flat)
            start += len(part)
            if hurries or len(part) == limit:
                await asyncio.sleep(0)  # an urgent page may have come on its own connection

    def _copy(self, arrivals: Arrivals, page: int, data: NDArray[np.uint8]) -> None:
        """Place contiguous pages, and let go on who waited for them."""
        assert self._service is not None
        source: int = data.__array_interface__["data"][0]
        woken = copy_pages(arrivals.block, page, source, len(data), arrivals.has)
        arrivals.add_run(page, page + len(data))
        self._service.placed_run(arrivals.block.name, page, page + len(data), woken)

    async def _place_zeros(self, run: ZeroRun) -> None:
        arrivals = self._arrivals[run.block]
        if self._service is not None:
            if run.fill:
                for page in run.pages.tolist():
                    await self._copy_run(arrivals, page, np.full((1, PAGE), run.fill, np.uint8))
            else:
                arrivals.add_holes(run.pages)
                self._service.placed_holes(run.block)
        elif run.fill:
            # QEMU 7.2 loads any fill byte, though nobody sends one but 0.
            arrivals.block.pages[run.pages] = run.fill
            arrivals.add_pages(run.pages)
        else:
            if len(stale := arrivals.take_stale(run.pages)):
                await asyncio.to_thread(make_holes, arrivals.block, stale)
            arrivals.add_holes(run.pages)
        self._stats.duplicate += len(run.pages)
