"""The history of one daemon's migrations: each is followed from its beginning to its end, and leaves a report.

The rule of the file: a migration never waits for its report. What is to be kept is handed to one writer, which is
behind by as much as the disk is; a report that cannot be written is said in the log, and changes nothing.

A mark without an end is left at the beginning, so that the next life of the daemon can tell that there was one. An
outcome that is unknown at the end is corrected when the ownership record knows it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping
from typing import Any, Protocol

import structlog
from msgspec import structs, to_builtins

from migrated.migration import report
from migrated.migration.host import Host, Spawn
from migrated.migration.incoming import IncomingMigration
from migrated.migration.outgoing import OutgoingMigration
from migrated.migration.progress import Progress
from migrated.model.faults import FaultFigures
from migrated.model.handover import Hold
from migrated.model.history import (
    UNFINISHED,
    UNKNOWN,
    Direction,
    Moved,
    Report,
    Tally,
    Unreadable,
    find,
    format_wall,
    interrupted,
    listed,
    outcome_of,
    with_answer,
)
from migrated.model.status import MigrationStatus

Migration = OutgoingMigration | IncomingMigration
#: One migration at a time, and every start tells of the one before: only the newest can be without an end.
LOOKED_AT = 8


class HistoryStore(Protocol):
    """Reports on a disk, a limited number of them."""

    async def write(self, report: Report, *, durable: bool) -> None:
        """Keep a report, in the place of one with the same key. Raises OSError.

        ``durable``: return only when it would survive a crash of the host.
        """
        ...

    async def read(self, newest: int | None = None) -> list[Report | Unreadable]:
        """Return what is kept, or that many of it, the newest first. What cannot be read is named."""
        ...


def _counted(migration: Migration) -> bool:
    """Return whether the figures are those of this migration: an incoming one begins them with its first section."""
    return isinstance(migration, OutgoingMigration) or migration.touched


class CurrentId:
    """A migration's id as the log has it: an incoming one gets its source's id only when that is known."""

    def __init__(self, migration: Migration) -> None:
        self._migration = migration

    def __repr__(self) -> str:
        return self._migration.migration_id

    __structlog__ = __repr__


class History:
    """Follows migrations, and answers for those that have ended."""

    def __init__(self, host: Host, store: HistoryStore, outgoing: Progress, incoming: Progress, spawn: Spawn) -> None:
        self.tally = Tally()
        self._host = host
        self._store = store
        self._progress = {Direction.OUTGOING: outgoing, Direction.INCOMING: incoming}
        self._spawn = spawn
        self._running: dict[Migration, Report] = {}
        self._ended: dict[Direction, MigrationStatus] = {}
        """How the last one in each direction ended; nothing more of it is kept."""
        self._unsettled: Report | None = None
        """The last one, where its outcome is unknown."""
        self._unwritten: dict[tuple[str, str], tuple[Report, bool]] = {}
        self._more = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._writer: asyncio.Task[None] | None = None

    # -- following ---------------------------------------------------------------------------------------------

    def departs(self, migration: OutgoingMigration, uri: str) -> Spawn:
        """Return what an outgoing migration is to be started with."""

        def spawn(job: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
            self._begin(migration, Direction.OUTGOING, uri)
            return self._spawn(self._follow(job, migration, Direction.OUTGOING))

        return spawn

    def arrives(self, migration: IncomingMigration) -> Spawn:
        """Return what an incoming one is to be started with; it leaves a report if a machine comes (`comes`)."""
        return lambda job: self._spawn(self._follow(job, migration, Direction.INCOMING))

    def comes(self, migration: IncomingMigration) -> None:
        """The first section is about to be loaded: this is no question, and no stranger."""
        self._begin(migration, Direction.INCOMING, "")

    def status(self, direction: Direction) -> MigrationStatus:
        """Return the status of the present or last migration in this direction."""
        running = (migration for migration, begun in self._running.items() if begun.direction is direction)
        if (migration := next(running, None)) is not None:
            return migration.status.value
        return self._ended.get(direction, MigrationStatus.NONE)

    def is_running(self, direction: Direction) -> bool:
        """Return whether a migration is followed now in this direction."""
        return any(one.direction is direction for one in self._running.values())

    async def _follow(self, job: Coroutine[Any, Any, None], migration: Migration, direction: Direction) -> None:
        # Every line that is written for this migration has its id, whoever writes it.
        with structlog.contextvars.bound_contextvars(migration_id=CurrentId(migration), role=direction.value):
            try:
                await job
            finally:
                try:
                    self._end(migration)
                except Exception:  # the top of a job: whatever is wrong with a report, the migration has ended
                    self._host.log.exception("history_bug")

    def _begin(self, migration: Migration, direction: Direction, uri: str) -> None:
        begun = self._running[migration] = Report(
            id=migration.migration_id,
            direction=direction,
            machine=self._host.machine.name,
            started=format_wall(self._host.site.clock_ms()),
            status=UNFINISHED,
            outcome=UNKNOWN,
            uri=uri,
            peer=migration.peer,
        )
        self._keep(begun, durable=False)

    def _end(self, migration: Migration) -> None:
        begun = self._running.pop(migration, None)
        if begun is None:
            return
        ended = structs.replace(self._now(migration, begun), ended=format_wall(self._host.site.clock_ms()))
        self._count(ended, migration)
        self._unsettled = ended if ended.outcome == UNKNOWN else None
        self._keep(ended, durable=True)

    def _now(self, migration: Migration, begun: Report) -> Report:
        """Return the report of a migration as it is at this moment."""
        progress = self._progress[begun.direction]
        if isinstance(migration, OutgoingMigration):
            limit_ms = self._host.settings.parameters.integer("downtime-limit")
            answer = report.describe_outgoing(migration, progress, self._host.ownership, limit_ms)
        else:
            blocktime = migration.settings.enabled("postcopy-blocktime")
            answer = report.describe_incoming(migration, progress, blocktime=blocktime)
        if not answer:  # the connection is there, and has not become an arriving machine yet
            return begun
        if _counted(migration):
            # QEMU leaves the figures of what failed out; whoever asks afterwards wants to know how far it came.
            answer = {**report.figures(progress, migration.status.value), **answer}
        return with_answer(begun, answer, outcome=outcome_of(begun.direction, self._host.ownership.record.hold))

    def _count(self, ended: Report, migration: Migration) -> None:
        self._ended[ended.direction] = migration.status.value
        self.tally.ended(ended.direction, ended.status)
        progress = self._progress[ended.direction]
        if _counted(migration):
            self.tally.add(ended.direction, progress.stats)
        if ended.direction is Direction.OUTGOING and migration.status.value is MigrationStatus.COMPLETED:
            parts_s = {name: ms / 1000 for name, ms in progress.ledger.parts_ms().items()}
            self.tally.last_moved = Moved(
                self._host.site.clock_ms() / 1000,
                progress.elapsed_ms() / 1000,
                progress.ledger.total_ms / 1000,
                parts_s,
            )
        if isinstance(migration, IncomingMigration) and (figures := migration.postcopy.faults) is not None:
            self.tally.add_faults(figures)

    def live_faults(self) -> FaultFigures | None:
        """Return what faults have cost in a postcopy that is under way here."""
        found = (one.postcopy.faults for one in self._running if isinstance(one, IncomingMigration))
        return next((figures for figures in found if figures is not None), None)

    def live_received_bytes(self) -> int:
        """Return how much of a machine that is on its way has arrived here."""
        arrives = any(isinstance(one, IncomingMigration) and one.touched for one in self._running)
        return self._progress[Direction.INCOMING].stats.transferred if arrives else 0

    # -- the writer --------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Begin to write; tell what an earlier life of this daemon has left without an end."""
        hold = self._host.ownership.record.hold
        found = await self._store.read(LOOKED_AT)
        for one in found:
            if isinstance(one, Unreadable):
                self._host.log.warning("history_unreadable", path=one.path, error=one.unreadable)
            elif not one.ended and one.status == UNFINISHED:
                self._host.log.warning("migration_interrupted", migration_id=one.id, role=one.direction.value)
                self._keep(interrupted(one, outcome=outcome_of(one.direction, hold)), durable=True)
        last = next((one for one in found if isinstance(one, Report)), None)
        if last is not None and last.outcome == UNKNOWN:
            self._unsettled = self._unwritten.get(last.key, (last, True))[0]
            self.record_written({"hold": hold.value})
        self._writer = self._spawn(self._write())

    def record_written(self, record: Mapping[str, Any]) -> None:
        """The ownership record says something new: an outcome may be known now."""
        if self._unsettled is None:
            return
        outcome = outcome_of(self._unsettled.direction, Hold(record["hold"]))
        if outcome != UNKNOWN:
            self._keep(structs.replace(self._unsettled, outcome=outcome), durable=True)
            self._unsettled = None

    async def close(self) -> None:
        """Write what is not written yet, and no more."""
        await self._idle.wait()
        if self._writer is not None:
            self._writer.cancel()
            await asyncio.wait([self._writer])

    def _keep(self, one: Report, *, durable: bool) -> None:
        self._unwritten[one.key] = one, durable
        self._idle.clear()
        self._more.set()

    async def _write(self) -> None:
        while True:
            await self._more.wait()
            self._more.clear()
            while self._unwritten:
                key, (one, durable) = next(iter(self._unwritten.items()))
                try:
                    await self._store.write(one, durable=durable)
                except OSError as error:
                    self._host.log.error("history_not_written", error=str(error), migration_id=one.id)
                except Exception:  # the top of a job: a report that cannot be written must not end the daemon
                    self._host.log.exception("history_bug", migration_id=one.id)
                if self._unwritten[key][0] is one:
                    del self._unwritten[key]
            self._idle.set()

    # -- answers -----------------------------------------------------------------------------------------------

    async def query(self) -> list[dict[str, object]]:
        """Answer ``x-migrated-query-history``: the newest first; what cannot be read comes last."""
        return listed(await self._all())

    async def report(self, wanted: str) -> dict[str, object]:
        """Answer ``x-migrated-query-report``. Raises CommandError."""
        found = find([one for one in await self._all() if isinstance(one, Report)], wanted)
        answer: dict[str, object] = to_builtins(found)
        return answer

    async def _all(self) -> list[Report | Unreadable]:
        found = await self._store.read()
        reports = {one.key: one for one in found if isinstance(one, Report)}
        reports |= {key: one for key, (one, _) in self._unwritten.items()}
        reports |= {begun.key: self._now(migration, begun) for migration, begun in self._running.items()}
        newest_first = sorted(reports.values(), key=lambda one: one.key, reverse=True)
        return [*newest_first, *(one for one in found if isinstance(one, Unreadable))]
