"""A machine of 1 GiB that nobody has ever written to, and how long until it is there.

The rule of the file: ``total-time`` of both, bandwidth unlimited, memory that is nothing but holes at both ends.
"""

from __future__ import annotations

from tests.bench import qemu
from tests.bench.case import Bench
from tests.bench.figures import Figure, Target
from tests.bench.host import GIB, MIB, warm
from tests.bench.site import migrate, site

SIZE_BYTES = GIB


def run(bench: Bench) -> list[Figure]:
    """Measure pairs."""
    how = "total-time of query-migrate (return path on), setup included"
    target = Target("<=", 1.0) if bench.qemu else None
    figure = Figure("untouched", "1 GiB never written", "ms", how, target, "qemu" if bench.qemu else "")
    competitors = {"migrated": lambda: _ours(bench)}
    if bench.qemu:
        competitors["qemu"] = lambda: _qemu(bench)
    for result in bench.rounds("untouched", competitors):
        figure.ours.append(result["migrated"])
        if bench.qemu:
            figure.theirs.append(result["qemu"])
    return [figure]


def _ours(bench: Bench) -> float:
    with (
        site(bench.directory, "source", SIZE_BYTES) as source,
        site(bench.directory, "target", SIZE_BYTES, incoming=True) as target,
    ):
        warm(SIZE_BYTES)
        return float(migrate(source, target)["total-time"])


def _qemu(bench: Bench) -> float:
    arguments = [*qemu.EMPTY, "-m", str(SIZE_BYTES // MIB), *qemu.backend_cold(SIZE_BYTES)]
    with (
        qemu.qemu(bench.directory, "qemu-source", [*arguments, "-S"]) as source,
        qemu.qemu(bench.directory, "qemu-target", [*arguments, "-incoming", "defer"]) as target,
    ):
        warm(SIZE_BYTES)
        return float(qemu.migrate(source, target)["total-time"])
