"""A question to a destination, over a connection of its own: whether a machine may come, or what became of one.

The rule of the file: the stream begins as that of a migration does, and no section follows.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from migrated.migration.handshake import greet
from migrated.migration.host import Host, first_error
from migrated.migration.return_path import PeerKind, ReturnPathReader
from migrated.model.stats import BandwidthMeter
from migrated.stream.incoming import IncomingStream
from migrated.stream.outgoing import OutgoingStream
from migrated.transport.channel import Channel

T = TypeVar("T")


async def ask_over(
    host: Host, channel: Channel, question: Callable[[OutgoingStream, ReturnPathReader, PeerKind], Awaitable[T]]
) -> T:
    """Greet whoever is at the other end of ``channel``, and return what ``question`` makes of him.

    Raises ChannelError, ProtocolError, PeerRefused, and what ``question`` raises.
    """
    channel.silence_timeout_s = host.settings.silence_timeout_s()
    f = OutgoingStream(channel, BandwidthMeter(), clock=host.clock)
    stream = IncomingStream(channel, silence_timeout_s=host.settings.silence_timeout_s)
    reader = ReturnPathReader(stream, lambda block, start, length: None, lambda figures: None)
    try:
        async with asyncio.TaskGroup() as group:
            reading = group.create_task(reader.read())
            try:
                return await question(f, reader, await greet(f, reader, host))
            finally:
                reading.cancel()
    except BaseExceptionGroup as error:
        raise first_error(error) from None
    finally:
        stream.close()
