"""The two sides of a hand-over between two daemons: the tables of `model.handover`, driven.

The rule of the file: what is to be done, and in which order, is the table's; here it is done, one act after the other,
and a record that could not be written ends it. Who runs the machine and who writes to the link is given to it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping

from migrated.errors import ChannelError, RemoteProtocolError
from migrated.migration.faultpoint import behind
from migrated.migration.host import Host, resume_machine, write_moved
from migrated.model.handover import Act, Event, Hold, Source, Target, source_step, target_step
from migrated.model.runstate import RunState
from migrated.wire.command import Command
from migrated.wire.handover import Offer, encode_commit, encode_withdrawal

Do = Callable[[], Awaitable[None]]


class SourceHandover:
    """One offer of this host's machine, from its id to the destination's word."""

    def __init__(self, host: Host, offer: Offer, *, peer: str, address: str, state: Source = Source.RUNNING) -> None:
        self._host = host
        self.offer = offer
        self.peer = peer
        self.address = address
        """Where the destination is asked again, if its word gets lost."""
        self.state = state
        self._serves = state is Source.RUNNING
        """Memory that is missing at the other end comes from this process, while it lives."""

    @classmethod
    def begin(cls, host: Host, migration_id: str, *, peer: str, address: str) -> SourceHandover:
        """Make an offer."""
        return cls(host, Offer(migration_id, host.ownership.record.epoch + 1), peer=peer, address=address)

    @classmethod
    def of_record(cls, host: Host) -> SourceHandover | None:
        """Return the one that waits for an answer, as the record has it; None where nobody can be asked."""
        record = host.ownership.record
        if record.hold is not Hold.RELEASED or not record.address:
            return None
        offer = Offer(record.migration_id, record.epoch)
        return cls(host, offer, peer=record.peer, address=record.address, state=Source.RELEASED)

    @property
    def released(self) -> bool:
        """True from the moment on that only the destination's answer decides."""
        return self.state in (Source.RELEASED, Source.MOVED)

    async def happened(
        self, event: Event, *, send: Callable[[bytes], Awaitable[None]] | None = None, run: Do | None = None
    ) -> None:
        """Do what the table says. Raises OSError for a record, ChannelError for a commit that did not go out."""
        before = self.state
        self.state, acts = source_step(before, event)
        for act in acts:
            match act:
                case Act.WRITE_RELEASED:
                    await self._release(before)
                case Act.WRITE_OWNER:
                    await self._host.ownership.become(Hold.OWNER)
                case Act.WRITE_MOVED:
                    offer = self.offer
                    await write_moved(self._host, peer=self.peer, migration_id=offer.migration_id, epoch=offer.epoch)
                case Act.RUN if run is not None:
                    await run()
                case Act.SEND_COMMIT if send is not None:
                    await send(encode_commit(self.offer, serves=self._serves))
                case Act.SEND_WITHDRAWN if send is not None:
                    await self._withdraw(send)
            await self._host.fault_point(behind("source", act))

    async def _release(self, before: Source) -> None:
        try:
            await self._host.ownership.become(
                Hold.RELEASED,
                peer=self.peer,
                migration_id=self.offer.migration_id,
                epoch=self.offer.epoch,
                address=self.address,
            )
        except OSError:
            self.state = before  # nobody was told: it is still this host's
            raise

    async def _withdraw(self, send: Callable[[bytes], Awaitable[None]]) -> None:
        try:
            await send(encode_withdrawal(self.offer))
        except ChannelError:
            return  # it waits, until another offer tells it the same


async def take_back(
    host: Host,
    handover: SourceHandover | None,
    previous: RunState,
    *,
    send: Callable[[bytes], Awaitable[None]] | None = None,
) -> None:
    """Make the machine this host's again, and what it was before. Lock held; twice does no harm.

    ``send`` tells a destination that can be told. Without an offer the record may say "released" as well: nobody has
    started what was not sent whole, or was refused.
    """

    async def resume() -> None:
        await resume_machine(host, previous)

    if handover is not None:
        await handover.happened(Event.REFUSED if handover.released else Event.LOST, send=send, run=resume)
    elif host.ownership.record.hold is Hold.RELEASED:
        await host.ownership.become(Hold.OWNER)
    await resume()  # also where it had not got as far as that


class TargetHandover:
    """The offer of one incoming migration, if its source makes one."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self.offer: Offer | None = None
        self.checked = False
        """A checksum follows each section."""
        self.state = Target.EMPTY
        self._decision: asyncio.Future[Event] = asyncio.get_running_loop().create_future()
        self.obeyed = asyncio.Event()
        """Set when the word was obeyed, or cannot be any more."""

    def offered(self, offer: Offer, *, checked: bool) -> None:
        """Take an offer down. Raises RemoteProtocolError for a second one, and for one that was taken before."""
        if offer.migration_id in self._host.ownership.record.taken:
            # Somebody says again what was said in another life: the machine went on from there.
            raise RemoteProtocolError(
                "an offer that was taken before", section="hand-over", expected="a new one", found=offer.migration_id
            )
        if self.offer is not None:
            raise RemoteProtocolError("a second offer", section="hand-over", expected="one for each migration")
        self.state, _ = target_step(self.state, Event.OFFERED)
        self.checked = checked
        # No epoch is given twice, whatever either end has seen.
        self.offer = Offer(offer.migration_id, max(offer.epoch, self._host.ownership.record.epoch + 1))

    @property
    def prepared(self) -> bool:
        """True while everything is here, and the source's word is not."""
        return self.state is Target.PREPARED

    def is_for(self, migration_id: str) -> bool:
        """True for the offer of that migration."""
        return self.offer is not None and self.offer.migration_id == migration_id

    async def happened(self, event: Event, acts: Mapping[Act, Do]) -> None:
        """Do what the table says, by what ``acts`` has for it."""
        self.state, todo = target_step(self.state, event)
        for act in todo:
            if act in acts:
                await acts[act]()
            await self._host.fault_point(behind("target", act))
        if event is not Event.COMPLETE:
            self.obeyed.set()

    def decide(self, event: Event) -> None:
        """Say what becomes of it: COMMIT, WITHDRAWN, OFFERED (another one), or an operator's word."""
        if not self._decision.done():
            self._decision.set_result(event)

    @property
    def decided(self) -> bool:
        """True once the word is there."""
        return self._decision.done()

    async def decision(self) -> Event:
        """Wait for that word; it may be asked for more than once."""
        return await asyncio.shield(self._decision)

    def take_commit(self, offer: Offer) -> None:
        """Take X_COMMIT. Raises RemoteProtocolError where it is about another offer, or nothing was ready."""
        if offer != self.offer:
            raise _of_another(Command.X_COMMIT, offer, self.offer)
        if self.state not in (Target.PREPARED, Target.OWNER):
            raise RemoteProtocolError("X_COMMIT before anything was ready", section="hand-over")
        self.decide(Event.COMMIT)

    def take_withdrawal(self, offer: Offer) -> None:
        """Take X_WITHDRAW. Raises RemoteProtocolError where it is about another offer."""
        if not self.is_for(offer.migration_id):
            raise _of_another(Command.X_WITHDRAW, offer, self.offer)
        self.decide(Event.WITHDRAWN)


def _of_another(command: Command, found: Offer, expected: Offer | None) -> RemoteProtocolError:
    return RemoteProtocolError(
        f"{command.name} of another migration",
        section="hand-over",
        expected="none" if expected is None else f"{expected.migration_id}, epoch {expected.epoch}",
        found=f"{found.migration_id}, epoch {found.epoch}",
    )
