"""What the migrator lets begin."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any, cast

import structlog

from migrated.errors import CommandError
from migrated.migration.host import Host
from migrated.migration.jobs import Jobs
from migrated.migration.migrator import Migrator
from migrated.migration.progress import Progress
from migrated.model.runstate import RunState


async def test_of_two_listeners_at_once_one_is_refused() -> None:
    """Two would let two machines in at once."""
    machine = SimpleNamespace(run_state=RunState.INMIGRATE)
    host = cast(Host, SimpleNamespace(machine=machine, log=structlog.get_logger()))
    progress = Progress(time.monotonic)
    jobs = Jobs(cast(Any, None), cast(Any, None), host.log)
    migrator = Migrator(host, progress, progress, cast(Any, None), jobs, cast(Any, None))
    opened = await asyncio.gather(*[migrator.incoming("tcp:127.0.0.1:0") for _ in range(2)], return_exceptions=True)
    await migrator.close()
    assert [type(result) for result in opened] == [type(None), CommandError]
