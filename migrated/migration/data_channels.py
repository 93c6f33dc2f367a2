"""The connections of an outgoing migration besides the main one: with pages (multifd), and with requested pages.

The rule of the file: where `multifd` is on, its channels are dialled right behind the main connection, before anything
is known of the peer, because a QEMU that expects them reads nothing before it has all of them. Where it is off, and the
peer is a `migrated` that is ready for the machine, they are dialled all the same: it does as preflight tells it.
"""

from __future__ import annotations

import contextlib

from migrated.errors import ChannelError, CommandError
from migrated.migration.host import Host
from migrated.migration.preflight_source import Verdict
from migrated.migration.recovery import Dial
from migrated.migration.return_path import PeerKind
from migrated.transport.channel import Channel, SocketChannel
from migrated.wire.command import FEATURE_PREFLIGHT
from migrated.wire.multifd import NO_UUID, Initial, encode_initial
from migrated.wire.packing import METHODS

#: Addresses that lead to the same peer each time.
DIALLED_AGAIN = ("tcp:", "unix:")
AUTO = "auto"
#: How hard a method tries, by the values of the parameter multifd-compression.
LEVELS = {"zlib": "multifd-zlib-level", "zstd": "multifd-zstd-level", AUTO: "multifd-zstd-level"}


def unasked_channels(most: int, processors: int, *, works: bool) -> int:
    """Return how many channels are made that nobody insists on, at most ``most``. ``works``: they encrypt, or pack.

    Where there is nothing to do but to move pages, one is as fast as memory, and the machine needs processors, too.
    """
    return most if works else min(most, max(processors // 2, 1))


class DataChannels:
    """Those of one outgoing migration."""

    def __init__(self, host: Host, address: str) -> None:
        self._host = host
        self._address = address
        self._channels: list[SocketChannel] = []
        self.urgent: Channel | None = None
        """The one for requested pages, in postcopy."""

    @property
    def wanted(self) -> bool:
        """Whether pages are to go over channels of their own, whoever is there."""
        return self._host.settings.enabled("multifd")

    def number(self, kind: PeerKind, features: int, *, encrypted: bool) -> int:
        """Return over how many channels of their own pages go to this peer; 0 where they go in the stream."""
        settings = self._host.settings
        asked = settings.parameters.integer("multifd-channels")
        by_themselves = (
            settings.parameters.get("x-migrated-data-channels")
            and self._address.startswith(DIALLED_AGAIN)
            and kind is PeerKind.MIGRATED
            and features & FEATURE_PREFLIGHT
            and not settings.enabled("xbzrle")
        )
        if self.wanted or not by_themselves:
            return asked if self.wanted else 0
        works = encrypted or settings.parameters.get("multifd-compression") != "none"
        return unasked_channels(asked, self._host.site.processors(), works=works)

    async def open_first(self, dial: Dial, *, resumes: bool) -> None:
        """Dial what comes right behind the main connection. Raises what ``dial`` raises, ChannelError, CommandError."""
        if self.wanted and not resumes:
            await self._open(dial, self._host.settings.parameters.integer("multifd-channels"))
        elif self._preempts:
            # A 7.2 expects it right behind the first: the order says which is which.
            self.urgent = await dial()

    async def open_rest(self, dial: Dial, verdict: Verdict, *, channels: int) -> bool:
        """Dial what only a destination that knows what comes can tell apart; True where there are channels with pages.

        ``channels``: so many were told of. Raises as `open_first` does.
        """
        if channels and not self._channels:
            await self._open(dial, channels)
        if self._channels:
            method, level = self._packing(verdict.kind)
            to_qemu = verdict.kind is not PeerKind.MIGRATED
            self._host.multifd_save.begin(self._channels, METHODS[method], level, to_qemu=to_qemu)
        if self._preempts and self.urgent is None:
            self.urgent = await dial()
        elif self.urgent is not None and verdict.answer is not None and not verdict.answer.preempt:
            # It was refused: only now does the destination know that it carries requested pages.
            self.urgent.abort()
            self.urgent = await dial()
        return bool(self._channels)

    @property
    def _preempts(self) -> bool:
        return all(map(self._host.settings.enabled, ("postcopy-ram", "postcopy-preempt")))

    async def _open(self, dial: Dial, count: int) -> None:
        """Dial so many, and say on each which it is."""
        settings, uuid = self._host.settings, self._host.machine.uuid
        raw = bytes.fromhex(uuid.replace("-", "")) if uuid else NO_UUID
        for number in range(count):
            channel = await dial()
            if not isinstance(channel, SocketChannel):
                channel.abort()
                raise CommandError("multifd is not supported by current protocol")
            self._channels.append(channel)
            channel.silence_timeout_s = settings.silence_timeout_s()
            await channel.send(encode_initial(Initial(number, raw)))

    def _packing(self, kind: PeerKind) -> tuple[str, int]:
        """Return how pages are packed for a peer of this kind, and how hard that tries."""
        parameters = self._host.settings.parameters
        method = str(parameters.get("multifd-compression"))
        if method == AUTO and kind is not PeerKind.MIGRATED:
            method = "none"  # a QEMU has no such thing
        return method, parameters.integer(LEVELS[method]) if method in LEVELS else 0

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
        for channel in (*self._channels, self.urgent):
            if channel is not None:
                channel.abort()
        self._channels, self.urgent = [], None
