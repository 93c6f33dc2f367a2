"""Taking a machine over: the record, the start, the answer.

The rule of the file: the record is written before the machine runs, and the machine runs, or is known not to, before
the source hears of it. Once it has begun, nothing is given up any more: the record may say that the machine is here.

    from a `migrated` source     prepared -> ready -> its commit -> owner -> run -> active
       that makes no offer       owner -> run -> SHUT 0
    from a QEMU                  accepted -> SHUT 0 -> its orderly end -> owner -> run: a QEMU resumes without SHUT 0
    by postcopy                  [prepared -> ready -> commit ->] incomplete -> run -> ... all memory -> owner -> SHUT 0
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from migrated.errors import ChannelError, OutcomeUnknown, ProtocolError, RemoteProtocolError
from migrated.migration.host import Host
from migrated.migration.incoming_link import IncomingLink
from migrated.migration.return_path import PeerKind
from migrated.model.faults import FaultFigures
from migrated.model.handover import Hold
from migrated.model.runstate import RESTING, RunState
from migrated.wire.handover import Offer


class TakeOver:
    """The end of one incoming migration. ``autostart``: a machine that ran is to run here at once."""

    def __init__(self, host: Host, link: IncomingLink, migration_id: str, autostart: Callable[[], bool]) -> None:
        self._host = host
        self._link = link
        self.migration_id = migration_id
        self.autostart = autostart
        self.begun = False
        """From here on nothing is given up any more."""
        self.prepared = False
        """The record says, or has said, that everything of this one is here."""

    # -- by an offer: the acts of `model.handover` -------------------------------------------------------------

    async def prepare(self, offer: Offer) -> None:
        """Write that everything is here."""
        await self._host.ownership.become(
            Hold.PREPARED, peer=self._link.peer, migration_id=offer.migration_id, epoch=offer.epoch
        )
        self.prepared = True

    async def dismiss(self) -> None:
        """Write that nothing will come of it: memory of it is here, and no machine."""
        await self._host.ownership.become(Hold.PARTIAL)

    async def own(self, hold: Hold = Hold.OWNER) -> None:
        """Write that the machine is here, and what it does. Lock held."""
        ownership = self._host.ownership
        self._host.machine.check_alive()
        self.begun = True
        epoch = ownership.record.epoch if ownership.record.hold is Hold.PREPARED else None
        try:
            await self._become(hold, self._run_state(), epoch)
        except OSError:
            self.begun = False  # the record is the one before: the machine is not here, and never was
            raise

    async def start(self) -> None:
        """Run the machine, or write that it goes back. Lock held."""
        host = self._host
        try:
            await self._start(host.ownership.record.run_state)
        except Exception as error:
            if host.machine.run_state is RunState.RUNNING:
                # Its workloads were told to go on: nobody may tell the source that it does not run.
                raise OutcomeUnknown(f"{error!r}, after the machine was started here") from error
            await self._give_back(error)
            raise

    async def start_without_all(self) -> None:
        """Run a machine whose memory still arrives. Lock held."""
        self._host.postcopy_load.started()
        await self._start(self._host.ownership.record.run_state, confirm=False)

    # -- without one -------------------------------------------------------------------------------------------

    async def precopy(self) -> None:
        """Run a machine that is all here."""
        if self._link.kind is PeerKind.QEMU:
            await self._commit_with_qemu()
        async with self._host.lock:
            await self.own()
            await self.start()
        if self._link.kind is not PeerKind.QEMU:
            await self.answer()

    async def answer(self) -> None:
        """Say the last word to a source whose machine runs here."""
        try:
            await self._link.return_path.shut(0)
        except ChannelError as error:
            # The machine runs here. The source asks again, or says "unknown"; this host knows.
            self._host.log.warning("answer_not_delivered", error=str(error), migration_id=self.migration_id)

    async def postcopy(self) -> None:
        """Run a machine whose memory is not all here."""
        async with self._host.lock:
            await self.own(Hold.INCOMPLETE)
            await self.start_without_all()
        self._link.expect_heartbeat()

    async def finish_postcopy(self, faults: FaultFigures | None) -> None:
        """All memory is here: the source may let go of it."""
        async with self._host.lock:
            await self._become(Hold.OWNER)
        with contextlib.suppress(ChannelError):  # the machine is here, whole, whatever the source knows
            await self._link.return_path.faults(faults)
            await self._link.return_path.shut(0)

    async def _become(self, hold: Hold, run_state: RunState | None = None, epoch: int | None = None) -> None:
        await self._host.ownership.become(
            hold, peer=self._link.peer, migration_id=self.migration_id, run_state=run_state, epoch=epoch
        )

    async def _give_back(self, why: Exception) -> None:
        """Write that the machine stays at the source, before the source is told so."""
        try:
            await self._become(Hold.MOVED)
        except OSError as error:
            # On disk it is this host's: told that it is not, the source would run it, and so would a restart here.
            raise OutcomeUnknown(f"{why}; and the record cannot be written: {error}") from error

    def _run_state(self) -> RunState:
        """Return what the machine does here: what it did there, unless it is to wait for `cont`."""
        state = self._host.global_state.received or RunState.RUNNING
        if state is RunState.RUNNING:
            return RunState.RUNNING if self.autostart() else RunState.PAUSED
        return state if state in RESTING else RunState.PAUSED

    async def _start(self, state: RunState, *, confirm: bool = True) -> None:
        self._host.machine.check_alive()
        if state is RunState.RUNNING:
            await self._host.machine.cont(confirm=confirm)
        else:
            self._host.machine.set_run_state(state)

    async def _commit_with_qemu(self) -> None:
        """Send SHUT 0 and wait for the source's orderly end; only then may the machine run here."""
        ownership, channel = self._host.ownership, self._link.channel
        await self._become(Hold.ACCEPTED)
        timeout_s = self._host.settings.seconds("x-migrated-answer-timeout")
        try:
            await self._link.return_path.shut(0)
            channel.shutdown_write()
            scrap = memoryview(bytearray(1))
            if await channel.receive_into(scrap, deadline_s=timeout_s):
                raise RemoteProtocolError("the source goes on sending after SHUT 0", expected="end of stream")
        except (ChannelError, ProtocolError) as error:
            raise OutcomeUnknown(f"{error}; {ownership.text()}. Next: {ownership.next_step()}") from error
