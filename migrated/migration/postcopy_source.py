"""The source's half of postcopy: hand the machine over first, send its memory afterwards.

The rule of the file: up to the commit every failure gives the machine back to the source; from the commit on the
source only serves, and a broken connection is a pause, never an end.

    DISCARD of what is not sent -> stop -> END of what cannot follow -> DISCARD of what was written since
         -> PACKAGED{LISTEN, devices, PING 3, RUN} -> ready: devices are loaded -> nobody writes -> record "released"
         -> commit -> active: record "moved" -> PARTs: requested pages first -> END -> SHUT 0

A QEMU starts by itself at the end of the package, so "released" is written before the package, and PONG 3 is the
answer. Source of the phases: QEMU 7.2; postcopy-device is that of QEMU 10.2.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from migrated.errors import ChannelError, MigrationCancelled, PeerRefused, WorkloadError
from migrated.migration.handover import SourceHandover, take_back
from migrated.migration.host import Host, first_error, insist, leave_machine, write_moved
from migrated.migration.operator_pause import OperatorPause
from migrated.migration.progress import Progress
from migrated.migration.recovery import Dial
from migrated.migration.return_path import (
    DEVICES_PING,
    DISCARDED_PING,
    PACKAGE_PING,
    SETUP_PING,
    PeerKind,
    ReturnPathReader,
)
from migrated.migration.settlement import GIVEN_BACK, Settlement
from migrated.model.handover import Event, Hold
from migrated.model.runstate import RunState
from migrated.model.stats import BandwidthMeter
from migrated.model.status import MigrationStatus, StatusCell
from migrated.stream.outgoing import OutgoingStream
from migrated.transport.channel import Channel, SocketChannel
from migrated.transport.memory import MemoryChannel
from migrated.wire.command import Command, encode_command, ping_payload
from migrated.wire.handover import Answer
from migrated.wire.postcopy import encode_packaged, encode_recv_bitmap
from migrated.wire.section import EOF_BYTE

#: Heartbeats per silence timeout: one may be lost in a slow moment.
BEATS = 3


class PostcopySource:
    """One machine on its way out by postcopy: `hand_over` on the first connection, `resume` on each further one."""

    def __init__(
        self, host: Host, progress: Progress, status: StatusCell, pause: OperatorPause, migration_id: str
    ) -> None:
        self._host = host
        self._progress = progress
        self._status = status
        self._pause = pause
        self._migration_id = migration_id
        self.committed = False
        """The machine may run at the other end: nothing gives it back any more."""
        self._handover: SourceHandover | None = None
        self._previous = RunState.RUNNING
        self.answered = False
        """The other end has said that it does."""

    async def hand_over(self, link: Link, on_commit: Callable[[], None], handover: SourceHandover | None) -> None:
        """Stop the machine, have it run at the other end, and send its memory.

        Raises with the machine as it was before, or, when `committed`, with the migration to be paused.
        """
        self._handover, self._previous = handover, self._host.machine.run_state
        if await self._host.postcopy_save.discard_early(link.f):
            await link.command(Command.PING, ping_payload(DISCARDED_PING))
            await self._wait_pong(link, DISCARDED_PING, "the destination drops pages that were written again")
        try:
            async with self._host.lock:
                self._previous = self._host.machine.run_state
                await self._stop_and_package(link, on_commit)
            async with asyncio.TaskGroup() as group:
                # From here on: loading a device may touch memory that is still here.
                server = group.create_task(self._serve(link))
                group.create_task(link.return_path.watch_link())
                aside = self._beside(group, link)
                await self._wait_devices(link)
                if handover is not None:
                    await self._commit(link, handover, on_commit)
                await self._answered(link)
                aside.append(group.create_task(self._beat(link)))
                await server
                await self._last_word(link, aside)
            await self.let_go(link.peer)
        except BaseException as raised:  # CancelledError too: the machine is given back first
            if not self.committed:
                await insist(lambda: self._take_back(link))
            if isinstance(raised, BaseExceptionGroup):
                raise first_error(raised) from None
            raise

    # -- up to the commit --------------------------------------------------------------------------------------

    async def _stop_and_package(self, link: Link, on_commit: Callable[[], None]) -> None:
        host, ledger, clock, f = self._host, self._progress.ledger, self._host.clock, link.f
        ledger.begin(clock())
        host.global_state.store(self._previous)
        await host.machine.stop(RunState.FINISH_MIGRATE)
        ledger.mark("stop", clock())
        await host.fault_point("source.stopped")
        if host.settings.enabled("pause-before-switchover"):
            await self._pause.wait(f, answers=True)
            ledger.mark("operator", clock())
        self._progress.meter.set_limit(0)
        await host.registry.save_live_complete_precopy(f, postcopy=True)
        await host.postcopy_save.begin_postcopy(f, preempt=link.urgent is not None)
        ledger.mark("ram", clock())
        package = await self._package(f.checks)
        if self._handover is None:
            # It starts when it has read the package.
            await host.postcopy_save.require_stopped()
            self._advance(MigrationStatus.POSTCOPY_ACTIVE)
            host.machine.check_alive()
            await host.ownership.become(Hold.RELEASED, peer=link.peer, migration_id=self._migration_id)
            self._committed(on_commit)
        f.put_command(Command.PING, ping_payload(SETUP_PING))
        f.put_checksum()
        f.end_checksums()  # pages are placed as they come from here on
        f.put_buffer(encode_packaged(len(package)))
        f.put_buffer(package)
        f.put_command(Command.PING, ping_payload(PACKAGE_PING))
        await f.drain()
        if self._handover is not None:
            await self._handover.happened(Event.SENT)
            await host.fault_point("source.sent")
            # Told to the log and to clients while the destination works.
            self._advance(MigrationStatus.DEVICE)
            self._advance(MigrationStatus.POSTCOPY_DEVICE)

    async def _package(self, checked: bool) -> bytes:
        """Return LISTEN, the devices, and RUN, as one piece."""
        memory = MemoryChannel()
        f = OutgoingStream(memory, BandwidthMeter(), clock=self._host.clock)
        if checked:
            f.begin_checksums()
        f.put_command(Command.POSTCOPY_LISTEN)
        await self._host.registry.save_state(f)
        f.put_command(Command.PING, ping_payload(DEVICES_PING))
        f.put_command(Command.POSTCOPY_RUN)
        await f.drain()
        return bytes(memory.content)

    def _advance(self, status: MigrationStatus) -> None:
        if not self._status.advance(status) and self._status.value is not status:
            raise MigrationCancelled("cancelled before switchover")

    async def _wait_devices(self, link: Link) -> None:
        # A QEMU that is not heard may run by now. That is a pause: over another connection its bitmaps are the answer.
        await self._wait_pong(link, DEVICES_PING, "the destination loads the devices")
        self._progress.ledger.mark("devices", self._host.clock())

    def _stray(self, error: WorkloadError) -> None:
        # Too late to give the machine back: at the other end it may lack what was written here.
        self._host.log.error("stray_write_after_commit", error=str(error), migration_id=self._migration_id)

    async def _commit(self, link: Link, handover: SourceHandover, on_commit: Callable[[], None]) -> None:
        """Let go of the machine, and wait until it runs at the other end."""
        handover.offer = await link.return_path.wait_ready(self._migration_id, self._answer_timeout_s)
        self._host.postcopy_save.stopped_so_far(self._stray)
        self._host.machine.check_alive()  # who watches may not have had its turn yet, and is dismissed here
        self._progress.ledger.mark("ready", self._host.clock())
        try:
            await handover.happened(Event.READY, send=link.put)
        finally:
            if handover.released:
                # Also where the connection broke meanwhile: what follows is a pause.
                self._committed(on_commit)
                self._status.advance(MigrationStatus.POSTCOPY_ACTIVE)
        answer = await link.return_path.wait_settled(self._migration_id, self._answer_timeout_s)
        await self._settled(answer)

    def _committed(self, on_commit: Callable[[], None]) -> None:
        self._progress.ledger.mark("record", self._host.clock())
        self.committed = True
        on_commit()

    async def _settled(self, answer: Answer) -> None:
        """Take the destination's word. Raises PeerRefused with the machine as it was before."""
        assert self._handover is not None
        if answer is not Answer.REFUSED:
            self._runs_there()
            await self._handover.happened(Event.ACTIVE)
            return
        self.committed = False
        await self._take_back(None)
        raise PeerRefused(GIVEN_BACK)

    async def settle(self, dial: Dial) -> bool:
        """Ask for an answer that got lost, to the commit or at the end; True when all memory is at the destination.

        Raises PeerRefused with the machine as it was before; ChannelError.
        """
        if self._handover is None or (self.answered and self._progress.stats.remaining):
            return False
        answer = await Settlement(self._host, self._handover, dial).ask()
        if not self.answered:
            await self._settled(answer)
        # Whoever has answered once ran it: one who knows nothing of that now gives nothing back.
        return answer is Answer.WHOLE

    async def _take_back(self, link: Link | None) -> None:
        async with self._host.lock:
            send = link.put if link is not None else None
            await take_back(self._host, self._handover, self._previous, send=send)

    # -- from the commit on ------------------------------------------------------------------------------------

    async def _answered(self, link: Link) -> None:
        if self._handover is None:
            self._runs_there()
            await write_moved(self._host, peer=link.peer, migration_id=self._migration_id)
        await self._host.fault_point("source.background")
        self._host.postcopy_save.begin_background()
        link.expect_signs_of_life(self._host.settings.silence_timeout_s())

    def _runs_there(self) -> None:
        self.answered = True
        self._progress.ledger.mark("answer", self._host.clock())
        self._progress.ledger.end(self._host.clock())

    async def resume(self, link: Link, on_resumed: Callable[[], None]) -> None:
        """Go on, on a new connection. Raises with the migration to be paused again."""
        link.expect_signs_of_life(self._host.settings.silence_timeout_s())
        try:
            async with asyncio.TaskGroup() as group:
                aside = [group.create_task(self._beat(link))]
                group.create_task(link.return_path.watch_link())
                await self._host.registry.resume_prepare(_Bitmaps(link, self._answer_timeout_s))
                aside += self._beside(group, link)
                if not self.answered:
                    await self._answered(link)
                await link.command(Command.POSTCOPY_RESUME)
                await link.return_path.wait_resumed(self._answer_timeout_s)
                self._status.advance(MigrationStatus.POSTCOPY_ACTIVE)
                on_resumed()
                self._host.postcopy_save.begin_background()
                await self._serve(link)
                await self._last_word(link, aside)
            await self.let_go(link.peer)
        except BaseExceptionGroup as group_error:
            raise first_error(group_error) from None

    async def _serve(self, link: Link) -> None:
        """Send what is requested, then everything, until nothing is left and the other end has been told so."""
        link.take_short_turns()
        save, meter, clock = self._host.postcopy_save, self._progress.meter, self._host.clock
        done = False
        while not done:
            meter.set_limit(self._host.settings.parameters.integer("max-postcopy-bandwidth"))
            wait_s = meter.time_left_s(clock()) if meter.exceeded(clock()) else 0.0
            await save.wait_work(wait_s)
            meter.roll(clock())
            async with link.writing:
                done = await self._host.registry.save_live_iterate(link.f, postcopy=True)
        async with link.writing, self._host.lock:
            await self._host.registry.save_live_complete_postcopy(link.f)
            link.f.put_buffer(EOF_BYTE)
            await link.f.drain()

    async def _beat(self, link: Link) -> None:
        """Show a `migrated` destination that this end lives; it answers, which shows that the other one does."""
        while link.kind is PeerKind.MIGRATED:
            await asyncio.sleep(self._host.settings.silence_timeout_s() / BEATS)
            await link.command(Command.PING, ping_payload(0))

    def _beside(self, group: asyncio.TaskGroup, link: Link) -> list[asyncio.Task[None]]:
        if link.urgent is None:
            return []
        return [group.create_task(self._host.postcopy_save.serve_urgent(link.urgent))]

    async def _last_word(self, link: Link, aside: list[asyncio.Task[None]]) -> None:
        """End what runs aside, and wait for SHUT."""
        if link.urgent is not None:
            await self._host.postcopy_save.end_urgent(link.urgent)
        for task in aside:
            task.cancel()
        try:
            async with asyncio.timeout(self._answer_timeout_s):
                shut = await asyncio.shield(link.return_path.answer)
        except TimeoutError as error:
            raise ChannelError(f"no answer within {self._answer_timeout_s:g} s", peer=link.peer) from error
        if shut:
            raise link.return_path.refusal() or PeerRefused(f"the destination answered SHUT {shut}")

    async def let_go(self, peer: str) -> None:
        """All memory is at the destination: this host's is out of date."""
        self._progress.finish()
        async with self._host.lock:
            await leave_machine(self._host, peer)

    @property
    def _answer_timeout_s(self) -> float:
        return self._host.settings.seconds("x-migrated-answer-timeout")

    async def _wait_pong(self, link: Link, value: int, phase: str) -> None:
        await link.return_path.wait_pong(value, self._answer_timeout_s, phase)


class Link:
    """One connection to the destination."""

    def __init__(
        self,
        f: OutgoingStream,
        urgent: OutgoingStream | None,
        return_path: ReturnPathReader,
        peer: str,
        kind: PeerKind,
        channel: Channel,
        expect_signs_of_life: Callable[[float], None],
    ) -> None:
        self.f = f
        self.urgent = urgent
        """Where requested pages go, if they have a connection of their own (postcopy-preempt)."""
        self.return_path = return_path
        self.peer = peer
        self.kind = kind
        self._channel = channel
        self.writing = asyncio.Lock()
        """Held around each section and each command: nothing comes between the parts of one."""
        self._expect_signs_of_life = expect_signs_of_life

    def take_short_turns(self) -> None:
        """From here on requests are more urgent than throughput."""
        if isinstance(self._channel, SocketChannel):
            self._channel.take_short_turns()

    def expect_signs_of_life(self, timeout_s: float) -> None:
        """From here on silence means that the other end is gone, where it answers heartbeats."""
        if self.kind is PeerKind.MIGRATED:
            self._expect_signs_of_life(timeout_s)

    async def command(self, command: Command, payload: bytes = b"") -> None:
        """Send one command, at once."""
        await self.put(encode_command(command, payload))

    async def put(self, element: bytes) -> None:
        """Send one element, at once."""
        async with self.writing:
            await self.f.send(element)


class _Bitmaps:
    """The BitmapSource of a recovery."""

    def __init__(self, link: Link, timeout_s: float) -> None:
        self._link = link
        self._timeout_s = timeout_s

    async def received_bitmaps(self, pages: Mapping[str, int]) -> Mapping[str, bytes]:
        """Ask for every block at once, and wait for all answers."""

        async def ask() -> None:
            for block in pages:
                await self._link.put(encode_recv_bitmap(block))

        return await self._link.return_path.wait_bitmaps(pages, ask, self._timeout_s)
