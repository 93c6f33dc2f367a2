"""The snapshots of one machine: the commands, and whether they may begin.

The rule of the file: it decides whether something may begin, never how it goes on; that is `snapshot_save` and
`snapshot_load`. A snapshot and a migration never meet: each is refused while the other one is under way.
Implements control's ``SnapshotsPort``. Error texts are QEMU's where QEMU has one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from migrated.errors import CommandError
from migrated.migration.host import OPTIONAL_SECTIONS, require_machine_here
from migrated.migration.jobs import Job, Jobs
from migrated.migration.migrator import BUSY
from migrated.migration.snapshot_host import SnapshotHost
from migrated.migration.snapshot_load import load_snapshot
from migrated.migration.snapshot_save import save_snapshot
from migrated.model.handover import Hold
from migrated.model.job import JobType
from migrated.wire.manifest import Summary

#: Records with which a machine may be loaded here: it is here already, or there is none anywhere as far as is known.
_LOADABLE = frozenset({Hold.NONE, Hold.PARTIAL, Hold.OWNER})


class Snapshots:
    """Starts, follows and lists."""

    def __init__(self, snapshots: SnapshotHost, jobs: Jobs, migrating: Callable[[], bool]) -> None:
        self._snapshots = snapshots
        self._jobs = jobs
        self._migrating = migrating

    async def save(self, job_id: str, tag: str, vmstate: str, devices: Sequence[str]) -> None:
        """Save the machine (``snapshot-save``); returns once the job has begun. Raises CommandError."""
        host = self._snapshots.host
        self._snapshots.store.path(tag)
        handlers = await host.registry.device_names(besides=OPTIONAL_SECTIONS)
        self._require_here()
        if not handlers and not host.machine.ram_blocks():
            raise CommandError(
                f"there is nothing to save: machine '{host.machine.name}' has no RAM block and no device here."
                " Next: start its workload, which attaches to this daemon"
            )

        async def work(job: Job) -> None:
            _require_no_nodes(vmstate, devices)
            await save_snapshot(self._snapshots, tag, job, self._require_here)

        self._jobs.start(job_id, JobType.SNAPSHOT_SAVE, work)

    async def load(self, job_id: str, tag: str, vmstate: str, devices: Sequence[str]) -> None:
        """Replace the machine (``snapshot-load``); returns once the job has begun. Raises CommandError."""
        self._snapshots.store.path(tag)
        self._require_may_load()

        async def work(job: Job) -> None:
            _require_no_nodes(vmstate, devices)
            await load_snapshot(self._snapshots, tag, job, self._require_may_load)

        self._jobs.start(job_id, JobType.SNAPSHOT_LOAD, work)

    async def delete(self, job_id: str, tag: str, devices: Sequence[str]) -> None:
        """Delete a snapshot (``snapshot-delete``); returns once the job has begun. Raises CommandError."""
        self._snapshots.store.path(tag)

        async def work(job: Job) -> None:
            _require_no_nodes("", devices)
            job.no_way_back = "it takes what was saved away"
            await self._snapshots.store.delete(tag)

        self._jobs.start(job_id, JobType.SNAPSHOT_DELETE, work)

    async def query(self) -> list[dict[str, object]]:
        """Answer ``x-migrated-query-snapshots``."""
        found = await self._snapshots.store.summaries()
        return [
            _summary(tag, str(self._snapshots.store.path(tag)), one)
            if isinstance(one, Summary)
            else {"tag": tag, "path": str(self._snapshots.store.path(tag)), "error": str(one)}
            for tag, one in found.items()
        ]

    def jobs(self) -> list[dict[str, object]]:
        """Answer ``query-jobs``."""
        return self._jobs.query()

    def cancel_job(self, job_id: str) -> None:
        """Cancel a job (``job-cancel``). Raises CommandError."""
        self._jobs.cancel(job_id)

    def dismiss_job(self, job_id: str) -> None:
        """Forget a job that has ended (``job-dismiss``). Raises CommandError."""
        self._jobs.dismiss(job_id)

    def _require_here(self) -> None:
        if self._migrating():
            raise CommandError(BUSY)
        require_machine_here(self._snapshots.host)

    def _require_may_load(self) -> None:
        if self._migrating():
            raise CommandError(BUSY)
        ownership = self._snapshots.host.ownership
        if ownership.record.hold not in _LOADABLE:
            raise CommandError(f"no snapshot can be loaded here: {ownership.text()}. Next: {ownership.next_step()}")


def _require_no_nodes(vmstate: str, devices: Sequence[str]) -> None:
    """There are no disks here, so every name of one is wrong."""
    if vmstate:
        raise CommandError(f"vmstate block device '{vmstate}' does not exist")
    if devices:
        raise CommandError(f"No block device node '{devices[0]}'")


def _summary(tag: str, path: str, one: Summary) -> dict[str, object]:
    return {
        "tag": tag,
        "path": path,
        "created": one.created,
        "size": one.length,
        "machine": one.machine.name,
        "status": one.machine.run_state,
        "blocks": [{"name": block.name, "size": block.size} for block in one.blocks],
    }
