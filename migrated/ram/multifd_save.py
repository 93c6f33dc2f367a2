"""Pages over channels of their own (multifd): what the "ram" handler's sending half gives to them, and when they wait.

The rule of the file: a page goes a second time only behind a SYNC, because channels do not wait for each other. So at
the end of each ram section every channel gets one, once all that was given to it has left, and only then the main
stream says that the section ends.

Each channel has a thread, which reads, sums up, packs and sends; the event loop only says which pages, some MiB at a
time, and hears how it went. What a thread does for a page is done where the GIL is free. The content of a packet is
read into a buffer before it is summed up and sent: what the machine writes meanwhile cannot make a checksum wrong, and
the read (`preadv`, without a fault) costs less than the page tables that a view of the mapping needs. Pages that are
zero are told on the main stream, as a QEMU 7.2 does. Format: `wire.multifd`.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from queue import SimpleQueue

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64_digest

from migrated.errors import ChannelError
from migrated.model.packing_choice import JobCost, PackingChoice
from migrated.model.stats import RamStats
from migrated.ram.deltas import Deltas
from migrated.ram.multifd_load import named
from migrated.ram.page_read import read_pages, zero_pages
from migrated.savevm.ports import RamBlockPort
from migrated.stream.outgoing import OutgoingStream
from migrated.transport.blocking import BlockingSocket, blocking
from migrated.transport.channel import SocketChannel
from migrated.transport.thread import in_own_thread
from migrated.wire.multifd import (
    CHECKSUM_AT,
    CHECKSUM_BYTES,
    HEAD_BYTES,
    PACKET_PAGES,
    PLAIN,
    PacketFlag,
    encode_head,
)
from migrated.wire.packing import Packer, packers
from migrated.wire.ram import PAGE
from migrated.wire.ram_encoder import RamEncoder

NO_PAGES = np.empty(0, np.int64)
#: What a thread is given at a time, so that the handing over hardly counts.
JOB_PAGES = 8 * PACKET_PAGES
#: Where the rate is limited, so many jobs of each channel make up what may be sent in a second.
JOBS_PER_SECOND = 80
JOB_MIN_PAGES = 16
#: One that a channel sends, and one that it finds when it has done that.
JOBS_PER_LANE = 2


@dataclass(frozen=True, slots=True, eq=False)
class _Job:
    """Pages of a block to be sent; a SYNC where there is none."""

    block: RamBlockPort | None
    pages: NDArray[np.int64]
    checked: bool
    packs: bool = False


@dataclass(slots=True, eq=False)
class _Done:
    """What became of a job."""

    block: RamBlockPort | None
    zero: list[NDArray[np.int64]]
    """Pages that are for the main stream to tell."""
    normal: int = 0
    sent_bytes: int = 0
    pack_s: float = 0.0
    send_s: float = 0.0

    @property
    def cost(self) -> JobCost:
        return JobCost(self.normal * PAGE, self.sent_bytes, self.pack_s, self.send_s)


class _Packet:
    """A buffer for one packet: its head and its pages, one behind the other."""

    def __init__(self, pages: int = PACKET_PAGES) -> None:
        self.raw = np.empty(HEAD_BYTES + pages * PAGE, np.uint8)
        self.rows = self.raw[HEAD_BYTES:].reshape(-1, PAGE)
        self.block = ""
        self.pages = NO_PAGES

    def read(self, block: RamBlockPort, pages: NDArray[np.int64]) -> NDArray[np.int64]:
        """Read pages as they are at this moment, and keep those that are not zero; return those that are."""
        read_pages(block, pages, self.rows[: len(pages)])
        zero = zero_pages(self.rows[: len(pages)].view(np.uint64))
        self.block, self.pages = block.name, pages
        if not len(zero):
            return NO_PAGES
        keep = np.ones(len(pages), bool)
        keep[zero] = False
        self.pages = pages[keep]
        self.rows[: len(self.pages)] = self.rows[: len(pages)][keep]
        return pages[zero]

    @property
    def size_bytes(self) -> int:
        """How much is to be sent."""
        return HEAD_BYTES + len(self.pages) * PAGE

    @property
    def content(self) -> memoryview:
        """The pages, one behind the other."""
        return self.raw[HEAD_BYTES : self.size_bytes].data

    def sealed(self, flags: PacketFlag, number: int, *, checked: bool, packed: bytes | None = None) -> memoryview:
        """Return what is to be sent, ``packed`` or as it is, with its checksum where the other end looks at that."""
        whole = self.raw[: self.size_bytes]
        if packed is not None:
            whole = np.empty(HEAD_BYTES + len(packed), np.uint8)
            whole[HEAD_BYTES:] = np.frombuffer(packed, np.uint8)
        encode_head(whole, self.block, self.pages, number=number, flags=flags, size_bytes=len(whole) - HEAD_BYTES)
        if checked:
            whole[CHECKSUM_AT : CHECKSUM_AT + CHECKSUM_BYTES] = np.frombuffer(xxh3_64_digest(whole.data), np.uint8)
        return whole.data


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
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()

    def give(self, job: _Job) -> None:
        """Have the thread do something."""
        self.given += 1
        self._jobs.put(job)

    async def run(self, numbers: Iterator[int], done: Callable[[_Lane, _Done], None]) -> None:
        """Do what is given until this is cancelled. ``done`` is called on the event loop. Raises ChannelClosed."""
        loop = asyncio.get_running_loop()
        end = blocking(self._channel)

        def work() -> None:
            packet = _Packet()
            while (job := self._jobs.get()) is not None:
                report = _Done(job.block, [])
                try:
                    if self.broken is None:
                        self._do(end, packet, job, numbers, report)
                except ChannelError as error:
                    self.broken = named(error, self.number)
                loop.call_soon_threadsafe(done, self, report)

        def stop() -> None:
            self._jobs.put(None)
            if self.given:
                end.interrupt()

        try:
            await in_own_thread(work, stop)
        finally:
            end.close()

    def _do(self, end: BlockingSocket, packet: _Packet, job: _Job, numbers: Iterator[int], report: _Done) -> None:
        """Send what a job says. Raises ChannelError."""
        if job.block is None:
            packet.pages = NO_PAGES
            self._send(end, packet.sealed(PacketFlag.SYNC, next(numbers), checked=job.checked), report)
            return
        for first in range(0, len(job.pages), PACKET_PAGES):
            zero = packet.read(job.block, job.pages[first : first + PACKET_PAGES])
            if len(zero):
                report.zero.append(zero)
            if len(packet.pages):
                flags, packed = PLAIN, None
                if job.packs:
                    flags, packed = self._method, self._pack(packet, report)
                data = packet.sealed(flags, next(numbers), checked=job.checked, packed=packed)
                self._send(end, data, report)
                report.normal += len(packet.pages)

    def _pack(self, packet: _Packet, report: _Done) -> bytes:
        assert self._packer is not None
        began = time.monotonic()
        packed = self._packer.pack(packet.content)
        report.pack_s += time.monotonic() - began
        return packed

    def _send(self, end: BlockingSocket, data: memoryview, report: _Done) -> None:
        began = time.monotonic()
        end.send(data)
        report.send_s += time.monotonic() - began
        report.sent_bytes += len(data)


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
        self._encoder = RamEncoder()
        self._done: list[_Done] = []
        """What has become of jobs, and was not told yet."""
        self._changed = asyncio.Event()

    def begin(self, channels: Sequence[SocketChannel], methods: Sequence[PacketFlag], level: int) -> None:
        """Send over these from the next setup on, packed by one of ``methods``."""
        method = methods[-1]
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

    def _take_back(self, lane: _Lane, done: _Done) -> None:
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
            return JOB_PAGES
        share = int(limit_bps / JOBS_PER_SECOND) // (len(self._lanes) * PAGE)
        return min(max(share, JOB_MIN_PAGES), JOB_PAGES)

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
        lane.give(_Job(block, pages, f.checks, packs))
        if self._done:
            await self._tell(f)

    async def sync(self, f: OutgoingStream) -> None:
        """Have every channel wait at the other end, behind all that was given to it. Raises ChannelError."""
        await self._finish(f)
        for lane in self._lanes:
            lane.give(_Job(None, NO_PAGES, f.checks))
        await self._finish(f)

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


def _given(lane: _Lane) -> int:
    return lane.given
