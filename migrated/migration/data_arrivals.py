"""The channels that carry pages to an arriving machine (multifd), as they come in.

The rule of the file: a channel is one of these by how it begins, belongs to the machine whose uuid it says, and has a
number of its own. They come before the main connection or behind it; nothing is loaded before all of them are here.
"""

from __future__ import annotations

import asyncio

from migrated.errors import ChannelClosed, ChannelTimeout, MigratedError, RemoteProtocolError
from migrated.migration.host import Host, Settings
from migrated.migration.incoming_link import IncomingLink
from migrated.migration.return_path import PeerKind
from migrated.transport.channel import SocketChannel
from migrated.wire.multifd import INITIAL_BYTES, Initial, parse_initial
from migrated.wire.packing import METHODS

NOT_EXPECTED = "the source sends pages over multifd channels, and capability multifd is off here"


class DataArrivals:
    """The channels of one incoming migration."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._channels: dict[int, SocketChannel] = {}
        self._refused: MigratedError | None = None
        self._changed = asyncio.Event()

    async def seat(self, channel: SocketChannel) -> None:
        """Take a channel in. What is wrong with it is wrong with the migration. Raises MigratedError."""
        channel.silence_timeout_s = self._host.settings.silence_timeout_s()
        try:
            initial = await self._read_initial(channel)
            if initial.number in self._channels:
                text = f"multifd: received id '{initial.number}' already setup'"
                raise RemoteProtocolError(text, section="multifd")
        except MigratedError as error:
            self._refused = error
            raise
        else:
            self._channels[initial.number] = channel
            self._host.log.info("multifd_channel", peer=channel.peer, number=initial.number)
        finally:
            self._changed.set()

    async def _read_initial(self, channel: SocketChannel) -> Initial:
        raw = memoryview(bytearray(INITIAL_BYTES))
        got = 0
        limit_s = self._host.settings.silence_timeout_s()
        try:
            async with asyncio.timeout(limit_s):
                while got < INITIAL_BYTES:
                    if not (count := await channel.receive_into(raw[got:])):
                        raise ChannelClosed("a multifd channel ended before it had begun", peer=channel.peer)
                    got += count
        except TimeoutError as error:
            text = f"a multifd channel did not say which it is within {limit_s:g} s"
            raise ChannelTimeout(text, peer=channel.peer) from error
        uuid = self._host.machine.uuid
        return parse_initial(bytes(raw), bytes.fromhex(uuid.replace("-", "")) if uuid else None)

    async def begin(
        self, group: asyncio.TaskGroup, link: IncomingLink, settings: Settings, checked: bool
    ) -> list[asyncio.Task[None]]:
        """Wait until all are here, and receive; return the tasks that do. ``checked``: packets have checksums.

        Raises RemoteProtocolError, ChannelError.
        """
        if not settings.enabled("multifd"):
            if self._channels:
                raise RemoteProtocolError(NOT_EXPECTED, section="multifd", found=f"{len(self._channels)} channels")
            return []
        channels = await self._all(settings)
        load = self._host.multifd_load
        from_qemu = link.kind is not PeerKind.MIGRATED
        method = METHODS[str(settings.parameters.get("multifd-compression"))]
        load.begin(channels, method, settings.silence_timeout_s, checked=checked, from_qemu=from_qemu)
        link.stream.received_elsewhere = load.received_bytes
        return [group.create_task(load.receive())]

    async def _all(self, settings: Settings) -> list[SocketChannel]:
        expected = settings.parameters.integer("multifd-channels")
        limit_s = settings.silence_timeout_s()
        try:
            async with asyncio.timeout(limit_s):
                while self._refused is None and len(self._channels) < expected:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError as error:
            text = f"{len(self._channels)} of {expected} multifd channels have come within {limit_s:g} s"
            raise ChannelTimeout(
                f"{text}. Next: let as many connections through as there are channels, or set x-migrated-data-channels"
                " off at the source; with a QEMU, set multifd and multifd-channels alike at both ends"
            ) from error
        if self._refused is not None:
            raise self._refused
        if wrong := sorted(self._channels.keys() - set(range(expected))):
            raise RemoteProtocolError(
                f"multifd: a channel with number {wrong[0]}", section="multifd", expected=f"0 to {expected - 1}"
            )
        return [self._channels[number] for number in range(expected)]

    def close(self) -> None:
        """Let go of all of them. Twice does no harm."""
        for channel in self._channels.values():
            channel.abort()
        self._channels = {}
