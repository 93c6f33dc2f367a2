"""One side of a migration of ours: a real daemon and the benchmark's workload, both fresh processes.

The rule of the file: default configuration, except for what a case says; a destination is new for each migration, so
its memory is cold.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from migrated.control.client import QmpClient
from migrated.errors import ChannelClosed
from tests.bench.processes import DEADLINE_S, BenchError, expect, module, running, tail
from tests.bench.qemu import POLL_S, follow


@dataclass(frozen=True, slots=True)
class Site:
    """A daemon with a workload."""

    qmp: QmpClient
    socket: Path
    daemon: subprocess.Popen[str]
    workload: subprocess.Popen[str]
    log: Path

    @property
    def pids(self) -> tuple[int, int]:
        """Return the daemon's and the workload's."""
        return self.daemon.pid, self.workload.pid

    @property
    def address(self) -> str:
        """Return the URI at which this daemon waits."""
        answer = self.qmp.execute("query-migrate")["socket-address"][0]
        return f"tcp:{answer['host']}:{answer['port']}"


@contextmanager
def site(
    directory: Path,
    name: str,
    ram_bytes: int,
    workload: Sequence[object] = (),
    *,
    incoming: bool | str = False,
    config: str = "",
    program: Sequence[str] = (),
) -> Iterator[Site]:
    """Run a daemon and a workload inside the block; the workload has filled its memory and is ready.

    ``program`` takes the place of the daemon's; ``incoming`` may say where to wait, and what `[migration]` has besides.
    """
    home = directory / f"{name}-{time.monotonic_ns()}"
    home.mkdir()
    log = home / "log"
    toml = home / "bench.toml"
    where = incoming if isinstance(incoming, str) else 'incoming = "tcp:127.0.0.1:0"'
    wait = f"[migration]\n{where}\n" if incoming else ""
    toml.write_text(f'[paths]\nruntime = "{home}/run"\nstate = "{home}/state"\n{wait}{config}\n')
    with (
        running(
            [*program, "--config", str(toml)] if program else module("migrated", "--config", toml), log=log
        ) as daemon,
        _connect(daemon, home / "run" / "qmp.sock", log) as qmp,
        running(
            module("tests.bench.workload", "--attach", home / "run" / "attach.sock", "--ram", ram_bytes, *workload),
            log=log,
        ) as process,
    ):
        expect(process, "ready", log)
        yield Site(qmp, home / "run" / "qmp.sock", daemon, process, log)


def _connect(daemon: subprocess.Popen[str], socket: Path, log: Path) -> QmpClient:
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline and daemon.poll() is None:
        try:
            return QmpClient(str(socket), deadline_s=DEADLINE_S)
        except ChannelClosed:
            time.sleep(POLL_S)
    raise BenchError(f"the daemon does not answer\n{tail(log)}")


def migrate(source: Site, target: Site, parameters: Mapping[str, object] | None = None) -> dict[str, Any]:
    """Migrate and return the source's last query-migrate."""
    if parameters:
        source.qmp.execute("migrate-set-parameters", parameters)
    source.qmp.execute("migrate", {"uri": target.address})
    try:
        return follow(source.qmp)
    except BenchError as error:
        raise BenchError(f"{error}\nsource:\n{tail(source.log)}\ntarget:\n{tail(target.log)}") from error
