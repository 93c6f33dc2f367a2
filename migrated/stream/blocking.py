"""The incoming stream for a plain (not ``async``) ``load_state``, which runs in a worker thread.

The rule of the file: every get is one hop to the event loop and back; nothing here touches the channel itself. A
handler whose body is large should be ``async``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

from migrated.errors import LocalProtocolError, MigrationCancelled
from migrated.stream.incoming import IncomingStream

T = TypeVar("T")


class BlockingIncoming:
    """The ``get_*`` of `IncomingStream` as blocking calls for one worker thread."""

    def __init__(self, stream: IncomingStream, loop: asyncio.AbstractEventLoop) -> None:
        self._stream = stream
        self._loop = loop
        self._waiting: Future[Any] | None = None
        self._closed = False

    def close(self) -> None:
        """End the thread's present wait and refuse further ones: the load was given up."""
        self._closed = True
        if self._waiting is not None:
            self._waiting.cancel()

    def _wait(self, coroutine: Coroutine[Any, Any, T]) -> T:
        if self._closed:
            coroutine.close()
            raise MigrationCancelled("the load was given up")
        try:
            running = asyncio.get_running_loop()
        except RuntimeError:
            running = None
        if running is self._loop:
            coroutine.close()
            raise LocalProtocolError("a load_state that awaits must be an async def")
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        self._waiting = future
        try:
            return future.result()
        finally:
            self._waiting = None

    def get_be8(self) -> int:
        return self._wait(self._stream.get_be8())

    def get_be16(self) -> int:
        return self._wait(self._stream.get_be16())

    def get_be32(self) -> int:
        return self._wait(self._stream.get_be32())

    def get_be64(self) -> int:
        return self._wait(self._stream.get_be64())

    def get_buffer(self, count: int) -> bytes:
        return self._wait(self._stream.get_buffer(count))

    def get_counted_string(self) -> str:
        return self._wait(self._stream.get_counted_string())
