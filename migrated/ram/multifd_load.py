"""Pages that come over channels of their own (multifd), and where they wait for each other.

The rule of the file: a channel whose SYNC has come is not read until all of them have theirs and the main stream has
said that its section ends; so what comes later can never be overwritten by what came before.

Each channel has a thread, which receives, unpacks, puts pages into the memfd and sums them up; the event loop hears of
it at the SYNC, and only then do they count as arrived. Long runs go from the socket into the memfd through a pipe
(`splice`): one copy, nothing is zeroed before, and no page table is needed. Scattered pages, packed ones and those
under TLS land from a buffer. A page whose sum is another than the source's may have been written to while it was sent:
it is doubted until it comes again.

A channel that breaks or says nonsense ends the migration by an error that names it. From `listen` on it is only
remembered: pages come another way then, and a connection that broke pauses a postcopy. Format: `wire.multifd`.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from migrated.errors import ChannelClosed, ChannelError, ChannelTimeout, MigratedError, RemoteProtocolError
from migrated.kernel.splice import Pipe
from migrated.ram.arrivals import Part
from migrated.ram.page_read import long_runs
from migrated.savevm.ports import RamBlockPort
from migrated.transport.blocking import BlockingSocket, blocking
from migrated.transport.channel import SocketChannel
from migrated.transport.thread import in_own_thread
from migrated.wire.multifd import (
    PACKED_MAX_BYTES,
    PACKET_BYTES,
    PACKET_PAGES,
    PLAIN,
    QEMU_FORM,
    Form,
    Head,
    PacketFlag,
    form_of,
    page_sums,
    parse_count,
    parse_head,
)
from migrated.wire.packing import Unpacker, unpackers
from migrated.wire.ram import PAGE, PageRun


class Landing(Protocol):
    """Where pages belong."""

    def block(self, name: str) -> RamBlockPort:
        """Return a block by its name."""

    def put(self, run: PageRun) -> list[Part]:
        """Put pages into memory; return them for `arrived`. Called in any thread. Raises KernelError."""

    def arrived(self, block: str, part: Part) -> None:
        """Count pages that were put there. Called on the event loop."""

    def doubt(self, block: str, pages: NDArray[np.int64]) -> None:
        """Count on it that these, which have arrived, come again. Called on the event loop."""


@dataclass(frozen=True, slots=True)
class _Terms:
    """What holds for all channels."""

    methods: Sequence[PacketFlag]
    form: Form
    syncs_in_postcopy: bool


class _Nowhere:
    """A Landing before blocks are known: a packet with pages is refused before it comes here."""

    def block(self, name: str) -> RamBlockPort:
        raise AssertionError(name)

    def put(self, run: PageRun) -> list[Part]:
        raise AssertionError(run.block)

    def doubt(self, block: str, pages: NDArray[np.int64]) -> None:
        raise AssertionError(block)

    def arrived(self, block: str, part: Part) -> None:
        raise AssertionError(block)


@dataclass(slots=True, eq=False)
class _Landed:
    """What one channel brought from one SYNC to the next, by block."""

    parts: list[tuple[str, Part]] = field(default_factory=list)
    doubted: list[tuple[str, NDArray[np.int64]]] = field(default_factory=list)
    """Those of them whose sums are others than at the source."""


class _Reader:
    """One channel, and its thread."""

    def __init__(
        self, number: int, channel: SocketChannel, terms: _Terms, unpacker: Unpacker | None, puts: threading.Lock
    ) -> None:
        self.number = number
        self.channel = channel
        self.blocks: Mapping[str, int] = {}
        self.landing: Landing = _Nowhere()
        self.listens = False
        self._landed = _Landed()
        self.syncs = False
        """True from a SYNC to the next `go_on`."""
        self._terms = terms
        self._unpacker = unpacker
        self._unpacked = np.empty(PACKET_BYTES if unpacker else 0, np.uint8)
        self._head = np.empty(terms.form.head_max_bytes, np.uint8)
        self._raw = np.empty(PACKED_MAX_BYTES if unpacker else PACKET_BYTES, np.uint8)
        self._pipe: Pipe | None = None
        self._puts = puts
        self._go_on = threading.Event()
        self._offset = 0
        """Where in the channel the packet begins that is read."""

    async def run(self, synced: Callable[[], None]) -> None:
        """Receive until the channel ends. ``synced`` is called on the event loop.

        Raises RemoteProtocolError, ChannelError, KernelError.
        """
        loop = asyncio.get_running_loop()
        end = blocking(self.channel)

        def stop() -> None:
            end.interrupt()
            self._go_on.set()

        try:
            await in_own_thread(lambda: self._receive(end, lambda: loop.call_soon_threadsafe(synced)), stop)
        except RemoteProtocolError as error:
            error.section, error.offset = f"multifd channel {self.number}", self._offset
            raise
        except ChannelError as error:
            raise named(error, self.number) from error
        finally:
            end.close()
            if self._pipe is not None:
                self._pipe.close()
            # Whatever still knows this reader: an error in a task group is held in circles with its frames.
            self._head = self._raw = self._unpacked = np.empty(0, np.uint8)
            self._unpacker = None

    def listen(self) -> None:
        """Put no page into memory any more from the return on."""
        with self._puts:
            self.listens = True

    def go_on(self) -> _Landed:
        """Read what is behind the SYNC; return what was put into memory before it."""
        landed, self._landed = self._landed, _Landed()
        self.syncs = False
        self._go_on.set()
        return landed

    # -- in the thread -----------------------------------------------------------------------------------------

    def _receive(self, end: BlockingSocket, synced: Callable[[], object]) -> None:
        while (head := self._receive_head(end)) is not None:
            if head.packed:
                self._receive_packed(end, head)
            else:
                self._receive_pages(end, head)
            self._offset += head.size_bytes
            if head.sync:
                self.syncs = True
                synced()
                # Cleared behind the wait: set before it, by who wants an end, it must not be lost.
                self._go_on.wait()
                self._go_on.clear()

    def _receive_head(self, end: BlockingSocket) -> Head | None:
        form = self._terms.form
        first = form.head_min_bytes
        if not end.fill(self._head[:first].data, idle=True):
            return None
        size = form.head_bytes(parse_count(self._head[:first].data, form, self.number))
        end.fill(self._head[first:size].data, idle=False)
        head = parse_head(self._head[:size].data, self.blocks, self._terms.methods, self.number, form)
        self._offset += size
        return head

    def _receive_packed(self, end: BlockingSocket, head: Head) -> None:
        """Unpack pages, and put them where they belong. Raises RemoteProtocolError, ChannelError, KernelError."""
        assert self._unpacker is not None
        packed = self._raw[: head.size_bytes].data
        end.fill(packed, idle=False)
        pages = self._unpacked[: len(head.pages) * PAGE]
        self._unpacker.unpack(packed, pages.data)
        self._put(head, 0, pages.reshape(-1, PAGE))

    def _receive_pages(self, end: BlockingSocket, head: Head) -> None:
        """Put pages where they belong as they come. Raises RemoteProtocolError, ChannelError, KernelError."""
        if end.pours and (runs := long_runs(head.pages)):
            block = self.landing.block(head.block)
            if block.page_size == PAGE:
                for start, stop in runs:
                    self._pour(end, head, block, start, stop)
                return
        for at in range(0, len(head.pages), PACKET_PAGES):
            rows = self._raw[: min(PACKET_PAGES, len(head.pages) - at) * PAGE]
            end.fill(rows.data, idle=False)
            self._put(head, at, rows.reshape(-1, PAGE))

    def _pour(self, end: BlockingSocket, head: Head, block: RamBlockPort, start: int, stop: int) -> None:
        """Put pages start..stop-1 of a packet, which follow each other, into a block."""
        first = int(head.pages[start])
        pipe = self._pipe = self._pipe or Pipe()

        def put(at: int, count: int) -> None:
            with self._puts:
                self._require_silence()
                pipe.empty_into(block.memfd, first * PAGE + at, count)

        end.pour((stop - start) * PAGE, pipe.entrance, put)
        last = first + stop - start
        self._compare(head, start, block.pages[first:last])
        self._landed.parts.append((head.block, range(first, last)))

    def _put(self, head: Head, start: int, rows: NDArray[np.uint8]) -> None:
        """Put pages of a packet, from the one with number ``start`` on, where they belong."""
        pages = head.pages[start : start + len(rows)]
        self._compare(head, start, rows)
        with self._puts:
            self._require_silence()
            parts = self.landing.put(PageRun(head.block, pages, rows))
        self._landed.parts += [(head.block, part) for part in parts]

    def _require_silence(self) -> None:
        if self.listens:
            raise RemoteProtocolError("pages over a multifd channel", expected="none from LISTEN on")

    def _compare(self, head: Head, start: int, rows: NDArray[np.uint8]) -> None:
        """Compare pages with their sums at the source, where those are known."""
        if head.sums is not None:
            wrong = page_sums(rows) != head.sums[start : start + len(rows)]
            if wrong.any():
                self._landed.doubted.append((head.block, head.pages[start : start + len(rows)][wrong]))


class MultifdLoad:
    """The channels of one incoming migration at a time."""

    def __init__(self) -> None:
        self.end()

    # -- for the engine ----------------------------------------------------------------------------------------

    def end(self) -> None:
        """Forget the channels. Twice does no harm."""
        self._readers: list[_Reader] = []
        self._terms = _Terms((PLAIN,), QEMU_FORM, syncs_in_postcopy=False)
        self._silence_timeout_s: Callable[[], float] = lambda: 0.0
        self._listens = False
        self._landing: Landing = _Nowhere()
        self._broken: MigratedError | None = None
        self._changed = asyncio.Event()

    def begin(
        self,
        channels: Sequence[SocketChannel],
        methods: Sequence[PacketFlag],
        silence_timeout_s: Callable[[], float],
        *,
        checked: bool,
        from_qemu: bool,
    ) -> None:
        """Take pages from these, packed by one of ``methods``. ``checked``: each page has its sum."""
        self._terms = _Terms(methods, form_of(qemu=from_qemu, checked=checked), from_qemu)
        self._silence_timeout_s = silence_timeout_s
        ends: Sequence[Unpacker | None] = unpackers(methods[-1], len(channels)) or [None] * len(channels)
        # Who waits for another one's write into the same memfd spins in the kernel; here it sleeps.
        puts = threading.Lock()
        self._readers = [
            _Reader(number, channel, self._terms, unpacker, puts)
            for number, (channel, unpacker) in enumerate(zip(channels, ends, strict=True))
        ]

    async def receive(self) -> None:
        """Receive until every channel has ended. Raises RemoteProtocolError, ChannelError, which name the channel."""
        async with asyncio.TaskGroup() as group:
            for reader in self._readers:
                group.create_task(self._receive(reader))

    async def _receive(self, reader: _Reader) -> None:
        try:
            await reader.run(self._changed.set)
            # An end between two packets is one in order; whoever still waits for a SYNC says otherwise.
            self._broken = named(ChannelClosed("it ended before its SYNC", peer=reader.channel.peer), reader.number)
        except MigratedError as error:
            self._broken = error
            if not self._listens:
                raise
        finally:
            self._changed.set()

    def received_bytes(self) -> int:
        """Return how much has come over the channels: while that grows, nobody is silent."""
        return sum(reader.channel.bytes_received for reader in self._readers)

    # -- for the handler ---------------------------------------------------------------------------------------

    def accept(self, blocks: Mapping[str, int], landing: Landing) -> None:
        """Take pages of these blocks (name -> bytes) from now on."""
        self._landing = landing
        for reader in self._readers:
            reader.blocks, reader.landing = blocks, landing

    def listen(self) -> None:
        """Pages come another way from now on."""
        self._listens = True
        for reader in self._readers:
            reader.listen()

    async def sync(self) -> None:
        """At the end of a section: wait for the SYNC of every channel, then let all of them go on.

        Raises RemoteProtocolError, ChannelError.
        """
        if not self._readers or (self._listens and not self._terms.syncs_in_postcopy):
            return
        while not all(reader.syncs for reader in self._readers):
            if self._broken is not None:
                raise self._broken
            self._changed.clear()
            await self._wait_changed()
        landed = [reader.go_on() for reader in self._readers]
        # In order, runs of different channels that follow each other are one.
        for block, part in sorted((part for one in landed for part in one.parts), key=_first_page):
            self._landing.arrived(block, part)
        for block, pages in (pages for one in landed for pages in one.doubted):
            self._landing.doubt(block, pages)

    async def _wait_changed(self) -> None:
        """Wait until a channel has its SYNC, or is broken. Raises ChannelTimeout once all are silent."""
        before = -1
        while (received := self.received_bytes()) != before:
            before = received
            try:
                async with asyncio.timeout(self._silence_timeout_s()):
                    await self._changed.wait()
            except TimeoutError:
                continue
            return
        late = next(reader for reader in self._readers if not reader.syncs)
        silent = ChannelTimeout(f"no SYNC within {self._silence_timeout_s():g} s", peer=late.channel.peer)
        raise named(silent, late.number)


def _first_page(landed: tuple[str, Part]) -> int:
    return int(landed[1][0])


def named(error: ChannelError, number: int) -> ChannelError:
    """Return the error of a channel with its number."""
    kind = ChannelTimeout if isinstance(error, ChannelTimeout) else ChannelClosed
    return kind(f"multifd channel {number}: {error.what}", role=f"multifd {number}", peer=error.peer, phase=error.phase)
