"""Taking a machine over: the record, the start, the answer.

The rule of the file: the record is written before the machine runs, and the machine runs, or is known not to, before
the source hears of it. Once it has begun, nothing is given up any more: the record may say that the machine is here.

    from a `migrated` source     owner -> run -> SHUT 0
    from a QEMU                  accepted -> SHUT 0 -> its orderly end -> owner -> run: a QEMU resumes without SHUT 0
    by postcopy                  [prepared ->] incomplete -> run -> ... all memory -> owner -> SHUT 0

A destination that is prepared runs the machine while it writes that it does: whatever happens to it meanwhile, its
record says to ask, and the source, which has let go, says who owns the machine.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from migrated.errors import ChannelError, OutcomeUnknown, ProtocolError, RemoteProtocolError
from migrated.migration.host import Host
from migrated.migration.incoming_link import IncomingLink
from migrated.migration.ownership import Hold
from migrated.migration.return_path import PeerKind
from migrated.model.faults import FaultFigures
from migrated.model.runstate import RESTING, RunState


class TakeOver:
    """The end of one incoming migration. ``autostart``: a machine that ran is to run here at once."""

    def __init__(self, host: Host, link: IncomingLink, migration_id: str, autostart: Callable[[], bool]) -> None:
        self._host = host
        self._link = link
        self._migration_id = migration_id
        self._autostart = autostart
        self.begun = False
        """From here on nothing is given up any more."""
        self._before = host.ownership.record
        """What holds if nothing comes of it."""

    async def precopy(self) -> None:
        """Run a machine that is all here."""
        host, link = self._host, self._link
        if link.kind is PeerKind.QEMU:
            await self._commit_with_qemu()
        state = self._run_state()
        async with host.lock:
            self.begun = True
            await self._become(Hold.OWNER, state)
            try:
                await self._start(state)
            except Exception as error:
                if host.machine.run_state is RunState.RUNNING:
                    # Its workloads were told to go on: nobody may tell the source that it does not run.
                    raise OutcomeUnknown(f"{error!r}, after the machine was started here") from error
                await self._give_back(error)
                raise
        if link.kind is not PeerKind.QEMU:
            try:
                await link.return_path.shut(0)
            except ChannelError as error:
                # The machine runs here. The source will say "unknown"; this host knows.
                host.log.warning("answer_not_delivered", error=str(error), migration_id=self._migration_id)

    async def prepare(self) -> None:
        """Write that the machine is about to be handed over."""
        self._before = self._host.ownership.record
        await self._become(Hold.PREPARED)

    async def dismiss(self) -> None:
        """Nothing came of it: write what was true before. Twice does no harm."""
        if self._host.ownership.record.hold is Hold.PREPARED and not self.begun:
            before = self._before
            await self._host.ownership.become(before.hold, peer=before.peer, migration_id=before.migration_id)

    async def postcopy(self) -> None:
        """Run a machine whose memory is not all here."""
        host, state = self._host, self._run_state()
        async with host.lock:
            host.machine.check_alive()
            self.begun = True
            prepared = host.ownership.record.hold is Hold.PREPARED
            writing = asyncio.ensure_future(self._become(Hold.INCOMPLETE, state))
            if not prepared:
                await writing
            host.postcopy_load.started()
            try:
                await self._start(state, confirm=False)
            finally:
                await self._written(writing)
        self._link.expect_heartbeat()

    async def _written(self, writing: asyncio.Future[None]) -> None:
        try:
            await writing
        except OSError as error:
            # It runs here all the same; on disk "prepared" stays, which says to ask the source, and that knows.
            self._host.log.error("record_not_written", error=str(error), migration_id=self._migration_id)

    async def finish_postcopy(self, faults: FaultFigures | None) -> None:
        """All memory is here: the source may let go of it."""
        async with self._host.lock:
            await self._become(Hold.OWNER)
        with contextlib.suppress(ChannelError):  # the machine is here, whole, whatever the source knows
            await self._link.return_path.faults(faults)
            await self._link.return_path.shut(0)

    async def _become(self, hold: Hold, run_state: RunState | None = None) -> None:
        await self._host.ownership.become(
            hold, peer=self._link.peer, migration_id=self._migration_id, run_state=run_state
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
            return RunState.RUNNING if self._autostart() else RunState.PAUSED
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
