"""One incoming migration: read the stream, load the sections, take the machine over.

The rule of the file: the stream is hostile until its last byte was checked, and nothing runs before that. A failure
before the machine was taken over tells the source why (SHUT 1, with a reason for a `migrated` source), so that the
source goes on, and leaves this daemon waiting for the next attempt.

    preamble -> [ element ]* -> EOF -> VMDESCRIPTION -> everything here? -> take over -> SHUT 0

With a QEMU source the order of the last two is turned round: a QEMU resumes when it gets no SHUT 0, so the machine
runs here only after SHUT 0 was sent *and* the source ended the connection in order.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

from migrated.errors import (
    ChannelError,
    CommandError,
    MigratedError,
    MigrationCancelled,
    OutcomeUnknown,
    PreflightBlocked,
    RemoteProtocolError,
)
from migrated.migration.data_arrivals import DataArrivals
from migrated.migration.handover import TargetHandover
from migrated.migration.handshake import read_any_preamble
from migrated.migration.host import Host, Settings, first_error, insist, without_frames
from migrated.migration.incoming_link import IncomingLink
from migrated.migration.postcopy_target import PostcopyTarget
from migrated.migration.preflight_target import PreflightTarget
from migrated.migration.progress import Progress
from migrated.migration.return_path import PeerKind
from migrated.migration.section_reader import SectionReader
from migrated.migration.source_word import Answered, SourceWord
from migrated.migration.take_over import TakeOver
from migrated.model.handover import Event, Hold
from migrated.model.status import INCOMING, MigrationStatus, StatusCell
from migrated.stream.incoming import IncomingStream
from migrated.transport.channel import PATIENCE, Channel
from migrated.transport.tls_channel import names_of
from migrated.wire.command import PEER_PING, Command, check_command, parse_ping
from migrated.wire.postcopy import parse_packaged
from migrated.wire.section import CommandHeader, EndOfFile, SectionHeader, parse_element


class IncomingMigration:
    """Runs once for one connection. `error` and `status` say how it ended; nothing is raised out of `run`."""

    def __init__(
        self,
        host: Host,
        progress: Progress,
        channel: Channel,
        pages: DataArrivals,
        *,
        migration_id: str,
        autostart: Callable[[], bool] = lambda: True,
        before: IncomingMigration | None = None,
        on_begin: Callable[[], None] = lambda: None,
    ) -> None:
        # The source's settings take the place of this host's for one migration.
        self._host = host = replace(host, settings=host.settings.copy())
        self._before = before
        """One that is still here, and is not heard any more: this connection may be about it, or take its place."""
        self._on_begin = on_begin
        self._pages = pages
        self._progress = progress
        self.migration_id = migration_id
        self.status = StatusCell(INCOMING, self._status_changed)
        self.error: MigratedError | None = None
        self.failed_in = MigrationStatus.NONE
        """The status in which it failed."""
        self.touched = False
        """True once memory or devices of this host may have been overwritten."""
        self.only_asked = False
        """True when the source wanted to know whether it could come, and nothing else."""
        self.peer = channel.peer
        self.peer_names = names_of(channel)
        """What the source has proven to be called: a paused migration goes on with that one only."""
        self._link = IncomingLink(channel, host.settings)
        self._sections = SectionReader(host, self._link)
        self._preflight = PreflightTarget(host, self._link)
        self._take_over = TakeOver(host, self._link, migration_id, autostart)
        self.handover = TargetHandover(host)
        self._word = SourceWord(
            host, self._link, self._take_over, self.handover, before, command=self._command, on_alone=self._released
        )
        self._mismatch: RemoteProtocolError | None = None
        """What the configuration said that does not fit: no section of this machine is loaded."""
        self._group: asyncio.TaskGroup | None = None
        self._begun_at = self._patient_since = host.clock()
        self._watchers: list[asyncio.Task[None]] = []
        self._package: bytes | None = None
        self.postcopy = PostcopyTarget(
            host,
            self._link,
            self.status,
            self._take_over,
            self.handover,
            read=self._elements,
            check_devices=self._sections.check_devices,
        )
        self._task: asyncio.Task[None] | None = None

    def _status_changed(self, status: MigrationStatus) -> None:
        self._host.log.info("migration_status", status=status.value, migration_id=self.migration_id, role="incoming")
        if self._host.settings.enabled("events"):
            self._host.emit("MIGRATION", {"status": status.value})

    @property
    def settings(self) -> Settings:
        """What holds for this migration: this host's settings, and those that its source brought along."""
        return self._host.settings

    @property
    def kind(self) -> PeerKind:
        """Who sends."""
        return self._link.kind

    def start(self, spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]]) -> asyncio.Task[None]:
        """Run as a task of the daemon."""
        self._task = spawn(self.run())
        return self._task

    def cancel(self) -> None:
        """Give the load up (daemon shutdown), unless the machine is here or about to be, and something can be done."""
        if self._task is not None and (not self._take_over.begun or self.postcopy.paused):
            self._task.cancel()

    def pause(self) -> None:
        """Break the connection of a postcopy (``migrate-pause``)."""
        self.postcopy.pause()

    @property
    def waits(self) -> bool:
        """True while another connection may be about it: it is paused, or the source's word is missing."""
        return self.postcopy.paused or (self.handover.prepared and not self._take_over.begun)

    def _released(self) -> None:
        self.postcopy.released.set()

    async def give_way(self) -> None:
        """Make room for another migration of the source that this one came from. Raises CommandError."""
        if self._take_over.begun or not self.postcopy.released.is_set():
            raise CommandError("There's a migration process in progress")
        self.handover.decide(Event.OFFERED)
        await self.wait()

    async def commit(self, *, serves: bool) -> None:
        """Take the machine over, as the source has said elsewhere; return when that is done, or cannot be done."""
        if self._package is not None and not serves:
            # Its memory does not come any more: the source speaks from another life than the one it served from.
            await self.give_way()
            return
        self.handover.decide(Event.COMMIT)
        await self.handover.obeyed.wait()

    async def decide(self, event: Event) -> None:
        """Obey an operator's word. Raises CommandError where the machine is not all here."""
        if event is Event.PEER_FENCED and self._package is not None:
            raise CommandError("the machine's memory is not here: only the source has all of it")
        self._host.log.warning("outcome_resolved_by_operator", word=event.value, peer=self.peer)
        self.handover.decide(event)
        await self.wait()

    async def wait(self) -> None:
        """Wait until it has ended."""
        if self._task is not None:
            await asyncio.wait([self._task])

    async def run(self) -> None:
        """Load; end in completed or failed."""
        self._begun_at = self._host.clock()
        if not self._link.channel.has_return_path:
            self._progress.begin(self._begun_at)  # nobody only asks there
        try:
            await self._load()
        except Answered:
            self.only_asked = True
            self.status.advance(MigrationStatus.NONE, expected={MigrationStatus.ACTIVE})
        except asyncio.CancelledError:
            await self._failed(MigrationCancelled("the daemon is stopping"))
        except (MigratedError, OSError) as error:
            await self._failed(self._link.stream.located(without_frames(error)))
        except Exception as error:  # the top of a job: a bug here must not leave a source without an answer
            self._host.log.exception("migration_bug")
            await self._failed(MigratedError(f"internal error: {error!r}"))
        else:
            self.status.advance(MigrationStatus.COMPLETED)
        finally:
            if self.touched:
                self._progress.finish()
                self._host.multifd_load.end()
                await insist(self._cleanup)
            self._preflight.release()
            await self._link.close()
            self.postcopy.close()
            self.handover.obeyed.set()
            self.postcopy.released.set()

    async def _failed(self, error: MigratedError) -> None:
        await self._dismiss()
        self.error, self.failed_in = without_frames(error), self.status.value
        self._host.log.error(
            "migration_failed",
            error=str(error),
            error_id=error.error_id,
            migration_id=self.migration_id,
            role="incoming",
        )
        self.status.advance(MigrationStatus.ACTIVE, expected={MigrationStatus.NONE})
        self.status.advance(MigrationStatus.FAILED)
        if isinstance(error, OutcomeUnknown):
            return
        if not self._take_over.begun:
            self._host.kept.forget()
        if not self._link.return_path.opened:
            # A source that cannot be told must not get rid of its bytes: it would take that for success.
            self._link.channel.abort()
            return
        try:
            await self._link.return_path.shut(1, str(error))
            self._link.channel.shutdown_write()
            await self._link.linger()
        except ChannelError:
            return

    async def _dismiss(self) -> None:
        """Write that nothing came of it, where the record says of this one, and no other, that something may."""
        prepared = self._take_over.prepared and self._host.ownership.record.hold is Hold.PREPARED
        if self._take_over.begun or not prepared:
            return
        try:
            await self._take_over.dismiss()
        except OSError as error:  # a restart finds "prepared", and does the same
            self._host.log.error("record_not_written", error=str(error), migration_id=self.migration_id)

    async def _cleanup(self) -> None:
        async with self._host.lock:
            for failure in await self._host.registry.load_cleanup():
                self._host.log.error("cleanup_failed", error=str(failure))

    # -- the stream --------------------------------------------------------------------------------------------

    async def _load(self) -> None:
        first, self._mismatch = await read_any_preamble(self._link.stream, self._host)
        if self._before is None:
            self.status.advance(MigrationStatus.ACTIVE)
        # The first section follows at once; only then may a source have reasons to be silent for long.
        self._link.expect_element()
        try:
            await self._watched(first)
        except MigratedError:
            if self._mismatch is None or self._preflight.nothing_follows:
                raise
            raise self._mismatch from None
        if self._package is None:
            await self._sections.check_complete()
            if self.handover.offer is None:
                await self._take_over.precopy()
            else:
                await self._word.take_over()
        else:
            self.error = None
            await self._take_over.finish_postcopy(self.postcopy.faults)

    async def _watched(self, first: int) -> None:
        """Read to the end, beside what makes the rest worthless: a workload that leaves with a part of the machine."""
        try:
            async with asyncio.TaskGroup() as self._group:
                await self._elements(self._link.stream, first)
                if self._package is None:
                    await self._sections.description(commit_follows=self.handover.offer is not None)
                else:
                    await self.postcopy.run(self._package)
                for watcher in self._watchers:
                    watcher.cancel()
        except BaseExceptionGroup as error:
            raise first_error(error) from None

    async def _elements(self, stream: IncomingStream, ahead: int | None = None) -> None:
        """Read elements until the end of the stream, a package, or RUN."""
        clock = asyncio.get_running_loop().time
        patience_s = PATIENCE * self._host.settings.silence_timeout_s()
        self._patient_since = clock()
        while True:
            if not self.touched and clock() - self._patient_since > patience_s:
                raise RemoteProtocolError(f"no section within {patience_s:g} s", expected="a machine", found="commands")
            stream.section = "between sections"
            if ahead is None:
                await stream.wait_for_element()
            element = await stream.run(parse_element(ahead))
            ahead = None
            match element:
                case EndOfFile():
                    if not self.touched:
                        raise RemoteProtocolError(
                            "the stream ended without a machine", expected="sections", found="end of file"
                        )
                    return
                case CommandHeader():
                    if await self._command(stream, element):
                        return
                case SectionHeader():
                    await self._begin()
                    await self._sections.load(stream, element, listening=self.postcopy.listening)

    async def _begin(self) -> None:
        """Check, before the first section, that a machine may come here and its source be answered."""
        if self.touched:
            return
        if self._mismatch is not None:
            raise self._mismatch
        allowed = self._host.settings.parameters.get("x-migrated-allow-no-return-path")
        if self._link.channel.has_return_path and not self._link.return_path.opened and not allowed:
            raise RemoteProtocolError(
                "the source did not open a return path: it would call the migration completed without knowing",
                expected="OPEN_RETURN_PATH (capability return-path on a QEMU source)",
                found="a section; set x-migrated-allow-no-return-path=true to load it all the same",
            )
        host = self._host
        host.ownership.require_may_receive()
        if self._before is not None:
            await self._before.give_way()
        self._on_begin()
        self.status.advance(MigrationStatus.ACTIVE)
        async with host.lock:
            await host.machine.begin_incoming()
            if host.ownership.record.hold is Hold.NONE:
                await host.ownership.become(Hold.PARTIAL, peer=self.peer, migration_id=self.migration_id)
            self.touched = True
            self._progress.begin(self._begun_at)
            host.kept.forget()
            await host.registry.load_setup(self._link.stream)
            if self.postcopy.advised:
                host.postcopy_load.advise(self.postcopy.page_sizes)
        if (group := self._group) is not None:
            watched = (host.machine.arrival_lost(), self._preflight.keep_reservation())
            self._watchers = [group.create_task(watch) for watch in watched]
            self._watchers += await self._pages.begin(group, self._link, self.settings, self.handover.checked)
        self._progress.setup_done()
        await host.fault_point("target.load")
        if self._link.kind is not PeerKind.MIGRATED:
            self._link.stream.idle_timeout_s = None

    async def _command(self, stream: IncomingStream, header: CommandHeader) -> bool:
        """Take a command; True when nothing more is to be read of ``stream`` here."""
        match command := check_command(header):
            case Command.OPEN_RETURN_PATH:
                if not self._link.channel.has_return_path:
                    raise RemoteProtocolError("CMD_OPEN_RETURN_PATH failed", found="a transport with one direction")
                self._link.return_path.opened = True
            case Command.PING:
                value = parse_ping(header.payload)
                if not self._link.return_path.opened:
                    raise RemoteProtocolError(f"CMD_PING ({value:#x}) received with no return path")
                await self.postcopy.ping(value, in_package=stream is not self._link.stream)
                if value == PEER_PING:
                    await self._link.return_path.greet()
                    # A `migrated` source pings when it has nothing to say; silence means it is gone.
                    self._link.expect_element()
            case Command.X_OFFER | Command.X_COMMIT | Command.X_WITHDRAW:
                # One id for one migration, in the logs of both hosts.
                self.migration_id = self._take_over.migration_id = await self._word.take(
                    command, header.payload, first=not self.touched
                )
            case Command.X_CHECKSUM:
                stream.compare(header.payload)
            case Command.X_PREFLIGHT if not self.touched:
                await self._asked(header.payload)
            case Command.PACKAGED if self._package is None:
                stream.end_checksums()
                self._package = await stream.get_buffer(parse_packaged(header.payload))
                return True
            case _:
                await self.postcopy.command(command, header)
                return self.postcopy.ran and stream is not self._link.stream
        return False

    async def _asked(self, payload: bytes) -> None:
        """Answer a preflight. Where nothing follows, the source leaves: it has heard all there is to say."""
        if not self._link.return_path.opened:
            raise RemoteProtocolError("X_PREFLIGHT received with no return path", section="preflight")
        # Where it is awaited here anyway, the connection for requested pages is as good as here.
        preempt = self.postcopy.has_second or self.settings.enabled("postcopy-preempt")
        await self._preflight.take(payload, preempt=preempt)
        self._patient_since = asyncio.get_running_loop().time()
        if self._preflight.nothing_follows:
            with contextlib.suppress(ChannelError):
                await self._link.linger()
            raise Answered if self._preflight.dry_run else PreflightBlocked(self._preflight.blockers)
