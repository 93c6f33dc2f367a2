"""The destination's half of postcopy: load the devices, run the machine, take its memory in while it runs.

The rule of the file: until the machine was taken over, a failure ends the migration and the source goes on; from then
on a broken connection is a pause, and only what cannot be mended ends it.

    ADVISE -> blocks -> DISCARD -> PACKAGED{LISTEN: faults are served, devices, PING 3, RUN} -> [ready, commit]
           -> take over -> PARTs: pages -> END, EOF: everything here? -> SHUT 0

From LISTEN on two jobs run: `package` (devices, taking over) and `listen` (the main connection, without the lock). A
`migrated` source holds the start until it knows that the devices are loaded: RUN is only taken down, the commit starts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from migrated.errors import (
    ChannelError,
    ChannelTimeout,
    MigratedError,
    MigrationCancelled,
    ProtocolError,
    RemoteProtocolError,
)
from migrated.migration.handover import TargetHandover
from migrated.migration.host import Host, first_error, without_frames
from migrated.migration.incoming_link import IncomingLink
from migrated.migration.source_word import acts_of
from migrated.migration.take_over import TakeOver
from migrated.model.faults import FaultFigures
from migrated.model.handover import Event, Hold
from migrated.model.postcopy import PostcopyState, PostcopyStep, next_state
from migrated.model.ramblock import PAGE_SIZES, TARGET_PAGE_BYTES
from migrated.model.status import MigrationStatus, StatusCell
from migrated.stream.incoming import PIECE_MAX_BYTES, IncomingStream
from migrated.transport.channel import Channel, SocketChannel
from migrated.transport.memory import MemoryChannel
from migrated.wire.command import Command
from migrated.wire.postcopy import Advise, check_advise, parse_advise, parse_discard, parse_recv_bitmap
from migrated.wire.section import CommandHeader

#: A large buffer takes longer to get than most packages to read.
PACKAGE_BUFFER_BYTES = PIECE_MAX_BYTES
#: Reads the elements of a stream until EOF or RUN.
ReadElements = Callable[[IncomingStream], Awaitable[None]]


class PostcopyTarget:
    """The postcopy of one incoming migration, if it turns out to be one."""

    def __init__(
        self,
        host: Host,
        link: IncomingLink,
        status: StatusCell,
        take_over: TakeOver,
        handover: TargetHandover,
        *,
        read: ReadElements,
        check_devices: Callable[[], Awaitable[None]],
    ) -> None:
        self._host = host
        self._link = link
        self._status = status
        self._take_over = take_over
        self._handover = handover
        self._read = read
        self._check_devices = check_devices
        self._state = PostcopyState.NONE
        self.page_sizes = 0
        """Those of the source's blocks, or-ed together, as it advised."""
        self.listens = asyncio.Event()
        """Set once the machine is about to run with memory that is not here."""
        self._next_channel: asyncio.Future[Channel] | None = None
        self._second: asyncio.Future[Channel] = asyncio.get_running_loop().create_future()
        self.released = asyncio.Event()
        """Set while the migration uses no connection: it is paused, or has ended."""
        self.running = False
        """The machine was taken over."""
        self.faults: FaultFigures | None = None
        """What faults have cost, once it listens."""
        self.why_paused: MigratedError | None = None

    @property
    def advised(self) -> bool:
        """True when the source has said that postcopy may follow."""
        return self._state is not PostcopyState.NONE

    @property
    def listening(self) -> bool:
        """True from LISTEN on: sections are loaded without the iothread lock."""
        return self._state.listening

    @property
    def ran(self) -> bool:
        """True once RUN was read: the package ends with it."""
        return self._state is PostcopyState.RUNNING

    # -- commands ----------------------------------------------------------------------------------------------

    async def command(self, command: Command, header: CommandHeader) -> None:
        """Take one of postcopy's commands, but PACKAGED."""
        match command:
            case Command.POSTCOPY_ADVISE:
                self._step(PostcopyStep.ADVISE)
                advice = parse_advise(header.payload)
                check_advise(advice, Advise(PAGE_SIZES, TARGET_PAGE_BYTES))
                self.page_sizes = advice.page_size_summary if advice is not None else 0
            case Command.POSTCOPY_RAM_DISCARD:
                self._step(PostcopyStep.DISCARD)
                discard = parse_discard(header.payload)
                await self._host.postcopy_load.discard(discard.block, discard.ranges)
            case Command.POSTCOPY_LISTEN:
                self._step(PostcopyStep.LISTEN)
                self._host.postcopy_load.listen(self._link.return_path.request_pages)
                if isinstance(self._link.channel, SocketChannel):
                    self._link.channel.take_short_turns()
                self.faults = self._host.postcopy_load.faults
                self.listens.set()
                await self._host.fault_point("target.listen")
            case Command.POSTCOPY_RUN:
                self._step(PostcopyStep.RUN)
            case Command.RECV_BITMAP:
                self._require_recovery(command)
                block = parse_recv_bitmap(header.payload)
                await self._link.return_path.received_bitmap(block, self._host.postcopy_load.received(block))
            case Command.POSTCOPY_RESUME:
                self._require_recovery(command)
                self._status.advance(MigrationStatus.POSTCOPY_ACTIVE)
                self.why_paused = None
                self._link.expect_heartbeat()
                await self._link.return_path.resumed()
                self._host.postcopy_load.request_again()
            case _:
                raise RemoteProtocolError(
                    f"command {command.name} is not implemented by this version of migrated",
                    expected="a stream without COLO and without dirty-bitmaps",
                    found=command.name,
                )

    def _step(self, step: PostcopyStep) -> None:
        self._state = next_state(self._state, step)

    def _require_recovery(self, command: Command) -> None:
        if self._status.value is not MigrationStatus.POSTCOPY_RECOVER:
            raise RemoteProtocolError(
                f"{command.name} outside a recovery", expected="status postcopy-recover", found=self._status.value.value
            )

    async def ping(self, value: int, *, in_package: bool) -> None:
        """Echo; behind the devices only when they are loaded, all of them."""
        if in_package:
            await self._check_devices()
        if self.running:
            await self._link.return_path.faults(self.faults)
        await self._link.return_path.pong(value)

    # -- the phases --------------------------------------------------------------------------------------------

    async def run(self, package: bytes) -> None:
        """From the package to the last page. Raises what ends the migration."""
        async with asyncio.TaskGroup() as group:
            listener = group.create_task(self._listen())
            self._host.machine.watch()
            lost = group.create_task(self._host.machine.lost())
            await self._load(package)
            if self._handover.offer is None:
                await self._take_over.postcopy()
            else:
                await self._by_commit(listener)
            self.running = True
            await self._host.fault_point("target.background")
            await listener
            lost.cancel()

    async def _by_commit(self, listener: asyncio.Task[None]) -> None:
        """Say that the devices are here, and run the machine when the source has let go of it."""
        acts = acts_of(self._handover, self._take_over, self._link, Hold.INCOMPLETE)
        await self._handover.happened(Event.COMPLETE, acts)
        event = await self._word(listener)
        async with self._host.lock:
            await self._handover.happened(event, acts)
        if event is not Event.COMMIT:
            raise MigrationCancelled(f"the machine stays at {self._link.peer}: {event.value}")
        self._link.expect_heartbeat()

    async def _word(self, listener: asyncio.Task[None]) -> Event:
        word = asyncio.ensure_future(self._handover.decision())
        try:
            await asyncio.wait({word, listener}, return_when=asyncio.FIRST_COMPLETED)
            if word.done():
                return word.result()
        finally:
            word.cancel()
        await listener  # raises, or else:
        raise RemoteProtocolError("the stream ended without a commit", expected="X_COMMIT", found="end of file")

    async def _load(self, package: bytes) -> None:
        stream = IncomingStream(
            MemoryChannel(package),
            silence_timeout_s=self._host.settings.silence_timeout_s,
            buffer_bytes=PACKAGE_BUFFER_BYTES,
        )
        if self._handover.checked:
            stream.begin_checksums()
        await self._read(stream)
        if not self.ran:
            raise RemoteProtocolError("the package ended without RUN", section="package", expected="POSTCOPY_RUN")
        self._status.advance(MigrationStatus.POSTCOPY_ACTIVE)  # told to the log and to clients once the source knows

    async def _listen(self) -> None:
        """Take memory in until all is here, over as many connections as it takes."""
        await self.listens.wait()
        while True:
            try:
                async with asyncio.TaskGroup() as group:
                    requests = group.create_task(self._link.return_path.deliver())
                    urgent = group.create_task(self._read_urgent())
                    await self._read(self._link.stream)
                    await self._end_of(urgent)
                    await self._host.postcopy_load.finish()
                    requests.cancel()
            except BaseExceptionGroup as group_error:
                error = first_error(group_error)
                if not (self._take_over.begun or self._handover.prepared) or not isinstance(
                    error, ChannelError | ProtocolError
                ):
                    raise error from None
                await self._pause(without_frames(error))
            else:
                return

    def take_second(self, channel: Channel) -> bool:
        """Take the connection that carries requested pages only; False when there is one already."""
        if self._second.done():
            return False
        channel.silence_timeout_s = self._host.settings.silence_timeout_s()
        self._second.set_result(channel)
        return True

    @property
    def has_second(self) -> bool:
        """True when the connection that carries requested pages is here."""
        return self._second.done()

    async def _read_urgent(self) -> None:
        channel = await asyncio.shield(self._second)
        stream = IncomingStream(channel, silence_timeout_s=self._host.settings.silence_timeout_s)
        await self._host.postcopy_load.load_urgent(stream)

    async def _end_of(self, urgent: asyncio.Task[None]) -> None:
        """Wait for the last requested page: it may be behind the end of the main connection."""
        if not self._second.done():
            urgent.cancel()
            return
        timeout_s = self._host.settings.silence_timeout_s()
        _, late = await asyncio.wait([urgent], timeout=timeout_s)
        if late:
            raise ChannelTimeout(f"requested pages did not end within {timeout_s:g} s", peer=self._link.peer)

    def close(self) -> None:
        """Let go of the connection for requested pages."""
        if self._second.done():
            self._second.result().abort()

    # -- pause and recovery ------------------------------------------------------------------------------------

    async def _pause(self, why: MigratedError) -> None:
        """Wait for another connection."""
        self.why_paused = why
        self._host.log.warning("migration_paused", error=str(why), peer=self._link.peer, role="incoming")
        self._link.drop()
        self.close()
        self._second = asyncio.get_running_loop().create_future()
        self._next_channel = asyncio.get_running_loop().create_future()
        self._status.advance(MigrationStatus.POSTCOPY_PAUSED)
        self.released.set()
        try:
            self._link.replace(await self._next_channel)
        finally:
            self._next_channel = None
        self._link.expect_element()
        self._host.postcopy_load.reconnected()
        self._status.advance(MigrationStatus.POSTCOPY_RECOVER)

    @property
    def paused(self) -> bool:
        """True while it waits for another connection."""
        return self._next_channel is not None and not self._next_channel.done()

    def resume(self, channel: Channel) -> None:
        """Go on over another connection."""
        assert self._next_channel is not None
        self.released.clear()
        self._next_channel.set_result(channel)

    def pause(self) -> None:
        """Break the connection (``migrate-pause``)."""
        self._link.channel.abort()
