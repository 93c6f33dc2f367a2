"""Jobs: one at a time, every end told, and nothing forgotten before it is dismissed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import pytest
import pytest_asyncio
import structlog

from migrated.errors import CommandError, MigratedError
from migrated.migration.jobs import MAX_JOBS, Job, Jobs
from migrated.model.job import JobType

SAVE = JobType.SNAPSHOT_SAVE


@dataclass
class Bench:
    """Jobs, what they told, and work that goes on until it is let go."""

    jobs: Jobs
    statuses: list[tuple[object, object]] = field(default_factory=list)
    begun: asyncio.Event = field(default_factory=asyncio.Event)
    let_go: asyncio.Event = field(default_factory=asyncio.Event)
    undone: bool = False

    async def work(self, job: Job) -> None:
        job.total = 10
        job.add(4)
        self.begun.set()
        try:
            await self.let_go.wait()
        except asyncio.CancelledError:
            self.undone = True
            raise

    async def end(self, job_id: str) -> None:
        await self.jobs._find(job_id).wait()


@pytest_asyncio.fixture
async def bench() -> AsyncIterator[Bench]:
    async with asyncio.TaskGroup() as group:
        jobs = Jobs(
            group.create_task,
            lambda name, data: found.statuses.append((data["id"], data["status"])),
            structlog.get_logger(),
        )
        found = Bench(jobs)
        yield found
        await jobs.close()


async def test_a_job_that_goes_well(bench: Bench) -> None:
    bench.jobs.start("a", SAVE, bench.work)
    await bench.begun.wait()
    line = {"id": "a", "type": "snapshot-save", "status": "running", "current-progress": 4, "total-progress": 10}
    assert bench.jobs.query() == [line]
    assert bench.jobs.active is not None
    bench.let_go.set()
    await bench.end("a")
    assert bench.jobs.query() == [{**line, "status": "concluded", "current-progress": 10}]
    assert bench.jobs.active is None
    bench.jobs.dismiss("a")
    assert bench.jobs.query() == []
    life = ["created", "running", "waiting", "pending", "concluded", "null"]
    assert bench.statuses == [("a", status) for status in life]


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (MigratedError("no"), "no"),
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
        (ZeroDivisionError("a bug"), "internal error: ZeroDivisionError('a bug')"),
    ],
)
async def test_a_job_that_fails_says_why(bench: Bench, error: Exception, text: str) -> None:
    async def fail(job: Job) -> None:
        raise error

    bench.jobs.start("a", SAVE, fail)
    await bench.end("a")
    (line,) = bench.jobs.query()
    assert (line["status"], line["error"]) == ("concluded", text)
    assert [status for _, status in bench.statuses] == ["created", "running", "aborting", "concluded"]


async def test_cancel(bench: Bench) -> None:
    bench.jobs.start("a", SAVE, bench.work)
    await bench.begun.wait()
    bench.jobs.cancel("a")
    with pytest.raises(CommandError, match="in state 'aborting' cannot accept command verb 'cancel'"):
        bench.jobs.cancel("a")
    with pytest.raises(CommandError, match="in state 'aborting' cannot accept command verb 'dismiss'"):
        bench.jobs.dismiss("a")
    await bench.end("a")
    assert bench.undone
    assert bench.jobs.query()[0]["error"] == "Job was cancelled"
    assert [status for _, status in bench.statuses] == ["created", "running", "aborting", "concluded"]


async def test_where_there_is_no_way_back_nobody_cancels_and_the_end_waits(bench: Bench) -> None:
    async def work(job: Job) -> None:
        job.no_way_back = "it overwrites"
        await bench.work(job)

    bench.jobs.start("a", SAVE, work)
    await bench.begun.wait()
    with pytest.raises(CommandError, match="Job 'a' cannot be cancelled any more: it overwrites"):
        bench.jobs.cancel("a")
    closing = asyncio.ensure_future(bench.jobs.close())
    await asyncio.sleep(0)
    assert not closing.done()
    bench.let_go.set()
    await closing
    assert "error" not in bench.jobs.query()[0]


async def test_one_at_a_time_and_names_once(bench: Bench) -> None:
    bench.jobs.start("a", SAVE, bench.work)
    with pytest.raises(CommandError, match="Job ID 'a' already in use"):
        bench.jobs.start("a", SAVE, bench.work)
    with pytest.raises(CommandError, match=r"job 'a' \(snapshot-save\) is under way\. Next: .*job-cancel"):
        bench.jobs.start("b", SAVE, bench.work)
    with pytest.raises(CommandError, match="Invalid job ID '1'"):
        bench.jobs.start("1", SAVE, bench.work)
    for verb in (bench.jobs.cancel, bench.jobs.dismiss):
        with pytest.raises(CommandError, match="Job not found"):
            verb("b")


async def test_jobs_that_nobody_dismisses_do_not_pile_up(bench: Bench) -> None:
    bench.let_go.set()
    for number in range(MAX_JOBS + 3):
        bench.jobs.start(f"j{number}", SAVE, bench.work)
        await bench.end(f"j{number}")
    assert [line["id"] for line in bench.jobs.query()] == [f"j{n}" for n in range(MAX_JOBS + 2, 2, -1)]


async def test_the_end_of_the_daemon_cancels(bench: Bench) -> None:
    bench.jobs.start("a", SAVE, bench.work)
    await bench.begun.wait()
    await bench.jobs.close()
    assert bench.undone
