"""Moving an idle machine of 1, 2, 4 and 8 GiB, by us and by a QEMU.

The rule of the file: the same bytes at each size; a size for which this machine has no memory (both ends are here) is
left out, and it is said.
"""

from __future__ import annotations

from functools import partial

from tests.bench.case import Bench
from tests.bench.figures import Figure, Point, Target
from tests.bench.host import GIB, MIB, RESERVE_BYTES, available_bytes, repeated_file
from tests.bench.movers import Job, Moved, ours, theirs

SIZES_BYTES = (GIB, 2 * GIB, 4 * GIB, 8 * GIB)
#: Of content, which is repeated.
PIECE_BYTES = 4 * MIB
HOW = "total time from `migrate` to the destination's answer, setup included; idle machine, cold destination"


def run(bench: Bench) -> list[Figure]:
    """Measure pairs of each size."""
    figures = []
    for size in map(bench.size, SIZES_BYTES):
        if available_bytes() < 2 * size + RESERVE_BYTES:
            bench.say(f"sizes: {size / GIB:g} GiB left out, {available_bytes() / GIB:.1f} GiB of memory are free")
            continue
        target, against = (Target("<=", 1.0), "qemu") if bench.qemu else (None, "")
        name = f"total time, {size / GIB:g} GiB"
        figure = Figure("sizes", name, "ms", HOW, target, against, point=Point("sizes", size / GIB))
        competitors = {"migrated": partial(_ours, bench, size)}
        if bench.qemu:
            competitors["qemu"] = partial(_theirs, bench, size)
        for result in bench.rounds(name, competitors):
            figure.ours.append(result["migrated"].total_ms)
            figure.theirs += [result["qemu"].total_ms] if bench.qemu else []
        figures.append(figure)
    return figures


def _ours(bench: Bench, size: int) -> Moved:
    with repeated_file(bench.memory, PIECE_BYTES) as content:
        return ours(bench, Job(size, content, spare=1))


def _theirs(bench: Bench, size: int) -> Moved:
    with repeated_file(bench.memory, size) as content:
        return theirs(bench, Job(size, content, spare=1))
