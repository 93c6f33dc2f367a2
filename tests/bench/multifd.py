"""Bulk precopy over channels of their own (multifd), beside one stream, raw sockets and a QEMU's multifd.

The rule of the file: figures as in `throughput`. What both daemons use of the processors is counted, too: on a host
that holds both ends it decides how fast they are.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.bench import qemu, raw
from tests.bench.case import Bench
from tests.bench.figures import Figure
from tests.bench.host import GIB, MIB, cpu_s, random_file, warm
from tests.bench.site import migrate, site
from tests.bench.throughput import HOW

SIZE_BYTES = 1 * GIB
HOW_CPU = "processor time of both daemons during the migration, per GiB of RAM"

#: MiB/s and processor seconds.
Result = tuple[float, float]


def run(bench: Bench) -> list[Figure]:
    """Measure in turns: raw, one stream, one channel, two channels, a QEMU with two."""
    figures = {
        (ours, theirs): Figure("multifd", f"1 GiB, idle machine, {ours}", "MiB/s", HOW, None, theirs)
        for ours in ("1 channel", "2 channels")
        for theirs in ("one stream", "raw", *(["qemu"] if bench.qemu else []))
    }
    cpu = {ours: Figure("multifd", f"processor, {ours}", "s/GiB", HOW_CPU, None, "one stream") for ours, _ in figures}
    with random_file(bench.memory, SIZE_BYTES) as content:
        competitors: dict[str, Callable[[], Result]] = {
            "raw": lambda: (SIZE_BYTES / MIB / raw.push(content, SIZE_BYTES, bench.log), 0.0),
            "one stream": partial(_ours, bench, content, 0),
            "1 channel": partial(_ours, bench, content, 1),
            "2 channels": partial(_ours, bench, content, 2),
        }
        if bench.qemu:
            competitors["qemu"] = partial(_qemu, bench, content)
        for result in bench.rounds("multifd", competitors):
            for (ours, theirs), figure in figures.items():
                figure.pair(result[ours][0], result[theirs][0])
            for ours, figure in cpu.items():
                figure.pair(result[ours][1], result["one stream"][1])
    return [*figures.values(), *cpu.values()]


def _ours(bench: Bench, content: Path, channels: int) -> Result:
    config = ""
    if channels:
        config = f"[migration.capabilities]\nmultifd = true\n[migration.parameters]\nmultifd-channels = {channels}"
    with (
        site(bench.directory, "source", SIZE_BYTES, ["--content", content], config=config) as source,
        site(bench.directory, "target", SIZE_BYTES, incoming=True, config=config) as target,
    ):
        warm(SIZE_BYTES)
        before = [cpu_s(side.daemon.pid) for side in (source, target)]
        ms = float(migrate(source, target)["total-time"])
        used = sum(cpu_s(side.daemon.pid) for side in (source, target)) - sum(before)
        return SIZE_BYTES / MIB * 1000 / ms, used * GIB / SIZE_BYTES


def _qemu(bench: Bench, content: Path) -> Result:
    memory = ["-m", str(SIZE_BYTES // MIB)]
    with (
        qemu.qemu(
            bench.directory, "qemu-source", [*qemu.EMPTY, *memory, *qemu.backend_file(content, SIZE_BYTES), "-S"]
        ) as source,
        qemu.qemu(
            bench.directory, "qemu-target", [*qemu.EMPTY, *memory, *qemu.backend_cold(SIZE_BYTES), "-incoming", "defer"]
        ) as target,
    ):
        for side in (source, target):
            on = [{"capability": "multifd", "state": True}]
            side.execute("migrate-set-capabilities", {"capabilities": on})
            side.execute("migrate-set-parameters", {"multifd-channels": 2})
        warm(SIZE_BYTES)
        return SIZE_BYTES / MIB * 1000 / float(qemu.migrate(source, target)["total-time"]), 0.0
