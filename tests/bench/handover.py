"""What certainty costs: the hand-over by a commit in downtime, and the checksums in throughput.

The rule of the file: the downtime is what the source's own ledger says of an idle machine; beside it, what one record
on the same disk takes, of which a hand-over writes three in a row.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from pathlib import Path
from typing import Any

from migrated.daemon.record import FileRecordStore
from tests.bench.case import Bench
from tests.bench.figures import Figure, Target
from tests.bench.host import GIB, MIB, random_file, warm
from tests.bench.site import migrate, site

SMALL_BYTES = 64 * MIB
BULK_BYTES = 2 * GIB
#: Behind the last device: the destination checks and writes, the source writes, the destination writes and runs.
PARTS = ("ready", "record", "answer")
WRITES = 50


def run(bench: Bench) -> list[Figure]:
    """Measure the hand-over alone, and bulk pairs with and without checksums."""
    return [_handover(bench), _checksums(bench)]


def _handover(bench: Bench) -> Figure:
    how = "parts of the downtime of an idle machine of 64 MiB: " + " + ".join(PARTS)
    figure = Figure("handover", "offer to active, behind the last device", "ms", how, Target("<=", 5.0))
    with random_file(bench.memory, SMALL_BYTES) as content:
        for result in bench.rounds("handover", {"migrated": lambda: _parts(bench, content)}):
            parts = result["migrated"]
            figure.ours.append(sum(parts[part] for part in PARTS))
            for part in PARTS:
                figure.details.setdefault(f"{part}_ms", []).append(parts[part])
    figure.details["one_record_ms"] = asyncio.run(_record_ms(bench.directory))
    return figure


def _parts(bench: Bench, content: Path) -> dict[str, float]:
    with (
        site(bench.directory, "source", SMALL_BYTES, ["--content", content]) as source,
        site(bench.directory, "target", SMALL_BYTES, incoming=True) as target,
    ):
        parts: dict[str, float] = migrate(source, target)["x-migrated-downtime"]
        return parts


async def _record_ms(directory: Path) -> float:
    store = FileRecordStore(directory, "bench-record.json")
    took = []
    for number in range(WRITES):
        begun = time.monotonic()
        await store.write({"hold": "owner", "epoch": number})
        took.append((time.monotonic() - begun) * 1000)
    return statistics.median(took)


def _checksums(bench: Bench) -> Figure:
    how = "RAM bytes / total time, 2 GiB, idle machine, x-migrated-checksums on against off"
    figure = Figure("handover", "bulk with checksums", "MiB/s", how, Target(">=", 0.85), "without")
    with random_file(bench.memory, BULK_BYTES) as content:
        competitors = {"on": lambda: _bulk(bench, content, True), "off": lambda: _bulk(bench, content, False)}
        for result in bench.rounds("checksums", competitors):
            figure.pair(result["on"], result["off"])
    return figure


def _bulk(bench: Bench, content: Path, checksums: bool) -> float:
    parameters: dict[str, Any] = {"x-migrated-checksums": checksums}
    with (
        site(bench.directory, "source", BULK_BYTES, ["--content", content]) as source,
        site(bench.directory, "target", BULK_BYTES, incoming=True) as target,
    ):
        warm(BULK_BYTES)
        return BULK_BYTES / MIB * 1000 / float(migrate(source, target, parameters)["total-time"])
