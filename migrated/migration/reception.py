"""Who comes to a destination: the connection of a machine, and those that belong to it.

The rule of the file: a connection is what its first bytes say: a stream, a channel with pages (multifd), or the one for
requested pages (postcopy-preempt), which says nothing before it has one. While one machine is received, connections of
the same peer are sorted beside it, each with a deadline, so many and not more.

Source: QEMU looks at the first bytes since 8.0; a 7.2 sends the main connection first, and the others in any order.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

from migrated.errors import ChannelClosed, ChannelError, ChannelTimeout, MigratedError
from migrated.migration.data_arrivals import DataArrivals
from migrated.migration.handshake import STREAM_BEGIN
from migrated.migration.host import Host, Spawn
from migrated.migration.incoming import IncomingMigration
from migrated.model.status import ENDED
from migrated.transport.channel import Channel, SocketChannel
from migrated.transport.listen import BUSY
from migrated.wire.multifd import FIRST_BYTE

#: As many channels as there can be, and one for requested pages.
MAX_UNSORTED = 256
#: What a connection has said that says nothing, and does not have to.
SILENT = None


class Reception:
    """Sorts the connections to one daemon. ``receive`` deals with a machine's, ``current`` is the last one's."""

    def __init__(
        self,
        host: Host,
        spawn: Spawn,
        receive: Callable[[Channel, DataArrivals], Awaitable[None]],
        current: Callable[[], IncomingMigration | None],
    ) -> None:
        self._host = host
        self._spawn = spawn
        self._receive = receive
        self._current = current
        self._arrivals = DataArrivals(host)
        self._begun = asyncio.Event()
        self._unsorted: dict[asyncio.Task[None], Channel] = {}
        self._second: Channel | None = None
        """The connection for requested pages of a migration that has not begun yet."""
        self._main: asyncio.Future[Channel] | None = None
        """While the connection of the machine is not known."""
        self._first_known = asyncio.Event()
        """Set once it is known what the first of these connections is."""

    async def receive(self, channel: Channel) -> None:
        """Deal with a connection that comes while nobody is here; return when that is over."""
        self._begun.clear()
        self._first_known.clear()
        try:
            main = await self._main_of(channel)
            self._first_known.set()
            try:
                await self._receive(main, self._arrivals)
            finally:
                main.abort()  # nothing, where it was closed in order
        except MigratedError as error:
            self._refuse(channel, str(error))
        finally:
            self.close()
            self._arrivals.close()
            self._arrivals = DataArrivals(self._host)
            if self._second is not None:
                self._second.abort()
                self._second = None

    async def _main_of(self, channel: Channel) -> Channel:
        """Return the connection of the machine: this one, or one that came behind it. Raises ChannelError."""
        main: asyncio.Future[Channel] = asyncio.get_running_loop().create_future()
        self._main = main
        beginning = asyncio.ensure_future(self._beginning(channel, self._host.settings.silence_timeout_s()))
        try:
            either: set[asyncio.Future[Any]] = {beginning, main}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not beginning.done() and self.take(channel):
                return main.result()  # under TLS the one that was made first may come in last
            if await beginning == FIRST_BYTE and isinstance(channel, SocketChannel):
                self._first_known.set()
                return await self._main_behind(channel, main)
            return channel
        finally:
            beginning.cancel()
            self._main = None

    async def _main_behind(self, channel: SocketChannel, main: asyncio.Future[Channel]) -> Channel:
        """Seat a channel that came before its machine, and return the connection of that. Raises ChannelError."""
        limit_s = self._host.settings.silence_timeout_s()
        try:
            await self._arrivals.seat(channel)
            async with asyncio.timeout(limit_s):
                return await main
        except TimeoutError as error:
            if main.done() and not main.cancelled():
                return main.result()  # at the last moment
            raise ChannelTimeout(f"no machine behind its multifd channel within {limit_s:g} s") from error

    def take(self, channel: Channel) -> bool:
        """Sort a connection that comes while another one of the same peer is here; False where there are too many."""
        if not isinstance(channel, SocketChannel) or len(self._unsorted) >= MAX_UNSORTED:
            return False
        task = self._spawn(self._sort(channel))
        self._unsorted[task] = channel
        task.add_done_callback(self._unsorted.pop)
        return True

    async def _sort(self, channel: SocketChannel) -> None:
        try:
            limit_s = None if self._awaits_requested() else self._host.settings.silence_timeout_s()
            begins = await self._beginning(channel, limit_s)
            if begins == STREAM_BEGIN and self._main is not None and not self._main.done():
                self._main.set_result(channel)
                return
            await self._first_known.wait()
            if begins == FIRST_BYTE:
                await self._arrivals.seat(channel)
            elif begins in (STREAM_BEGIN, b"") or not self._take_second(channel):
                raise ChannelClosed(BUSY)
            else:
                self._host.log.info("second_channel", peer=channel.peer)
        except MigratedError as error:
            self._refuse(channel, str(error))
            with contextlib.suppress(ChannelError):
                await channel.close()
        except asyncio.CancelledError:
            channel.abort()
        except Exception:  # the top of a job: a bug here must not end the daemon
            self._host.log.exception("incoming_channel_bug", peer=channel.peer)
            channel.abort()

    def _refuse(self, channel: Channel, reason: str) -> None:
        self._host.log.warning("connection_refused", peer=channel.peer, reason=reason)

    def close(self) -> None:
        """Sort nobody any more."""
        for task, channel in self._unsorted.items():
            if task.cancel():
                channel.abort()  # one that has not begun to run never will

    # -- how it begins -----------------------------------------------------------------------------------------

    async def _beginning(self, channel: Channel, limit_s: float | None) -> bytes | None:
        """Return the first byte, b"" for an end, SILENT for a connection that needs to say nothing any more."""
        if not isinstance(channel, SocketChannel):
            return SILENT
        peeked = asyncio.ensure_future(channel.peek(limit_s))
        listens = asyncio.ensure_future(self._listens())
        try:
            await asyncio.wait({peeked, listens}, return_when=asyncio.FIRST_COMPLETED)
            return peeked.result() if peeked.done() else SILENT
        except ChannelError:
            return b""
        finally:
            for task in (peeked, listens):
                task.cancel()

    async def _listens(self) -> None:
        """Wait until channels with pages can come no more: the machine is about to run, and its memory is not here."""
        await self._begun.wait()
        if (incoming := self._present()) is not None:
            await incoming.postcopy.listens.wait()

    # -- requested pages ---------------------------------------------------------------------------------------

    def began(self) -> None:
        """The migration whose connection came last has begun."""
        if self._second is not None and (incoming := self._present()) is not None:
            second, self._second = self._second, None
            if not incoming.postcopy.take_second(second):
                second.abort()
        self._begun.set()

    def _present(self) -> IncomingMigration | None:
        incoming = self._current()
        return None if incoming is None or incoming.status.value in ENDED else incoming

    def _awaits_requested(self) -> bool:
        """Say whether a connection for requested pages may come, as far as is known."""
        return (self._present() or self._host).settings.enabled("postcopy-preempt") and self._second is None

    def _take_second(self, channel: Channel) -> bool:
        if not self._awaits_requested():
            return False
        if (incoming := self._present()) is not None:
            return incoming.postcopy.take_second(channel)
        self._second = channel  # the job of the first may not have begun yet
        return True
