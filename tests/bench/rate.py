"""Bandwidth limits that are changed while a machine moves: how far what is sent is from what was asked for.

The rule of the file: bytes are the source's own ``transferred``, over a second of the client's clock, some time after
the change. A QEMU's figures stand in lines of their own, because what has to hold is about ours alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

from migrated.control.client import QmpClient
from tests.bench import qemu
from tests.bench.case import Bench
from tests.bench.figures import Figure, Target
from tests.bench.host import GIB, MIB, random_file
from tests.bench.movers import DEFAULT, ONE_STREAM, Job, guests, sites
from tests.bench.postcopy import ON
from tests.bench.processes import DEADLINE_S, BenchError

SIZE_BYTES = GIB
#: One after the other, of one migration: 700 MiB in all.
LIMITS_MIB_PER_S = (200, 400, 100)
SETTLE_S, WINDOW_S = 0.3, 0.7
TARGET = Target("<=", 5.0)
_NAMED = ", ".join(map(str, LIMITS_MIB_PER_S))
PRECOPY, POSTCOPY = "max-bandwidth", "max-postcopy-bandwidth"
HOW = "|sent / limit - 1| over 0.7 s, 0.3 s after the change, one limit after the other in one migration of 1 GiB"

#: In percent, of each limit.
Deviations = dict[str, float]


def run(bench: Bench) -> list[Figure]:
    """Measure everybody in turn."""
    with random_file(bench.memory, SIZE_BYTES) as content:
        job = Job(SIZE_BYTES, content)
        competitors: dict[str, Callable[[], Deviations]] = {
            "migrated": partial(_ours, bench, job, DEFAULT, PRECOPY),
            "migrated, one stream": partial(_ours, bench, job, ONE_STREAM, PRECOPY),
            "migrated, postcopy": partial(_ours, bench, job, DEFAULT, POSTCOPY),
        }
        if bench.qemu:
            competitors["qemu"] = partial(_theirs, bench, job, PRECOPY)
            competitors["qemu, postcopy"] = partial(_theirs, bench, job, POSTCOPY)
        results = list(bench.rounds("rate", competitors))
    figures = []
    for who in competitors:
        target = TARGET if who.startswith("migrated") else None
        limit = POSTCOPY if "postcopy" in who else PRECOPY
        figure = Figure("rate", f"{limit} changed to {_NAMED} MiB/s: off by at most", "%", HOW, target, who=who)
        figure.ours = [max(result[who].values()) for result in results]
        figure.details = {name: [result[who][name] for result in results] for name in results[0][who]}
        figures.append(figure)
    return figures


def _ours(bench: Bench, job: Job, config: str, limit: str) -> Deviations:
    with sites(bench, job, config) as (source, target):
        sides = (source.qmp, target.qmp)
        return _watched(sides, limit, lambda: source.qmp.execute("migrate", {"uri": target.address}))


def _theirs(bench: Bench, job: Job, limit: str) -> Deviations:
    with guests(bench, job) as (source, target):
        return _watched((source, target), limit, lambda: qemu.start(source, target, {limit: _bps(LIMITS_MIB_PER_S[0])}))


def _watched(sides: Sequence[QmpClient], limit: str, start: Callable[[], None]) -> Deviations:
    source = sides[0]
    if limit == POSTCOPY:
        for side in sides:
            side.execute("migrate-set-capabilities", {"capabilities": ON})
    source.execute("migrate-set-parameters", {limit: _bps(LIMITS_MIB_PER_S[0])})
    start()
    if limit == POSTCOPY:
        source.execute("migrate-start-postcopy")
    _wait_until(source, "postcopy-active" if limit == POSTCOPY else "active")
    found = {}
    for mib_per_s in LIMITS_MIB_PER_S:
        source.execute("migrate-set-parameters", {limit: _bps(mib_per_s)})
        time.sleep(SETTLE_S)
        began, before = _sent(source)
        time.sleep(WINDOW_S)
        ended, after = _sent(source)
        found[f"{mib_per_s} MiB/s"] = abs((after - before) / (ended - began) / _bps(mib_per_s) - 1) * 100
    source.execute("migrate-set-parameters", {limit: qemu.UNLIMITED_BPS})
    qemu.follow(source)
    return found


def _wait_until(source: QmpClient, status: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while (found := source.execute("query-migrate").get("status")) != status:
        if found in ("failed", "completed") or time.monotonic() > deadline:
            raise BenchError(f"the migration is {found}, not {status}")
        time.sleep(qemu.POLL_S)


def _sent(source: QmpClient) -> tuple[float, int]:
    asked = time.monotonic()
    transferred = source.execute("query-migrate")["ram"]["transferred"]
    return (asked + time.monotonic()) / 2, int(transferred)


def _bps(mib_per_s: int) -> int:
    return mib_per_s * MIB
