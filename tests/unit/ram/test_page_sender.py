"""Pages as records: the same bytes, whether a channel copies them or has them made where they belong."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest

from migrated.model.stats import BandwidthMeter, RamStats
from migrated.ram.page_sender import PageSender
from migrated.stream.outgoing import OutgoingStream
from migrated.wire.ram import PAGE, PageRun, RamParser, ZeroRun
from tests.support.channel import MemoryChannel
from tests.support.memory_block import Block, memory_block

PAGES = 64
#: Room for all of them, heads included.
CHUNK_BYTES = (PAGES + 1) * PAGE
#: No record fits into it a whole number of times.
ROOM_BYTES = 5 * PAGE + 1000


class LendingChannel(MemoryChannel):
    """A channel that collects bytes in buffers of its own, and lends what is left of one."""

    def __init__(self) -> None:
        super().__init__()
        self.lent = 0
        """Bytes that were put where they belong."""
        self._buffer = memoryview(bytearray(ROOM_BYTES))
        self._filled = 0

    async def send(self, data: bytes | bytearray | memoryview) -> None:
        rest = memoryview(data)
        while rest:
            room = self.room()
            count = min(len(rest), len(room))
            room[:count], rest = rest[:count], rest[count:]
            self._take(count)

    def room(self) -> memoryview:
        return self._buffer[self._filled :]

    async def fill(self, count: int) -> None:
        self.lent += count
        self._take(count)

    def _take(self, count: int) -> None:
        self.sent += self._buffer[self._filled : self._filled + count]
        self._filled = (self._filled + count) % ROOM_BYTES


@pytest.fixture
def block() -> Iterator[Block]:
    with memory_block(PAGES) as block:
        for page in range(PAGES):
            if page % 7 or page > 40:
                os.pwrite(block.memfd, os.urandom(PAGE), page * PAGE)
        yield block


async def sent(channel: MemoryChannel, block: Block) -> bytes:
    stats = RamStats()
    sender = PageSender(stats, CHUNK_BYTES)
    accounted = 0

    def account(count: int) -> None:
        nonlocal accounted
        accounted += count

    f = OutgoingStream(channel, BandwidthMeter(), on_sent=account)
    f.put_buffer(b"head")
    await sender.send_run(f, block, 0, 48)
    await sender.send(f, block, np.array([50, 52, 60, 61]))
    await sender.send_run(f, block, 53, 1)
    await f.drain()
    assert accounted == f.position == len(channel.sent)
    assert (stats.normal, stats.duplicate) == (48 - 6 + 5, 6)
    return bytes(channel.sent)


async def test_records_are_made_where_they_belong(block: Block) -> None:
    lending = LendingChannel()
    lent, copied = await sent(lending, block), await sent(MemoryChannel(), block)
    assert lending.lent > 20 * PAGE
    # Zero pages come behind those they were read with, which are fewer where the room is small.
    assert sorted(_records(lent)) == sorted(_records(copied))


async def test_the_same_bytes_where_no_page_is_zero(block: Block) -> None:
    for page in range(PAGES):
        os.pwrite(block.memfd, bytes([page + 1]) * PAGE, page * PAGE)
    streams = []
    for channel in (LendingChannel(), MemoryChannel()):
        f = OutgoingStream(channel, BandwidthMeter())
        await PageSender(RamStats(), CHUNK_BYTES).send_run(f, block, 0, PAGES)
        streams.append(bytes(channel.sent))
    assert streams[0] == streams[1]
    assert len(streams[0]) == PAGES * (8 + PAGE) + 1 + len("heap")


def _records(stream: bytes) -> list[bytes]:
    """The pages in a stream, each with its number."""
    events, used = RamParser({"heap": PAGES * PAGE}).parse(memoryview(stream)[len(b"head") :])
    assert used == len(stream) - len(b"head")
    found = []
    for event in events:
        match event:
            case PageRun():
                found += [
                    int(page).to_bytes(8, "big") + bytes(body)
                    for page, body in zip(event.pages, event.data, strict=True)
                ]
            case ZeroRun():
                found += [int(page).to_bytes(8, "big") for page in event.pages]
    return found
