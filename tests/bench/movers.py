"""One idle machine moved once, by two daemons of ours or by two QEMUs: what almost every case measures.

The rule of the file: both are given the same bytes, the same kind of destination memory and the same warm host; what
both are asked is the source's own ``total-time``, return path on, and the kernel what processor time and memory it was.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from migrated.control.client import QmpClient
from migrated.migration.data_channels import unasked_channels
from tests.bench import qemu
from tests.bench.case import Bench
from tests.bench.host import GIB, MIB, anonymous_bytes, cpu_s, warm, watching
from tests.bench.site import Site, migrate, site

HOW = "RAM bytes / total time from `migrate` to the destination's answer, setup included"
HOW_CPU = "processor time of both ends (daemons and workloads, or QEMUs) from before `migrate` to the end, per GiB"
HOW_MEMORY = "highest RssAnon of the daemon (or QEMU) at that end, looked at every 20 ms"


@dataclass(frozen=True, slots=True)
class Moved:
    """What a move took."""

    ram_bytes: int
    total_ms: float
    cpu_s: float = 0.0
    anonymous_bytes: tuple[int, int] = (0, 0)
    """At most, at source and target."""

    @property
    def mib_per_s(self) -> float:
        return self.ram_bytes / MIB * 1000 / self.total_ms

    @property
    def cpu_s_per_gib(self) -> float:
        return self.cpu_s * GIB / self.ram_bytes

    def __str__(self) -> str:
        return f"{self.total_ms:.0f} ms, {self.mib_per_s:.0f} MiB/s, {self.cpu_s_per_gib:.2f} s/GiB"

    __repr__ = __str__


@dataclass(frozen=True, slots=True)
class Job:
    """What is to be moved."""

    size_bytes: int
    content: Path | None = None
    """What it is filled with, over and over; None: nothing was ever written to it."""
    zeros: bool = False
    """Filled with zeros that are there."""
    populated: bool = False
    """The destination's pages are all there before."""
    spare: int = 2
    """How much more than the size the host is asked to back."""


def default_channels() -> int:
    """Return over how many channels pages go between two daemons here, where nobody says otherwise."""
    return unasked_channels(2, len(os.sched_getaffinity(0)), works=False)


#: Configurations of a daemon: as nobody configures it (pages on channels), and everything on one connection.
DEFAULT, ONE_STREAM = "", "[migration.parameters]\nx-migrated-data-channels = false"


def channels_config(channels: int, compression: str = "none") -> str:
    """Return the configuration of so many channels."""
    return (
        "[migration.capabilities]\nmultifd = true\n"
        f'[migration.parameters]\nmultifd-channels = {channels}\nmultifd-compression = "{compression}"\n'
    )


@contextmanager
def sites(bench: Bench, job: Job, config: str = "") -> Iterator[tuple[Site, Site]]:
    """Run a pair of ours, ready to migrate, on a warm host."""
    options: list[object] = ["--populate"] if job.zeros else []
    options += ["--content", job.content] if job.content else []
    there = ["--populate"] if job.populated else []
    with (
        site(bench.directory, "source", job.size_bytes, options, config=config) as source,
        site(bench.directory, "target", job.size_bytes, there, incoming=True, config=config) as target,
    ):
        warm(job.size_bytes, job.spare)
        yield source, target


def ours(bench: Bench, job: Job, config: str = "") -> Moved:
    """Move it from daemon to daemon."""
    with sites(bench, job, config) as (source, target):
        pids = (*source.pids, *target.pids)
        before = cpu_s(*pids)
        with watching(anonymous_bytes, {"source": source.daemon.pid, "target": target.daemon.pid}) as most:
            figures = migrate(source, target)
        return _moved(job, figures, cpu_s(*pids) - before, most)


@contextmanager
def guests(
    bench: Bench, job: Job, more: tuple[Sequence[str], Sequence[str]] = ((), ())
) -> Iterator[tuple[QmpClient, QmpClient]]:
    """Run a pair of QEMUs without processors, ready to migrate, on a warm host; ``more`` arguments for each."""
    common = [*qemu.EMPTY, "-m", str(job.size_bytes // MIB)]
    content = qemu.backend_file(job.content, job.size_bytes) if job.content else qemu.backend_cold(job.size_bytes)
    here = qemu.backend_populated(job.size_bytes) if job.zeros else content
    there = (qemu.backend_populated if job.populated else qemu.backend_cold)(job.size_bytes)
    waits = [*common, *there, *more[1], "-incoming", "defer"]
    with (
        qemu.qemu(bench.directory, qemu.SOURCE, [*common, *here, *more[0], "-S"]) as source,
        qemu.qemu(bench.directory, qemu.TARGET, waits) as target,
    ):
        warm(job.size_bytes, job.spare)
        yield source, target


def theirs(
    bench: Bench, job: Job, channels: int = 0, more: tuple[Sequence[str], Sequence[str]] = ((), ()), **parameters: str
) -> Moved:
    """Move it from QEMU to QEMU; 0 channels: one stream. ``parameters`` are for both ends, ``_`` for ``-``."""
    common = {name.replace("_", "-"): value for name, value in parameters.items()}
    with guests(bench, job, more) as (source, target):
        if channels:
            qemu.use_multifd((source, target), channels)
        if common:
            target.execute("migrate-set-parameters", common)
        pids = {side: qemu.pid(bench.directory, side) for side in (qemu.SOURCE, qemu.TARGET)}
        before = cpu_s(*pids.values())
        with watching(anonymous_bytes, pids) as most:
            figures = qemu.migrate(source, target, common)
        return _moved(job, figures, cpu_s(*pids.values()) - before, most)


def _moved(job: Job, figures: dict[str, Any], used_s: float, most: dict[str, int]) -> Moved:
    source, target = most.values()
    return Moved(job.size_bytes, float(figures["total-time"]), used_s, (source, target))
