"""The pause before the switchover: the machine is stopped, and an operator says when it goes on.

The rule of the file: whoever waits here holds the iothread lock and gets it back; meanwhile it is free.
"""

from __future__ import annotations

import asyncio

from migrated.errors import MigrationCancelled
from migrated.migration.host import Host
from migrated.model.status import MigrationStatus, StatusCell
from migrated.stream.outgoing import OutgoingStream
from migrated.wire.command import Command, ping_payload


class OperatorPause:
    """``pause-before-switchover`` of one migration."""

    def __init__(self, host: Host, status: StatusCell) -> None:
        self._host = host
        self._status = status
        self._proceed = asyncio.Event()

    def proceed(self) -> None:
        """Go on (``migrate-continue``)."""
        self._proceed.set()

    async def wait(self, f: OutgoingStream, *, answers: bool) -> None:
        """Enter pre-switchover and wait; ``answers``: the peer reads PINGs. Raises MigrationCancelled."""
        self._status.advance(MigrationStatus.PRE_SWITCHOVER)
        async with self._host.lock.released():
            beat_s = self._host.settings.silence_timeout_s()
            while not self._proceed.is_set():
                if answers:
                    # The peer must not take an operator who thinks for a dead source. (Without a return path it has
                    # no such patience, and would refuse a PING.)
                    f.put_command(Command.PING, ping_payload(0))
                    await f.drain()
                try:
                    async with asyncio.timeout(beat_s):
                        await self._proceed.wait()
                except TimeoutError:
                    continue
        if not self._status.advance(MigrationStatus.DEVICE, expected={MigrationStatus.PRE_SWITCHOVER}):
            raise MigrationCancelled("cancelled before switchover")
