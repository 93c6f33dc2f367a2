"""A channel in memory: a real implementer of the channel contract, for tests of what is above it."""

from __future__ import annotations

import asyncio

from migrated.errors import ChannelClosed, ChannelTimeout


class MemoryChannel:
    """One end of a pair; what one end sends, the other receives, in pieces of at most ``cut`` bytes."""

    def __init__(self, peer: str = "memory", *, cut: int = 1 << 20, has_return_path: bool = True) -> None:
        self.peer = peer
        self.has_return_path = has_return_path
        self.bytes_sent = 0
        self.bytes_received = 0
        self.silence_timeout_s = 5.0
        self.sent = bytearray()
        self.other: MemoryChannel | None = None
        self._cut = cut
        self._incoming = bytearray()
        self._eof = False
        self._arrived = asyncio.Event()

    def feed(self, data: bytes, *, eof: bool = False) -> None:
        """Let bytes (and the end) arrive."""
        self._incoming += data
        self._eof |= eof
        self._arrived.set()

    async def send(self, data: bytes | bytearray | memoryview) -> None:
        if self._eof and self.other is None:
            raise ChannelClosed("closed", peer=self.peer)
        self.sent += data
        self.bytes_sent += len(data)
        if self.other is not None:
            self.other.feed(bytes(data))

    async def receive_into(self, view: memoryview, *, deadline_s: float | None = None) -> int:
        while not self._incoming and not self._eof:
            self._arrived.clear()
            try:
                async with asyncio.timeout(deadline_s):
                    await self._arrived.wait()
            except TimeoutError as error:
                raise ChannelTimeout("silent", peer=self.peer) from error
        count = min(len(view), len(self._incoming), self._cut)
        view[:count] = self._incoming[:count]
        del self._incoming[:count]
        self.bytes_received += count
        return count

    def shutdown_write(self) -> None:
        if self.other is not None:
            self.other.feed(b"", eof=True)

    async def close(self) -> None:
        self.shutdown_write()

    def abort(self) -> None:
        self.shutdown_write()


def memory_pair(cut: int = 1 << 20) -> tuple[MemoryChannel, MemoryChannel]:
    """Return two connected ends."""
    a, b = MemoryChannel("b", cut=cut), MemoryChannel("a", cut=cut)
    a.other, b.other = b, a
    return a, b
