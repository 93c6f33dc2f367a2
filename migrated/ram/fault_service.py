"""The fault service: a workload's touch of a page that is still at the source becomes one request to it.

The rule of the file: a thread that waits is never forgotten and never woken to zeros. A fault on a page that was
received is answered here (it is a hole that was announced as zero, or was placed in between); any other page is asked
for once, however many threads and processes wait for it, and all of them are woken when it was placed. A huge page is
known by its first target page, and asked for whole.

    fault -> received: answer here | asked for already: join | else: ask
    placed -> waiters in other processes woken, latency recorded

Runs on the event loop: one read takes up to 64 faults, nothing here waits. Figures: `FaultFigures`.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from migrated.errors import KernelError
from migrated.kernel import userfault, userfault_place
from migrated.model.faults import FaultFigures
from migrated.ram.place import place_zeros
from migrated.savevm.ports import RamBlockPort
from migrated.wire.ram import PAGE

#: A program that misses one page misses the next one within a few round trips.
HURRY_S = 0.005
#: Who touches one page after the other meets what comes by itself, and gains nothing if that comes in small pieces.
NEAR_PAGES = 512
#: block name, byte offset, length
Request = Callable[[str, int, int], None]
IsReceived = Callable[[str, int], bool]


@dataclass(slots=True)
class _Waiting:
    """Everybody who waits for one page."""

    asked_at: float
    threads: dict[tuple[int, int], float] = field(default_factory=dict)
    """(userfaultfd, thread) -> when its fault was read."""


class FaultService:
    """Serves the faults of all processes that map ``blocks``, from `start` to `stop`."""

    def __init__(
        self,
        blocks: Sequence[RamBlockPort],
        is_received: IsReceived,
        request: Request,
        clock: Callable[[], float],
    ) -> None:
        self._is_received = is_received
        self._request = request
        self._clock = clock
        self._addresses = {(m.userfault, block.name): m.address for block in blocks for m in block.mappings}
        self._ranges = {fd: self._ranges_of(fd) for fd, _ in self._addresses}
        self._page_sizes = {block.name: block.page_size for block in blocks}
        self._waiting: dict[str, dict[int, _Waiting]] = {block.name: {} for block in blocks}
        self.figures = FaultFigures()
        self._serving = False
        self._hurried_at = -HURRY_S
        self._front = ("", 0)
        """Behind the last page that came by itself."""

    def _ranges_of(self, fd: int) -> tuple[list[int], list[str]]:
        """Return where the blocks begin in a process, ascending, and which those are."""
        ranges = sorted((address, name) for (owner, name), address in self._addresses.items() if owner == fd)
        return [address for address, _ in ranges], [name for _, name in ranges]

    def start(self) -> None:
        """Begin to read faults."""
        self._serving = True
        loop = asyncio.get_running_loop()
        for fd in self._ranges:
            loop.add_reader(fd, self._readable, fd)

    def stop(self) -> None:
        """Read no more. Registrations stay: who waits, waits on. Twice does no harm."""
        if not self._serving:
            return
        self._serving = False
        loop = asyncio.get_running_loop()
        for fd in self._ranges:
            loop.remove_reader(fd)

    def request_again(self) -> None:
        """Ask for everything that somebody still waits for (the link was replaced)."""
        for block, pages in self._waiting.items():
            for page in pages:
                self._request(block, page * PAGE, self._page_sizes[block])

    @property
    def waiting(self) -> int:
        """How many pages are asked for and not here."""
        return sum(map(len, self._waiting.values()))

    @property
    def hurries(self) -> bool:
        """True while somebody waits, or did a moment ago, for a page that does not come next by itself."""
        return self._clock() - self._hurried_at < HURRY_S

    # -- faults ------------------------------------------------------------------------------------------------

    def _readable(self, fd: int) -> None:
        try:
            faults = userfault_place.read_faults(fd)
        except KernelError:
            # Its process is gone: the machine learns that from its connection.
            asyncio.get_running_loop().remove_reader(fd)
            return
        now = self._clock()
        bases, blocks = self._ranges[fd]
        for address, thread, _ in faults:
            index = bisect_right(bases, address) - 1
            block = blocks[index]
            size = self._page_sizes[block]
            self._fault(fd, block, (address - bases[index]) // size * (size // PAGE), thread, now)

    def _fault(self, fd: int, block: str, page: int, thread: int, now: float) -> None:
        if self._is_received(block, page):
            self.answer(fd, block, page)
            self.figures.local.add(self._clock() - now)
            return
        name, front = self._front
        if name != block or abs(page - front) > NEAR_PAGES:
            self._hurried_at = now
        waiting = self._waiting[block].get(page)
        if waiting is None:
            # First of all: the rest is done while the answer comes.
            self._request(block, page * PAGE, self._page_sizes[block])
            self._waiting[block][page] = waiting = _Waiting(now)
            self.figures.requests += 1
        waiting.threads[fd, thread] = now
        self.figures.blocked.enter((fd, thread), now)

    def answer(self, fd: int, block: str, page: int) -> None:
        """Let a process go on that touched a page which is here: map it, or the zeros that it is."""
        address, size = self._addresses[fd, block] + page * PAGE, self._page_sizes[block]
        try:
            if place_zeros(fd, address, size):
                # It is here (EEXIST), or cannot be placed just now: who waits looks again, and faults again if need be.
                userfault.wake(fd, address, size)
        except KernelError:
            return  # the process is gone, or has no such mapping any more: nobody waits

    # -- pages -------------------------------------------------------------------------------------------------

    def placed_page(self, block: str, page: int, woken: int = -1) -> None:
        """A page was received: let everybody go on who waited for it; those of userfaultfd ``woken`` do already."""
        waiting = self._waiting[block].pop(page, None)
        if waiting is None:
            return
        now = self._clock()
        for (fd, thread), since in waiting.threads.items():
            if fd != woken:
                self.answer(fd, block, page)
            histogram = self.figures.remote if since == waiting.asked_at else self.figures.in_flight
            histogram.add(now - since)
            self.figures.blocked.leave((fd, thread), now)

    def placed_run(self, block: str, first: int, end: int, woken: int) -> None:
        """The same of the pages first..end-1, which came by themselves."""
        self._front = block, end
        for page in [page for page in self._waiting[block] if first <= page < end]:
            self.placed_page(block, page, woken)

    def placed_holes(self, block: str) -> None:
        """Pages of a block were announced to be zero: let everybody go on who waited for one of them."""
        for page in [page for page in self._waiting[block] if self._is_received(block, page)]:
            self.placed_page(block, page)
