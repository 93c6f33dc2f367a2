"""The connection an incoming migration comes over, and the one that takes its place after a pause.

The rule of the file: whoever reads or answers asks the link each time; nobody keeps a channel or a stream of his own.
"""

from __future__ import annotations

from migrated.migration.host import Settings
from migrated.migration.return_path import PeerKind, ReturnPathWriter
from migrated.stream.incoming import PATIENCE, IncomingStream
from migrated.transport.channel import Channel


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

    async def close(self) -> None:
        """End the connection in order."""
        self.stream.close()
        await self.channel.close()
