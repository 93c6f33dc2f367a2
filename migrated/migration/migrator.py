"""The migrations of one daemon: one at a time, in either direction, and the commands that steer them.

The rule of the file: it decides whether something may begin, never how it goes on; that is `outgoing` and `incoming`.
Implements control's ``MigratorPort``. Error texts are QEMU's where QEMU has one.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from typing import Any

from migrated.errors import CommandError
from migrated.migration import report
from migrated.migration.data_arrivals import DataArrivals
from migrated.migration.descriptors import Descriptors
from migrated.migration.handshake import begins_stream
from migrated.migration.history import History
from migrated.migration.host import (
    OPTIONAL_SECTIONS,
    Emit,
    Host,
    Spawn,
    leave_machine,
    let_go_of_memory,
    require_machine_here,
    require_something,
)
from migrated.migration.incoming import IncomingMigration
from migrated.migration.jobs import Jobs
from migrated.migration.listening import Listening
from migrated.migration.outgoing import OutgoingMigration
from migrated.migration.preflight_source import dry_run
from migrated.migration.progress import Progress
from migrated.migration.reception import Reception
from migrated.migration.recovery import Dial, dialling
from migrated.migration.requests import Requests
from migrated.migration.settlement import Settler
from migrated.model.handover import Event, Hold
from migrated.model.runstate import RunState
from migrated.model.status import PAUSABLE, POSTCOPY, MigrationStatus, is_running
from migrated.transport.address import Address, TcpAddress, UnixAddress, parse_address
from migrated.transport.channel import Channel
from migrated.transport.tls_channel import names_of
from migrated.transport.trust import Trust

BUSY = "There's a migration process in progress"
OTHER_HOST = "the paused migration is another host's"


class Migrator:
    """Starts, cancels and describes migrations; owns the incoming listener."""

    def __init__(
        self,
        host: Host,
        outgoing_progress: Progress,
        incoming_progress: Progress,
        spawn: Spawn,
        jobs: Jobs,
        history: History,
        allow: Sequence[str] = (),
        trust: Callable[[], Trust] = Trust,
    ) -> None:
        self._host = host
        self._outgoing_progress = outgoing_progress
        self._incoming_progress = incoming_progress
        self._spawn = spawn
        self._jobs = jobs
        self._history = history
        self._trust = trust
        self._outgoing: OutgoingMigration | None = None
        self._incoming: IncomingMigration | None = None
        self._arrived_before: IncomingMigration | None = None
        """The incoming migration that the present outgoing one came after."""
        self.settler = Settler(host, spawn, lambda address: self._dialling(parse_address(address)))
        self._asking = False
        self._requests = Requests(host)
        self._reception = Reception(host, spawn, self._receive, lambda: self._incoming)
        self.descriptors = Descriptors()
        """Under names, for ``fd:`` URIs."""
        self._listening = Listening(
            host,
            allow=allow,
            trust=trust,
            fds=self.descriptors,
            receive=self._reception.receive,
            second=self._reception.take,
        )
        self._autostart = True
        """False after a `stop` while a machine is awaited: it is to arrive paused, as QEMU has it."""
        self._subscribers: list[Emit] = []

    # -- events ------------------------------------------------------------------------------------------------

    def subscribe(self, callback: Emit) -> Callable[[], None]:
        """Call ``callback(name, data)`` for every event until the returned function is called."""
        self._subscribers.append(callback)
        return lambda: self._subscribers.remove(callback) if callback in self._subscribers else None

    def emit(self, name: str, data: dict[str, object]) -> None:
        """Hand an event to every subscriber."""
        for callback in list(self._subscribers):
            callback(name, data)

    # -- settings ----------------------------------------------------------------------------------------------

    @property
    def capabilities(self) -> Any:
        return self._host.settings.capabilities

    @property
    def parameters(self) -> Any:
        return self._host.settings.parameters

    def set_capabilities(self, changes: dict[str, bool]) -> None:
        """Change capabilities, all or none. Raises CommandError; refused while a migration runs."""
        self._require_idle()
        changed = self._host.settings.capabilities.replace(changes)
        changed.refuse_conflicts()
        self._host.settings.capabilities = changed

    def set_parameters(self, changes: dict[str, object]) -> None:
        """Change parameters, all or none. Raises CommandError."""
        self._host.settings.parameters = self._host.settings.parameters.replace(changes)

    # -- migrating ---------------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """True while a migration runs in either direction."""
        outgoing = self._outgoing is not None and (
            is_running(self._outgoing.status.value) or not self._outgoing.finished
        )
        return self._asking or outgoing or (self._incoming is not None and is_running(self._incoming.status.value))

    async def migrate(self, uri: str, *, resume: bool = False, request_id: str = "") -> None:
        """Start an outgoing migration, if this is not a known request; returns once accepted. Raises CommandError."""
        if resume:
            if self._outgoing is None:
                raise CommandError("Cannot resume if there is no paused migration")
            self._outgoing.resume(self._dialling(parse_address(uri)))
            return
        if request_id and self._requests.knows(request_id, uri, self._outgoing):
            return
        address = await self._may_leave_for(uri)
        self._arrived_before = self._incoming
        self._requests.begun(uri)
        migration_id = request_id or uuid.uuid4().hex
        self._outgoing = OutgoingMigration(
            self._host, self._outgoing_progress, self._dialling(address), migration_id=migration_id, address=uri
        )
        self._outgoing.start(self._history.departs(self._outgoing, uri))
        self._spawn(self.settler.settle_after(self._outgoing.wait()))

    async def _may_leave_for(self, uri: str) -> Address:
        """Return the address in ``uri``. Raises CommandError unless a machine may go there."""
        handlers = await self._host.registry.device_names(besides=OPTIONAL_SECTIONS)
        self._require_idle()
        address = parse_address(uri)
        self._host.settings.capabilities.refuse_conflicts()  # those of the configuration
        if self._host.settings.enabled("multifd") and not isinstance(address, TcpAddress | UnixAddress):
            raise CommandError("multifd is not supported by current protocol")
        require_machine_here(self._host)
        require_something(self._host, handlers)
        return address

    def _dialling(self, address: Address) -> Dial:
        settings = self._host.settings
        name = str(settings.parameters.get("tls-hostname") or "")
        return dialling(address, settings.silence_timeout_s(), self.descriptors.take, self._trust, name)

    async def preflight(self, uri: str) -> dict[str, object]:
        """Check both sides, move nothing (``x-migrated-preflight``). Raises CommandError where there is no machine."""
        address = await self._may_leave_for(uri)
        self._asking = True
        try:
            return (await dry_run(self._host, self._dialling(address))).as_dict()
        finally:
            self._asking = False

    def start_postcopy(self) -> None:
        """Have the present migration switch to postcopy (``migrate-start-postcopy``). Raises CommandError."""
        if not self._host.settings.enabled("postcopy-ram"):
            raise CommandError("Enable postcopy with migrate_set_capability before the start of migration")
        if self._outgoing is None or self._outgoing.finished:
            raise CommandError("Postcopy must be started after migration has been started")
        self._outgoing.start_postcopy()

    def pause(self) -> None:
        """Break the connection of a postcopy, so that it pauses (``migrate-pause``). Raises CommandError."""
        for migration in (self._outgoing, self._incoming):
            if migration is not None and migration.status.value in PAUSABLE:
                migration.pause()
                return
        raise CommandError("migrate-pause is currently only supported during postcopy-active or postcopy-recover state")

    async def recover(self, uri: str) -> None:
        """Wait at ``uri`` for the source of a paused postcopy (``migrate-recover``). Raises CommandError."""
        if self._incoming is None or not self._incoming.postcopy.paused:
            raise CommandError("Migrate recover can only be run when postcopy is paused.")
        await self._listening.close()
        await self.open_listener(uri)

    def _require_idle(self, text: str = BUSY) -> None:
        """Raise CommandError while a migration or a snapshot is under way."""
        self._jobs.require_none()
        if self.busy:
            raise CommandError(text, error_id="busy")

    async def cancel(self) -> None:
        """Cancel the outgoing migration; without one nothing happens. Raises CommandError after the last byte."""
        if self._outgoing is not None and self._outgoing.status.value in POSTCOPY:
            self._outgoing.cancel()
        if self._host.ownership.outcome_unknown and self._host.ownership.record.hold is Hold.RELEASED:
            ownership = self._host.ownership
            raise CommandError(f"{ownership.text()}. Next: {ownership.next_step()}")
        if self._outgoing is not None and is_running(self._outgoing.status.value):
            self._outgoing.cancel()

    async def proceed(self, state: str) -> None:
        """Go on after pause-before-switchover (``migrate-continue``)."""
        if self._outgoing is None:
            raise CommandError("Migration not in expected state: none")
        self._outgoing.proceed(state)

    async def incoming(self, uri: str) -> None:
        """Open a listener (``migrate-incoming``). Raises CommandError."""
        if self._listening.begun:
            raise CommandError("The incoming migration has already been started")
        if self._host.machine.run_state not in (RunState.INMIGRATE, RunState.POSTMIGRATE):
            raise CommandError("'-incoming' was not specified on the command line")
        await self.open_listener(uri)

    async def open_listener(self, uri: str) -> None:
        """Listen for machines on ``uri``. A machine that comes while one runs here is refused. Raises CommandError."""
        await self._listening.open(uri)

    async def _receive(self, channel: Channel, pages: DataArrivals) -> None:
        before = self._incoming
        waiting = before if before is not None and before.waits else None
        busy = waiting is None and (self.busy or self._jobs.active is not None)
        if busy or (waiting is not None and names_of(channel) != waiting.peer_names):
            self._host.log.warning("connection_refused", peer=channel.peer, reason=BUSY if busy else OTHER_HOST)
            channel.abort()
            return
        if waiting is not None and waiting.postcopy.paused and not await begins_stream(channel, self._host):
            waiting.postcopy.resume(channel)
            self._reception.began()
            await waiting.postcopy.released.wait()
            return
        incoming = IncomingMigration(
            self._host,
            self._incoming_progress,
            channel,
            pages,
            migration_id=uuid.uuid4().hex,
            autostart=lambda: self._autostart,
            before=waiting,
            on_begin=lambda: self._comes(incoming),
        )
        if waiting is None:
            self._begin(incoming)
        incoming.start(self._history.arrives(incoming))
        await incoming.postcopy.released.wait()
        if incoming.only_asked and self._incoming is incoming:
            self._incoming = before
        self._autostart = self._autostart or self._host.ownership.may_run
        if incoming.touched and incoming is not self._arrived_before:
            # What came before is history, for `query` too. (What began since this one's end came after it, and stays.)
            self._outgoing = None

    def _begin(self, incoming: IncomingMigration) -> None:
        self._incoming = incoming
        self._reception.began()

    def _comes(self, incoming: IncomingMigration) -> None:
        self._begin(incoming)
        self._history.comes(incoming)

    # -- the machine -------------------------------------------------------------------------------------------

    async def stop(self) -> None:
        """Stop the machine (QMP ``stop``)."""
        self._jobs.require_none()
        async with self._host.lock:
            match self._host.machine.run_state:
                case RunState.RUNNING:
                    await self._host.machine.stop(RunState.PAUSED)
                    # Whoever owns it goes on to: in postcopy, with memory that is not all here.
                    ownership = self._host.ownership
                    await ownership.become(ownership.record.hold, run_state=RunState.PAUSED)
                case RunState.INMIGRATE:
                    self._autostart = False
                case RunState.FINISH_MIGRATE if not self._host.ownership.outcome_unknown:
                    raise CommandError(
                        "the machine is stopped for its switchover and goes on wherever that ends."
                        " Next: `migrate_cancel`, then `stop`"
                    )

    async def cont(self) -> None:
        """Start the machine (QMP ``cont``), if this host may. Raises CommandError with the reason and next step."""
        if self._host.ownership.record.hold is not Hold.PREPARED:
            self._require_idle("Migration is not finalized yet")
        self._host.ownership.require_may_start()
        async with self._host.lock:
            self._host.ownership.require_may_start()  # still, for whoever held the lock before
            await self._host.ownership.become(Hold.OWNER, run_state=RunState.RUNNING)
            await self._host.machine.cont()

    async def release(self) -> None:
        """Let go of the memory of a machine that moved away, or came only in part (``x-migrated-release``)."""
        self._require_idle()
        await let_go_of_memory(self._host)

    async def resolve(self, peer_is_fenced: bool, peer_is_running: bool) -> None:
        """End an unknown outcome by an operator's word (``x-migrated-resolve``)."""
        if peer_is_fenced == peer_is_running:
            raise CommandError("say exactly one of peer-is-fenced and peer-is-running")
        paused = self._outgoing is not None and self._outgoing.status.value is MigrationStatus.POSTCOPY_PAUSED
        # Everything may be there, and only the word that it is got lost: then nobody comes for it any more.
        all_sent = paused and not self._outgoing_progress.stats.remaining
        if paused and peer_is_running and not all_sent:
            raise CommandError("then it needs the memory that is here. Next: `migratectl recover`")
        ownership = self._host.ownership
        if ownership.record.hold is Hold.PREPARED and self._incoming is not None and self._incoming.waits:
            await self._incoming.decide(Event.PEER_FENCED if peer_is_fenced else Event.PEER_RUNS)
            return
        if self.busy and not paused:
            raise CommandError(f"{BUSY}: its outcome is not unknown yet")
        if not ownership.outcome_unknown and not (all_sent and peer_is_running):
            raise CommandError(f"there is nothing to resolve: {ownership.text()}")
        self._host.log.warning(
            "outcome_resolved_by_operator",
            peer_is_fenced=peer_is_fenced,
            peer=ownership.record.peer,
            migration_id=ownership.record.migration_id,
        )
        if paused and self._outgoing is not None:
            await self._outgoing.give_up()
        await self.settler.cancel()
        async with self._host.lock:
            if ownership.outcome_unknown:
                hold = Hold.OWNER if peer_is_fenced else Hold.MOVED
                await ownership.become(hold, peer=ownership.record.peer, run_state=RunState.PAUSED)
            if peer_is_fenced:
                self._host.machine.set_run_state(RunState.PAUSED)
            else:
                await leave_machine(self._host, ownership.record.peer)

    # -- answers -----------------------------------------------------------------------------------------------

    def query(self) -> dict[str, object]:
        """Answer ``query-migrate``: the last migration that touched the machine, in whichever direction."""
        answer: dict[str, object] = {}
        incoming = self._incoming
        asked_for = self._listening.takes_one
        arrives = incoming is not None and (incoming.touched or asked_for) and incoming is not self._arrived_before
        if self._outgoing is not None and not arrives:
            limit_ms = self._host.settings.parameters.integer("downtime-limit")
            answer = report.describe_outgoing(self._outgoing, self._outgoing_progress, self._host.ownership, limit_ms)
        elif self._requests.remembered and not arrives:
            answer = report.describe_record(self._host.ownership)
        elif incoming is not None:
            blocktime = incoming.settings.enabled("postcopy-blocktime")
            answer = report.describe_incoming(incoming, self._incoming_progress, blocktime=blocktime)
        if addresses := self._listening.addresses:
            answer["socket-address"] = addresses
        if kept := self._host.kept.describe():
            answer["x-migrated-kept-sections"] = kept
        return answer

    def ownership(self) -> dict[str, object]:
        """Answer ``x-migrated-query-ownership``."""
        return self._host.ownership.as_dict()

    # -- the end -----------------------------------------------------------------------------------------------

    async def close(self) -> None:
        """Drain: cancel what may be cancelled, wait for what may not, stop listening, close descriptors."""
        await self._listening.close()
        self._reception.close()
        if self._incoming is not None:
            self._incoming.cancel()
        await self._jobs.close()
        await self.settler.cancel()
        if self._outgoing is not None and is_running(self._outgoing.status.value):
            try:
                self._outgoing.cancel()
            except CommandError:
                self._host.log.info("waiting_for_switchover")
            await self._outgoing.give_up()
        if self._incoming is not None:
            await self._incoming.wait()  # a take-over needs the workloads, and the source its answer
        self.descriptors.close_all()
