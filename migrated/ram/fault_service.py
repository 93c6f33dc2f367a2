"""The fault service: a workload's touch of a page that is still at the source becomes one request to it.

The rule of the file: a thread that waits is never forgotten and never woken to zeros. A fault on a page that was
received is answered here (it is a hole that was announced as zero, or was placed in between); any other page is asked
for once, however many threads and processes wait for it, and all of them are woken when it was placed.

    fault -> received: answer here | asked for already: join | else: ask
    placed -> latency recorded, waiters in other processes woken

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
from migrated.savevm.ports import RamBlockPort, TrackedMapping
from migrated.wire.ram import PAGE

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
        self._ranges: dict[int, list[tuple[int, TrackedMapping, str]]] = {}
        for block in blocks:
            for mapping in block.mappings:
                self._ranges.setdefault(mapping.userfault, []).append((mapping.address, mapping, block.name))
        for ranges in self._ranges.values():
            ranges.sort(key=lambda entry: entry[0])
        self._waiting: dict[str, dict[int, _Waiting]] = {block.name: {} for block in blocks}
        self._addresses = {
            (fd, name): mapping.address for fd, ranges in self._ranges.items() for _, mapping, name in ranges
        }
        self._blocked = _Blocktime()
        self.figures = FaultFigures()
        self._serving = False

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
                self._request(block, page * PAGE, PAGE)

    @property
    def waiting(self) -> int:
        """How many pages are asked for and not here."""
        return sum(map(len, self._waiting.values()))

    # -- faults ------------------------------------------------------------------------------------------------

    def _readable(self, fd: int) -> None:
        try:
            faults = userfault_place.read_faults(fd)
        except KernelError:
            # Its process is gone: the machine learns that from its connection.
            asyncio.get_running_loop().remove_reader(fd)
            return
        now = self._clock()
        for fault in faults:
            ranges = self._ranges[fd]
            base, _, block = ranges[bisect_right(ranges, fault.address, key=lambda entry: entry[0]) - 1]
            self._fault(fd, block, (fault.address - base) // PAGE, fault.thread_id, now)

    def _fault(self, fd: int, block: str, page: int, thread: int, now: float) -> None:
        if self._is_received(block, page):
            self.answer(fd, block, page)
            self.figures.local.add(self._clock() - now)
            return
        self._blocked.enter((fd, thread), now)
        waiting = self._waiting[block].get(page)
        if waiting is None:
            self._waiting[block][page] = waiting = _Waiting(now)
            self.figures.requests += 1
            self._request(block, page * PAGE, PAGE)
        waiting.threads[fd, thread] = now

    def answer(self, fd: int, block: str, page: int) -> None:
        """Let a process go on that touched a page which is here: map it, or the zeros that it is."""
        address = self._addresses[fd, block] + page * PAGE
        try:
            if userfault_place.zeropage(fd, address, PAGE).obstacle:
                # It is here (EEXIST), or cannot be placed just now: who waits looks again, and faults again if need be.
                userfault.wake(fd, address, PAGE)
        except KernelError:
            return  # the process is gone, or has no such mapping any more: nobody waits

    # -- pages -------------------------------------------------------------------------------------------------

    def placed(self, block: str) -> None:
        """Pages of a block were received: let everybody go on who waited for one of them."""
        waiting = self._waiting[block]
        for page in [page for page in waiting if self._is_received(block, page)]:
            self._release(block, page, waiting.pop(page))

    def _release(self, block: str, page: int, waiting: _Waiting) -> None:
        for fd in {fd for fd, _ in waiting.threads}:
            self.answer(fd, block, page)
        now = self._clock()
        for key, since in waiting.threads.items():
            histogram = self.figures.remote if since == waiting.asked_at else self.figures.in_flight
            histogram.add(now - since)
            self._blocked.leave(key, now)
        self.figures.blocktime_s = self._blocked.all_s
        self.figures.blocktime_by_thread_s = self._blocked.by_thread()


class _Blocktime:
    """How long threads stood still: each one, and all of them at once (QEMU's postcopy-blocktime)."""

    def __init__(self) -> None:
        self.all_s = 0.0
        self._since: dict[tuple[int, int], float] = {}
        self._sum: dict[tuple[int, int], float] = {}
        self._all_since = 0.0

    def enter(self, key: tuple[int, int], now: float) -> None:
        self._since[key] = now
        self._sum.setdefault(key, 0.0)
        if len(self._since) == len(self._sum):
            self._all_since = now

    def leave(self, key: tuple[int, int], now: float) -> None:
        since = self._since.pop(key, None)
        if since is None:
            return
        if len(self._since) + 1 == len(self._sum):
            self.all_s += now - self._all_since
        self._sum[key] += now - since

    def by_thread(self) -> list[float]:
        return list(self._sum.values())
