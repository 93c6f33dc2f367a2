"""Asking the destination of a hand-over for its answer, on new connections, until it gives one.

The rule of the file: it asks, and never decides. Whoever lost the answer asks by saying the commit again: whoever has
taken the machine over says so, whoever has not, and never will, says that. Both are final.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from migrated.errors import ChannelError, MigratedError
from migrated.migration.handover import SourceHandover
from migrated.migration.host import Host, Spawn, leave_machine, resume_machine
from migrated.migration.question import ask_over
from migrated.migration.recovery import RECONNECT_MAX_S, RECONNECT_MIN_S, Dial
from migrated.migration.return_path import PeerKind, ReturnPathReader
from migrated.model.handover import Event
from migrated.stream.outgoing import OutgoingStream
from migrated.wire.command import FEATURE_HANDOVER
from migrated.wire.handover import Answer

#: What a source says whose destination answers REFUSED.
GIVEN_BACK = "the destination has lost what it had loaded, and gives the machine back"


class Settlement:
    """The questions of one hand-over."""

    def __init__(self, host: Host, handover: SourceHandover, dial: Dial) -> None:
        self._host = host
        self._handover = handover
        self._dial = dial

    async def run(self) -> Answer:
        """Ask until there is an answer: ACTIVE, WHOLE or REFUSED."""
        delay_s = RECONNECT_MIN_S
        log = self._host.log.bind(migration_id=self._handover.offer.migration_id, peer=self._handover.peer)
        while True:
            try:
                answer = await self.ask()
            except (MigratedError, OSError) as error:
                log.warning("handover_answer_missing", error=str(error), asks_again_in_s=delay_s)
                await asyncio.sleep(delay_s)
                delay_s = min(2 * delay_s, RECONNECT_MAX_S)
            else:
                log.warning("handover_settled", answer=answer.name.lower())
                return answer

    async def ask(self) -> Answer:
        """Ask once. Raises ChannelError, ProtocolError, PeerRefused."""
        channel = await self._dial()
        try:
            return await ask_over(self._host, channel, self._question)
        finally:
            channel.abort()

    async def _question(self, f: OutgoingStream, reader: ReturnPathReader, kind: PeerKind) -> Answer:
        if kind is not PeerKind.MIGRATED or not reader.features & FEATURE_HANDOVER:
            raise ChannelError("whoever answers there is not the destination", peer=self._handover.peer)
        await self._handover.happened(Event.LOST, send=f.send)
        return await reader.wait_settled(
            self._handover.offer.migration_id, self._host.settings.seconds("x-migrated-answer-timeout")
        )


class Settler:
    """Asks, beside everything else, for the answer that the record waits for, also after a restart."""

    def __init__(self, host: Host, spawn: Spawn, dialling: Callable[[str], Dial]) -> None:
        self._host = host
        self._spawn = spawn
        self._dialling = dialling
        self._task: asyncio.Task[None] | None = None

    async def settle_after(self, end: Awaitable[None]) -> None:
        """Begin when a migration has ended, if it has left a question."""
        await end
        self.settle()

    def settle(self) -> None:
        """Ask until there is an answer, if one is missing."""
        handover = SourceHandover.of_record(self._host)
        if handover is not None and (self._task is None or self._task.done()):
            self._task = self._spawn(self._settle(handover))

    async def cancel(self) -> None:
        """Ask no more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _settle(self, handover: SourceHandover) -> None:
        answer = await Settlement(self._host, handover, self._dialling(handover.address)).run()
        async with self._host.lock:
            if answer is not Answer.REFUSED:
                await handover.happened(Event.ACTIVE)
                await leave_machine(self._host, handover.peer)
            else:
                await handover.happened(Event.REFUSED, run=self._resume)

    async def _resume(self) -> None:
        await resume_machine(self._host, self._host.ownership.record.run_state)
