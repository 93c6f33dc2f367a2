"""The dirty log of 1 GiB, and what a pass costs at 1, 4 and 8 GiB with the same dirty set.

The rule of the file: each size and pattern in a process of its own (`tests.bench.dirty_probe`); a pass is compared with
one over 1 GiB that has the same pages dirty.
"""

from __future__ import annotations

from tests.bench.case import Bench
from tests.bench.figures import Figure, Target
from tests.bench.host import GIB, MIB, warm
from tests.bench.processes import expect, module, running

SYNC_BYTES = GIB
SYNC_TARGET_MS = 10.0
PASS_BYTES = (GIB, 4 * GIB, 8 * GIB)
#: 64 MiB, spread over the first GiB: every 16th page.
PASS_STEP = 16
#: How many pages apart the written pages are; 0: nothing is written.
PATTERNS = {"nothing": 0, "every 256th page": 256, "every 16th page": 16, "every 2nd page": 2, "everything": 1}


def run(bench: Bench) -> list[Figure]:
    """Measure every pattern; then the pass at each size, one look of each in turn."""
    how = "DirtyLog.sync of 1 GiB in a thread: PAGEMAP_SCAN, decoding, into the bitmap"
    warm(SYNC_BYTES)
    figures = []
    for pattern, step in PATTERNS.items():
        figure = Figure("dirty sync", f"1 GiB, {pattern} dirty", "ms", how, Target("<=", SYNC_TARGET_MS))
        figure.ours = _looks(bench, "sync", SYNC_BYTES, step)
        figures.append(figure)
    return figures + _passes(bench)


def _passes(bench: Bench) -> list[Figure]:
    how = "sync and sending of 64 MiB dirty (every 16th page of the first GiB) into a channel that drops it"
    warm(max(PASS_BYTES) // 2)
    looks = {size: _looks(bench, "pass", size, PASS_STEP) for size in PASS_BYTES}
    figures = []
    for size in PASS_BYTES[1:]:
        name = f"64 MiB dirty of {size // GIB} GiB"
        figure = Figure("pass", name, "ms", how, Target("<=", 1.25), "1 GiB")
        for ours, theirs in zip(looks[size], looks[PASS_BYTES[0]], strict=True):
            figure.pair(ours, theirs)
        figures.append(figure)
    return figures


def _looks(bench: Bench, what: str, size_bytes: int, step: int) -> list[float]:
    with running(module("tests.bench.dirty_probe", what, size_bytes, step, bench.pairs), log=bench.log) as process:
        looks = [float(expect(process, "took", bench.log)[0]) for _ in range(bench.pairs)]
    bench.say(f"{what} {size_bytes // MIB} MiB, every {step}: {[round(look, 2) for look in looks]} ms")
    return looks
