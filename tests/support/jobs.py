"""Jobs over QMP: begin one, wait for its end, and dismiss it."""

from __future__ import annotations

from itertools import count
from typing import Any

from migrated.control.client import QmpClient
from tests.support.following import wait_until

_numbers = count()


def begin_job(qmp: QmpClient, command: str, tag: str) -> str:
    """Begin a job, return its id. Raises CommandError when it is refused."""
    job_id = f"test-{next(_numbers)}"
    qmp.execute(command, {"job-id": job_id, "tag": tag})
    return job_id


def job_line(qmp: QmpClient, job_id: str) -> dict[str, Any]:
    """Return its line of query-jobs."""
    return next(job for job in qmp.execute("query-jobs") if job["id"] == job_id)


def end_job(qmp: QmpClient, job_id: str) -> dict[str, Any]:
    """Wait until a job has ended, dismiss it, and return its last line."""
    wait_until(lambda: job_line(qmp, job_id)["status"] == "concluded", f"job {job_id} ends")
    line = job_line(qmp, job_id)
    qmp.execute("job-dismiss", {"id": job_id})
    return line


def run_job(qmp: QmpClient, command: str, tag: str) -> dict[str, Any]:
    """Run a job that goes well."""
    line = end_job(qmp, begin_job(qmp, command, tag))
    assert "error" not in line, line
    return line


def fail_job(qmp: QmpClient, command: str, tag: str) -> str:
    """Run a job that fails, and return why."""
    return str(end_job(qmp, begin_job(qmp, command, tag))["error"])
