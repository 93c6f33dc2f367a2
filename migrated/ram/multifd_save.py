"""Pages over channels of their own (multifd): what the "ram" handler's sending half gives to them, and when they wait.

The rule of the file: a page goes a second time only behind a SYNC, because channels do not wait for each other. So at
the end of each ram section every channel gets one, once all that was given to it has left, and only then the main
stream says that the section ends.

The content of a packet is read into a buffer of its own before it is summed up and sent: what the machine writes
meanwhile cannot make a checksum wrong, and the read (`preadv`, without a fault) costs less than the page tables that a
view of the mapping needs. Pages that are zero are told on the main stream, as a QEMU 7.2 does.

A packet goes to the first channel that is idle. What its socket takes at once is sent at once, from a buffer that is
still in the processor's cache; the rest is for the channel's task. There are as many buffers as channels, and one to
read into; whoever has the next packet waits for a channel. Format: `wire.multifd`.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64_digest

from migrated.errors import ChannelError
from migrated.model.bitmap import consecutive
from migrated.model.stats import RamStats
from migrated.ram.deltas import Deltas
from migrated.ram.multifd_load import named
from migrated.ram.page_sender import is_scattered, zero_pages
from migrated.savevm.ports import RamBlockPort
from migrated.stream.outgoing import OutgoingStream
from migrated.transport.channel import Channel, SocketChannel, Turn
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


class _Packet:
    """A buffer for one packet: its head and its pages, one behind the other."""

    def __init__(self, pages: int = PACKET_PAGES) -> None:
        self.raw = np.empty(HEAD_BYTES + pages * PAGE, np.uint8)
        self.rows = self.raw[HEAD_BYTES:].reshape(-1, PAGE)
        self.block = ""
        self.pages = NO_PAGES

    def read(self, block: RamBlockPort, pages: NDArray[np.int64]) -> NDArray[np.int64]:
        """Read pages as they are at this moment, and keep those that are not zero; return those that are."""
        self._read(block, pages)
        zero = zero_pages(self.rows[: len(pages)].view(np.uint64))
        self.block, self.pages = block.name, pages
        if not len(zero):
            return NO_PAGES
        keep = np.ones(len(pages), bool)
        keep[zero] = False
        self.pages = pages[keep]
        self.rows[: len(self.pages)] = self.rows[: len(pages)][keep]
        return pages[zero]

    def _read(self, block: RamBlockPort, pages: NDArray[np.int64]) -> None:
        runs = consecutive(pages)
        if is_scattered(pages, runs):
            self.rows[: len(pages)] = block.pages[pages]
            return
        for start, end in runs:
            rows, first = self.rows[start:end], int(pages[start])
            if os.preadv(block.memfd, [rows.data], first * PAGE) != rows.nbytes:
                rows[:] = block.pages[first : first + len(rows)]

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
    """One channel: what it was given and has not sent yet, if anything."""

    def __init__(self, number: int, channel: Channel, packer: Packer | None) -> None:
        self.number = number
        self.packer = packer
        self._channel = channel
        self._given = asyncio.Event()
        self._rest: memoryview | None = None
        self.packet: _Packet | None = None
        self.broken: ChannelError | None = None

    def give(self, packet: _Packet, rest: memoryview | None) -> None:
        """Have `MultifdSave.run` send the rest of a packet, or pack it first."""
        self.packet, self._rest = packet, rest
        self._given.set()

    async def take(self) -> tuple[_Packet, memoryview | None]:
        """Wait for what is given."""
        await self._given.wait()
        self._given.clear()
        assert self.packet is not None
        (packet, rest), self.packet, self._rest = (self.packet, self._rest), None, None
        return packet, rest

    def send_now(self, data: memoryview) -> int:
        """Send what goes without waiting; return how much that was. Raises ChannelError."""
        try:
            return self._channel.send_now(data) if isinstance(self._channel, SocketChannel) else 0
        except ChannelError as error:
            raise named(error, self.number) from error

    async def send(self, data: memoryview) -> None:
        """Send all of it. Raises ChannelError."""
        try:
            await self._channel.send(data)
        except ChannelError as error:
            raise named(error, self.number) from error


class MultifdSave:
    """The channels of one outgoing migration at a time. Where there are some, it sends as a `PageSender` does."""

    deltas: Deltas | None = None
    """None: a channel carries whole pages."""

    def __init__(self, stats: RamStats) -> None:
        self._stats = stats
        self.end()

    # -- for the engine ----------------------------------------------------------------------------------------

    def end(self) -> None:
        """Forget the channels. Twice does no harm."""
        self._lanes: list[_Lane] = []
        self._idle: list[_Lane] = []
        self._free: list[_Packet] = []
        self._method = PLAIN
        self._encoder = RamEncoder()
        self._number = 0
        self._returned = asyncio.Event()
        self._turn = Turn()
        self._f: OutgoingStream | None = None

    def begin(self, channels: Sequence[Channel], method: PacketFlag, level: int) -> None:
        """Send over these from the next setup on, packed by ``method``."""
        self._method = method
        ends: Sequence[Packer | None] = packers(method, level, len(channels)) or [None] * len(channels)
        self._lanes = [_Lane(number, *both) for number, both in enumerate(zip(channels, ends, strict=True))]
        self._idle = list(self._lanes)
        # One for each channel, and one to read the next pages into.
        self._free = [_Packet() for _ in range(len(channels) + 1)]

    async def run(self) -> None:
        """Send what there is, until this is cancelled. An error is raised where something is wanted of a channel."""
        async with asyncio.TaskGroup() as group:
            for lane in self._lanes:
                group.create_task(self._send_given(lane))

    async def _send_given(self, lane: _Lane) -> None:
        while lane.broken is None:
            packet, rest = await lane.take()
            try:
                await lane.send(rest if rest is not None else await self._packed(lane, packet))
            except ChannelError as error:
                lane.broken = error
            self._free.append(packet)
            self._idle.append(lane)
            self._returned.set()

    async def _packed(self, lane: _Lane, packet: _Packet) -> memoryview:
        assert lane.packer is not None
        assert self._f is not None
        packed = await asyncio.to_thread(lane.packer.pack, packet.content)
        data = packet.sealed(self._method, self._next(), checked=self._f.checks, packed=packed)
        self._account(self._f, len(data))
        return data

    # -- for the handler ---------------------------------------------------------------------------------------

    @property
    def active(self) -> bool:
        """True where pages go over these channels."""
        return bool(self._lanes)

    def capacity(self, block: RamBlockPort) -> int:
        """Return how many pages of a block `send` takes."""
        return PACKET_PAGES

    def put_zeros(self, f: OutgoingStream, block: RamBlockPort, pages: NDArray[np.int64]) -> None:
        """Put records that say that pages are zero on the main stream."""
        self._stats.duplicate += len(pages)
        f.put_buffer(self._encoder.zero_run(block.name, pages))

    async def send_run(self, f: OutgoingStream, block: RamBlockPort, first: int, count: int) -> None:
        """Read ``count`` pages that follow each other, and send them."""
        await self.send(f, block, np.arange(first, first + count))

    async def send(self, f: OutgoingStream, block: RamBlockPort, pages: NDArray[np.int64]) -> None:
        """Read pages and give them to the channel that is free first. Raises ChannelError."""
        packet = self._free.pop()
        zero = packet.read(block, pages)
        if len(packet.pages):
            self._stats.normal += len(packet.pages)
            await self._send(f, packet)
        else:
            self._free.append(packet)
        if len(zero):
            self.put_zeros(f, block, zero)
            await f.drain()

    async def _send(self, f: OutgoingStream, packet: _Packet) -> None:
        self._f = f
        if self._method:
            (await self._idle_lane()).give(packet, None)
            return
        data = packet.sealed(PLAIN, self._next(), checked=f.checks)
        self._account(f, len(data))
        await self._turn.take()
        lane = await self._idle_lane()
        count = lane.send_now(data)
        self._turn.moved(count)
        if count < len(data):
            lane.give(packet, data[count:])
        else:
            self._free.append(packet)
            self._idle.append(lane)

    async def sync(self, f: OutgoingStream) -> None:
        """Have every channel wait at the other end, behind all that was given to it. Raises ChannelError."""
        while len(self._idle) < len(self._lanes):
            await self._wait_returned()
        packet = _Packet(0)
        for lane in self._lanes:
            if lane.broken is not None:
                raise lane.broken
            data = packet.sealed(PacketFlag.SYNC, self._next(), checked=f.checks)
            self._account(f, len(data))
            await lane.send(data)

    def _account(self, f: OutgoingStream, size_bytes: int) -> None:
        f.account(size_bytes)
        self._stats.multifd_bytes += size_bytes

    def _next(self) -> int:
        self._number += 1
        return self._number

    async def _idle_lane(self) -> _Lane:
        while not self._idle:
            await self._wait_returned()
        lane = self._idle.pop(0)
        if lane.broken is not None:
            raise lane.broken
        return lane

    async def _wait_returned(self) -> None:
        self._returned.clear()
        await self._returned.wait()
