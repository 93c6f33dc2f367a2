"""Pages that come over channels of their own (multifd), and where they wait for each other.

The rule of the file: a channel whose SYNC has come is not read until all of them have theirs and the main stream has
said that its section ends; so what comes later can never be overwritten by what came before.

Each channel has a thread, which receives, sums up, unpacks and puts pages into the memfd; the event loop hears of it at
the SYNC, and only then do they count as arrived. A packet lands from where it was received, by one `pwritev` for each
run of pages: into memory that nobody has touched that costs two thirds of receiving into a mapping of it, and into
memory that is there it costs no page tables.

A channel that breaks or says nonsense ends the migration by an error that names it. From `listen` on it is only
remembered: pages come another way then, and a connection that broke pauses a postcopy. Format: `wire.multifd`.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from xxhash import xxh3_64_digest

from migrated.errors import ChannelClosed, ChannelError, ChannelTimeout, MigratedError, RemoteProtocolError
from migrated.ram.arrivals import Part
from migrated.transport.blocking import BlockingSocket, blocking
from migrated.transport.channel import SocketChannel
from migrated.transport.thread import in_own_thread
from migrated.wire.multifd import (
    CHECKSUM_AT,
    CHECKSUM_BYTES,
    HEAD_BYTES,
    PACKED_MAX_BYTES,
    PACKET_BYTES,
    PLAIN,
    Head,
    PacketFlag,
    parse_head,
)
from migrated.wire.packing import Unpacker, unpackers
from migrated.wire.ram import PAGE, PageRun

NO_CHECKSUM = bytes(CHECKSUM_BYTES)


class Landing(Protocol):
    """Where pages belong."""

    def put(self, run: PageRun) -> list[Part]:
        """Put pages into memory; return them for `arrived`. Called in any thread. Raises KernelError."""
        ...

    def arrived(self, block: str, part: Part) -> None:
        """Count pages that were put there. Called on the event loop."""
        ...


@dataclass(frozen=True, slots=True)
class _Terms:
    """What holds for all channels."""

    methods: Sequence[PacketFlag]
    checked: bool
    """Each packet has its checksum."""
    syncs_in_postcopy: bool


class _Nowhere:
    """A Landing before blocks are known: a packet with pages is refused before it comes here."""

    def put(self, run: PageRun) -> list[Part]:
        raise AssertionError(run.block)

    def arrived(self, block: str, part: Part) -> None:
        raise AssertionError(block)


class _Reader:
    """One channel, and its thread."""

    def __init__(self, number: int, channel: SocketChannel, terms: _Terms, unpacker: Unpacker | None) -> None:
        self.number = number
        self.channel = channel
        self.blocks: Mapping[str, int] = {}
        self.landing: Landing = _Nowhere()
        self.listens = False
        self._landed: list[tuple[str, Part]] = []
        self.syncs = False
        """True from a SYNC to the next `go_on`."""
        self._terms = terms
        self._unpacker = unpacker
        self._unpacked = np.empty(PACKET_BYTES if unpacker else 0, np.uint8)
        self._raw = np.empty(HEAD_BYTES + (PACKED_MAX_BYTES if unpacker else PACKET_BYTES), np.uint8)
        self._puts = threading.Lock()
        """Held while pages are put into memory."""
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
            # Whatever still knows this reader: an error in a task group is held in circles with its frames.
            self._raw = self._unpacked = np.empty(0, np.uint8)
            self._unpacker = None

    def listen(self) -> None:
        """Put no page into memory any more from the return on."""
        with self._puts:
            self.listens = True

    def go_on(self) -> list[tuple[str, Part]]:
        """Read what is behind the SYNC; return what was put into memory before it."""
        landed, self._landed = self._landed, []
        self.syncs = False
        self._go_on.set()
        return landed

    # -- in the thread -----------------------------------------------------------------------------------------

    def _receive(self, end: BlockingSocket, synced: Callable[[], object]) -> None:
        head_view = self._raw[:HEAD_BYTES].data
        while end.fill(head_view, idle=True):
            head = parse_head(head_view, self.blocks, self._terms.methods, self.number)
            size = HEAD_BYTES + head.size_bytes
            end.fill(self._raw[HEAD_BYTES:size].data, idle=False)
            if self._terms.checked:
                self._check(head, size)
            if len(head.pages):
                self._put(head)
            self._offset += size
            if head.sync:
                self.syncs = True
                synced()
                # Cleared behind the wait: set before it, by who wants an end, it must not be lost.
                self._go_on.wait()
                self._go_on.clear()

    def _check(self, head: Head, size: int) -> None:
        """Compare a packet with its checksum. Raises RemoteProtocolError."""
        whole = self._raw[:size].data
        whole[CHECKSUM_AT : CHECKSUM_AT + CHECKSUM_BYTES] = NO_CHECKSUM
        if (found := xxh3_64_digest(whole)) != head.checksum:
            raise RemoteProtocolError(
                "what arrived is not what was sent: it changed on the way",
                expected=f"checksum {head.checksum.hex()}",
                found=found.hex(),
            )

    def _put(self, head: Head) -> None:
        """Put the pages of a packet where they belong. Raises RemoteProtocolError, KernelError."""
        content = self._raw[HEAD_BYTES : HEAD_BYTES + head.size_bytes]
        if head.packed:
            assert self._unpacker is not None
            pages = self._unpacked[: len(head.pages) * PAGE]
            self._unpacker.unpack(content.data, pages.data)
            content = pages
        with self._puts:
            if self.listens:
                raise RemoteProtocolError("pages over a multifd channel", expected="none from LISTEN on")
            parts = self.landing.put(PageRun(head.block, head.pages, content.reshape(-1, PAGE)))
        self._landed += [(head.block, part) for part in parts]


class MultifdLoad:
    """The channels of one incoming migration at a time."""

    def __init__(self) -> None:
        self.end()

    # -- for the engine ----------------------------------------------------------------------------------------

    def end(self) -> None:
        """Forget the channels. Twice does no harm."""
        self._readers: list[_Reader] = []
        self._terms = _Terms((PLAIN,), checked=False, syncs_in_postcopy=False)
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
        """Take pages from these, packed by one of ``methods``. ``checked``: each packet has its checksum."""
        self._terms = _Terms(methods, checked, from_qemu)
        self._silence_timeout_s = silence_timeout_s
        ends: Sequence[Unpacker | None] = unpackers(methods[-1], len(channels)) or [None] * len(channels)
        pairs = zip(channels, ends, strict=True)
        self._readers = [
            _Reader(number, channel, self._terms, unpacker) for number, (channel, unpacker) in enumerate(pairs)
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
        landed = [one for reader in self._readers for one in reader.go_on()]
        # In order, runs of different channels that follow each other are one.
        for block, part in sorted(landed, key=_first_page):
            self._landing.arrived(block, part)

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
