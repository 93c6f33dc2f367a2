"""Bulk precopy of an idle machine: 2 GiB that cannot be compressed, against raw sockets and against a QEMU.

The rule of the file: one definition for all: RAM bytes divided by the whole time from the order to migrate until the
sender knows that the destination has everything (``total-time`` with its setup for a daemon and for a QEMU, both with
return path; connect to acknowledgement for raw). Destination memory is cold everywhere.
"""

from __future__ import annotations

from pathlib import Path

from tests.bench import qemu, raw
from tests.bench.case import Bench
from tests.bench.figures import Figure, Target
from tests.bench.host import GIB, MIB, random_file, warm
from tests.bench.site import migrate, site

SIZE_BYTES = 2 * GIB
HOW = "RAM bytes / total time from `migrate` to the destination's answer, setup included; cold destination memory"


def run(bench: Bench) -> list[Figure]:
    """Measure triples: raw, migrated, QEMU."""
    against_raw = Figure("bulk", "2 GiB, idle machine", "MiB/s", HOW, Target(">=", 0.55), "raw")
    against_qemu = Figure("bulk", "2 GiB, idle machine", "MiB/s", HOW, Target(">=", 1.0), "qemu")
    with random_file(bench.memory, SIZE_BYTES) as content:
        competitors = {
            "raw": lambda: SIZE_BYTES / MIB / raw.push(content, SIZE_BYTES, bench.log),
            "migrated": lambda: _ours(bench, content),
        }
        if bench.qemu:
            competitors["qemu"] = lambda: _qemu(bench, content)
        for result in bench.rounds("bulk", competitors):
            against_raw.pair(result["migrated"], result["raw"])
            if bench.qemu:
                against_qemu.pair(result["migrated"], result["qemu"])
    return [against_raw, against_qemu] if bench.qemu else [against_raw]


def _ours(bench: Bench, content: Path) -> float:
    with (
        site(bench.directory, "source", SIZE_BYTES, ["--content", content]) as source,
        site(bench.directory, "target", SIZE_BYTES, incoming=True) as target,
    ):
        warm(SIZE_BYTES)
        return SIZE_BYTES / MIB * 1000 / float(migrate(source, target)["total-time"])


def _qemu(bench: Bench, content: Path) -> float:
    memory = ["-m", str(SIZE_BYTES // MIB)]
    with (
        qemu.qemu(
            bench.directory, "qemu-source", [*qemu.EMPTY, *memory, *qemu.backend_file(content, SIZE_BYTES), "-S"]
        ) as source,
        qemu.qemu(
            bench.directory,
            "qemu-target",
            [*qemu.EMPTY, *memory, *qemu.backend_cold(SIZE_BYTES), "-incoming", "defer"],
        ) as target,
    ):
        warm(SIZE_BYTES)
        return SIZE_BYTES / MIB * 1000 / float(qemu.migrate(source, target)["total-time"])
