"""Pages that come over channels of their own (multifd), and where they wait for each other.

The rule of the file: a channel whose SYNC has come is not read until all of them have theirs and the main stream has
said that its section ends; so what comes later can never be overwritten by what came before.

A packet lands from where it was received, by one `pwritev` for each run of pages: into memory that nobody has touched
that costs two thirds of receiving into a mapping of it, and into memory that is there it costs no page tables.

A channel that breaks or says nonsense ends the migration by an error that names it. From `listen` on it is only
remembered: pages come another way then, and a connection that broke pauses a postcopy. Format: `wire.multifd`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from xxhash import xxh3_64_digest

from migrated.errors import ChannelClosed, ChannelError, ChannelTimeout, MigratedError, RemoteProtocolError
from migrated.stream.incoming import PATIENCE
from migrated.transport.channel import Channel
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


class _Reader:
    """Packets out of one channel. Reads ahead no more than a head, where it knows how long a packet is."""

    def __init__(self, channel: Channel, silence_timeout_s: Callable[[], float], unpacker: Unpacker | None) -> None:
        self._channel = channel
        self._silence_timeout_s = silence_timeout_s
        self._unpacker = unpacker
        self._unpacked = np.empty(PACKET_BYTES if unpacker else 0, np.uint8)
        self._raw = np.empty(2 * HEAD_BYTES + (PACKED_MAX_BYTES if unpacker else PACKET_BYTES), np.uint8)
        self._view = self._raw.data
        self._end = 0
        self._since = 0.0
        """When the first byte of the packet came that is read."""
        self.offset = 0
        """Where in the channel the packet begins that is read."""

    @property
    def head(self) -> memoryview:
        """The head that `fill` has brought."""
        return self._view[:HEAD_BYTES]

    async def fill(self, count: int) -> bool:
        """Receive until ``count`` bytes of a packet are here; False where the channel ended before the first one.

        Between two packets a channel may be silent for as long as it likes. Raises ChannelError.
        """
        while self._end < count:
            room = self._view[self._end :] if count == HEAD_BYTES else self._view[self._end : count + HEAD_BYTES]
            got = await self._channel.receive_into(room, deadline_s=self._deadline_s())
            if not got:
                if self._end:
                    raise ChannelClosed("it ended within a packet", peer=self._channel.peer, phase="receiving")
                return False
            if not self._end:
                self._since = time.monotonic()
            self._end += got
        return True

    def _deadline_s(self) -> float | None:
        """Return how long the peer may be silent now; a packet has to be whole in time as well."""
        if not self._end:
            return None
        silence_s = self._silence_timeout_s()
        left_s = self._since + PATIENCE * silence_s - time.monotonic()
        if left_s <= 0:
            raise ChannelTimeout(
                f"the peer sends too slowly: not one packet in {PATIENCE * silence_s:g} s", peer=self._channel.peer
            )
        return min(silence_s, left_s)

    def check(self, head: Head) -> None:
        """Compare a packet with its checksum. Raises RemoteProtocolError."""
        whole = self._view[: HEAD_BYTES + head.size_bytes]
        whole[CHECKSUM_AT : CHECKSUM_AT + CHECKSUM_BYTES] = NO_CHECKSUM
        if (found := xxh3_64_digest(whole)) != head.checksum:
            raise RemoteProtocolError(
                "what arrived is not what was sent: it changed on the way",
                expected=f"checksum {head.checksum.hex()}",
                found=found.hex(),
            )

    async def run(self, head: Head) -> PageRun:
        """Return the pages of a packet that is here whole, where they lie; packed ones are unpacked in a thread.

        Raises RemoteProtocolError.
        """
        content = self._raw[HEAD_BYTES : HEAD_BYTES + head.size_bytes]
        if self._unpacker is not None:
            pages = self._unpacked[: len(head.pages) * PAGE]
            await asyncio.to_thread(self._unpacker.unpack, content.data, pages.data)
            content = pages
        return PageRun(head.block, head.pages, content.reshape(-1, PAGE))

    def consume(self, head: Head) -> None:
        """Go on behind a packet."""
        size = HEAD_BYTES + head.size_bytes
        left = self._end - size
        self._view[:left] = self._view[size : self._end]
        self._end = left
        self._since = time.monotonic()
        self.offset += size


class MultifdLoad:
    """The channels of one incoming migration at a time."""

    def __init__(self) -> None:
        self.end()

    # -- for the engine ----------------------------------------------------------------------------------------

    def end(self) -> None:
        """Forget the channels. Twice does no harm."""
        self._channels: Sequence[Channel] = ()
        self._method = PLAIN
        self._unpackers: list[Unpacker] = []
        self._silence_timeout_s: Callable[[], float] = lambda: 0.0
        self._checked = self._syncs_in_postcopy = self._listens = False
        self._blocks: Mapping[str, int] = {}
        self._place: Callable[[PageRun], None] = lambda run: None
        self._waiting: dict[int, asyncio.Future[None]] = {}
        self._broken: MigratedError | None = None
        self._changed = asyncio.Event()

    def begin(
        self,
        channels: Sequence[Channel],
        method: PacketFlag,
        silence_timeout_s: Callable[[], float],
        *,
        checked: bool,
        from_qemu: bool,
    ) -> None:
        """Take pages from these, packed by ``method``. ``checked``: each packet has its checksum."""
        self._channels, self._method = channels, method
        self._unpackers = unpackers(method, len(channels))
        self._silence_timeout_s = silence_timeout_s
        self._checked = checked
        self._syncs_in_postcopy = from_qemu

    async def receive(self) -> None:
        """Receive until every channel has ended. Raises RemoteProtocolError, ChannelError, which name the channel."""
        async with asyncio.TaskGroup() as group:
            for number, channel in enumerate(self._channels):
                group.create_task(self._receive(number, channel))

    def received_bytes(self) -> int:
        """Return how much has come over the channels: while that grows, nobody is silent."""
        return sum(channel.bytes_received for channel in self._channels)

    # -- for the handler ---------------------------------------------------------------------------------------

    def accept(self, blocks: Mapping[str, int], place: Callable[[PageRun], None]) -> None:
        """Take pages of these blocks (name -> bytes) from now on; ``place`` puts them where they belong."""
        self._blocks, self._place = blocks, place

    def listen(self) -> None:
        """Pages come another way from now on."""
        self._listens = True

    async def sync(self) -> None:
        """At the end of a section: wait for the SYNC of every channel, then let all of them go on.

        Raises RemoteProtocolError, ChannelError.
        """
        if not self._channels or (self._listens and not self._syncs_in_postcopy):
            return
        while len(self._waiting) < len(self._channels):
            if self._broken is not None:
                raise self._broken
            self._changed.clear()
            await self._wait_changed()
        waiting, self._waiting = self._waiting, {}
        for future in waiting.values():
            if not future.done():  # cancelled, with its channel
                future.set_result(None)

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
        number = min(set(range(len(self._channels))) - self._waiting.keys())
        silent = ChannelTimeout(f"no SYNC within {self._silence_timeout_s():g} s", peer=self._channels[number].peer)
        raise named(silent, number)

    # -- the channels ------------------------------------------------------------------------------------------

    async def _receive(self, number: int, channel: Channel) -> None:
        unpacker = self._unpackers[number] if self._unpackers else None
        reader = _Reader(channel, self._silence_timeout_s, unpacker)
        try:
            while await reader.fill(HEAD_BYTES):
                head = parse_head(reader.head, self._blocks, self._method, number)
                await reader.fill(HEAD_BYTES + head.size_bytes)
                await self._take(number, reader, head)
            # An end between two packets is one in order; whoever still waits for a SYNC says otherwise.
            self._broken = named(ChannelClosed("it ended before its SYNC", peer=channel.peer), number)
        except ChannelError as error:
            self._fail(named(error, number))
        except RemoteProtocolError as error:
            error.section, error.offset = f"multifd channel {number}", reader.offset
            self._fail(error)
        finally:
            self._changed.set()

    def _fail(self, error: MigratedError) -> None:
        self._broken = error
        if not self._listens:
            raise error

    async def _take(self, number: int, reader: _Reader, head: Head) -> None:
        if self._checked:
            reader.check(head)
        if len(head.pages):
            run = await reader.run(head)
            if self._listens:  # looked at where nothing can come between
                raise RemoteProtocolError("pages over a multifd channel", expected="none from LISTEN on")
            self._place(run)
        reader.consume(head)
        if head.sync:
            self._waiting[number] = released = asyncio.get_running_loop().create_future()
            self._changed.set()
            await released


def named(error: ChannelError, number: int) -> ChannelError:
    """Return the error of a channel with its number."""
    kind = ChannelTimeout if isinstance(error, ChannelTimeout) else ChannelClosed
    return kind(f"multifd channel {number}: {error.what}", role=f"multifd {number}", peer=error.peer, phase=error.phase)
