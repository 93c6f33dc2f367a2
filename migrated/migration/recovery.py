"""How a paused postcopy goes on: whom to connect to, and when.

The rule of the file: between two `migrated` daemons a broken connection is tried again by itself, less and less often,
unless an operator broke it; towards a QEMU, and after ``migrate-pause``, only an operator goes on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from migrated.transport.address import Address
from migrated.transport.channel import Channel
from migrated.transport.dial import TakeFd, dial
from migrated.transport.trust import Trust

Dial = Callable[[], Awaitable[Channel]]

RECONNECT_MIN_S = 0.2
RECONNECT_MAX_S = 5.0


def dialling(address: Address, timeout_s: float, fds: TakeFd, trust: Callable[[], Trust], name: str) -> Dial:
    """Return what connects to an address, each time with the keys of that moment; ``name`` is what it must prove."""

    async def connect() -> Channel:
        return await dial(address, timeout_s=timeout_s, fds=fds, trust=trust(), name=name)

    return connect


class Pauses:
    """The pauses of one outgoing migration."""

    def __init__(self) -> None:
        self.by_operator = False
        """The next pause is one that an operator asked for."""
        self._delay_s = RECONNECT_MIN_S
        self._told: asyncio.Future[Dial] | None = None
        self._next: Dial | None = None

    def resume(self, dial: Dial) -> None:
        """Go on over what ``dial`` gives."""
        if self._told is not None and not self._told.done():
            self._told.set_result(dial)
        else:
            self._next = dial  # it dials by itself just now

    async def next_dial(self, last: Dial, *, by_itself: bool) -> Dial:
        """Return how to connect: what `resume` says, or, ``by_itself``, as the last time after a while."""
        said, self._next = self._next, None
        if said is not None:
            return said
        self._told = asyncio.get_running_loop().create_future()
        delay_s = self._delay_s if by_itself and not self.by_operator else None
        self.by_operator = False
        try:
            async with asyncio.timeout(delay_s):
                return await self._told
        except TimeoutError:
            self._delay_s = min(2 * self._delay_s, RECONNECT_MAX_S)
            return last
        finally:
            self._told = None

    def went_on(self) -> None:
        """A connection was good: begin again with short delays."""
        self._delay_s = RECONNECT_MIN_S
        self._next = None
