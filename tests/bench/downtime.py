"""Downtime of a machine that rewrites 64 MiB without pause, at 500 MiB/s, against a TCG guest that does the same.

The rule of the file: the same RAM size, content, working set, bandwidth and downtime limit; ``downtime`` is what each
source reports in query-migrate, and both write rates are in the details, because they are not the same.
"""

from __future__ import annotations

import re
import statistics
import time
from pathlib import Path
from typing import Any

from migrated.control.client import QmpClient
from tests.bench import qemu
from tests.bench.boot_sector import ROUNDS_ADDRESS, WORKING_SET_BYTES, write_floppy
from tests.bench.case import Bench
from tests.bench.figures import Figure, Target
from tests.bench.host import MIB, random_file, warm
from tests.bench.processes import DEADLINE_S, BenchError, expect, tell
from tests.bench.site import migrate, site

RAM_BYTES = 256 * MIB
LIMITS = {"max-bandwidth": 500 * MIB, "downtime-limit": 300}
#: A guest needs its first megabyte for the firmware's own purposes.
LOW_MEMORY_BYTES = MIB
#: Over this long the write rates are taken, before the migration.
RATE_S = 0.5


def run(bench: Bench) -> list[Figure]:
    """Measure pairs."""
    how = "downtime of query-migrate; max-bandwidth 500 MiB/s, downtime-limit 300 ms, 256 MiB of RAM"
    target = Target("<=", 1.0) if bench.qemu else None
    figure = Figure("downtime", "64 MiB rewritten without pause", "ms", how, target, "qemu" if bench.qemu else "")
    with random_file(bench.memory, RAM_BYTES, zero_bytes=LOW_MEMORY_BYTES) as content:
        competitors = {"migrated": lambda: _ours(bench, content)}
        if bench.qemu:
            competitors["qemu"] = lambda: _qemu(bench, content)
        results = list(bench.rounds("downtime", competitors))
    for name, values in (("migrated", figure.ours), ("qemu", figure.theirs)):
        if name in results[0]:
            values += [result[name]["downtime_ms"] for result in results]
            figure.details[f"{name}_write_mib_per_s"] = _median(results, name, "write_mib_per_s")
            figure.details[f"{name}_total_ms"] = _median(results, name, "total_ms")
    figure.details["migrated_parts_ms"] = [result["migrated"]["parts_ms"] for result in results]
    return [figure]


def _median(results: list[dict[str, dict[str, Any]]], who: str, what: str) -> float:
    return float(statistics.median(result[who][what] for result in results))


def _ours(bench: Bench, content: Path) -> dict[str, Any]:
    options = ["--content", content, "--rewrite", WORKING_SET_BYTES]
    with (
        site(bench.directory, "source", RAM_BYTES, options) as source,
        site(bench.directory, "target", RAM_BYTES, ["--rewrite", WORKING_SET_BYTES], incoming=True) as target,
    ):

        def rounds() -> float:
            tell(source.workload, "rounds?")
            return float(expect(source.workload, "rounds", source.log)[0])

        rate = _rate(rounds)
        warm(RAM_BYTES)
        figures = migrate(source, target, LIMITS)
        return {
            "downtime_ms": float(figures["downtime"]),
            "total_ms": float(figures["total-time"]),
            "write_mib_per_s": rate,
            "parts_ms": figures["x-migrated-downtime"],
        }


def _qemu(bench: Bench, content: Path) -> dict[str, Any]:
    floppy = bench.directory / "walk.img"
    write_floppy(floppy)
    with qemu.guests(bench.directory, content, RAM_BYTES, floppy) as (source, target):
        wait_walking(source)
        rate = _rate(lambda: guest_count(source))
        warm(RAM_BYTES)
        figures = qemu.migrate(source, target, LIMITS)
        return {
            "downtime_ms": float(figures["downtime"]),
            "total_ms": float(figures["total-time"]),
            "write_mib_per_s": rate,
        }


def _rate(rounds: Any) -> float:
    """Return how many MiB of working set are rewritten per second."""
    started, before = time.monotonic(), rounds()
    time.sleep(RATE_S)
    after, ended = rounds(), time.monotonic()
    return float(after - before) * WORKING_SET_BYTES / MIB / (ended - started)


def guest_count(source: QmpClient) -> int:
    """Return what the guest has counted: the rounds (or, of `tests.bench.pace_guest`, milliseconds) it has made."""
    answer = source.execute("human-monitor-command", {"command-line": f"xp /1wx {ROUNDS_ADDRESS:#x}"})
    found = re.search(r": 0x([0-9a-f]+)", answer)
    return int(found[1], 16) if found else 0


def wait_walking(source: QmpClient) -> None:
    """Wait until the guest rewrites its working set."""
    deadline = time.monotonic() + DEADLINE_S
    first = guest_count(source)
    while guest_count(source) <= first + 10:
        if time.monotonic() > deadline:
            raise BenchError("the boot sector does not run")
        time.sleep(qemu.POLL_S)
