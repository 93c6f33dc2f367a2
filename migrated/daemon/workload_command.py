"""``[workload] command``: the daemon starts the workload, in a session of its own, and never ends it.

The rule of the file: one workload at a time, also across restarts of the daemon: its pid and start time are kept under
the runtime directory, and a workload that still lives is left alone (its client re-attaches by itself).
"""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from structlog.typing import FilteringBoundLogger

from migrated.kernel.process import open_pidfd

ATTACH_VARIABLE = "MIGRATED_ATTACH"


class WorkloadCommand:
    """Starts the configured command once and reports its end."""

    def __init__(self, command: Sequence[str], runtime: Path, attach_socket: str, log: FilteringBoundLogger) -> None:
        self._command = list(command)
        self._pid_file = runtime / "workload.pid"
        self._attach_socket = attach_socket
        self._log = log

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Start the command unless it lives already; watch it inside the block."""
        if self._lives():
            self._log.info("workload_still_running", pid=self._kept()[0])
            yield
            return
        environment = os.environ | {ATTACH_VARIABLE: str(self._attach_socket)}
        # Not asyncio's subprocess: its transport kills the child when the loop closes.
        process = subprocess.Popen(self._command, env=environment, start_new_session=True)  # noqa: ASYNC220
        self._pid_file.write_text(f"{process.pid} {_start_time(process.pid)}\n")
        self._log.info("workload_started", pid=process.pid, command=self._command[0])
        async with asyncio.TaskGroup() as group:
            watcher = group.create_task(self._watch(process))
            try:
                yield
            finally:
                watcher.cancel()

    async def _watch(self, process: subprocess.Popen[bytes]) -> None:
        loop = asyncio.get_running_loop()
        pidfd = open_pidfd(process.pid)
        ended = asyncio.Event()
        loop.add_reader(pidfd, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(pidfd)
            os.close(pidfd)
        self._log.error("workload_ended", pid=process.pid, status=process.wait())
        self._pid_file.unlink(missing_ok=True)

    def _kept(self) -> tuple[int, int]:
        try:
            pid, started = self._pid_file.read_text().split()
            return int(pid), int(started)
        except (OSError, ValueError):
            return 0, 0

    def _lives(self) -> bool:
        pid, started = self._kept()
        return pid > 0 and _start_time(pid) == started


def _start_time(pid: int) -> int:
    """Return when a process started, in clock ticks since boot; 0 when there is none. Tells a reused pid."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    return int(stat.rpartition(")")[2].split()[19])
