"""Waiting until one raw descriptor can be read or written, on any asyncio loop.

The rule of the file: one waiter per direction, every wait ends (readiness, timeout, cancellation, `close`), and a
cancelled wait loses nothing, because no byte moves here. Raw sockets are used instead of stream transports because
those drop descriptors (SCM_RIGHTS) and copy what passes through them.

A descriptor stays registered with the loop after a wait, and is only taken out when it turns ready with nobody
waiting: a receiver that keeps up then never pays for registering again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class _Direction:
    """Readable or writable: the loop's two functions and the one waiter."""

    def __init__(
        self, fd: int, add: Callable[[int, Callable[[], None]], None], remove: Callable[[int], bool | None]
    ) -> None:
        self._fd = fd
        self._add = add
        self._remove = remove
        self._registered = False
        self._waiter: asyncio.Future[None] | None = None

    async def wait(self, loop: asyncio.AbstractEventLoop, timeout_s: float | None) -> None:
        if self._waiter is not None:
            raise RuntimeError("two tasks wait for the same direction of one descriptor")
        waiter = self._waiter = loop.create_future()
        timer = None if timeout_s is None else loop.call_later(timeout_s, _expire, waiter, timeout_s)
        try:
            if not self._registered:
                self._add(self._fd, self._ready)
                self._registered = True
            await waiter
        finally:
            self._waiter = None
            if timer is not None:
                timer.cancel()

    def _ready(self) -> None:
        if self._waiter is None:
            self.forget()
        elif not self._waiter.done():
            self._waiter.set_result(None)

    def forget(self) -> None:
        if self._registered:
            self._remove(self._fd)
            self._registered = False

    def fail(self, error: Exception) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(error)


def _expire(waiter: asyncio.Future[None], timeout_s: float) -> None:
    if not waiter.done():
        waiter.set_exception(TimeoutError(f"not ready within {timeout_s:g} s"))


class Readiness:
    """Both directions of one non-blocking descriptor, which stays owned by the caller."""

    def __init__(self, fd: int) -> None:
        self._loop = loop = asyncio.get_running_loop()
        self._read = _Direction(fd, loop.add_reader, loop.remove_reader)
        self._write = _Direction(fd, loop.add_writer, loop.remove_writer)
        self.closed = False

    async def readable(self, timeout_s: float | None = None) -> None:
        """Wait for bytes or the end. Raises TimeoutError, and ConnectionAbortedError once `close` was called."""
        self._check_open()
        await self._read.wait(self._loop, timeout_s)

    async def writable(self, timeout_s: float | None = None) -> None:
        """Wait for room or an error. Raises TimeoutError, and ConnectionAbortedError once `close` was called."""
        self._check_open()
        await self._write.wait(self._loop, timeout_s)

    def _check_open(self) -> None:
        if self.closed:
            raise ConnectionAbortedError("closed at this end")

    def close(self) -> None:
        """Take the descriptor out of the loop and end the waits. Call this before closing it; idempotent."""
        self.closed = True
        for direction in (self._read, self._write):
            direction.forget()
            direction.fail(ConnectionAbortedError("closed at this end"))
