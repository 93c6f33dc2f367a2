"""Pages over channels of their own: what arrives, in which order, and what is said where it does not."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from migrated.errors import ChannelClosed, ChannelError, ChannelTimeout, MigratedError, RemoteProtocolError
from migrated.kernel.memory import STAT_BLOCK_BYTES
from migrated.model.stats import BandwidthMeter, RamStats
from migrated.ram.arrivals import Part
from migrated.ram.multifd_load import MultifdLoad
from migrated.ram.multifd_save import JOB_MAX_PAGES, JOB_MIN_PAGES, JOB_S, MultifdSave, next_job_pages
from migrated.ram.multifd_sender import Done
from migrated.stream.outgoing import OutgoingStream
from migrated.transport.channel import SocketChannel
from migrated.wire.multifd import (
    CHECKED_FORM,
    CHECKSUM_AT,
    PACKET_PAGES,
    PLAIN,
    QEMU_FORM,
    Form,
    PacketFlag,
    encode_head,
    page_sums,
)
from migrated.wire.packing import METHODS
from migrated.wire.ram import PAGE, PageRun, RamParser, ZeroRun
from tests.support.channel import MemoryChannel
from tests.support.memory_block import Block, memory_block

PAGES = 512
HEAD_BYTES = QEMU_FORM.head_max_bytes
BLOCKS = {"heap": PAGES * PAGE}


@pytest.fixture
def block() -> Iterator[Block]:
    """Every fifth page is zero; the others are full of their number."""
    with memory_block(PAGES) as block:
        for page in range(PAGES):
            if page % 5:
                os.pwrite(block.memfd, bytes([page % 255 + 1]) * PAGE, page * PAGE)
        yield block


@pytest.fixture
def memory() -> Iterator[Block]:
    """Where pages arrive: nothing but a hole."""
    with memory_block(PAGES) as block:
        yield block


def used_bytes(block: Block) -> int:
    return os.fstat(block.memfd).st_blocks * STAT_BLOCK_BYTES


class Target:
    """What came, by page, and what was said against it."""

    def __init__(self, memory: Block) -> None:
        self.load = MultifdLoad()
        self.memory = memory
        self.counted: set[int] = set()
        self.doubted: set[int] = set()
        self.error: MigratedError | None = None

    def begin(
        self,
        channels: list[SocketChannel],
        methods: Sequence[PacketFlag] = (PLAIN,),
        *,
        silence_s: float = 5.0,
        checked: bool = False,
        from_qemu: bool = True,
    ) -> None:
        for channel in channels:
            channel.silence_timeout_s = silence_s
        self.load.begin(channels, methods, lambda: silence_s, checked=checked, from_qemu=from_qemu)
        self.load.accept(BLOCKS, self)

    def block(self, name: str) -> Block:
        assert name == "heap"
        return self.memory

    def put(self, run: PageRun) -> list[Part]:
        self.memory.pages[run.pages] = run.data
        return [run.pages]

    def doubt(self, block: str, pages: NDArray[np.int64]) -> None:
        assert block == "heap"
        assert set(pages.tolist()) <= self.counted
        self.doubted |= set(pages.tolist())

    def arrived(self, block: str, part: Part) -> None:
        assert block == "heap"
        self.counted |= {int(page) for page in part}

    @property
    def pages(self) -> dict[int, bytes]:
        """What was put into memory and counts as arrived."""
        return {page: self.memory.pages[page].tobytes() for page in self.counted}

    @property
    def touched(self) -> bool:
        """Whether anything was put into memory."""
        return used_bytes(self.memory) > 0

    async def receive(self) -> None:
        try:
            await self.load.receive()
        except BaseExceptionGroup as group:
            error = group.exceptions[0]
            assert isinstance(error, MigratedError)
            self.error = error


def stream(*, checked: bool = False) -> tuple[OutgoingStream, MemoryChannel]:
    main = MemoryChannel()
    f = OutgoingStream(main, BandwidthMeter())
    if checked:
        f.begin_checksums()
    return f, main


@asynccontextmanager
async def running(*jobs: asyncio.Task[None]) -> AsyncIterator[None]:
    try:
        yield
    finally:
        for job in jobs:
            job.cancel()
        await asyncio.gather(*jobs, return_exceptions=True)


@pytest.fixture
async def pairs() -> AsyncIterator[Pairs]:
    pairs = Pairs()
    yield pairs
    pairs.close()


class Pairs:
    """Connections whose ends are closed with the test."""

    def __init__(self) -> None:
        self._ends: list[SocketChannel | Feed] = []

    def channels(self) -> tuple[SocketChannel, SocketChannel]:
        """Return both ends of one."""
        here, there = (
            SocketChannel(sock, name) for sock, name in zip(socket.socketpair(), ("here", "there"), strict=True)
        )
        self._ends += [here, there]
        return here, there

    def fed(self) -> tuple[Feed, SocketChannel]:
        """Return one end as bytes go in, and the other one."""
        sock, other = socket.socketpair()
        feed, there = Feed(sock), SocketChannel(other, "there")
        self._ends += [feed, there]
        return feed, there

    def close(self) -> None:
        for end in self._ends:
            end.abort()


class Feed:
    """Bytes into a connection, one behind the other, as its other end takes them."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._task: asyncio.Task[None] | None = None

    def __call__(self, data: bytes, *, eof: bool = False) -> None:
        """Send this behind what came before."""
        self._task = asyncio.create_task(self._send(self._task, data, eof=eof))

    async def _send(self, before: asyncio.Task[None] | None, data: bytes, *, eof: bool) -> None:
        if before is not None:
            await before
        with suppress(OSError):  # nobody reads it any more
            await asyncio.get_running_loop().sock_sendall(self._sock, data)
            if eof:
                self._sock.shutdown(socket.SHUT_WR)

    def abort(self) -> None:
        if self._task is not None:
            self._task.cancel()
        self._sock.close()


@pytest.mark.parametrize(("to_qemu", "checked"), [(True, False), (False, False), (False, True)])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("methods", METHODS.values(), ids=METHODS)
async def test_pages_arrive(
    memory: Block,
    block: Block,
    pairs: Pairs,
    channels: int,
    to_qemu: bool,
    checked: bool,
    scattered: bool,
    methods: Sequence[PacketFlag],
) -> None:
    ends = [pairs.channels() for _ in range(channels)]
    stats, target, (f, main) = RamStats(), Target(memory), stream(checked=checked)
    save = MultifdSave(stats)
    save.begin([here for here, _ in ends], methods, 1, to_qemu=to_qemu)
    target.begin([there for _, there in ends], methods, checked=checked, from_qemu=to_qemu)
    memory_bytes = used_bytes(block)
    async with running(asyncio.create_task(save.run()), asyncio.create_task(target.receive())):
        for first in range(0, PAGES, PACKET_PAGES):
            pages = np.arange(first, first + PACKET_PAGES)
            if scattered:
                await save.send(f, block, pages[::2])
                await save.send(f, block, pages[1::2])
            else:
                await save.send_run(f, block, first, PACKET_PAGES)
        await save.sync(f)
        await target.load.sync()
    await f.drain()
    if not scattered:
        assert used_bytes(block) == memory_bytes, "looking at a hole has filled it"
    zero = {page for page in range(PAGES) if page % 5 == 0}
    assert target.error is None
    assert target.pages == {page: block.pages[page].tobytes() for page in range(PAGES) if page not in zero}
    events, _ = RamParser(BLOCKS).parse(memoryview(bytes(main.sent)))
    assert {page for event in events if isinstance(event, ZeroRun) for page in event.pages.tolist()} == zero
    assert (stats.normal, stats.duplicate) == (PAGES - len(zero), len(zero))
    assert stats.multifd_bytes == sum(here.bytes_sent for here, _ in ends) == target.load.received_bytes()


async def test_what_comes_behind_a_sync_waits_for_it(memory: Block, pairs: Pairs) -> None:
    """The same page over two channels: what was sent last stays, whichever channel is faster."""
    (feed, there), (other_feed, other_there) = pairs.fed(), pairs.fed()
    target = Target(memory)
    target.begin([there, other_there])
    async with running(asyncio.create_task(target.receive())):
        feed(packet([7], 1) + sync() + packet([7], 3) + sync())
        other_feed(packet([8], 2) + sync())
        await target.load.sync()
        assert (target.pages[7], target.pages[8]) == (bytes([1]) * PAGE, bytes([2]) * PAGE)
        other_feed(sync())
        await target.load.sync()
        assert target.pages[7] == bytes([3]) * PAGE


@pytest.mark.parametrize(
    ("pages", "had", "took_s", "expected"),
    [
        (1000, 1000, JOB_S, 1000),
        (1000, 1000, JOB_S / 1.5, 1500),
        (1000, 1000, JOB_S / 100, 2000),
        (1000, 1000, 0.0, 2000),
        (1000, 1000, 100 * JOB_S, 500),
        (1000, 10, JOB_S / 100, 1000),
        (JOB_MAX_PAGES, JOB_MAX_PAGES, 0.0, JOB_MAX_PAGES),
        (JOB_MIN_PAGES, JOB_MIN_PAGES, 100 * JOB_S, JOB_MIN_PAGES),
    ],
)
def test_a_thread_is_given_what_takes_it_so_long(pages: int, had: int, took_s: float, expected: int) -> None:
    assert next_job_pages(pages, Done(None, [], had, took_s)) == expected


async def send_all(save: MultifdSave, f: OutgoingStream, block: Block) -> None:
    for first in range(0, PAGES, PACKET_PAGES):
        await save.send_run(f, block, first, PACKET_PAGES)
    await save.sync(f)


async def test_a_channel_that_breaks_is_named_where_something_is_wanted_of_it(
    memory: Block, block: Block, pairs: Pairs
) -> None:
    (good, reads), (broken, gone) = pairs.channels(), pairs.channels()
    gone.abort()
    save, (f, _) = MultifdSave(RamStats()), stream()
    save.begin([good, broken], [PLAIN], 0, to_qemu=False)
    target = Target(memory)
    target.begin([reads])
    async with running(asyncio.create_task(save.run()), asyncio.create_task(target.receive())):
        with pytest.raises(ChannelClosed, match=r"multifd channel 1: Unable to write to socket: .*peer here") as caught:
            await send_all(save, f, block)
    assert caught.value.role == "multifd 1"


def packet(
    pages: list[int], fill: int, flags: PacketFlag = PLAIN, form: Form = QEMU_FORM, sums_of: int | None = None
) -> bytes:
    """Pages full of ``fill``; their sums are those of pages full of ``sums_of``."""
    head = np.empty(form.head_bytes(len(pages)), np.uint8)
    content = np.full((len(pages), PAGE), fill if sums_of is None else sums_of, np.uint8)
    encode_head(head, "heap", np.array(pages, np.int64), form, flags=flags, sums=page_sums(content))
    return head.tobytes() + bytes([fill]) * PAGE * len(pages)


def sync(form: Form = QEMU_FORM) -> bytes:
    return packet([], 0, PacketFlag.SYNC, form)


async def hears(
    memory: Block, data: bytes, *, eof: bool = True, silence_s: float = 5.0, form: Form = QEMU_FORM
) -> Target:
    """Feed one channel, and wait for a SYNC behind it."""
    target, pairs = Target(memory), Pairs()
    feed, channel = pairs.fed()
    target.begin([channel], silence_s=silence_s, checked=form.checked, from_qemu=form is QEMU_FORM)
    feed(data, eof=eof)
    async with running(asyncio.create_task(target.receive())):
        try:
            await target.load.sync()
        except MigratedError as error:
            target.error = target.error or error
    pairs.close()
    return target


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "multifd channel 0: it ended before its SYNC"),
        (packet([1], 1), "multifd channel 0: it ended before its SYNC"),
        (packet([1], 1)[:-1], "multifd channel 0: it ended within a packet"),
        (sync()[:7], "multifd channel 0: it ended within a packet"),
    ],
)
async def test_a_channel_that_ends_too_early(memory: Block, data: bytes, expected: str) -> None:
    target = await hears(memory, data)
    assert isinstance(target.error, ChannelError)
    assert target.error.what == expected


async def test_a_sync_may_be_the_last_thing_of_a_channel(memory: Block) -> None:
    target = await hears(memory, packet([3], 9) + sync())
    assert target.error is None
    assert target.pages == {3: bytes([9]) * PAGE}


async def test_nonsense_is_refused_with_its_place(memory: Block) -> None:
    target = await hears(memory, packet([1], 1) + b"nonsense" * HEAD_BYTES)
    assert isinstance(target.error, RemoteProtocolError)
    assert target.error.what == "multifd: received packet magic 6e6f6e73 expected 11223344"
    assert (target.error.section, target.error.offset) == ("multifd channel 0", HEAD_BYTES + PAGE)


async def test_a_head_without_its_checksum(memory: Block) -> None:
    data = bytearray(packet([1], 1, form=CHECKED_FORM) + sync(CHECKED_FORM))
    data[CHECKSUM_AT] ^= 1
    target = await hears(memory, bytes(data), form=CHECKED_FORM)
    assert isinstance(target.error, RemoteProtocolError)
    assert "it changed on the way" in target.error.what
    assert not target.touched


@pytest.mark.parametrize("pages", [[7], [1, 3, 5], list(range(20, 60)), list(range(PAGES))])
async def test_pages_that_differ_from_their_sums_are_doubted(memory: Block, pages: list[int]) -> None:
    """They lie there, and count as arrived: what is written to while it is sent comes again."""
    good, bad = [9], packet(pages, 3, form=CHECKED_FORM, sums_of=4)
    target = await hears(memory, packet(good, 2, form=CHECKED_FORM) + bad + sync(CHECKED_FORM), form=CHECKED_FORM)
    assert target.error is None
    assert target.doubted == set(pages)
    assert all(target.pages[page] == bytes([3]) * PAGE for page in pages)


async def test_what_is_written_while_it_is_sent_differs_from_its_sum(block: Block, memory: Block, pairs: Pairs) -> None:
    """A page leaves as it is when the kernel gets to it: here that is held back until the page has changed."""
    here, there = pairs.channels()
    # Nothing is read at the other end, so the pages wait in this socket's buffer, where they still belong to the memfd.
    f, _ = stream(checked=True)
    save, target = MultifdSave(RamStats()), Target(memory)
    save.begin([here], [PLAIN], 0, to_qemu=False)
    async with running(asyncio.create_task(save.run())):
        await save.send(f, block, np.arange(1, 17))
        while not here.bytes_sent:
            await asyncio.sleep(0.001)
        os.pwrite(block.memfd, b"new", 6 * PAGE)
        target.begin([there], checked=True, from_qemu=False)
        async with running(asyncio.create_task(target.receive())):
            await save.sync(f)
            await target.load.sync()
    same = {page for page in target.counted if target.pages[page] == block.pages[page].tobytes()}
    assert target.counted == set(range(1, 17)) - {5, 10, 15}
    assert same | {6} == target.counted
    # Whether the socket holds the page itself or a copy of it is the kernel's choice; the sum is of what was there.
    assert target.doubted == ({6} if 6 in same else set())


async def test_pages_behind_listen_are_refused(memory: Block, pairs: Pairs) -> None:
    target, (feed, channel) = Target(memory), pairs.fed()
    target.begin([channel])
    target.load.listen()
    feed(packet([1], 1))
    async with running(asyncio.create_task(target.receive())):
        with pytest.raises(RemoteProtocolError, match="pages over a multifd channel, expected none from LISTEN on"):
            await target.load.sync()
    assert not target.touched
    assert target.error is None, "a connection that breaks now pauses the migration, and does not end it"


async def test_packed_pages_that_are_none(memory: Block, pairs: Pairs) -> None:
    raw = np.empty(HEAD_BYTES, np.uint8)
    encode_head(raw, "heap", np.array([1]), flags=PacketFlag.ZSTD, size_bytes=9)
    target, (feed, channel) = Target(memory), pairs.fed()
    target.begin([channel], [PacketFlag.ZSTD])
    feed(raw.tobytes() + b"not zstd!")
    await target.receive()
    assert isinstance(target.error, RemoteProtocolError)
    assert "packed pages cannot be unpacked (zstd)" in target.error.what
    assert target.error.section == "multifd channel 0"
    assert not target.touched


async def test_no_sync(memory: Block) -> None:
    target = await hears(memory, packet([1], 1), eof=False, silence_s=0.01)
    assert isinstance(target.error, ChannelTimeout)
    assert target.error.what == "multifd channel 0: no SYNC within 0.01 s"


async def test_a_packet_byte_by_byte_is_no_way_to_hold_a_daemon(memory: Block, pairs: Pairs) -> None:
    target, (feed, channel) = Target(memory), pairs.fed()
    target.begin([channel], silence_s=0.05)

    async def trickle() -> None:
        for byte in packet([1], 1):
            feed(bytes([byte]))
            await asyncio.sleep(0.005)

    async with running(asyncio.create_task(trickle())):
        await target.receive()
    assert isinstance(target.error, ChannelTimeout)
    assert "multifd channel 0: the peer sends too slowly" in target.error.what


@given(st.binary(max_size=300), st.lists(st.integers(0, PAGES * PAGE), max_size=2), st.integers(0, 200))
async def test_any_bytes_are_pages_or_refused(noise: bytes, offsets: list[int], count: int) -> None:
    head = bytearray(packet([0], 0)[:HEAD_BYTES])
    head[16:20] = count.to_bytes(4, "big")
    for number, offset in enumerate(offsets):
        head[320 + 8 * number : 328 + 8 * number] = offset.to_bytes(8, "big")
    with memory_block(PAGES) as memory:
        target = await hears(memory, bytes(head) + noise)
        assert target.error is not None
