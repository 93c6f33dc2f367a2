"""A machine that goes on writing: total time and downtime over working set and rate, beside a QEMU's guest.

The rule of the file: both have the same RAM, working set, rate (so many pages each millisecond, one byte of each), the
same bandwidth and the same downtime limit; what each really wrote is in the details. What is not over after
`GIVE_UP_MS` is cancelled, and has taken that long; it has no downtime.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from migrated.control.client import QmpClient
from tests.bench import qemu
from tests.bench.case import Bench
from tests.bench.downtime import LOW_MEMORY_BYTES, guest_count, wait_walking
from tests.bench.figures import Figure, Point, Target
from tests.bench.host import GIB, MIB, random_file, warm
from tests.bench.pace_guest import write_pace_floppy
from tests.bench.processes import BenchError, expect, tell
from tests.bench.site import site
from tests.support.compiler import NEEDS, has_compiler

RAM_BYTES = GIB
SETS_BYTES = (16 * MIB, 64 * MIB, 256 * MIB, 900 * MIB)
#: 62.5, 250 and 1000 MiB/s.
PAGES_PER_MS = (16, 64, 256)
PAGES_PER_MIB = 256
LIMITS = {"max-bandwidth": 500 * MIB, "downtime-limit": 300}
#: Long enough for four times the RAM.
GIVE_UP_MS = 8000.0
#: Over this long the rate is taken, before the migration.
RATE_S = 0.3
HOW = "query-migrate; 1 GiB of RAM, max-bandwidth 500 MiB/s, downtime-limit 300 ms, given up after 8 s"


@dataclass(frozen=True, slots=True)
class Swept:
    """One migration of a machine that writes."""

    total_ms: float
    downtime_ms: float | None
    """None: it did not converge."""
    written_mib_per_s: float


def run(bench: Bench) -> list[Figure]:
    """Measure every working set at every rate."""
    if not has_compiler():
        bench.say(f"sweep: left out, {NEEDS}")
        return []
    figures = []
    size = bench.size(RAM_BYTES)
    with random_file(bench.memory, size, zero_bytes=LOW_MEMORY_BYTES) as content:
        for working_set in SETS_BYTES:
            for pages in PAGES_PER_MS:
                figures += _point(bench, content, size, working_set, pages)
    return figures


def _point(bench: Bench, content: Path, size: int, working_set: int, pages: int) -> list[Figure]:
    line, rate = f"{working_set // MIB} MiB", pages / PAGES_PER_MIB * 1000
    written = bench.size(working_set)
    competitors: dict[str, Callable[[], Swept]] = {"migrated": partial(_ours, bench, content, size, written, pages)}
    if bench.qemu:
        competitors["qemu"] = partial(_theirs, bench, content, size, written, pages)
    target, against = (Target("<=", 1.0), "qemu") if bench.qemu else (None, "")
    total, downtime = (
        Figure("sweep", f"{what}, {line} written at {rate:g} MiB/s", "ms", HOW, target, against)
        for what in ("total time", "downtime")
    )
    total.point, downtime.point = Point("sweep-total", rate, line), Point("sweep-downtime", rate, line)
    results = list(bench.rounds(f"sweep, {line} at {rate:g} MiB/s", competitors))
    for result in results:
        total.ours.append(result["migrated"].total_ms)
        total.theirs += [result["qemu"].total_ms] if bench.qemu else []
        waits = [swept.downtime_ms for swept in result.values()]
        if None not in waits:
            downtime.ours.append(waits[0] or 0.0)
            downtime.theirs += [wait or 0.0 for wait in waits[1:]]
    for who in competitors:
        total.details[f"{who}_written_mib_per_s"] = statistics.median(one[who].written_mib_per_s for one in results)
    return [total, downtime]


def _ours(bench: Bench, content: Path, size: int, working_set: int, pages: int) -> Swept:
    writes = ["--rewrite", working_set, "--pace", pages]
    with (
        site(bench.directory, "source", size, ["--content", content, *writes]) as source,
        site(bench.directory, "target", size, writes, incoming=True) as target,
    ):

        def written_mib() -> float:
            tell(source.workload, "rounds?")
            return float(expect(source.workload, "rounds", source.log)[0]) * working_set / MIB

        rate = _rate(written_mib)
        warm(size)
        source.qmp.execute("migrate-set-parameters", LIMITS)
        source.qmp.execute("migrate", {"uri": target.address})
        return _followed(source.qmp, rate)


def _theirs(bench: Bench, content: Path, size: int, working_set: int, pages: int) -> Swept:
    floppy = write_pace_floppy(bench.directory, working_set, pages)
    with qemu.guests(bench.directory, content, size, floppy) as (source, target):
        wait_walking(source)
        rate = _rate(lambda: guest_count(source) * pages / PAGES_PER_MIB)
        warm(size)
        qemu.start(source, target, LIMITS)
        return _followed(source, rate)


def _rate(written_mib: Callable[[], float]) -> float:
    began, before = time.monotonic(), written_mib()
    time.sleep(RATE_S)
    return (written_mib() - before) / (time.monotonic() - began)


def _followed(source: QmpClient, rate: float) -> Swept:
    give_up = time.monotonic() + GIVE_UP_MS / 1000
    while True:
        figures = source.execute("query-migrate")
        if figures["status"] == "completed" and figures.get("total-time"):
            return Swept(min(float(figures["total-time"]), GIVE_UP_MS), float(figures["downtime"]), rate)
        if figures["status"] == "failed":
            raise BenchError(f"migration failed: {figures.get('error-desc', '')}")
        if figures["status"] == "cancelled":
            return Swept(GIVE_UP_MS, None, rate)
        if time.monotonic() > give_up and figures["status"] == "active":
            source.execute("migrate_cancel")
        time.sleep(qemu.POLL_S)
