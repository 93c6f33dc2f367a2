"""The dirty log of 1 GiB, and what a pass costs at 1 to 8 GiB with as many pages dirty.

The rule of the file: each size and pattern in a process of its own (`tests.bench.dirty_probe`); a pass is compared with
one over 1 GiB that has as many pages dirty, evenly spread in both.
"""

from __future__ import annotations

from tests.bench.case import Bench
from tests.bench.figures import Figure, Point, Target
from tests.bench.host import GIB, MIB, RESERVE_BYTES, available_bytes, warm
from tests.bench.processes import expect, module, running

SYNC_BYTES = GIB
SYNC_TARGET_MS = 10.0
PASS_BYTES = (GIB, 2 * GIB, 4 * GIB, 8 * GIB)
#: How many pages apart the written pages of 1 GiB are; of 8 GiB it is 1 in 96, about 1 %.
PASS_STEP = 12
PASS_MIB = 85
#: How many pages apart the written pages are; 0: nothing is written.
PATTERNS = {"nothing": 0, "every 256th page": 256, "every 16th page": 16, "every 2nd page": 2, "everything": 1}


def run(bench: Bench) -> list[Figure]:
    """Measure every pattern; then the pass at each size, one look of each in turn."""
    how = "DirtyLog.sync of 1 GiB in a thread: PAGEMAP_SCAN, decoding, into the bitmap"
    warm(SYNC_BYTES)
    figures = []
    for pattern, step in PATTERNS.items():
        figure = Figure("dirty", f"sync of 1 GiB, {pattern} dirty", "ms", how, Target("<=", SYNC_TARGET_MS))
        figure.ours = _looks(bench, "sync", SYNC_BYTES, step)
        figures.append(figure)
    return figures + _passes(bench)


def _passes(bench: Bench) -> list[Figure]:
    how = f"sync and sending of {PASS_MIB} MiB, dirty in single pages all over memory, into a channel that drops it"
    sizes = [size for size in PASS_BYTES if available_bytes() > size + RESERVE_BYTES]
    warm(max(sizes), 1)
    looks = {size: _looks(bench, "pass", size, PASS_STEP * size // GIB) for size in sizes}
    curve = [Figure("dirty", f"pass, {size // GIB} GiB", "ms", how, point=Point("pass", size / GIB)) for size in sizes]
    for figure, size in zip(curve, sizes, strict=True):
        figure.ours = looks[size]
    ratio = Figure("dirty", f"pass, {sizes[-1] // GIB} GiB", "ms", how, Target("<=", 1.3), "1 GiB")
    for ours, theirs in zip(looks[sizes[-1]], looks[sizes[0]], strict=True):
        ratio.pair(ours, theirs)
    return [*curve, ratio]


def _looks(bench: Bench, what: str, size_bytes: int, step: int) -> list[float]:
    with running(module("tests.bench.dirty_probe", what, size_bytes, step, bench.pairs), log=bench.log) as process:
        looks = [float(expect(process, "took", bench.log)[0]) for _ in range(bench.pairs)]
    bench.say(f"{what} {size_bytes // MIB} MiB, every {step}: {[round(look, 2) for look in looks]} ms")
    return looks
