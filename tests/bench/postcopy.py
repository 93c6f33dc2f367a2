"""Postcopy: how long the machine stands still, and how long all of it takes (`tests.bench.faults`: how long a page).

The rule of the file: what both can do is measured of both in the same run. Downtime is the time between the events STOP
of the source and RESUME of the destination, with the time stamps that each side puts on them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from migrated.control.client import QmpClient
from migrated.kernel.memory import PAGE_SIZE
from tests.bench import qemu
from tests.bench.boot_sector import write_floppy
from tests.bench.case import Bench
from tests.bench.downtime import LOW_MEMORY_BYTES, wait_walking
from tests.bench.figures import Figure, Target
from tests.bench.host import GIB, MIB, random_file, warm
from tests.bench.site import Site, migrate, site

ON = [{"capability": name, "state": True} for name in ("postcopy-ram", "events")]
#: QEMU's own figure for a working set that no precopy can follow.
LOOP_BYTES = 900 * MIB


def run(bench: Bench) -> list[Figure]:
    """Measure everything."""
    return [*_downtimes(bench), *_background(bench), *_looping(bench)]


# -- downtime --------------------------------------------------------------------------------------------------


def _downtimes(bench: Bench) -> list[Figure]:
    immediately = "no precopy pass; 64 MiB rewritten without pause"
    dirty_again = "after one precopy pass; everything but the first 16 MiB rewritten without pause"
    return [
        _downtime(bench, "at once, 1 GiB", immediately, GIB, 64 * MIB),
        _downtime(bench, "at once, 4 GiB", immediately, 4 * GIB, 64 * MIB),
        _downtime(bench, "after a pass, all dirty, 1 GiB", dirty_again, GIB, GIB - 16 * MIB, passes=1),
    ]


def _downtime(bench: Bench, name: str, when: str, size: int, working_set: int, passes: int = 0) -> Figure:
    how = f"STOP at the source to RESUME at the destination; {when}"
    target = Target("<=", 1.0) if bench.qemu else None
    figure = Figure("postcopy", f"downtime, {name}", "ms", how, target, "qemu" if bench.qemu else "")
    with random_file(bench.memory, size, zero_bytes=LOW_MEMORY_BYTES) as content:
        competitors = {"migrated": lambda: _ours(bench, content, size, working_set, passes)}
        if bench.qemu:
            competitors["qemu"] = lambda: _theirs(bench, content, size, working_set, passes)
        for result in bench.rounds(figure.name, competitors):
            for who, values in (("migrated", figure.ours), ("qemu", figure.theirs)):
                if who in result:
                    values.append(result[who]["downtime_ms"])
                    for what in ("total_ms", "sent_mib"):
                        figure.details.setdefault(f"{who}_{what}", []).append(result[who][what])
            figure.details.setdefault("migrated_parts_ms", []).append(result["migrated"]["parts_ms"])
    return figure


def _ours(bench: Bench, content: Path, size: int, working_set: int, passes: int = 0) -> dict[str, Any]:
    options = ["--content", content, "--rewrite", working_set]
    with (
        site(bench.directory, "source", size, options) as source,
        site(bench.directory, "target", size, ["--rewrite", working_set], incoming=True) as target,
    ):
        warm(size)
        figures = _by_postcopy(source, target, passes)
        return {
            "downtime_ms": _between(source.qmp, target.qmp),
            "total_ms": float(figures["total-time"]),
            "sent_mib": _sent_mib(figures),
            "parts_ms": figures["x-migrated-downtime"],
        }


def _theirs(bench: Bench, content: Path, size: int, working_set: int, passes: int = 0) -> dict[str, Any]:
    floppy = bench.directory / "walk.img"
    write_floppy(floppy, working_set)
    with qemu.guests(bench.directory, content, size, floppy) as (source, target):
        wait_walking(source)
        warm(size)
        qemu.start_postcopy(source, target, ON, passes)
        figures = qemu.follow(source)
        return {
            "downtime_ms": _between(source, target),
            "total_ms": float(figures["total-time"]),
            "sent_mib": _sent_mib(figures),
        }


def _sent_mib(figures: dict[str, Any]) -> float:
    """Say how much memory was sent, counted each time: beyond the RAM's size it is what became dirty behind a pass."""
    return float(figures["ram"]["normal"] + figures["ram"]["duplicate"]) * PAGE_SIZE / MIB


def _between(source: QmpClient, target: QmpClient) -> float:
    return (_when(target, "RESUME") - _when(source, "STOP")) * 1000


def _when(side: QmpClient, name: str) -> float:
    stamp = qemu.wait_event(side, name)["timestamp"]
    return float(stamp["seconds"]) + float(stamp["microseconds"]) / 1e6


# -- throughput ------------------------------------------------------------------------------------------------


def _background(bench: Bench) -> list[Figure]:
    how = "RAM bytes / total time, 1 GiB, idle machine, postcopy at once against precopy"
    figure = Figure("postcopy", "background throughput", "MiB/s", how, Target(">=", 0.6), "precopy")
    with random_file(bench.memory, GIB) as content:
        competitors = {
            "postcopy": lambda: _idle(bench, content, postcopy=True),
            "precopy": lambda: _idle(bench, content, postcopy=False),
        }
        for result in bench.rounds("background", competitors):
            figure.pair(result["postcopy"], result["precopy"])
    return [figure]


def _idle(bench: Bench, content: Path, *, postcopy: bool) -> float:
    with (
        site(bench.directory, "source", GIB, ["--content", content]) as source,
        site(bench.directory, "target", GIB, incoming=True) as target,
    ):
        warm(GIB)
        figures = _by_postcopy(source, target) if postcopy else migrate(source, target)
        return GIB / MIB * 1000 / float(figures["total-time"])


def _by_postcopy(source: Site, target: Site, passes: int = 0) -> dict[str, Any]:
    for side in (source, target):
        side.qmp.execute("migrate-set-capabilities", {"capabilities": ON})
    source.qmp.execute("migrate", {"uri": target.address})
    qemu.switch_after(source.qmp, passes)
    return qemu.follow(source.qmp)


def _looping(bench: Bench) -> list[Figure]:
    if not bench.qemu:
        return []
    how = "total-time, 1 GiB of which 900 MiB are rewritten without pause, postcopy at once at both"
    figure = Figure("postcopy", "900 MiB rewritten, total", "ms", how, Target("<=", 1.3), "qemu")
    with random_file(bench.memory, GIB, zero_bytes=LOW_MEMORY_BYTES) as content:
        competitors = {
            "migrated": lambda: _ours(bench, content, GIB, LOOP_BYTES)["total_ms"],
            "qemu": lambda: _theirs(bench, content, GIB, LOOP_BYTES)["total_ms"],
        }
        for result in bench.rounds("900 MiB", competitors):
            figure.pair(result["migrated"], result["qemu"])
    return [figure]
