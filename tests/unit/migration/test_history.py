"""The history: what an earlier life of the daemon has left is told, and an outcome is corrected once it is known."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import cast

import pytest
import structlog
from msgspec import structs

from migrated.errors import CommandError
from migrated.migration.history import History
from migrated.migration.host import Host
from migrated.migration.progress import Progress
from migrated.model.handover import Hold
from migrated.model.history import Direction, Report, Unreadable


class Shelf:
    """HistoryStore in memory, on a disk that may be full."""

    def __init__(self, *reports: Report | Unreadable) -> None:
        self.reports = list(reports)
        self.writes: list[tuple[Report, bool]] = []
        self.full = False

    async def read(self, newest: int | None = None) -> list[Report | Unreadable]:
        return self.reports[:newest]

    async def write(self, report: Report, *, durable: bool) -> None:
        if self.full:
            raise OSError(28, "No space left on device")
        self.writes.append((report, durable))
        kept = [one for one in self.reports if not isinstance(one, Report) or one.key != report.key]
        self.reports = [report, *kept]


def report(status: str, outcome: str = "unknown", direction: Direction = Direction.OUTGOING) -> Report:
    return Report(
        id="move-1", direction=direction, machine="kv", started="2026-11-26T18:00:00.000Z", status=status,
        outcome=outcome, ended="" if status == "unfinished" else "2026-11-26T18:00:01.000Z",
    )  # fmt: skip


@asynccontextmanager
async def opened(shelf: Shelf, hold: Hold) -> AsyncIterator[History]:
    ownership = SimpleNamespace(record=SimpleNamespace(hold=hold))
    host = cast(Host, SimpleNamespace(ownership=ownership, log=structlog.get_logger()))
    progress = Progress(lambda: 0.0)
    async with asyncio.TaskGroup() as group:
        history = History(host, shelf, progress, progress, group.create_task)
        await history.open()
        yield history
        await history.close()


@pytest.mark.parametrize(
    ("direction", "hold", "outcome"),
    [
        (Direction.OUTGOING, Hold.OWNER, "source-owns"),
        (Direction.OUTGOING, Hold.RELEASED, "unknown"),
        (Direction.OUTGOING, Hold.MOVED, "destination-owns"),
        (Direction.INCOMING, Hold.PARTIAL, "source-owns"),
    ],
)
async def test_one_without_an_end_was_interrupted(direction: Direction, hold: Hold, outcome: str) -> None:
    shelf = Shelf(report("unfinished", direction=direction))
    with structlog.testing.capture_logs() as lines:
        async with opened(shelf, hold) as history:
            (line,) = await history.query()
    assert (line["status"], line["outcome"], line["error-id"]) == ("interrupted", outcome, "migration-interrupted")
    assert [one["event"] for one in lines] == ["migration_interrupted"]
    assert [(one.status, durable) for one, durable in shelf.writes] == [("interrupted", True)]


async def test_an_outcome_is_corrected_when_the_record_knows_it() -> None:
    shelf = Shelf(report("failed"))
    async with opened(shelf, Hold.RELEASED) as history:
        history.record_written({"hold": "released"})
        assert (await history.query())[0]["outcome"] == "unknown"
        history.record_written({"hold": "moved"})
        history.record_written({"hold": "owner"})  # of another machine, later
        assert (await history.report("move"))["outcome"] == "destination-owns"
    assert [one for one, _ in shelf.writes] == [structs.replace(report("failed"), outcome="destination-owns")]


async def test_an_outcome_that_got_known_too_late_for_its_report() -> None:
    shelf = Shelf(report("failed"))
    async with opened(shelf, Hold.OWNER) as history:
        assert (await history.query())[0]["outcome"] == "source-owns"


async def test_what_ended_well_is_left_alone() -> None:
    shelf = Shelf(report("completed", "destination-owns"), Unreadable(path="/x", unreadable="cut short"))
    with structlog.testing.capture_logs() as lines:
        async with opened(shelf, Hold.MOVED) as history:
            history.record_written({"hold": "owner"})
            assert [one.get("status") for one in await history.query()] == ["completed", None]
    assert shelf.writes == []
    assert [(one["event"], one["path"]) for one in lines] == [("history_unreadable", "/x")]


async def test_a_full_disk_is_said_and_stops_nothing() -> None:
    shelf = Shelf(report("unfinished"))
    shelf.full = True
    with structlog.testing.capture_logs() as lines:
        async with opened(shelf, Hold.OWNER):
            pass
    assert [one["event"] for one in lines] == ["migration_interrupted", "history_not_written"]


async def test_a_report_that_is_not_there() -> None:
    async with opened(Shelf(), Hold.OWNER) as history:
        assert await history.query() == []
        with pytest.raises(CommandError, match="no report of a migration 'move'"):
            await history.report("move")
