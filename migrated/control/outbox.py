"""The lines that wait to be sent to one QMP client, bounded.

The rule of the file: memory never grows with a client that does not read. Answers wait for room (the client's own
commands then wait behind them, as QEMU does it); an event cannot wait, so an event that finds no room means that the
client is too slow, which its session ends.
"""

from __future__ import annotations

import asyncio
from collections import deque


class Outbox:
    """A queue of lines, limited by the bytes in it."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._lines: deque[bytes] = deque()
        self._pending_bytes = 0
        self._finished = False
        self._filled = asyncio.Event()
        self._emptied = asyncio.Event()
        self._emptied.set()

    def is_full(self) -> bool:
        return self._pending_bytes >= self._limit_bytes

    def offer(self, line: bytes) -> bool:
        """Queue a line, unless the queue is full; after `finish` lines are dropped silently."""
        if self._finished:
            return True
        if self.is_full():
            return False
        self._lines.append(line)
        self._pending_bytes += len(line)
        self._filled.set()
        if self.is_full():
            self._emptied.clear()
        return True

    async def put(self, line: bytes) -> None:
        """Queue a line, waiting for room; one line may exceed the limit."""
        while not self.offer(line):
            await self._emptied.wait()

    async def take(self, max_bytes: int) -> bytes | None:
        """Wait for lines and return about ``max_bytes`` of them joined, at least one; None when all is said."""
        while not self._lines:
            if self._finished:
                return None
            self._filled.clear()
            await self._filled.wait()
        batch = [self._lines.popleft()]
        size = len(batch[0])
        while self._lines and size + len(self._lines[0]) <= max_bytes:
            batch.append(self._lines.popleft())
            size += len(batch[-1])
        self._pending_bytes -= size
        if not self.is_full():
            self._emptied.set()
        return b"".join(batch)

    def finish(self) -> None:
        """Accept no more lines; `take` hands out what is queued and then ends."""
        self._finished = True
        self._filled.set()
        self._emptied.set()

    def discard(self) -> None:
        """Accept no more lines and forget those queued."""
        self._lines.clear()
        self._pending_bytes = 0
        self.finish()
