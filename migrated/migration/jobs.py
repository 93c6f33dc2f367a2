"""The jobs of one daemon: one at a time, followed by `query-jobs` and JOB_STATUS_CHANGE until they are dismissed.

The rule of the file: it knows how a job goes on (`model.job`), not what it does. A job that failed says why for as long
as nobody dismisses it. As in QEMU, what is wrong with the order to begin is refused at once, what is wrong with the
world is told by the job.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from structlog.typing import FilteringBoundLogger

from migrated.errors import CommandError, MigratedError, MigrationCancelled
from migrated.migration.host import Emit, Spawn, error_of, without_frames
from migrated.model.job import JobStatus, JobType, JobVerb, check_job_id, check_transition, check_verb

#: Jobs that nobody dismisses must not pile up for ever.
MAX_JOBS = 64


class Job:
    """One job. Whoever does its work tells it how far it is, and from when on it cannot be cancelled any more."""

    def __init__(self, job_id: str, kind: JobType, on_change: Callable[[Job], None]) -> None:
        self.id = job_id
        self.kind = kind
        self.status = JobStatus.CREATED
        self.error: MigratedError | None = None
        self.current = 0
        self.total = 1
        self.no_way_back = ""
        """Why it cannot be cancelled now; empty: it can."""
        self._on_change = on_change
        self._task: asyncio.Task[None] | None = None
        self._on_change(self)

    def add(self, count: int) -> None:
        """Account work that is done."""
        self.current += count

    def start(self, spawn: Spawn, work: Callable[[Job], Awaitable[None]], log: FilteringBoundLogger) -> None:
        """Run ``work`` as a task of the daemon."""
        self._advance(JobStatus.RUNNING)
        self._task = spawn(self._run(work, log))

    async def _run(self, work: Callable[[Job], Awaitable[None]], log: FilteringBoundLogger) -> None:
        try:
            await work(self)
        except asyncio.CancelledError:
            self._failed(MigrationCancelled("Job was cancelled"), log)
        except (MigratedError, OSError) as error:
            self._failed(error_of(error), log)
        except Exception as error:  # the top of a job: a bug here must not leave a job without an end
            log.exception("job_bug")
            self._failed(MigratedError(f"internal error: {error!r}"), log)
        else:
            self.current = self.total
            for status in (JobStatus.WAITING, JobStatus.PENDING, JobStatus.CONCLUDED):
                self._advance(status)

    def _failed(self, error: MigratedError, log: FilteringBoundLogger) -> None:
        self.error = without_frames(error)
        log.error("job_failed", job=self.id, type=self.kind.value, error=str(error), error_id=error.error_id)
        if self.status is not JobStatus.ABORTING:
            self._advance(JobStatus.ABORTING)
        self._advance(JobStatus.CONCLUDED)

    def cancel(self) -> None:
        """Give it up; it undoes what it did. Raises CommandError."""
        check_verb(self.id, self.status, JobVerb.CANCEL)
        if self.no_way_back:
            raise CommandError(f"Job '{self.id}' cannot be cancelled any more: {self.no_way_back}")
        self._advance(JobStatus.ABORTING)
        if self._task is not None:
            self._task.cancel()

    def dismiss(self) -> None:
        """Forget it. Raises CommandError."""
        check_verb(self.id, self.status, JobVerb.DISMISS)
        self._advance(JobStatus.NULL)

    async def wait(self) -> None:
        """Wait until it has ended."""
        if self._task is not None:
            await asyncio.wait([self._task])

    def as_dict(self) -> dict[str, object]:
        """Return its line of ``query-jobs``."""
        line: dict[str, object] = {
            "id": self.id,
            "type": self.kind.value,
            "status": self.status.value,
            "current-progress": self.current,
            "total-progress": max(self.total, self.current),
        }
        if self.error is None:
            return line
        # Of a machine that was loaded only in part, the ownership record tells.
        known = "what the ownership record says (`migratectl status`)"
        return {**line, "error": str(self.error), "x-migrated-error": self.error.explain(self.kind.value, known)}

    def _advance(self, to: JobStatus) -> None:
        check_transition(self.status, to)
        self.status = to
        self._on_change(self)


class Jobs:
    """All jobs that were not dismissed."""

    def __init__(self, spawn: Spawn, emit: Emit, log: FilteringBoundLogger) -> None:
        self._spawn = spawn
        self._emit = emit
        self._log = log
        self._jobs: dict[str, Job] = {}

    @property
    def active(self) -> Job | None:
        """The job under way, if any."""
        return next((job for job in self._jobs.values() if job.status is not JobStatus.CONCLUDED), None)

    def require_none(self) -> None:
        """Raise CommandError while a job is under way."""
        if (job := self.active) is not None:
            raise CommandError(f"job '{job.id}' ({job.kind}) is under way. Next: wait for its end, or `job-cancel`")

    def start(self, job_id: str, kind: JobType, work: Callable[[Job], Awaitable[None]]) -> None:
        """Begin a job. Raises CommandError."""
        check_job_id(job_id)
        if job_id in self._jobs:
            raise CommandError(f"Job ID '{job_id}' already in use")
        self.require_none()
        while len(self._jobs) >= MAX_JOBS:
            self.dismiss(next(iter(self._jobs)))  # the oldest; all have ended
        job = self._jobs[job_id] = Job(job_id, kind, self._changed)
        job.start(self._spawn, work, self._log)

    def cancel(self, job_id: str) -> None:
        """Cancel a job (``job-cancel``). Raises CommandError."""
        self._find(job_id).cancel()

    def dismiss(self, job_id: str) -> None:
        """Forget a job that has ended (``job-dismiss``). Raises CommandError."""
        self._find(job_id).dismiss()
        del self._jobs[job_id]

    def query(self) -> list[dict[str, object]]:
        """Answer ``query-jobs``, the latest first, as QEMU lists them."""
        return [job.as_dict() for job in reversed(self._jobs.values())]

    async def close(self) -> None:
        """Cancel what may be cancelled, and wait for what may not."""
        if (job := self.active) is not None:
            if job.status is JobStatus.RUNNING and not job.no_way_back:
                job.cancel()
            await job.wait()

    def _find(self, job_id: str) -> Job:
        if job_id not in self._jobs:
            raise CommandError("Job not found")
        return self._jobs[job_id]

    def _changed(self, job: Job) -> None:
        self._log.info("job_status", job=job.id, type=job.kind.value, status=job.status.value)
        self._emit("JOB_STATUS_CHANGE", {"id": job.id, "status": job.status.value})
