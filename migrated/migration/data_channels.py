"""The channels that carry pages of an outgoing migration (multifd): dialled, named, closed.

The rule of the file: they are dialled right behind the main connection, before anything is known of the peer, because a
QEMU that expects them reads nothing before it has all of them.
"""

from __future__ import annotations

import contextlib

from migrated.errors import ChannelError, CommandError
from migrated.migration.host import Host
from migrated.migration.recovery import Dial
from migrated.migration.return_path import PeerKind
from migrated.transport.channel import Channel
from migrated.wire.multifd import NO_UUID, Initial, encode_initial
from migrated.wire.packing import METHODS


class DataChannels:
    """The channels of one outgoing migration."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._channels: list[Channel] = []

    @property
    def wanted(self) -> bool:
        """Whether pages are to go over channels of their own."""
        return self._host.settings.enabled("multifd")

    async def open(self, dial: Dial) -> None:
        """Dial as many as there are to be, and say on each which it is. Raises what ``dial`` raises, ChannelError."""
        settings, uuid = self._host.settings, self._host.machine.uuid
        raw = bytes.fromhex(uuid.replace("-", "")) if uuid else NO_UUID
        for number in range(settings.parameters.integer("multifd-channels")):
            channel = await dial()
            self._channels.append(channel)
            channel.silence_timeout_s = settings.silence_timeout_s()
            if not channel.has_return_path:
                raise CommandError("multifd is not supported by current protocol")
            await channel.send(encode_initial(Initial(number, raw)))
        method = str(settings.parameters.get("multifd-compression"))
        level = settings.parameters.integer(f"multifd-{method}-level") if method != "none" else 0
        self._host.multifd_save.begin(self._channels, METHODS[method], level)

    def check_peer(self, kind: PeerKind) -> None:
        """Raise CommandError where what the capabilities promise would be the end of the peer."""
        if self.wanted and kind is PeerKind.QEMU and self._host.settings.enabled("postcopy-ram"):
            raise CommandError(
                "a QEMU 7.2 that has multifd channels aborts at the end of postcopy, and the machine with it. Next:"
                " migrate with multifd off, or with postcopy-ram off"
            )

    async def close(self) -> None:
        """End them in order: nothing more comes, and everything that was sent has arrived."""
        for channel in self._channels:
            with contextlib.suppress(ChannelError):
                await channel.close()

    def abort(self) -> None:
        """Drop them. Twice does no harm."""
        self._host.multifd_save.end()
        for channel in self._channels:
            channel.abort()
        self._channels = []
