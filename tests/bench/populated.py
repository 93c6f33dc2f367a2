"""Bulk precopy into memory whose pages are all there, beside raw sockets that receive into it and a QEMU's prealloc.

The rule of the file: as in `tests.bench.bulk`, but that nobody has to find a page for what arrives.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from tests.bench import raw
from tests.bench.bulk import speeds
from tests.bench.case import Bench
from tests.bench.figures import Figure, Target
from tests.bench.host import GIB, MIB, random_file
from tests.bench.movers import DEFAULT, HOW, ONE_STREAM, Job, Moved, channels_config, default_channels, ours, theirs

SIZE_BYTES = GIB
OURS = {"migrated": DEFAULT, "migrated, one stream": ONE_STREAM, "migrated, 2 channels": channels_config(2)}
RAW = {"raw": default_channels(), "raw, 2 channels": 2}
QEMU = "qemu, 2 channels"
PAIRS: tuple[tuple[str, str, Target | None], ...] = (
    ("migrated", "raw", Target(">=", 0.75)),
    ("migrated", QEMU, Target(">=", 1.1)),
    ("migrated, 2 channels", "raw, 2 channels", Target(">=", 0.75)),
    ("migrated, 2 channels", QEMU, Target(">=", 1.1)),
    ("migrated, one stream", "raw", None),
    ("migrated, one stream", QEMU, None),
)


def run(bench: Bench) -> list[Figure]:
    """Measure everybody in turn."""
    size = bench.size(SIZE_BYTES)
    with random_file(bench.memory, size) as content:
        job = Job(size, content, populated=True)
        competitors: dict[str, Callable[[], Moved]] = {
            name: partial(_raw, bench, job, channels) for name, channels in RAW.items()
        }
        competitors |= {name: partial(ours, bench, job, config) for name, config in OURS.items()}
        if bench.qemu:
            competitors[QEMU] = partial(theirs, bench, job, 2)
        results = list(bench.rounds("populated", competitors))
    what = f"{size / GIB:g} GiB, idle, populated destination"
    how = HOW + "; the destination's pages are all there before (a QEMU: prealloc=on)"
    return speeds("populated", what, how, PAIRS, results)


def _raw(bench: Bench, job: Job, channels: int) -> Moved:
    assert job.content is not None
    rate = raw.push(job.content, job.size_bytes, bench.log, channels, populated=True)
    return Moved(job.size_bytes, job.size_bytes / MIB * 1000 / rate)
