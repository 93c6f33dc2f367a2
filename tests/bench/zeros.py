"""A machine of zeros, and how long until it is there: memory that nobody has ever written to, and zeros that are there.

The rule of the file: ``total-time`` of both, bandwidth unlimited; destinations are nothing but holes.
"""

from __future__ import annotations

from functools import partial

from tests.bench.case import Bench
from tests.bench.figures import Figure, Target
from tests.bench.host import GIB
from tests.bench.movers import Job, ours, theirs

SIZE_BYTES = GIB
#: Three times as fast as a QEMU; as fast as a QEMU.
TARGETS = {"never written": Target("<=", 0.333), "populated with zeros": Target("<=", 1.0)}


def run(bench: Bench) -> list[Figure]:
    """Measure pairs of both kinds."""
    size = bench.size(SIZE_BYTES)
    how = "total-time of query-migrate (return path on), setup included"
    figures = []
    for kind, target in TARGETS.items():
        job = Job(size, zeros=kind != "never written")
        name = f"{size / GIB:g} GiB {kind}"
        figure = Figure("zeros", name, "ms", how, target if bench.qemu else None, "qemu" if bench.qemu else "")
        competitors = {"migrated": partial(ours, bench, job)}
        if bench.qemu:
            competitors["qemu"] = partial(theirs, bench, job)
        for result in bench.rounds(kind, competitors):
            figure.ours.append(result["migrated"].total_ms)
            if bench.qemu:
                figure.theirs.append(result["qemu"].total_ms)
        figures.append(figure)
    return figures
