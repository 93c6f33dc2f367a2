"""The iothread lock: one asyncio lock per daemon that stands in for QEMU's big lock.

The rule of the file: the lock knows its owner (a task), so that a caller in the wrong regime fails at once instead of
racing. Precedence: it is the only lock of the daemon that is ever held across an await.

Awaiting the network while holding it is allowed in switchover, in ``save_live_complete_postcopy`` and in savevm. It is
given up (`released`) while somebody waits for an operator. ``query-*``, ``migrate_cancel`` and ``migrate-pause`` never
take it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any, Self

from migrated.errors import LocalProtocolError

#: Upper bounds of the hold-time histogram in milliseconds; the last bucket is everything above.
HOLD_BUCKETS_MS = (1, 10, 100, 1000)


class IothreadLock:
    """An owner-tracked, non-reentrant asyncio lock: ``async with lock: ...``."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._lock = asyncio.Lock()
        self._owner: asyncio.Task[Any] | None = None
        self._clock = clock
        self._taken_at = 0.0
        self.holds_by_ms = [0] * (len(HOLD_BUCKETS_MS) + 1)
        """How often the lock was held for up to HOLD_BUCKETS_MS[i] ms (last: longer)."""
        self.held_ms = 0.0
        """For how long it was held altogether."""

    @property
    def held(self) -> bool:
        """True when the current task holds the lock."""
        return self._owner is not None and self._owner is asyncio.current_task()

    def assert_held(self, what: str) -> None:
        """Raise LocalProtocolError unless the current task holds the lock."""
        if not self.held:
            raise LocalProtocolError(f"{what} needs the iothread lock, and this task does not hold it")

    def assert_not_held(self, what: str) -> None:
        """Raise LocalProtocolError if the current task holds the lock (other tasks may)."""
        if self.held:
            raise LocalProtocolError(f"{what} must not be called with the iothread lock held")

    async def __aenter__(self) -> Self:
        self.assert_not_held("taking the iothread lock")
        await self._lock.acquire()
        self._owner = asyncio.current_task()
        self._taken_at = self._clock()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._give_up()

    def _give_up(self) -> None:
        self.assert_held("releasing the iothread lock")
        held_ms = (self._clock() - self._taken_at) * 1000
        bucket = sum(held_ms > bound for bound in HOLD_BUCKETS_MS)
        self.holds_by_ms[bucket] += 1
        self.held_ms += held_ms
        self._owner = None
        self._lock.release()

    @asynccontextmanager
    async def released(self) -> AsyncIterator[None]:
        """Give the lock up inside the block and take it back afterwards, also when the block raises."""
        self._give_up()
        try:
            yield
        finally:
            # A cancellation that arrives here must not leave the outer `async with` without its lock: the lock is
            # taken back first, the cancellation delivered afterwards.
            cancelled: asyncio.CancelledError | None = None
            while not self.held:
                try:
                    await self.__aenter__()
                except asyncio.CancelledError as error:
                    cancelled = error
            if cancelled is not None:
                raise cancelled
