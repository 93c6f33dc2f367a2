"""Behind the last byte of a precopy: everything is here, and the source's word decides what becomes of it.

The rule of the file: a connection that ends decides nothing. The word comes over the connection that the machine came
over, over another one (`IncomingMigration.commit`, `give_way`), or from an operator.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol

from migrated.errors import ChannelError, MigrationCancelled, ProtocolError, RemoteProtocolError
from migrated.migration.handover import Do, TargetHandover
from migrated.migration.host import Host
from migrated.migration.incoming_link import IncomingLink
from migrated.migration.take_over import TakeOver
from migrated.model.handover import Act, Event, Hold, answer_to
from migrated.stream.incoming import IncomingStream
from migrated.wire.command import Command
from migrated.wire.handover import Answer, Offer, decode_handover, decode_with_flag
from migrated.wire.section import CommandHeader, parse_element

TakeCommand = Callable[[IncomingStream, CommandHeader], Awaitable[bool]]


def acts_of(handover: TargetHandover, take_over: TakeOver, link: IncomingLink, hold: Hold) -> Mapping[Act, Do]:
    """Return how the acts of an offer are done; ``hold`` is what the record says of a machine that was taken over."""
    offer = handover.offer
    assert offer is not None

    async def say(answer: Answer) -> None:
        with contextlib.suppress(ChannelError):  # it is asked for again
            await link.return_path.handover(answer, offer)

    return {
        Act.WRITE_PREPARED: lambda: take_over.prepare(offer),
        Act.SEND_READY: lambda: say(Answer.READY),
        Act.WRITE_OWNER: lambda: take_over.own(hold),
        Act.RUN: take_over.start if hold is Hold.OWNER else take_over.start_without_all,
        Act.SEND_ACTIVE: lambda: say(Answer.ACTIVE),
        Act.WRITE_PARTIAL: take_over.dismiss,
    }


class Answered(Exception):
    """The connection was a question, and has its answer: a dry run, or a commit that was said before."""


class Waiting(Protocol):
    """A migration that is still here while its source speaks over another connection."""

    handover: TargetHandover

    async def commit(self, *, serves: bool) -> None: ...


class SourceWord:
    """What is waited for, and what is done about it."""

    def __init__(
        self,
        host: Host,
        link: IncomingLink,
        take_over: TakeOver,
        handover: TargetHandover,
        before: Waiting | None,
        *,
        command: TakeCommand,
        on_alone: Callable[[], None],
    ) -> None:
        self._host = host
        self._link = link
        self._take_over = take_over
        self._handover = handover
        self._before = before
        self._command = command
        self._on_alone = on_alone

    async def take(self, command: Command, payload: bytes, *, first: bool) -> str:
        """Take X_OFFER, X_COMMIT or X_WITHDRAW; return the id of the migration that it is about.

        ``first``: nothing of a machine has come. Raises RemoteProtocolError; Answered.
        """
        match command:
            case Command.X_OFFER:
                offer, checked = decode_with_flag(payload)
                self._handover.offered(offer, checked=checked)
                if checked:
                    self._link.stream.begin_checksums()
            case Command.X_WITHDRAW:
                offer = decode_handover(payload)
                self._handover.take_withdrawal(offer)
            case _:
                offer, serves = decode_with_flag(payload)
                if first:
                    await self._answer(offer, serves)
                self._handover.take_commit(offer)
        return offer.migration_id

    async def _answer(self, offer: Offer, serves: bool) -> None:
        """Answer a source that lost our answer, or speaks from another life. Raises Answered."""
        before, ownership = self._before, self._host.ownership
        answer = answer_to(
            taken=offer.migration_id in ownership.record.taken,
            awaited=before is not None and before.handover.offer == offer and before.handover.prepared,
        )
        if answer is None and before is not None:
            await before.commit(serves=serves)
        word = Answer.REFUSED
        if offer.migration_id in ownership.record.taken:
            word = Answer.ACTIVE if ownership.record.hold is Hold.INCOMPLETE else Answer.WHOLE
        self._host.log.info(
            "commit_answered", answer=word.name.lower(), migration_id=offer.migration_id, peer=self._link.peer
        )
        await self._link.return_path.handover(word, offer)
        raise Answered

    async def take_over(self) -> None:
        """Say that everything is here, wait for the word, and obey it. Raises MigrationCancelled."""
        acts = acts_of(self._handover, self._take_over, self._link, Hold.OWNER)
        await self._handover.happened(Event.COMPLETE, acts)
        reading = asyncio.ensure_future(self._read())
        try:
            event = await self._handover.decision()
        finally:
            reading.cancel()
            await asyncio.wait([reading])
        if event is Event.PEER_FENCED:
            self._take_over.autostart = lambda: False  # an operator starts it himself
        async with self._host.lock:
            await self._handover.happened(event, acts)
            if event is Event.PEER_FENCED:
                await self._take_over.start()
        if event not in (Event.COMMIT, Event.PEER_FENCED):
            raise MigrationCancelled(f"the machine stays at {self._link.peer}: {event.value}")
        await self._take_over.answer()

    async def _read(self) -> None:
        stream = self._link.stream
        stream.section = "hand-over"
        try:
            while not self._handover.decided:
                await stream.wait_for_element()
                element = await stream.run(parse_element(None))
                if not isinstance(element, CommandHeader):
                    raise RemoteProtocolError("something else than the source's word", expected="X_COMMIT")
                await self._command(stream, element)
        except (ChannelError, ProtocolError) as error:
            self._host.log.warning("waiting_for_commit", error=str(error), peer=self._link.peer)
            self._link.drop()
            self._on_alone()
