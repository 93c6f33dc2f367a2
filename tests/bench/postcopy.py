"""Postcopy: how long the machine stands still, how long a missing page takes, and how long all of it takes.

The rule of the file: what both can do is measured of both in the same run. Downtime is the time between the events STOP
of the source and RESUME of the destination, with the time stamps that each side puts on them. Fault latency is what a
C program at the destination sees: touch to go on; its yardstick is a request of 12 bytes and an answer of a page over
blocking loopback sockets.
"""

from __future__ import annotations

import socket
import statistics
import time
from pathlib import Path
from typing import Any

from migrated.control.client import QmpClient
from migrated.kernel.memory import PAGE_SIZE
from tests.bench import qemu
from tests.bench.boot_sector import write_floppy
from tests.bench.case import Bench
from tests.bench.downtime import LOW_MEMORY_BYTES, wait_walking
from tests.bench.figures import Figure, Target
from tests.bench.host import GIB, MIB, random_file, warm
from tests.bench.processes import DEADLINE_S, BenchError, expect, module, running
from tests.bench.site import Site, migrate, site
from tests.support.pager import PagerSite, compile_pager, pager_site

ON = [{"capability": name, "state": True} for name in ("postcopy-ram", "events")]
PREEMPT = [*ON, {"capability": "postcopy-preempt", "state": True}]
#: Nothing comes by itself at this rate.
STANDSTILL_BPS = 1
TOUCHES = 500
#: A touch of a page that is here, page tables included.
HERE_US = 10
#: QEMU's own figure for a working set that no precopy can follow.
LOOP_BYTES = 900 * MIB


def run(bench: Bench) -> list[Figure]:
    """Measure everything."""
    return [*_downtimes(bench), *_latencies(bench), *_background(bench), *_looping(bench)]


# -- downtime --------------------------------------------------------------------------------------------------


def _downtimes(bench: Bench) -> list[Figure]:
    figures = []
    for size in (GIB, 4 * GIB):
        how = "STOP at the source to RESUME at the destination; no precopy pass; 64 MiB rewritten without pause"
        target = Target("<=", 1.0) if bench.qemu else None
        name = f"downtime, at once, {size // GIB} GiB"
        figure = Figure("postcopy", name, "ms", how, target, "qemu" if bench.qemu else "")
        with random_file(bench.memory, size, zero_bytes=LOW_MEMORY_BYTES) as content:
            competitors = {"migrated": lambda c=content, s=size: _ours(bench, c, s, 64 * MIB)["downtime_ms"]}
            if bench.qemu:
                competitors["qemu"] = lambda c=content, s=size: _theirs(bench, c, s, 64 * MIB)["downtime_ms"]
            for result in bench.rounds(name, competitors):
                figure.ours.append(result["migrated"])
                if bench.qemu:
                    figure.theirs.append(result["qemu"])
        figures.append(figure)
    return figures


def _ours(bench: Bench, content: Path, size: int, working_set: int) -> dict[str, Any]:
    options = ["--content", content, "--rewrite", working_set]
    with (
        site(bench.directory, "source", size, options) as source,
        site(bench.directory, "target", size, ["--rewrite", working_set], incoming=True) as target,
    ):
        for side in (source, target):
            side.qmp.execute("migrate-set-capabilities", {"capabilities": ON})
        warm(size)
        source.qmp.execute("migrate", {"uri": target.address})
        source.qmp.execute("migrate-start-postcopy")
        figures = qemu.follow(source.qmp)
        return {
            "downtime_ms": _between(source.qmp, target.qmp),
            "total_ms": float(figures["total-time"]),
            "parts_ms": figures["x-migrated-downtime"],
        }


def _theirs(bench: Bench, content: Path, size: int, working_set: int) -> dict[str, Any]:
    floppy = bench.directory / "walk.img"
    write_floppy(floppy, working_set)
    guest = bench.memory / "guest"
    common = ["-M", "pc,memory-backend=mem0", "-m", str(size // MIB)]
    common += ["-drive", f"if=floppy,file={floppy},format=raw,readonly=on", "-boot", "a"]
    try:
        guest.write_bytes(content.read_bytes())
        with (
            qemu.qemu(bench.directory, "qemu-source", [*common, *qemu.backend_file(guest, size)]) as source,
            qemu.qemu(
                bench.directory, "qemu-target", [*common, *qemu.backend_cold(size), "-incoming", "defer"]
            ) as target,
        ):
            wait_walking(source)
            for side in (source, target):
                side.execute("migrate-set-capabilities", {"capabilities": ON})
            warm(size)
            source.execute("migrate-set-parameters", {"max-bandwidth": qemu.UNLIMITED_BPS})
            target.execute("migrate-incoming", {"uri": "tcp:127.0.0.1:0"})
            address = target.execute("query-migrate")["socket-address"][0]
            source.execute("migrate", {"uri": f"tcp:127.0.0.1:{address['port']}"})
            source.execute("migrate-start-postcopy")
            figures = qemu.follow(source)
            return {"downtime_ms": _between(source, target), "total_ms": float(figures["total-time"])}
    finally:
        guest.unlink(missing_ok=True)


def _between(source: QmpClient, target: QmpClient) -> float:
    return (_when(target, "RESUME") - _when(source, "STOP")) * 1000


def _when(side: QmpClient, name: str) -> float:
    while (event := side.next_event(DEADLINE_S)) is not None:
        if event["event"] == name:
            stamp = event["timestamp"]
            return float(stamp["seconds"]) + float(stamp["microseconds"]) / 1e6
    raise BenchError(f"no event {name}")


# -- latency ---------------------------------------------------------------------------------------------------


def _latencies(bench: Bench) -> list[Figure]:
    how = "touch of a missing page until the thread goes on, in a C program; nothing comes by itself"
    quiet = Figure("postcopy", "remote fault, quiet, p50", "us", how, Target("<=", 1.5), "raw echo")
    how = "the same while everything comes by itself, on a connection of its own (postcopy-preempt)"
    busy = Figure("postcopy", "remote fault, busy, p50", "us", how, Target("<=", 2.0), "quiet")
    busy.details["p99_us"] = []
    program = compile_pager(bench.directory)
    competitors = {
        "raw": lambda: [_echo(bench.log)] * 2,
        "quiet": lambda: _touches(bench, program, 64 * MIB, STANDSTILL_BPS),
        "busy": lambda: _touches(bench, program, GIB, 0),
    }
    for result in bench.rounds("fault latency", competitors):
        quiet.pair(result["quiet"][0], result["raw"][0])
        busy.pair(result["busy"][0], result["quiet"][0])
        busy.details["p99_us"].append(result["busy"][1])
    return [quiet, busy]


def _touches(bench: Bench, program: Path, size: int, background_bps: int) -> list[float]:
    directory = bench.directory / f"pager-{time.monotonic_ns()}"
    directory.mkdir()
    options: dict[str, Any] = {"ram_bytes": size, "walkers": 1, "readers": 0, "rate": 1}
    with (
        pager_site(program, "A", directory, **options) as a,
        pager_site(program, "B", directory, twin=True, **options) as b,
    ):
        a.run()
        for side in (a, b):
            side.qmp.execute("migrate-set-capabilities", {"capabilities": PREEMPT})
        warm(size)
        a.qmp.execute("migrate-set-parameters", {"max-postcopy-bandwidth": background_bps})
        a.qmp.execute("migrate", {"uri": b.address})
        a.qmp.execute("migrate-start-postcopy")
        b.wait_event("running")
        latencies = _remote(b)
        a.qmp.execute("migrate-set-parameters", {"max-postcopy-bandwidth": 0})
        qemu.follow(a.qmp)
        return latencies


def _remote(b: PagerSite) -> list[float]:
    """Touch pages; return p50 and p99 of the touches that had to wait: what was there already takes no time."""
    waited = sorted(us for us in b.touch(TOUCHES)["us"] if us > HERE_US)
    return [statistics.median(waited), waited[-(len(waited) // 100 + 1)]]


def _echo(log: Path) -> float:
    """Return the median round trip of a request and a page over blocking sockets, in microseconds."""
    with running(module("tests.bench.echo"), log=log) as answerer:
        (port,) = expect(answerer, "port", log)
        latencies = []
        with socket.create_connection(("127.0.0.1", int(port))) as sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            page = memoryview(bytearray(PAGE_SIZE))
            for _ in range(2 * TOUCHES):
                begun = time.perf_counter()
                sock.sendall(bytes(12))
                got = 0
                while got < len(page):
                    got += sock.recv_into(page[got:])
                latencies.append((time.perf_counter() - begun) * 1e6)
    return statistics.median(latencies)


# -- throughput ------------------------------------------------------------------------------------------------


def _background(bench: Bench) -> list[Figure]:
    how = "RAM bytes / total time, 1 GiB, idle machine, postcopy at once against precopy"
    figure = Figure("postcopy", "background throughput", "MiB/s", how, Target(">=", 0.6), "precopy")
    with random_file(bench.memory, GIB) as content:
        competitors = {
            "postcopy": lambda: _idle(bench, content, postcopy=True),
            "precopy": lambda: _idle(bench, content, postcopy=False),
        }
        for result in bench.rounds("background", competitors):
            figure.pair(result["postcopy"], result["precopy"])
    return [figure]


def _idle(bench: Bench, content: Path, *, postcopy: bool) -> float:
    with (
        site(bench.directory, "source", GIB, ["--content", content]) as source,
        site(bench.directory, "target", GIB, incoming=True) as target,
    ):
        warm(GIB)
        figures = _by_postcopy(source, target) if postcopy else migrate(source, target)
        return GIB / MIB * 1000 / float(figures["total-time"])


def _by_postcopy(source: Site, target: Site) -> dict[str, Any]:
    for side in (source, target):
        side.qmp.execute("migrate-set-capabilities", {"capabilities": ON})
    source.qmp.execute("migrate", {"uri": target.address})
    source.qmp.execute("migrate-start-postcopy")
    return qemu.follow(source.qmp)


def _looping(bench: Bench) -> list[Figure]:
    if not bench.qemu:
        return []
    how = "total-time, 1 GiB of which 900 MiB are rewritten without pause, postcopy at once at both"
    figure = Figure("postcopy", "900 MiB rewritten, total", "ms", how, Target("<=", 1.3), "qemu")
    with random_file(bench.memory, GIB, zero_bytes=LOW_MEMORY_BYTES) as content:
        competitors = {
            "migrated": lambda: _ours(bench, content, GIB, LOOP_BYTES)["total_ms"],
            "qemu": lambda: _theirs(bench, content, GIB, LOOP_BYTES)["total_ms"],
        }
        for result in bench.rounds("900 MiB", competitors):
            figure.pair(result["migrated"], result["qemu"])
    return [figure]
