"""Pages over channels of their own (multifd): what the "ram" handler's sending half gives to them, and when they wait.

The rule of the file: a page goes a second time only behind a SYNC, because channels do not wait for each other. So at
the end of each ram section every channel gets one, once all that was given to it has left, and only then the main
stream says that the section ends.

Each channel has a thread, which looks, sums up, packs and sends (`ram.multifd_sender`); the event loop only says which
pages, some MiB at a time, and hears how it went. What a thread does for a page is done where the GIL is free. Pages
that are zero are told on the main stream, as a QEMU 7.2 does.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from queue import SimpleQueue

import numpy as np
from numpy.typing import NDArray

from migrated.errors import ChannelError
from migrated.model.packing_choice import PackingChoice
from migrated.model.stats import RamStats
from migrated.ram.deltas import Deltas
from migrated.ram.multifd_load import named
from migrated.ram.multifd_sender import NO_PAGES, Done, Job, Sender
from migrated.savevm.ports import RamBlockPort
from migrated.stream.outgoing import OutgoingStream
from migrated.transport.blocking import blocking
from migrated.transport.channel import SocketChannel
from migrated.transport.thread import in_own_thread
from migrated.wire.multifd import LONG_PACKET_PAGES, Form, PacketFlag, form_of
from migrated.wire.packing import Packer, packers
from migrated.wire.ram import PAGE
from migrated.wire.ram_encoder import RamEncoder

#: What a thread is given at a time: as much as takes it so long, so that the handing over hardly counts, and nobody
#: waits long for the end of what is under way.
JOB_S = 0.02
JOB_MIN_PAGES, JOB_MAX_PAGES = 16, LONG_PACKET_PAGES
#: Before it is known how long that takes.
JOB_FIRST_PAGES = 256
#: Where the rate is limited, so many jobs of each channel make up what may be sent in a second.
JOBS_PER_SECOND = 80
#: One that a channel sends, and one that it finds when it has done that.
JOBS_PER_LANE = 2


class _Lane:
    """One channel: its thread, and what that is given."""

    def __init__(self, number: int, channel: SocketChannel, packer: Packer | None, method: PacketFlag) -> None:
        self.number = number
        self.given = 0
        """Jobs that are not done."""
        self.broken: ChannelError | None = None
        self._channel = channel
        self._packer = packer
        self._method = method
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()

    def give(self, job: Job) -> None:
        """Have the thread do something."""
        self.given += 1
        self._jobs.put(job)

    async def run(self, numbers: Iterator[int], done: Callable[[_Lane, Done], None]) -> None:
        """Do what is given until this is cancelled. ``done`` is called on the event loop. Raises ChannelClosed."""
        loop = asyncio.get_running_loop()
        end = blocking(self._channel)

        def work() -> None:
            sender = Sender(end, numbers, self._packer, self._method)
            while (job := self._jobs.get()) is not None:
                report, began = Done(job.block, [], len(job.pages)), time.monotonic()
                try:
                    if self.broken is None:
                        sender.do(job, report)
                except ChannelError as error:
                    self.broken = named(error, self.number)
                report.took_s = time.monotonic() - began
                loop.call_soon_threadsafe(done, self, report)

        def stop() -> None:
            self._jobs.put(None)
            if self.given:
                end.interrupt()

        try:
            await in_own_thread(work, stop)
        finally:
            end.close()


class MultifdSave:
    """The channels of one outgoing migration at a time. Where there are some, it sends as a `PageSender` does."""

    deltas: Deltas | None = None
    """None: a channel carries whole pages."""

    def __init__(self, stats: RamStats, choice: PackingChoice | None = None) -> None:
        self._stats = stats
        self._choice = choice or PackingChoice()
        self.end()

    # -- for the engine ----------------------------------------------------------------------------------------

    def end(self) -> None:
        """Forget the channels. Twice does no harm."""
        self._lanes: list[_Lane] = []
        self._packs = False
        self._to_qemu = True
        self._encoder = RamEncoder()
        self._job_pages = JOB_FIRST_PAGES
        self._done: list[Done] = []
        """What has become of jobs, and was not told yet."""
        self._changed = asyncio.Event()

    def begin(
        self, channels: Sequence[SocketChannel], methods: Sequence[PacketFlag], level: int, *, to_qemu: bool
    ) -> None:
        """Send over these from the next setup on, packed by one of ``methods``."""
        method = methods[-1]
        self._to_qemu = to_qemu
        self._packs = bool(method)
        if len(methods) > 1:
            self._choice.begin(len(channels))
        ends: Sequence[Packer | None] = packers(method, level, len(channels)) or [None] * len(channels)
        pairs = zip(channels, ends, strict=True)
        self._lanes = [_Lane(number, channel, packer, method) for number, (channel, packer) in enumerate(pairs)]

    async def run(self) -> None:
        """Send what there is, until this is cancelled. An error is raised where something is wanted of a channel."""
        numbers = itertools.count(1)
        async with asyncio.TaskGroup() as group:
            for lane in self._lanes:
                group.create_task(lane.run(numbers, self._take_back))

    def _take_back(self, lane: _Lane, done: Done) -> None:
        lane.given -= 1
        self._done.append(done)
        self._changed.set()

    # -- for the handler ---------------------------------------------------------------------------------------

    @property
    def active(self) -> bool:
        """True where pages go over these channels."""
        return bool(self._lanes)

    def capacity(self, f: OutgoingStream, block: RamBlockPort) -> int:
        """Return how many pages of a block `send` takes."""
        if (limit_bps := f.limit_bps) is None:
            return self._job_pages
        share = int(limit_bps / JOBS_PER_SECOND) // (len(self._lanes) * PAGE)
        return min(max(share, JOB_MIN_PAGES), self._job_pages)

    def put_zeros(self, f: OutgoingStream, block: RamBlockPort, pages: NDArray[np.int64]) -> None:
        """Put records that say that pages are zero on the main stream."""
        self._stats.duplicate += len(pages)
        f.put_buffer(self._encoder.zero_run(block.name, pages))

    async def send_run(self, f: OutgoingStream, block: RamBlockPort, first: int, count: int) -> None:
        """Have ``count`` pages that follow each other sent."""
        await self.send(f, block, np.arange(first, first + count))

    async def send(self, f: OutgoingStream, block: RamBlockPort, pages: NDArray[np.int64]) -> None:
        """Have pages read and sent by the channel that has least to do. Raises ChannelError."""
        while (lane := min(self._lanes, key=_given)).given >= JOBS_PER_LANE:
            await self._wait(f)
        packs = self._choice.next_packs(f.limit_bps) if self._choice.active else self._packs
        lane.give(Job(block, pages, self._form(f), packs))
        if self._done:
            await self._tell(f)

    async def sync(self, f: OutgoingStream) -> None:
        """Have every channel wait at the other end, behind all that was given to it. Raises ChannelError."""
        await self._finish(f)
        for lane in self._lanes:
            lane.give(Job(None, NO_PAGES, self._form(f)))
        await self._finish(f)

    def _form(self, f: OutgoingStream) -> Form:
        return form_of(qemu=self._to_qemu, checked=f.checks)

    async def _finish(self, f: OutgoingStream) -> None:
        while any(map(_given, self._lanes)):
            await self._wait(f)
        await self._tell(f)

    async def _wait(self, f: OutgoingStream) -> None:
        """Wait until something is done, and tell it."""
        while not self._done:
            self._changed.clear()
            await self._changed.wait()
        await self._tell(f)

    async def _tell(self, f: OutgoingStream) -> None:
        """Count what was done, and tell of pages that are zero. Raises ChannelError where a channel is broken."""
        done, self._done = self._done, []
        for one in done:
            if one.pages:
                self._job_pages = next_job_pages(self._job_pages, one)
            self._stats.normal += one.normal
            self._stats.multifd_bytes += one.sent_bytes
            f.account(one.sent_bytes)
            if self._choice.active:
                self._choice.took(one.cost)
            for zero in one.zero:
                assert one.block is not None
                self.put_zeros(f, one.block, zero)
        for lane in self._lanes:
            if lane.broken is not None:
                raise lane.broken
        await f.drain()


def next_job_pages(pages: int, done: Done) -> int:
    """Return how many pages the next job is to have, where ``pages`` is what it would have had before this one."""
    fitting = int(done.pages * JOB_S / max(done.took_s, JOB_S / JOB_MAX_PAGES))
    # One that was held up by something else, or had nothing to do, is no rule for the others.
    return min(max(fitting, pages // 2, JOB_MIN_PAGES), 2 * pages, JOB_MAX_PAGES)


def _given(lane: _Lane) -> int:
    return lane.given
