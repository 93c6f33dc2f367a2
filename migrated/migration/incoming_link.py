"""The connection an incoming migration comes over, and the one that takes its place after a pause.

The rule of the file: whoever reads or answers asks the link each time; nobody keeps a channel or a stream of his own.
"""

from __future__ import annotations

import asyncio
import contextlib

from migrated.errors import ChannelError
from migrated.migration.host import Settings
from migrated.migration.return_path import PeerKind, ReturnPathWriter
from migrated.stream.incoming import IncomingStream
from migrated.transport.channel import PATIENCE, Channel

#: How long a refused source may go on sending before the connection is cut under it. Closing at once would reset the
#: connection and could destroy the reason on its way.
LINGER_S = 2.0


class IncomingLink:
    """Channel, stream and return path of one incoming migration."""

    def __init__(self, channel: Channel, settings: Settings) -> None:
        self._settings = settings
        self.peer = channel.peer
        self.return_path = ReturnPathWriter(channel)
        self._take(channel)

    def _take(self, channel: Channel) -> None:
        channel.silence_timeout_s = self._settings.silence_timeout_s()
        self.channel = channel
        self.stream = IncomingStream(channel, silence_timeout_s=self._settings.silence_timeout_s)

    @property
    def kind(self) -> PeerKind:
        """Who sends."""
        if self.return_path.opened and self.return_path.peer is PeerKind.UNKNOWN:
            return PeerKind.QEMU
        return self.return_path.peer

    def expect_element(self) -> None:
        """The next element comes soon: whoever sends has no reason to be silent for long."""
        self.stream.idle_timeout_s = PATIENCE * self._settings.silence_timeout_s()

    def expect_heartbeat(self) -> None:
        """A `migrated` source shows all the time that it lives; a QEMU may be silent for as long as it likes."""
        self.stream.idle_timeout_s = self._settings.silence_timeout_s() if self.kind is PeerKind.MIGRATED else None

    def replace(self, channel: Channel) -> None:
        """Go on over another connection."""
        self._take(channel)
        self.return_path.reconnect(channel)

    def drop(self) -> None:
        """Break the connection, and let go of what is buffered of it."""
        self.channel.abort()
        self.stream.close()

    async def linger(self) -> None:
        """Swallow what a refused source still sends, until it closes. Raises ChannelError."""
        swallowed = memoryview(bytearray(1 << 16))
        try:
            async with asyncio.timeout(LINGER_S):
                while await self.channel.receive_into(swallowed, deadline_s=LINGER_S):
                    continue
        except TimeoutError:
            return

    async def close(self) -> None:
        """End the connection in order, if it still can be: nothing depends on that any more."""
        self.stream.close()
        with contextlib.suppress(ChannelError):
            await self.channel.close()
