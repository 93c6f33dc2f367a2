"""What saving and loading a snapshot need of the daemon, and what both share.

The rule of the file: whatever a workload may do meanwhile is decided here: one that leaves ends the job, and nobody
declares anything until it has ended.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from migrated.migration.host import Host, first_error
from migrated.migration.progress import Progress
from migrated.migration.snapshot_store import SnapshotStore
from migrated.savevm.ports import MachinePort, RamBlockPort

HashContent = Callable[[RamBlockPort], Awaitable[str]]


@dataclass(frozen=True, slots=True)
class SnapshotHost:
    """One daemon, as its snapshots see it."""

    host: Host
    store: SnapshotStore
    hash_content: HashContent
    """Hash what is in a block that nobody writes to."""
    outgoing: Progress
    incoming: Progress
    """The figures that the handlers write to: those of migrations, which a snapshot leaves as they are."""
    tool: str
    """What wrote a snapshot, for its manifest."""


@asynccontextmanager
async def watched(machine: MachinePort) -> AsyncIterator[asyncio.TaskGroup]:
    """Run the block, and tasks of its own, beside what makes both worthless: a workload that leaves (WorkloadError)."""
    machine.watch()
    try:
        async with asyncio.TaskGroup() as group:
            watcher = group.create_task(machine.lost())
            yield group
            watcher.cancel()
    except BaseExceptionGroup as error:
        raise first_error(error) from None
    machine.check_alive()
