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
    MigratedError,
    MigrationCancelled,
    OutcomeUnknown,
    PreflightBlocked,
    RemoteProtocolError,
)
from migrated.migration.handshake import read_any_preamble
from migrated.migration.host import OPTIONAL_SECTIONS, Host, Settings, first_error, insist, without_frames
from migrated.migration.incoming_link import IncomingLink
from migrated.migration.ownership import Hold
from migrated.migration.postcopy_target import PostcopyTarget
from migrated.migration.preflight_target import PreflightTarget
from migrated.migration.progress import Progress
from migrated.migration.return_path import PeerKind
from migrated.migration.take_over import TakeOver
from migrated.model.status import INCOMING, MigrationStatus, StatusCell
from migrated.stream.incoming import PATIENCE, IncomingStream
from migrated.transport.channel import Channel, SocketChannel
from migrated.wire.command import PEER_PING, Command, check_command, parse_ping
from migrated.wire.postcopy import parse_packaged
from migrated.wire.section import (
    CommandHeader,
    EndOfFile,
    SectionHeader,
    parse_element,
    parse_footer,
    parse_vmdescription_length,
)

#: The first byte of a stream's magic; a recovery begins with a command.
STREAM_BEGIN = b"Q"


class _OnlyAsked(Exception):
    """The source has heard whether it could come, and is gone."""


class IncomingMigration:
    """Runs once for one connection. `error` and `status` say how it ended; nothing is raised out of `run`."""

    def __init__(
        self,
        host: Host,
        progress: Progress,
        channel: Channel,
        *,
        migration_id: str,
        autostart: Callable[[], bool] = lambda: True,
    ) -> None:
        # The source's settings take the place of this host's for one migration.
        self._host = host = replace(host, settings=host.settings.copy())
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
        self._link = IncomingLink(channel, host.settings)
        self._preflight = PreflightTarget(host, self._link)
        self._take_over = TakeOver(host, self._link, migration_id, autostart)
        self._mismatch: RemoteProtocolError | None = None
        """What the configuration said that does not fit: no section of this machine is loaded."""
        self._group: asyncio.TaskGroup | None = None
        self._begun_at = self._patient_since = host.clock()
        self._watchers: list[asyncio.Task[None]] = []
        self._package: bytes | None = None
        self.postcopy = PostcopyTarget(
            host, self._link, self.status, self._take_over, read=self._elements, check_devices=self._check_devices
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

    async def goes_on_over(self, channel: Channel) -> bool:
        """Give a paused postcopy another connection; False when it is over, because its source begins from the start.

        A source that was not told that the machine runs here may have taken it back, and migrate it again.
        """
        if not self._take_over.begun and isinstance(channel, SocketChannel):
            try:
                begin = await channel.peek(self._host.settings.silence_timeout_s())
            except ChannelError:
                return True  # nobody
            if begin == STREAM_BEGIN:
                self.cancel()
                return False
        self.postcopy.resume(channel)
        return True

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
        except _OnlyAsked:
            self.only_asked = True
            self.status.advance(MigrationStatus.NONE)
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
            await insist(self._cleanup)
            self._preflight.release()
            await self._link.close()
            self.postcopy.close()
            self.postcopy.released.set()

    async def _failed(self, error: MigratedError) -> None:
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

    async def _cleanup(self) -> None:
        async with self._host.lock:
            for failure in await self._host.registry.load_cleanup():
                self._host.log.error("cleanup_failed", error=str(failure))

    # -- the stream --------------------------------------------------------------------------------------------

    async def _load(self) -> None:
        first, self._mismatch = await read_any_preamble(self._link.stream, self._host)
        self.status.advance(MigrationStatus.ACTIVE)
        # The first section follows at once, whoever sends; only then may a source have reasons to be silent for long.
        self._link.expect_element()
        try:
            await self._watched(first)
        except MigratedError:
            if self._mismatch is None or self._preflight.nothing_follows:
                raise
            raise self._mismatch from None
        if self._package is None:
            await self._check_complete()
            await self._take_over.precopy()
        else:
            self.error = None
            await self._take_over.finish_postcopy(self.postcopy.faults)

    async def _watched(self, first: int) -> None:
        """Read to the end, beside what makes the rest worthless: a workload that leaves with a part of the machine."""
        try:
            async with asyncio.TaskGroup() as self._group:
                await self._elements(self._link.stream, first)
                if self._package is None:
                    await self._description()
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
                    await self._section(stream, element)

    async def _section(self, stream: IncomingStream, header: SectionHeader) -> None:
        await self._begin()
        stream.section = f"{header.idstr or f'id {header.section_id}'} ({header.kind.name})"
        if self.postcopy.listening and stream is self._link.stream:
            # Beside a machine that runs, or whose devices are being loaded: nobody here may hold the lock.
            idstr = await self._host.registry.load_state(stream, header, listening=True)
        else:
            async with self._host.lock:
                idstr = await self._host.registry.load_state(
                    stream, header, missing=self._wait_for_device, keep=self._keep if self._keeps() else None
                )
        await stream.run(parse_footer(header.section_id, idstr))

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
        async with host.lock:
            await host.machine.begin_incoming()
            if host.ownership.record.hold is Hold.NONE:
                await host.ownership.become(Hold.PARTIAL, peer=self.peer, migration_id=self.migration_id)
            self.touched = True
            self._progress.begin(self._begun_at)
            host.kept.forget()
            await host.registry.load_setup(self._link.stream)
            if self.postcopy.advised:
                host.postcopy_load.advise()
        if self._group is not None:
            self._watchers = [
                self._group.create_task(host.machine.arrival_lost()),
                self._group.create_task(self._preflight.keep_reservation()),
            ]
        self._progress.setup_done()
        if self._link.kind is not PeerKind.MIGRATED:
            self._link.stream.idle_timeout_s = None

    async def _wait_for_device(self, idstr: str, instance_id: int) -> None:
        await self._host.machine.wait_declared([], [idstr], self._device_patience_s())

    def _device_patience_s(self) -> float:
        # The machine may stand still at the source by now, and its patience after the last byte is limited: our reason
        # has to be there before it calls the outcome unknown.
        return min(self._host.attach_timeout_s, self._host.settings.seconds("x-migrated-answer-timeout") / 2)

    def _keeps(self) -> bool:
        return bool(self._host.settings.parameters.get("x-migrated-keep-unknown-sections"))

    async def _keep(self, f: IncomingStream, header: SectionHeader) -> None:
        size = await self._host.kept.keep(f, header, from_qemu=self._link.kind is PeerKind.QEMU)
        self._host.log.warning("section_kept", idstr=header.idstr, instance_id=header.instance_id, bytes=size)

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
            case Command.X_PREFLIGHT if not self.touched:
                await self._asked(header.payload)
            case Command.PACKAGED if self._package is None:
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
            raise _OnlyAsked if self._preflight.dry_run else PreflightBlocked(self._preflight.blockers)

    async def _description(self) -> None:
        self._link.stream.section = "vmdescription"
        left = await self._link.stream.run(parse_vmdescription_length())
        while left:
            left -= len(await self._link.stream.read_exactly(min(left, 4096)))
        if self._link.return_path.opened and (behind := len(self._link.stream.peek())):
            raise RemoteProtocolError(
                "the source goes on after its description", expected="nothing behind it", found=f"{behind} bytes"
            )
        self._link.stream.section = "end"

    async def _check_complete(self) -> None:
        self._host.machine.check_alive()  # what went with a workload is not missed below
        for check in self._host.completeness:
            check()
        await self._check_devices()

    async def _check_devices(self) -> None:
        if missing := await self._host.registry.not_loaded(besides=OPTIONAL_SECTIONS):
            raise RemoteProtocolError(
                "the stream ended without the state of " + ", ".join(missing),
                expected="a section for every device declared here",
            )
