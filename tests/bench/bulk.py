"""Bulk precopy of an idle machine into cold memory: raw sockets, ours and a QEMU, with one stream and with channels.

The rule of the file: one definition of time for all, in `tests.bench.movers`; who is compared with whom, and what has
to be reached, is the table below. What the same runs cost in processor time and memory is counted as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from tests.bench import raw
from tests.bench.case import Bench
from tests.bench.figures import Figure, Target
from tests.bench.host import GIB, MIB, random_file
from tests.bench.movers import (
    DEFAULT,
    HOW,
    HOW_CPU,
    HOW_MEMORY,
    ONE_STREAM,
    Job,
    Moved,
    channels_config,
    default_channels,
    ours,
    theirs,
)

SIZE_BYTES = GIB
OURS = {
    "migrated": DEFAULT,
    "migrated, one stream": ONE_STREAM,
    "migrated, 2 channels": channels_config(2),
    "migrated, 4 channels": channels_config(4),
}
RAW = {"raw": default_channels(), "raw, 2 channels": 2, "raw, 4 channels": 4}
QEMU = {"qemu": 0, "qemu, 2 channels": 2}
PAIRS: tuple[tuple[str, str, Target | None], ...] = (
    ("migrated", "raw", Target(">=", 0.9)),
    ("migrated", "qemu", Target(">=", 1.3)),
    ("migrated", "qemu, 2 channels", Target(">=", 1.2)),
    ("migrated, 2 channels", "raw, 2 channels", Target(">=", 0.9)),
    ("migrated, 2 channels", "qemu, 2 channels", Target(">=", 1.2)),
    ("migrated, one stream", "raw", None),
    ("migrated, one stream", "qemu", None),
    ("migrated, 4 channels", "raw, 4 channels", Target(">=", 0.9)),
)
COSTS = (
    ("migrated", "qemu"),
    ("migrated, 2 channels", "qemu, 2 channels"),
    ("migrated, one stream", "qemu"),
)


def run(bench: Bench) -> list[Figure]:
    """Measure everybody in turn."""
    size = bench.size(SIZE_BYTES)
    with random_file(bench.memory, size) as content:
        job = Job(size, content)
        competitors: dict[str, Callable[[], Moved]] = {
            name: partial(_raw, bench, job, channels) for name, channels in RAW.items()
        }
        competitors |= {name: partial(ours, bench, job, config) for name, config in OURS.items()}
        if bench.qemu:
            competitors |= {name: partial(theirs, bench, job, count) for name, count in QEMU.items()}
        results = list(bench.rounds("bulk", competitors))
    what = f"{size / GIB:g} GiB, idle, cold destination"
    return [*_speeds(what, results), *_costs(results, with_qemu=bench.qemu is not None)]


def _raw(bench: Bench, job: Job, channels: int) -> Moved:
    assert job.content is not None
    return Moved(
        job.size_bytes, job.size_bytes / MIB * 1000 / raw.push(job.content, job.size_bytes, bench.log, channels)
    )


def _speeds(what: str, results: list[dict[str, Moved]]) -> list[Figure]:
    return speeds("bulk", what, HOW + "; destination memory is cold", PAIRS, results)


def speeds(
    case: str,
    what: str,
    how: str,
    pairs: tuple[tuple[str, str, Target | None], ...],
    results: list[Mapping[str, Moved]] | list[dict[str, Moved]],
) -> list[Figure]:
    """Return a figure for every two who ran."""
    figures = []
    for who, against, target in pairs:
        if against in results[0]:
            figure = Figure(case, what, "MiB/s", how, target, against, who=who)
            for result in results:
                figure.pair(result[who].mib_per_s, result[against].mib_per_s)
            figures.append(figure)
    return figures


def _costs(results: list[dict[str, Moved]], *, with_qemu: bool) -> list[Figure]:
    figures = []
    for who, against in COSTS:
        beside = against if with_qemu else ""
        target = Target("<=", 1.0) if with_qemu else None
        cpu = Figure("bulk", "processor time, both ends", "s/GiB", HOW_CPU, target, beside, who=who)
        memory = [
            Figure("bulk", f"daemon's memory, {end}", "MiB", HOW_MEMORY, None, beside, who=who)
            for end in ("source", "target")
        ]
        for result in results:
            cpu.ours.append(result[who].cpu_s_per_gib)
            cpu.theirs += [result[against].cpu_s_per_gib] if with_qemu else []
            for end, figure in enumerate(memory):
                figure.ours.append(result[who].anonymous_bytes[end] / MIB)
                figure.theirs += [result[against].anonymous_bytes[end] / MIB] if with_qemu else []
        figures += [cpu, *memory]
    return figures
