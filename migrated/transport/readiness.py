"""Waiting until one raw descriptor can be read or written, on any asyncio loop.

The rule of the file: one waiter per direction, every wait ends (readiness, timeout, cancellation, `close`), and a
cancelled wait loses nothing, because no byte moves here. Raw sockets are used instead of stream transports because
those drop descriptors (SCM_RIGHTS) and copy what passes through them.

A descriptor stays registered with the loop after a wait, and is only taken out when it turns ready with nobody
waiting: a receiver that keeps up then never pays for registering again.

Waking a task costs more than receiving a page. A waiter that is in a hurry hands in ``take``, which is called from the
loop's own callback, and goes on waiting as long as that deals with what there is.
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
        self._take: Callable[[], bool] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._taken = False

    async def wait(
        self, loop: asyncio.AbstractEventLoop, timeout_s: float | None, take: Callable[[], bool] | None
    ) -> None:
        if self._waiter is not None:
            raise RuntimeError("two tasks wait for the same direction of one descriptor")
        waiter = self._waiter = loop.create_future()
        self._take = take
        if timeout_s is not None:
            self._timer = loop.call_later(timeout_s, self._expire, loop, waiter, timeout_s)
        try:
            if not self._registered:
                self._add(self._fd, self._ready)
                self._registered = True
            await waiter
        finally:
            self._waiter = self._take = None
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    def _ready(self) -> None:
        waiter = self._waiter
        if waiter is None:
            self.forget()
        elif not waiter.done():
            try:
                self._taken = self._take is not None and self._take()
            except Exception as error:  # noqa: BLE001 - the waiter's own callback: the waiter gets what it raises
                waiter.set_exception(error)
            else:
                if not self._taken:
                    waiter.set_result(None)

    def _expire(self, loop: asyncio.AbstractEventLoop, waiter: asyncio.Future[None], timeout_s: float) -> None:
        if waiter.done():
            return
        if self._taken:  # since the timer was set: that is no silence
            self._taken = False
            self._timer = loop.call_later(timeout_s, self._expire, loop, waiter, timeout_s)
        else:
            waiter.set_exception(TimeoutError(f"not ready within {timeout_s:g} s"))

    def forget(self) -> None:
        if self._registered:
            self._remove(self._fd)
            self._registered = False

    def fail(self, error: Exception) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(error)


class Readiness:
    """Both directions of one non-blocking descriptor, which stays owned by the caller."""

    def __init__(self, fd: int) -> None:
        self._loop = loop = asyncio.get_running_loop()
        self._read = _Direction(fd, loop.add_reader, loop.remove_reader)
        self._write = _Direction(fd, loop.add_writer, loop.remove_writer)
        self.closed = False

    async def readable(self, timeout_s: float | None = None, take: Callable[[], bool] | None = None) -> None:
        """Wait for bytes or the end. Raises TimeoutError, and ConnectionAbortedError once `close` was called.

        With ``take``, until that returns False; it is called, in the loop's callback, each time there is something.
        What it raises is raised here. The timeout is for silence: up to twice as long where something was taken.
        """
        self._check_open()
        await self._read.wait(self._loop, timeout_s, take)

    async def writable(self, timeout_s: float | None = None) -> None:
        """Wait for room or an error. Raises TimeoutError, and ConnectionAbortedError once `close` was called."""
        self._check_open()
        await self._write.wait(self._loop, timeout_s, None)

    def _check_open(self) -> None:
        if self.closed:
            raise ConnectionAbortedError("closed at this end")

    def close(self) -> None:
        """Take the descriptor out of the loop and end the waits. Call this before closing it; idempotent."""
        self.closed = True
        for direction in (self._read, self._write):
            direction.forget()
            direction.fail(ConnectionAbortedError("closed at this end"))
