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
)
from migrated.migration.host import OPTIONAL_SECTIONS, Host, first_error, insist, without_frames
from migrated.migration.progress import Progress
from migrated.migration.return_path import FIRST_PING, SETUP_PING, PeerKind, ReturnPathReader
from migrated.migration.switchover import Switchover
from migrated.model.convergence import Decision, decide, is_outpaced, next_throttle
from migrated.model.status import OUTGOING, MigrationStatus, StatusCell
from migrated.stream.incoming import IncomingStream
from migrated.stream.outgoing import OutgoingStream
from migrated.transport.channel import Channel
from migrated.transport.file import FileChannel
from migrated.wire.command import PEER_PING, Command, ping_payload
from migrated.wire.section import Configuration

Dial = Callable[[], Awaitable[Channel]]
#: How long a failing channel is given to deliver the destination's reason.
REASON_GRACE_S = 1.0
#: The throttle is reconsidered at most this often, as QEMU does.
THROTTLE_PERIOD_S = 1.0


class OutgoingMigration:
    """Runs once. `error` and `status` say how it ended; nothing is raised out of `run`."""

    def __init__(self, host: Host, progress: Progress, dial: Dial, *, migration_id: str) -> None:
        self._host = host
        self._progress = progress
        self._dial = dial
        self.migration_id = migration_id
        self.status = StatusCell(OUTGOING, self._status_changed)
        self.error: MigratedError | None = None
        self.kind = PeerKind.UNKNOWN
        self.peer = ""
        self._switchover = Switchover(host, progress, self.status, migration_id)
        self._task: asyncio.Task[None] | None = None
        self._watchers: list[asyncio.Task[None]] = []
        self._return_path: ReturnPathReader | None = None
        self._throttle_checked_at = 0.0
        self._outpaced_before = False

    def _status_changed(self, status: MigrationStatus) -> None:
        self._host.log.info("migration_status", status=status.value, migration_id=self.migration_id)
        if self._host.settings.enabled("events"):
            self._host.emit("MIGRATION", {"status": status.value})

    # -- commands ----------------------------------------------------------------------------------------------

    def cancel(self) -> None:
        """Cancel. Raises CommandError once the last byte is on its way: then only the answer decides."""
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
        self._switchover.proceed()

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
            unknown = self._switchover.handed_over
            self._failed(OutcomeUnknown("interrupted while waiting for the answer") if unknown else None)
        except (MigratedError, OSError) as error:
            self._failed(error if isinstance(error, MigratedError) else MigratedError(str(error)))
        except Exception as error:  # the top of a job: a bug here must not leave a migration without an end
            self._host.log.exception("migration_bug")
            self._failed(MigratedError(f"internal error: {error!r}"))
        else:
            self._progress.finish()
            self.status.advance(MigrationStatus.COMPLETED)
        finally:
            self._progress.finish()

    def _failed(self, error: MigratedError | None) -> None:
        cancelled = self.status.value is MigrationStatus.CANCELLING and not isinstance(error, OutcomeUnknown)
        if error is None or cancelled:
            self.status.advance(MigrationStatus.CANCELLING)
            self.status.advance(MigrationStatus.CANCELLED)
            return
        self.error = without_frames(error)
        self._host.log.error("migration_failed", error=str(error), migration_id=self.migration_id)
        self.status.advance(MigrationStatus.FAILED)

    async def _migrate(self) -> None:
        channel: Channel | None = None
        try:
            channel = await self._dial()
            self.peer = channel.peer
            channel.silence_timeout_s = self._host.settings.silence_timeout_s()
            if isinstance(channel, FileChannel):
                self.kind = PeerKind.FILE
            await self._with_channel(channel)
        finally:
            await insist(self._cleanup)
            if channel is not None:
                channel.abort()

    async def _with_channel(self, channel: Channel) -> None:
        """Run the phases beside what may end them: a dying workload, a breaking return path."""
        f = OutgoingStream(channel, self._progress.meter, on_sent=self._progress.sent, clock=self._host.clock)
        try:
            async with asyncio.TaskGroup() as group:
                self._host.machine.watch()
                self._watchers = [group.create_task(self._host.machine.lost())]
                reader = self._open_return_path(channel, group) if channel.has_return_path else None
                try:
                    await self._phases(f, channel)
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
        self._return_path = ReturnPathReader(stream)
        self._watchers.append(group.create_task(self._return_path.watch()))
        return group.create_task(self._return_path.read())

    def _unwatch(self) -> None:
        """Stop watching: from the last byte on only the return path's answer counts."""
        for task in self._watchers:
            task.cancel()

    async def _phases(self, f: OutgoingStream, channel: Channel) -> None:
        await self._greet(f)
        await self._host.registry.save_setup(f)
        await self._wait_for_destination(f)
        self._progress.setup_done()
        self._advance(MigrationStatus.ACTIVE)
        await self._iterate(f)
        await self._switchover.run(f, channel, self._return_path, self.kind, self._unwatch)

    async def _greet(self, f: OutgoingStream) -> None:
        machine, settings = self._host.machine, self._host.settings
        uuid = (
            bytes.fromhex(machine.uuid.replace("-", "")) if machine.uuid and settings.enabled("validate-uuid") else None
        )
        f.put_preamble(Configuration(machine.machine_type, uuid=uuid))
        if self._return_path is None:
            await f.drain()
            return
        f.put_command(Command.OPEN_RETURN_PATH)
        f.put_command(Command.PING, ping_payload(PEER_PING))
        f.put_command(Command.PING, ping_payload(FIRST_PING))
        await f.drain()
        self.kind = await self._return_path.wait_kind(settings.silence_timeout_s())
        if self.kind is PeerKind.QEMU:
            names = await self._host.registry.device_names(besides=OPTIONAL_SECTIONS)
            if names:
                raise CommandError(
                    f"the peer at {self.peer} is a QEMU, and a QEMU exits on sections it does not know: "
                    + ", ".join(names)
                )

    async def _wait_for_destination(self, f: OutgoingStream) -> None:
        """Send no page before the destination has its blocks: its workload may still be on the way."""
        if self._return_path is None:
            return
        f.put_command(Command.PING, ping_payload(SETUP_PING))
        await f.drain()
        settings = self._host.settings
        # The destination's own limit is attach-timeout; what it says then tells more than our silence.
        patience_s = settings.seconds("x-migrated-answer-timeout") + settings.silence_timeout_s()
        await self._return_path.wait_setup_loaded(patience_s)

    def _advance(self, status: MigrationStatus) -> None:
        if not self.status.advance(status):
            raise MigrationCancelled("cancelled")

    # -- the iteration loop ------------------------------------------------------------------------------------

    async def _iterate(self, f: OutgoingStream) -> None:
        """Make passes until what is left fits the downtime limit. No lock held."""
        host, progress, clock = self._host, self._progress, self._host.clock
        while True:
            progress.meter.set_limit(host.settings.parameters.integer("max-bandwidth"))
            if (wait_s := progress.meter.time_left_s(clock())) > 0 and progress.meter.exceeded(clock()):
                await asyncio.sleep(wait_s)
            progress.meter.roll(clock())
            limit_ms = host.settings.parameters.integer("downtime-limit")
            threshold = progress.meter.threshold_bytes(limit_ms)
            passes = len(progress.passes)
            pending = await host.registry.save_live_pending(f, threshold)
            facts = progress.facts(pending.total, limit_ms)
            if decide(facts) is Decision.COMPLETE:
                return
            if len(progress.passes) != passes:
                await self._after_pass()
            await host.registry.save_live_iterate(f)

    async def _after_pass(self) -> None:
        progress, settings, now = self._progress, self._host.settings, self._host.clock()
        auto_converge, limit_ms = settings.enabled("auto-converge"), settings.parameters.integer("downtime-limit")
        highest = settings.parameters.integer("max-cpu-throttle") if auto_converge else None
        assessment = progress.judge(progress.facts(progress.stats.remaining, limit_ms, highest))
        if not assessment.converging:
            self._host.log.warning("migration_not_converging", text=assessment.text, migration_id=self.migration_id)
        if not auto_converge or now - self._throttle_checked_at < THROTTLE_PERIOD_S:
            return
        self._throttle_checked_at = now
        last = progress.passes[-1]
        written, parameters = (last.dirtied_bytes, last.sent_bytes), settings.parameters
        percent = next_throttle(progress.throttle_percent, *written, parameters, self._outpaced_before)
        raised = percent != progress.throttle_percent
        self._outpaced_before = not raised and (self._outpaced_before or is_outpaced(*written, parameters))
        if raised and await self._host.machine.throttle(percent):
            progress.throttle_percent = percent
            self._host.log.info("workload_throttled", percent=percent, migration_id=self.migration_id)

    # -- the end -----------------------------------------------------------------------------------------------

    async def _reason_for(self, error: ChannelError) -> MigratedError:
        reader = self._return_path
        if reader is None or self._switchover.handed_over:
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
