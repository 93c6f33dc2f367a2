"""The listener for machines: one at a time, on the address of the configuration or of an operator.

The rule of the file: it opens and closes; who comes, and what becomes of him, others decide.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from migrated.migration.descriptors import Descriptors
from migrated.migration.handshake import CLEARTEXT_ANSWER
from migrated.migration.host import Host
from migrated.transport.address import parse_address
from migrated.transport.channel import Channel
from migrated.transport.listen import Listener, listen
from migrated.transport.trust import Trust


class Listening:
    """Where this daemon listens, if it does."""

    def __init__(
        self,
        host: Host,
        *,
        allow: Sequence[str],
        trust: Callable[[], Trust],
        fds: Descriptors,
        receive: Callable[[Channel], Awaitable[None]],
        second: Callable[[Channel], bool],
    ) -> None:
        self._host = host
        self._allow = allow
        self._trust = trust
        self._fds = fds
        self._receive = receive
        self._second = second
        self._listener: Listener | None = None
        self._opening = False

    @property
    def begun(self) -> bool:
        """True while it listens, or is about to."""
        return self._opening or (self._listener is not None and not self._listener.over)

    @property
    def takes_one(self) -> bool:
        """True for a source of one stream, as a file or a descriptor is."""
        return self._listener is not None and self._listener.takes_one

    @property
    def addresses(self) -> list[dict[str, object]]:
        """Where it listens, as QMP's SocketAddress; empty where it does not."""
        return self._listener.addresses if self._listener is not None and not self._listener.over else []

    async def open(self, uri: str) -> None:
        """Listen for machines on ``uri``. Raises CommandError, also where any stranger could come."""
        self._trust().require_listener(address := parse_address(uri), self._allow)
        self._opening = True  # opening takes its time, and a second listener would let a second machine in
        try:
            self._listener = await listen(
                address, self._receive, allow=self._allow, fds=self._fds.take, second=self._second,
                trust=self._trust, cleartext_answer=CLEARTEXT_ANSWER,
            )  # fmt: skip
        finally:
            self._opening = False
        self._host.log.info("waiting_for_machine", addresses=self._listener.addresses)

    async def close(self) -> None:
        """Listen no more. Twice does no harm."""
        if self._listener is not None:
            await self._listener.close()
            self._listener = None
