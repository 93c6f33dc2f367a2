"""The switchover of a precopy migration: from stopping the machine to the destination's answer.

The rule of the file: up to the last byte the destination needs, every failure and every cancel leaves the source
running as if nothing had happened; from the first byte of that last message on, only an answer decides, and without
one the outcome is unknown.

    stop -> [pause for the operator] -> END sections -> FULL sections -> record "released" -> EOF, VMDESCRIPTION
         -> answer: SHUT 0 = moved | the peer refused = resume | nothing = unknown
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from migrated.errors import ChannelError, OutcomeUnknown, PeerRefused, ProtocolError
from migrated.migration.host import Host, insist, resume_machine
from migrated.migration.operator_pause import OperatorPause
from migrated.migration.ownership import Hold
from migrated.migration.progress import Progress
from migrated.migration.return_path import PeerKind, ReturnPathReader
from migrated.model.runstate import RunState
from migrated.stream.outgoing import OutgoingStream
from migrated.transport.channel import Channel


class Switchover:
    """One attempt to hand the machine over; owns the point of no return."""

    def __init__(self, host: Host, progress: Progress, pause: OperatorPause, migration_id: str) -> None:
        self._host = host
        self._progress = progress
        self._pause = pause
        self._migration_id = migration_id
        self._on_commit: Callable[[], None] = lambda: None
        self._answers = False
        self.committed = False
        """From here on nothing is cancelled any more."""
        self.handed_over = False
        """The first byte of the last message may have left."""

    async def run(
        self,
        f: OutgoingStream,
        channel: Channel,
        return_path: ReturnPathReader | None,
        kind: PeerKind,
        on_commit: Callable[[], None],
    ) -> None:
        """Hand the machine over, or raise with the machine as it was before (unless OutcomeUnknown is raised)."""
        host = self._host
        self._on_commit = on_commit
        self._answers = return_path is not None
        async with host.lock:
            previous = host.machine.run_state
            try:
                await self._stop_and_send(f, previous)
                await self._release(f, channel)
            except BaseException:  # CancelledError too: a cancelled switchover gives the machine back first
                if not self.handed_over:
                    await insist(lambda: self._take_back(previous))
                raise
        try:
            await self._answer(channel, return_path, kind)
        except PeerRefused:
            async with host.lock:
                await insist(lambda: self._take_back(previous))
            raise
        await self._moved(channel.peer)

    async def _stop_and_send(self, f: OutgoingStream, previous: RunState) -> None:
        host, ledger, clock = self._host, self._progress.ledger, self._host.clock
        ledger.begin(clock())
        host.global_state.store(previous)
        await host.machine.stop(RunState.FINISH_MIGRATE)
        ledger.mark("stop", clock())
        if host.settings.enabled("pause-before-switchover"):
            await self._pause.wait(f, answers=self._answers)
            ledger.mark("operator", clock())
        self._progress.meter.set_limit(0)
        await host.registry.save_live_complete_precopy(f)
        ledger.mark("ram", clock())
        await host.registry.save_state(f)
        ledger.mark("devices", clock())

    async def _release(self, f: OutgoingStream, channel: Channel) -> None:
        self._host.machine.check_alive()  # who watches may not have had its turn yet, and is dismissed here
        self.committed = True
        self._on_commit()
        await self._host.ownership.become(Hold.RELEASED, peer=channel.peer, migration_id=self._migration_id)
        self._progress.ledger.mark("record", self._host.clock())
        f.put_end_of_stream()
        self.handed_over = True
        sent = channel.bytes_sent
        try:
            await f.drain()
        except ChannelError as error:
            if channel.bytes_sent == sent:
                self.handed_over = False  # not one byte of it has left
                raise
            raise self._unknown(error) from error

    async def _answer(self, channel: Channel, return_path: ReturnPathReader | None, kind: PeerKind) -> None:
        if return_path is None:
            await self._close_one_way(channel, kind)
            return
        timeout_s = self._host.settings.seconds("x-migrated-answer-timeout")
        try:
            async with asyncio.timeout(timeout_s):
                shut = await asyncio.shield(return_path.answer)
        except TimeoutError as error:
            raise self._unknown(f"no answer within {timeout_s:g} s") from error
        except (ChannelError, ProtocolError) as error:
            raise self._unknown(error) from error
        if shut == 0:
            return
        if kind is PeerKind.MIGRATED:
            raise return_path.refusal() or PeerRefused("the destination did not start the machine")
        # A QEMU says SHUT 1 also when it started but its description was cut short.
        raise self._unknown(f"the destination answered SHUT {shut}")

    async def _close_one_way(self, channel: Channel, kind: PeerKind) -> None:
        try:
            await channel.close()
        except (ChannelError, OSError) as error:
            if kind is PeerKind.FILE:
                # Nobody runs from a file by itself: an incomplete one is an ordinary failure.
                raise PeerRefused(f"the file could not be completed: {error}") from error
            raise self._unknown(error) from error

    async def _moved(self, peer: str) -> None:
        host = self._host
        self._progress.ledger.mark("answer", host.clock())
        self._progress.ledger.end(host.clock())
        async with host.lock:
            host.machine.set_run_state(RunState.POSTMIGRATE)
            try:
                await host.ownership.become(Hold.MOVED, peer=peer, migration_id=self._migration_id)
            except OSError as error:
                # It has moved all the same. A restart finds `released` on the disk and asks.
                host.log.error("record_not_written", error=str(error), migration_id=self._migration_id)
            await host.machine.moved(peer)

    async def _take_back(self, previous: RunState) -> None:
        host = self._host
        self.committed = self.handed_over = False
        if host.ownership.record.hold is Hold.RELEASED:
            await host.ownership.become(Hold.OWNER)
        await resume_machine(host, previous)

    def _unknown(self, why: object) -> OutcomeUnknown:
        return OutcomeUnknown(f"{why}; {self._host.ownership.text()}. Next: {self._host.ownership.next_step()}")
