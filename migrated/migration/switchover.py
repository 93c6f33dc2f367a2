"""The switchover of a precopy migration: from stopping the machine to the destination's answer.

The rule of the file: up to the point of no return every failure and every cancel leaves the source running as if
nothing had happened; behind it only an answer decides.

    stop -> [pause for the operator] -> END sections -> FULL sections -> by a commit, or by the last byte

    by a commit (`model.handover`)  EOF, VMDESCRIPTION -> ready -> record "released" -> commit -> active: record "moved"
    by the last byte                record "released" -> EOF, VMDESCRIPTION -> answer: SHUT 0 = moved | refused = resume
                                    | nothing = unknown: a QEMU, a file, or an older daemon starts when it has it
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from migrated.errors import ChannelError, OutcomeUnknown, PeerRefused, ProtocolError
from migrated.migration.handover import SourceHandover, take_back
from migrated.migration.host import Host, insist, write_moved
from migrated.migration.operator_pause import OperatorPause
from migrated.migration.progress import Progress
from migrated.migration.recovery import Dial
from migrated.migration.return_path import PeerKind, ReturnPathReader
from migrated.migration.settlement import GIVEN_BACK, Settlement
from migrated.model.handover import Event, Hold
from migrated.model.runstate import RunState
from migrated.stream.outgoing import OutgoingStream
from migrated.transport.channel import Channel
from migrated.wire.handover import Answer


@dataclass(frozen=True, slots=True)
class Commit:
    """A hand-over by an offer and its commit; ``dial`` leads to the destination again, if its answer gets lost."""

    handover: SourceHandover
    dial: Dial


class Switchover:
    """One attempt to hand the machine over; owns the point of no return."""

    def __init__(self, host: Host, progress: Progress, pause: OperatorPause, migration_id: str) -> None:
        self._host = host
        self._progress = progress
        self._pause = pause
        self._migration_id = migration_id
        self._on_commit: Callable[[], None] = lambda: None
        self._answers = False
        self._by: Commit | None = None
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
        by: Commit | None = None,
    ) -> None:
        """Hand the machine over, or raise with the machine as it was before (unless OutcomeUnknown is raised)."""
        host = self._host
        self._on_commit = on_commit
        self._by = by
        self._answers = return_path is not None
        async with host.lock:
            previous = host.machine.run_state
            try:
                await self._stop_and_send(f, previous)
                if by is not None and return_path is not None:
                    await self._release_by_commit(f, return_path, by)
                else:
                    await self._release(f, channel)
            except BaseException:  # CancelledError too: a cancelled switchover gives the machine back first
                if not self.handed_over:
                    await insist(lambda: self._take_back(previous, f))
                raise
        try:
            if by is not None and return_path is not None:
                await self._settled(return_path, by)
            else:
                await self._answer(channel, return_path, kind)
        except PeerRefused:
            async with host.lock:
                await insist(lambda: self._take_back(previous, None))
            raise
        await self._moved(channel.peer)

    async def _stop_and_send(self, f: OutgoingStream, previous: RunState) -> None:
        host, ledger, clock = self._host, self._progress.ledger, self._host.clock
        ledger.begin(clock())
        host.global_state.store(previous)
        await host.machine.stop(RunState.FINISH_MIGRATE)
        ledger.mark("stop", clock())
        await host.fault_point("source.stopped")
        if host.settings.enabled("pause-before-switchover"):
            await self._pause.wait(f, answers=self._answers)
            ledger.mark("operator", clock())
        self._progress.meter.set_limit(0)
        await host.registry.save_live_complete_precopy(f)
        ledger.mark("ram", clock())
        await host.registry.save_state(f)
        ledger.mark("devices", clock())

    async def _release_by_commit(self, f: OutgoingStream, return_path: ReturnPathReader, by: Commit) -> None:
        """Send the last byte; when the destination is ready, let go of the machine and say so."""
        f.put_end_of_stream()
        await f.drain()
        await by.handover.happened(Event.SENT)
        await self._host.fault_point("source.sent")
        timeout_s = self._host.settings.seconds("x-migrated-answer-timeout")
        by.handover.offer = await return_path.wait_ready(by.handover.offer.migration_id, timeout_s)
        self._progress.ledger.mark("ready", self._host.clock())
        self._host.machine.check_alive()  # who watches may not have had its turn yet, and is dismissed here
        self.committed = True
        self._on_commit()
        try:
            await by.handover.happened(Event.READY, send=f.send)
        except ChannelError as error:  # it is said again, on another connection
            self._host.log.warning("commit_not_delivered", error=str(error), migration_id=self._migration_id)
        finally:
            self.handed_over = by.handover.released
        self._progress.ledger.mark("record", self._host.clock())

    async def _settled(self, return_path: ReturnPathReader, by: Commit) -> None:
        """Wait for the destination's word, and ask for it where it got lost. Raises PeerRefused, OutcomeUnknown."""
        timeout_s = self._host.settings.seconds("x-migrated-answer-timeout")
        try:
            answer = await return_path.wait_settled(by.handover.offer.migration_id, timeout_s)
        except (ChannelError, ProtocolError) as error:
            try:
                async with asyncio.timeout(timeout_s):
                    answer = await Settlement(self._host, by.handover, by.dial).run()
            except TimeoutError:
                raise self._unknown(error) from error
        if answer is Answer.REFUSED:
            raise PeerRefused(GIVEN_BACK)

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
        self._progress.finish()
        async with host.lock:
            host.machine.set_run_state(RunState.POSTMIGRATE)
            if self._by is not None:
                await self._by.handover.happened(Event.ACTIVE)
            else:
                await write_moved(host, peer=peer, migration_id=self._migration_id)
            await host.machine.moved(peer)

    async def _take_back(self, previous: RunState, f: OutgoingStream | None) -> None:
        self.committed = self.handed_over = False
        handover = self._by.handover if self._by is not None else None
        await take_back(self._host, handover, previous, send=f.send if f is not None else None)

    def _unknown(self, why: object) -> OutcomeUnknown:
        return OutcomeUnknown(f"{why}; {self._host.ownership.text()}. Next: {self._host.ownership.next_step()}")
