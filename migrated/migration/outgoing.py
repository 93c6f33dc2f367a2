"""One outgoing migration: connect, setup, passes, switchover, cleanup.

The rule of the file: the iteration loop runs without the iothread lock; the lock is taken for the exact pending sync
(by the "ram" handler), for switchover, and for cleanup. However the migration ends, the cleanup hooks run, the channel
is closed, and the status says how it ended. Source of the loop: QEMU's migration thread, 7.2.

    dial -> preamble -> OPEN_RETURN_PATH, detection -> START sections -> [ pending -> decide -> PART sections ]*
         -> switchover -> completed | failed | cancelled
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from migrated.errors import (
    ChannelError,
    CommandError,
    MigratedError,
    MigrationCancelled,
    OutcomeUnknown,
    PreflightBlocked,
    ProtocolError,
)
from migrated.migration.data_channels import DataChannels
from migrated.migration.handover import SourceHandover
from migrated.migration.handshake import greet
from migrated.migration.host import Host, error_of, first_error, insist, without_frames
from migrated.migration.operator_pause import OperatorPause
from migrated.migration.passes import Passes, Switch
from migrated.migration.postcopy_source import Link, PostcopySource
from migrated.migration.preflight_source import Verdict, preflight
from migrated.migration.progress import Progress
from migrated.migration.recovery import Dial, Pauses
from migrated.migration.return_path import SETUP_PING, PeerKind, ReturnPathReader
from migrated.migration.switchover import Commit, Switchover
from migrated.model.ramblock import page_size_summary
from migrated.model.status import ENDED, OUTGOING, POSTCOPY, MigrationStatus, StatusCell
from migrated.stream.incoming import IncomingStream
from migrated.stream.outgoing import OutgoingStream
from migrated.transport.channel import Channel
from migrated.transport.file import FileChannel
from migrated.transport.tls_channel import TlsChannel
from migrated.wire.command import FEATURE_HANDOVER, Command, ping_payload
from migrated.wire.handover import encode_offer

#: How long a failing channel is given to deliver the destination's reason.
REASON_GRACE_S = 1.0


Phases = Callable[[OutgoingStream, Channel], Awaitable[None]]


class OutgoingMigration:
    """Runs once. `error` and `status` say how it ended; nothing is raised out of `run`."""

    def __init__(self, host: Host, progress: Progress, dial: Dial, *, migration_id: str, address: str = "") -> None:
        self._host = host
        self._progress = progress
        self._dial = dial
        self._address = address
        self._handover: SourceHandover | None = None
        self.migration_id = migration_id
        self.status = StatusCell(OUTGOING, self._status_changed)
        self.error: MigratedError | None = None
        self.failed_in = MigrationStatus.NONE
        """The status in which it failed."""
        self.kind = PeerKind.UNKNOWN
        self.peer = ""
        self._pause = OperatorPause(host, self.status)
        self._switchover = Switchover(host, progress, self._pause, migration_id)
        self._postcopy = PostcopySource(host, progress, self.status, self._pause, migration_id)
        self._postcopy_wanted = False
        self._passes = Passes(host, progress, migration_id)
        self._pages = DataChannels(host, address)
        self._channel: Channel | None = None
        self._pauses = Pauses()
        self._settled = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._group: asyncio.TaskGroup | None = None
        self._watchers: list[asyncio.Task[None]] = []
        self._return_path: ReturnPathReader | None = None

    def _status_changed(self, status: MigrationStatus) -> None:
        if status in ENDED or status is MigrationStatus.POSTCOPY_PAUSED:
            self._settled.set()
        else:
            self._settled.clear()
        self._host.log.info("migration_status", status=status.value, migration_id=self.migration_id, role="outgoing")
        if self._host.settings.enabled("events"):
            self._host.emit("MIGRATION", {"status": status.value})

    # -- commands ----------------------------------------------------------------------------------------------

    def cancel(self) -> None:
        """Cancel. Raises CommandError once the last byte is on its way: then only the answer decides."""
        if self.status.value in POSTCOPY:
            raise CommandError("Postcopy migration in progress, cannot cancel.")
        if self._switchover.committed:
            raise CommandError(
                "the machine is being handed over: the last byte is on its way, and only the destination's answer"
                " decides now. Next: wait for the outcome (query-migrate)"
            )
        if self._task is not None and self.status.advance(MigrationStatus.CANCELLING):
            self._task.cancel()

    def proceed(self, state: str) -> None:
        """Go on after pause-before-switchover; ``state`` must be the present status."""
        if state != self.status.value.value or self.status.value is not MigrationStatus.PRE_SWITCHOVER:
            raise CommandError(f"Migration not in expected state: {self.status.value.value}")
        self._pause.proceed()

    def start_postcopy(self) -> None:
        """Switch to postcopy as soon as what cannot follow the machine is sent."""
        self._postcopy_wanted = True

    def pause(self) -> None:
        """Break the connection of a postcopy (``migrate-pause``)."""
        self._pauses.by_operator = True
        if self._channel is not None:
            self._channel.abort()

    def resume(self, dial: Dial) -> None:
        """Go on after a pause, over what ``dial`` gives (``migrate`` with resume). Raises CommandError."""
        if self.status.value is not MigrationStatus.POSTCOPY_PAUSED:
            raise CommandError("Cannot resume if there is no paused migration")
        self._pauses.resume(dial)

    async def give_up(self) -> None:
        """Wait until it ends or is paused, and end it then; what becomes of the machine is for an operator to say."""
        await self._settled.wait()
        if self._task is not None and self.status.value is MigrationStatus.POSTCOPY_PAUSED:
            self._host.log.error("postcopy_given_up", text=self._host.ownership.text(), migration_id=self.migration_id)
            self._task.cancel()
        await self.wait()

    @property
    def finished(self) -> bool:
        """True when the migration has ended and nothing of it is left running."""
        return self._task is not None and self._task.done()

    async def wait(self) -> None:
        """Wait until it has ended."""
        if self._task is not None:
            await asyncio.wait([self._task])

    # -- the job -----------------------------------------------------------------------------------------------

    def start(self, spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]]) -> None:
        """Enter setup and run as a task of the daemon."""
        self._progress.begin()
        self.status.advance(MigrationStatus.SETUP)
        self._task = spawn(self.run())

    async def run(self) -> None:
        """Migrate; end in completed, failed or cancelled."""
        try:
            await self._migrate()
        except asyncio.CancelledError:
            unknown = self._switchover.handed_over or self._postcopy.committed
            self._failed(OutcomeUnknown("given up while waiting for the destination") if unknown else None)
        except (MigratedError, OSError) as error:
            self._failed(error_of(error))
        except Exception as error:  # the top of a job: a bug here must not leave a migration without an end
            self._host.log.exception("migration_bug")
            self._failed(MigratedError(f"internal error: {error!r}"))
        else:
            self._progress.finish()  # where nobody answers it had not ended before
            self.status.advance(MigrationStatus.COMPLETED)
        finally:
            self._progress.finish()

    def _failed(self, error: MigratedError | None) -> None:
        cancelled = self.status.value is MigrationStatus.CANCELLING and not isinstance(error, OutcomeUnknown)
        if error is None or cancelled:
            self.status.advance(MigrationStatus.CANCELLING)
            self.status.advance(MigrationStatus.CANCELLED)
            return
        self.error, self.failed_in = without_frames(error), self.status.value
        self._host.log.error(
            "migration_failed", error=str(error), error_id=error.error_id, migration_id=self.migration_id
        )
        self.status.advance(MigrationStatus.FAILED)

    async def _migrate(self) -> None:
        try:
            try:
                await self._over(self._dial, self._phases)
            except (ChannelError, ProtocolError) as error:
                if not self._postcopy.committed:
                    raise
                await self._recover(error)
        finally:
            await insist(self._cleanup)

    async def _recover(self, error: MigratedError) -> None:
        """Pause and go on, as often as it takes."""
        while True:
            self.error = without_frames(error)
            self._host.log.warning("migration_paused", error=str(error), migration_id=self.migration_id)
            self.status.advance(MigrationStatus.POSTCOPY_PAUSED)
            dial = await self._pauses.next_dial(self._dial, by_itself=self.kind is PeerKind.MIGRATED)
            try:
                if await self._postcopy.settle(dial):
                    await self._all_there()
                else:
                    await self._over(dial, self._resume_phases)
            except (ChannelError, ProtocolError, OSError) as again:
                error = error_of(again)
            else:
                return

    async def _over(self, dial: Dial, phases: Phases) -> None:
        """Connect and run phases over that connection."""
        channel: Channel | None = None
        try:
            channel = self._channel = await dial()
            self._dial = dial
            self.peer = channel.peer
            channel.silence_timeout_s = self._host.settings.silence_timeout_s()
            if isinstance(channel, FileChannel):
                self.kind = PeerKind.FILE
            await self._pages.open_first(dial, resumes=self._postcopy.committed)
            await self._with_channel(channel, phases)
            await self._pages.close()
        finally:
            self._channel = None
            self._pages.abort()
            if channel is not None:
                channel.abort()

    async def _with_channel(self, channel: Channel, phases: Phases) -> None:
        """Run the phases beside what may end them: a dying workload, a breaking return path."""
        f = OutgoingStream(channel, self._progress.meter, on_sent=self._progress.sent, clock=self._host.clock)
        try:
            async with asyncio.TaskGroup() as group:
                self._group, self._watchers = group, []
                if not self._postcopy.committed:
                    self._host.machine.watch()
                    self._watch(self._host.machine.lost())
                reader = self._open_return_path(channel, group) if channel.has_return_path else None
                try:
                    await phases(f, channel)
                except ChannelError as error:
                    # What the destination said before it closed tells more than the broken pipe it caused.
                    raise await self._reason_for(error) from error
                finally:
                    self._unwatch()
                    if reader is not None:
                        reader.cancel()
        except BaseExceptionGroup as group_error:
            raise first_error(group_error) from None

    def _open_return_path(self, channel: Channel, group: asyncio.TaskGroup) -> asyncio.Task[None]:
        stream = IncomingStream(channel, silence_timeout_s=self._host.settings.silence_timeout_s)
        self._return_path = ReturnPathReader(stream, self._host.postcopy_save.request, self._progress.faulted)
        self._return_stream = stream
        if not self._postcopy.committed:
            self._watch(self._return_path.watch())
        return group.create_task(self._return_path.read())

    def _watch(self, watch: Coroutine[Any, Any, None]) -> None:
        """Have this run until the last byte is sent."""
        assert self._group is not None
        self._watchers.append(self._group.create_task(watch))

    def _unwatch(self) -> None:
        """Stop watching: from the last byte on only the return path's answer counts."""
        for task in self._watchers:
            task.cancel()

    async def _phases(self, f: OutgoingStream, channel: Channel) -> None:
        await self._greet(f)
        await self._host.fault_point("source.setup")
        self._offer(f)
        self._advise(f)
        await self._host.registry.save_setup(f)
        await self._wait_for_destination(f)
        self._progress.setup_done()
        self._advance(MigrationStatus.ACTIVE)
        if await self._passes.run(f, lambda: self._postcopy_wanted) is Switch.POSTCOPY:
            await self._postcopy.hand_over(self._link(f, channel), self._unwatch, self._handover)
        else:
            by = Commit(self._handover, self._dial) if self._handover is not None else None
            await self._switchover.run(f, channel, self._return_path, self.kind, self._unwatch, by)

    async def _resume_phases(self, f: OutgoingStream, channel: Channel) -> None:
        self.status.advance(MigrationStatus.POSTCOPY_RECOVER)
        await self._postcopy.resume(self._link(f, channel), self._went_on)

    async def _all_there(self) -> None:
        """End a postcopy whose last word got lost."""
        self.status.advance(MigrationStatus.POSTCOPY_RECOVER)
        self.status.advance(MigrationStatus.POSTCOPY_ACTIVE)
        self._went_on()
        await self._postcopy.let_go(self.peer)

    def _went_on(self) -> None:
        self.error = None
        self._pauses.went_on()

    def _link(self, f: OutgoingStream, channel: Channel) -> Link:
        assert self._return_path is not None
        stream = self._return_stream

        def expect_signs_of_life(timeout_s: float) -> None:
            stream.idle_timeout_s = timeout_s

        urgent = None
        if self._pages.urgent is not None:
            urgent = OutgoingStream(
                self._pages.urgent, self._progress.meter, on_sent=self._progress.sent, clock=self._host.clock
            )
        return Link(f, urgent, self._return_path, self.peer, self.kind, channel, expect_signs_of_life)

    def _offer(self, f: OutgoingStream) -> None:
        """Offer the machine to a destination that waits for a commit."""
        if self._return_path is not None and self._return_path.features & FEATURE_HANDOVER:
            self._handover = SourceHandover.begin(self._host, self.migration_id, peer=self.peer, address=self._address)
            checked = bool(self._host.settings.parameters.get("x-migrated-checksums"))
            f.put_buffer(encode_offer(self._handover.offer, checked=checked))
            if checked:
                f.begin_checksums()

    def _advise(self, f: OutgoingStream) -> None:
        """Say that postcopy may follow."""
        if not self._host.settings.enabled("postcopy-ram"):
            return
        if self._return_path is None:
            raise CommandError(
                f"postcopy needs a connection with a return path, and {self.peer} has none."
                " Next: migrate with postcopy-ram off, or over tcp: or unix:"
            )
        f.put_advise(page_size_summary(block.page_size for block in self._host.machine.ram_blocks()))

    async def _greet(self, f: OutgoingStream) -> None:
        """Find out who is there, and whether anything stands in the way at either end. Nothing has moved yet."""
        kind = await greet(f, self._return_path, self._host)
        if self._return_path is not None:
            self.kind = kind
        self._pages.check_peer(self.kind)
        features = self._return_path.features if self._return_path is not None else 0
        encrypted = isinstance(self._channel, TlsChannel)
        channels = self._pages.number(self.kind, features, encrypted=encrypted)
        asked = Verdict((), self.peer, self.kind)
        verdict = await preflight(self._host, f, self._return_path, asked, self.migration_id, channels=channels)
        for one in verdict.blockers:
            self._host.log.warning(
                "preflight", error_id=one.id, side=one.side, text=one.text, migration_id=self.migration_id
            )
        if not verdict.ready:
            raise PreflightBlocked(verdict.blockers)
        if await self._pages.open_rest(self._dial, verdict, channels=channels):
            self._watch(self._host.multifd_save.run())

    async def _wait_for_destination(self, f: OutgoingStream) -> None:
        """Send no page before the destination has its blocks: its workload may still be on the way."""
        if self._return_path is None:
            return
        f.put_command(Command.PING, ping_payload(SETUP_PING))
        await f.drain()
        settings = self._host.settings
        # The destination's own limit is attach-timeout; what it says then tells more than our silence.
        patience_s = settings.seconds("x-migrated-answer-timeout") + settings.silence_timeout_s()
        await self._return_path.wait_pong(SETUP_PING, patience_s, "the destination sets up")

    def _advance(self, status: MigrationStatus) -> None:
        if not self.status.advance(status):
            raise MigrationCancelled("cancelled")

    # -- the end -----------------------------------------------------------------------------------------------

    async def _reason_for(self, error: ChannelError) -> MigratedError:
        reader = self._return_path
        if reader is None or self._switchover.handed_over or self._postcopy.committed:
            return error
        try:
            async with asyncio.timeout(REASON_GRACE_S):
                await asyncio.shield(reader.answer)
        except (TimeoutError, MigratedError):
            pass
        return reader.refusal() or error

    async def _cleanup(self) -> None:
        """Undo everything but the outcome: throttle and handlers. Twice does no harm."""
        if self._progress.throttle_percent:
            await self._host.machine.throttle(0)
            self._progress.throttle_percent = 0
        async with self._host.lock:
            for failure in await self._host.registry.save_cleanup():
                self._host.log.error("cleanup_failed", error=str(failure))
