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
from collections.abc import Callable, Coroutine
from typing import Any

from migrated.errors import (
    ChannelError,
    MigratedError,
    MigrationCancelled,
    OutcomeUnknown,
    ProtocolError,
    RemoteProtocolError,
)
from migrated.migration.host import OPTIONAL_SECTIONS, Host, first_error, insist, without_frames
from migrated.migration.ownership import Hold
from migrated.migration.progress import Progress
from migrated.migration.return_path import PeerKind, ReturnPathWriter
from migrated.model.runstate import RESTING, RunState
from migrated.model.status import INCOMING, MigrationStatus, StatusCell
from migrated.stream.incoming import PATIENCE, IncomingStream
from migrated.transport.channel import Channel
from migrated.wire.command import PEER_PING, Command, check_command, parse_ping
from migrated.wire.section import (
    CommandHeader,
    Configuration,
    EndOfFile,
    SectionHeader,
    parse_element,
    parse_footer,
    parse_preamble,
    parse_stream_header,
    parse_vmdescription_length,
)

#: How long, and how much, a refused source may go on sending before the connection is cut under it. Closing at once
#: would reset the connection and could destroy the reason on its way.
LINGER_S = 2.0
PAGE_BITS = 12


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
        self._host = host
        self._progress = progress
        self._channel = channel
        self.migration_id = migration_id
        self.status = StatusCell(INCOMING, self._status_changed)
        self.error: MigratedError | None = None
        self.touched = False
        """True once memory or devices of this host may have been overwritten."""
        self.peer = channel.peer
        channel.silence_timeout_s = host.settings.silence_timeout_s()
        self._stream = IncomingStream(channel, silence_timeout_s=host.settings.silence_timeout_s)
        self._return_path = ReturnPathWriter(channel)
        self._autostart = autostart
        self._group: asyncio.TaskGroup | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._taking_over = False
        """From here on nothing is given up any more: the record may say that the machine is this host's."""
        self._task: asyncio.Task[None] | None = None

    def _status_changed(self, status: MigrationStatus) -> None:
        self._host.log.info("migration_status", status=status.value, migration_id=self.migration_id, role="incoming")
        if self._host.settings.enabled("events"):
            self._host.emit("MIGRATION", {"status": status.value})

    @property
    def kind(self) -> PeerKind:
        """Who sends."""
        if self._return_path.opened and self._return_path.peer is PeerKind.UNKNOWN:
            return PeerKind.QEMU
        return self._return_path.peer

    def start(self, spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]]) -> asyncio.Task[None]:
        """Run as a task of the daemon."""
        self._task = spawn(self.run())
        return self._task

    def cancel(self) -> None:
        """Give the load up (daemon shutdown), unless the machine is being taken over."""
        if self._task is not None and not self._taking_over:
            self._task.cancel()

    async def wait(self) -> None:
        """Wait until it has ended."""
        if self._task is not None:
            await asyncio.wait([self._task])

    async def run(self) -> None:
        """Load; end in completed or failed."""
        self._progress.begin()
        try:
            await self._load()
        except asyncio.CancelledError:
            await self._failed(MigrationCancelled("the daemon is stopping"))
        except (MigratedError, OSError) as error:
            await self._failed(self._stream.located(error))
        except Exception as error:  # the top of a job: a bug here must not leave a source without an answer
            self._host.log.exception("migration_bug")
            await self._failed(MigratedError(f"internal error: {error!r}"))
        else:
            self.status.advance(MigrationStatus.COMPLETED)
        finally:
            self._progress.finish()
            await insist(self._cleanup)
            self._stream.close()
            await self._channel.close()

    async def _failed(self, error: MigratedError) -> None:
        self.error = without_frames(error)
        self._host.log.error("migration_failed", error=str(error), migration_id=self.migration_id, role="incoming")
        self.status.advance(MigrationStatus.ACTIVE, expected={MigrationStatus.NONE})
        self.status.advance(MigrationStatus.FAILED)
        if isinstance(error, OutcomeUnknown):
            return
        if not self._return_path.opened:
            # A source that cannot be told must not get rid of its bytes: it would take that for success.
            self._channel.abort()
            return
        try:
            await self._return_path.shut(1, str(error))
            self._channel.shutdown_write()
            await self._linger()
        except ChannelError:
            return

    async def _linger(self) -> None:
        """Swallow what a refused source still sends, until it closes."""
        swallowed = memoryview(bytearray(1 << 16))
        try:
            async with asyncio.timeout(LINGER_S):
                while await self._channel.receive_into(swallowed, deadline_s=LINGER_S):
                    continue
        except TimeoutError:
            return

    async def _cleanup(self) -> None:
        async with self._host.lock:
            for failure in await self._host.registry.load_cleanup():
                self._host.log.error("cleanup_failed", error=str(failure))

    # -- the stream --------------------------------------------------------------------------------------------

    async def _load(self) -> None:
        first = await self._handshake()
        self.status.advance(MigrationStatus.ACTIVE)
        # The first section follows at once, whoever sends; only then may a source have reasons to be silent for long.
        self._stream.idle_timeout_s = PATIENCE * self._host.settings.silence_timeout_s()
        await self._watched(first)
        await self._check_complete()
        await self._take_over()

    async def _watched(self, first: int) -> None:
        """Read to the end, beside what makes the rest worthless: a workload that leaves with a part of the machine."""
        try:
            async with asyncio.TaskGroup() as self._group:
                await self._elements(first)
                await self._description()
                if self._watcher is not None:
                    self._watcher.cancel()
        except BaseExceptionGroup as error:
            raise first_error(error) from None

    async def _handshake(self) -> int:
        """Read header and configuration, all within one deadline; return the first element's type byte."""
        limit_s = self._host.settings.silence_timeout_s()
        try:
            async with asyncio.timeout(limit_s):
                await self._stream.run(parse_stream_header())
                self._stream.section = "configuration"
                configuration, first = await self._stream.run(parse_preamble())
        except TimeoutError as error:
            raise RemoteProtocolError(
                f"no complete stream header and configuration within {limit_s:g} s", offset=self._stream.offset
            ) from error
        self._check_configuration(configuration)
        return first

    def _check_configuration(self, configuration: Configuration) -> None:
        machine = self._host.machine
        if configuration.machine_type != machine.machine_type:
            raise RemoteProtocolError(
                f"Machine type received is '{configuration.machine_type}' and local is '{machine.machine_type}'",
                section="configuration",
            )
        for name in configuration.capabilities:
            raise RemoteProtocolError(
                f"Capability {name} is off, but received capability is on", section="configuration"
            )
        if configuration.target_page_bits not in (None, PAGE_BITS):
            raise RemoteProtocolError(
                f"Received TARGET_PAGE_BITS is {configuration.target_page_bits} but local is {PAGE_BITS}",
                section="configuration",
            )
        if configuration.uuid is not None and machine.uuid is not None and self._host.settings.enabled("validate-uuid"):
            local = machine.uuid.replace("-", "").lower()
            if configuration.uuid.hex() != local:
                raise RemoteProtocolError(
                    f"UUID received is {configuration.uuid.hex()} and local is {local}", section="configuration"
                )

    async def _elements(self, first: int) -> None:
        ahead: int | None = first
        clock = asyncio.get_running_loop().time
        patience_s = PATIENCE * self._host.settings.silence_timeout_s()
        begun_s = clock()
        while True:
            if not self.touched and clock() - begun_s > patience_s:
                raise RemoteProtocolError(f"no section within {patience_s:g} s", expected="a machine", found="commands")
            self._stream.section = "between sections"
            if ahead is None:
                await self._stream.wait_for_element()
            element = await self._stream.run(parse_element(ahead))
            ahead = None
            match element:
                case EndOfFile():
                    if not self.touched:
                        raise RemoteProtocolError(
                            "the stream ended without a machine", expected="sections", found="end of file"
                        )
                    return
                case CommandHeader():
                    await self._command(element)
                case SectionHeader():
                    await self._section(element)

    async def _section(self, header: SectionHeader) -> None:
        await self._begin()
        self._stream.section = f"{header.idstr or f'id {header.section_id}'} ({header.kind.name})"
        async with self._host.lock:
            idstr = await self._host.registry.load_state(self._stream, header, missing=self._wait_for_device)
        await self._stream.run(parse_footer(header.section_id, idstr))

    async def _begin(self) -> None:
        """Check, before the first section, that a machine may come here and its source be answered."""
        if self.touched:
            return
        allowed = self._host.settings.parameters.get("x-migrated-allow-no-return-path")
        if self._channel.has_return_path and not self._return_path.opened and not allowed:
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
            await host.registry.load_setup(self._stream)
        if self._group is not None:
            self._watcher = self._group.create_task(host.machine.arrival_lost())
        self._progress.setup_done()
        if self._return_path.peer is not PeerKind.MIGRATED:
            self._stream.idle_timeout_s = None

    async def _wait_for_device(self, idstr: str, instance_id: int) -> None:
        # The machine may stand still at the source by now, and its patience after the last byte is limited: our reason
        # has to be there before it calls the outcome unknown.
        patience_s = min(self._host.attach_timeout_s, self._host.settings.seconds("x-migrated-answer-timeout") / 2)
        await self._host.machine.wait_declared([], [idstr], patience_s)

    async def _command(self, header: CommandHeader) -> None:
        match command := check_command(header):
            case Command.OPEN_RETURN_PATH:
                if not self._channel.has_return_path:
                    raise RemoteProtocolError("CMD_OPEN_RETURN_PATH failed", found="a transport with one direction")
                self._return_path.opened = True
            case Command.PING:
                value = parse_ping(header.payload)
                if not self._return_path.opened:
                    raise RemoteProtocolError(f"CMD_PING ({value:#x}) received with no return path")
                await self._return_path.pong(value)
                if value == PEER_PING:
                    await self._return_path.greet()
                    # A `migrated` source pings when it has nothing to say; silence means it is gone.
                    self._stream.idle_timeout_s = PATIENCE * self._host.settings.silence_timeout_s()
            case _:
                raise RemoteProtocolError(
                    f"command {command.name} is not implemented by this version of migrated",
                    expected="a precopy stream (postcopy-ram, dirty-bitmaps and x-colo off at the source)",
                    found=command.name,
                )

    async def _description(self) -> None:
        self._stream.section = "vmdescription"
        left = await self._stream.run(parse_vmdescription_length())
        while left:
            left -= len(await self._stream.read_exactly(min(left, 4096)))
        if self._return_path.opened and (behind := len(self._stream.peek())):
            raise RemoteProtocolError(
                "the source goes on after its description", expected="nothing behind it", found=f"{behind} bytes"
            )
        self._stream.section = "end"

    async def _check_complete(self) -> None:
        self._host.machine.check_alive()  # what went with a workload is not missed below
        for check in self._host.completeness:
            check()
        if missing := await self._host.registry.not_loaded(besides=OPTIONAL_SECTIONS):
            raise RemoteProtocolError(
                "the stream ended without the state of " + ", ".join(missing),
                expected="a section for every device declared here",
            )

    # -- taking over -------------------------------------------------------------------------------------------

    async def _take_over(self) -> None:
        host = self._host
        if self.kind is PeerKind.QEMU:
            await self._commit_with_qemu()
        state = self._run_state()
        async with host.lock:
            self._taking_over = True
            await host.ownership.become(Hold.OWNER, peer=self.peer, migration_id=self.migration_id, run_state=state)
            try:
                await self._start_machine(state)
            except MigratedError as error:
                await self._give_back(error)
                raise
        if self.kind is not PeerKind.QEMU:
            try:
                await self._return_path.shut(0)
            except ChannelError as error:
                # The machine runs here. The source will say "unknown"; this host knows.
                host.log.warning("answer_not_delivered", error=str(error), migration_id=self.migration_id)

    async def _give_back(self, why: MigratedError) -> None:
        """Write that the machine stays at the source, before the source is told so."""
        try:
            await self._host.ownership.become(Hold.MOVED, peer=self.peer, migration_id=self.migration_id)
        except OSError as error:
            # On disk it is this host's: told that it is not, the source would run it, and so would a restart here.
            raise OutcomeUnknown(f"{why}; and the record cannot be written: {error}") from error

    def _run_state(self) -> RunState:
        """Return what the machine does here: what it did there, unless it is to wait for `cont`."""
        state = self._host.global_state.received or RunState.RUNNING
        if state is RunState.RUNNING:
            return RunState.RUNNING if self._autostart() else RunState.PAUSED
        return state if state in RESTING else RunState.PAUSED

    async def _start_machine(self, state: RunState) -> None:
        self._host.machine.check_alive()
        if state is RunState.RUNNING:
            await self._host.machine.cont()
        else:
            self._host.machine.set_run_state(state)

    async def _commit_with_qemu(self) -> None:
        """Send SHUT 0 and wait for the source's orderly end; only then may the machine run here."""
        ownership = self._host.ownership
        await ownership.become(Hold.ACCEPTED, peer=self.peer, migration_id=self.migration_id)
        timeout_s = self._host.settings.seconds("x-migrated-answer-timeout")
        try:
            await self._return_path.shut(0)
            self._channel.shutdown_write()
            scrap = memoryview(bytearray(1))
            if await self._channel.receive_into(scrap, deadline_s=timeout_s):
                raise RemoteProtocolError("the source goes on sending after SHUT 0", expected="end of stream")
        except (ChannelError, ProtocolError) as error:
            raise OutcomeUnknown(f"{error}; {ownership.text()}. Next: {ownership.next_step()}") from error
