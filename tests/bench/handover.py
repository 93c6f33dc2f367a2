"""What certainty costs: the hand-over by a commit in downtime, and the checksums in throughput.

The rule of the file: the downtime is what the source's own ledger says of an idle machine, whose memory comes slowly
enough that the destination is not behind. What the commit adds to it is told by a destination that does not say that it
knows commits, so that the last byte decides, without checksums on either side (they are a figure of their own); beside
it, what one record on the same disk takes, of which a hand-over writes three in a row, and one without a commit two.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
from collections.abc import Sequence
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
#: A daemon like any other, but for what it says of itself.
WITHOUT_COMMIT = """
from migrated.daemon.app import main
from migrated.migration import return_path
from migrated.wire.command import FEATURE_HANDOVER
return_path.FEATURES &= ~FEATURE_HANDOVER
main()
"""
OLD = [sys.executable, "-c", WITHOUT_COMMIT]
WRITES = 50
QUIETLY: dict[str, object] = {"x-migrated-checksums": False, "max-bandwidth": 100 * MIB}


def run(bench: Bench) -> list[Figure]:
    """Measure the hand-over alone, and bulk pairs with and without checksums."""
    return [_handover(bench), _checksums(bench)]


def _handover(bench: Bench) -> Figure:
    how = "downtime of an idle machine of 64 MiB behind its last device (" + " + ".join(PARTS) + "), with - without"
    figure = Figure("handover", "added to the downtime by the commit", "ms", how, Target("<=", 5.0))
    with random_file(bench.memory, SMALL_BYTES) as content:
        competitors = {"commit": lambda: _parts(bench, content, []), "last byte": lambda: _parts(bench, content, OLD)}
        for result in bench.rounds("handover", competitors):
            parts, without = result["commit"], result["last byte"]
            sums = {name: sum(one.get(part, 0.0) for part in PARTS) for name, one in result.items()}
            figure.ours.append(sums["commit"] - sums["last byte"])
            for part in PARTS:
                figure.details.setdefault(f"{part}_ms", []).append(parts[part])
            for part in ("record", "answer"):
                figure.details.setdefault(f"without_{part}_ms", []).append(without[part])
    figure.details["one_record_ms"] = asyncio.run(_record_ms(bench.directory))
    return figure


def _parts(bench: Bench, content: Path, program: Sequence[str]) -> dict[str, float]:
    with (
        site(bench.directory, "source", SMALL_BYTES, ["--content", content]) as source,
        site(bench.directory, "target", SMALL_BYTES, incoming=True, program=program) as target,
    ):
        parts: dict[str, float] = migrate(source, target, QUIETLY)["x-migrated-downtime"]
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
