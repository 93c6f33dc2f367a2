"""What the daemon costs beside moving bytes: control latency, memory, wakeups when idle.

The rule of the file: latencies are taken by a client in a process of its own, at a fixed pace, while 2 GiB move at full
speed; memory is the daemon's own (anonymous and file pages), without the shared RAM that it maps.

Run as ``python -m tests.bench.service SOCKET``: asks until stdin ends, then prints ``latencies MS...``.
"""

from __future__ import annotations

import statistics
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from migrated.control.client import QmpClient
from tests.bench.case import Bench
from tests.bench.figures import Figure, Target
from tests.bench.host import (
    GIB,
    MIB,
    SAMPLE_EVERY_S,
    own_memory_bytes,
    random_file,
    voluntary_switches,
    warm,
    watching,
)
from tests.bench.processes import expect, module, running
from tests.bench.site import Site, migrate, site

SIZE_BYTES = 2 * GIB
#: Two hundred questions a second: many samples, few enough not to be the load themselves.
ASK_EVERY_S = 0.005
IDLE_S = 10.0


def run(bench: Bench) -> list[Figure]:
    """Measure ``pairs`` migrations and one idle daemon."""
    figures = _migrations(bench)
    idle = Figure(
        "service", f"idle daemon, wakeups in {IDLE_S:g} s", "wakeups",
        "voluntary context switches of all threads, a workload attached and asleep, no watchdog configured",
        Target("<=", 0.0),
    )  # fmt: skip
    with site(bench.directory, "idle", 16 * MIB) as quiet:
        # The last answer was given just now; whatever that set off is over after the first look.
        before = _settled_switches(quiet)
        time.sleep(IDLE_S)
        idle.ours.append(voluntary_switches(quiet.daemon.pid) - before)
    return [*figures, idle]


def _settled_switches(quiet: Site) -> int:
    time.sleep(1.0)
    return voluntary_switches(quiet.daemon.pid)


def _migrations(bench: Bench) -> list[Figure]:
    how = f"query-migrate every {ASK_EVERY_S * 1000:g} ms during a full-speed migration, by another process"
    latency = {
        side: Figure("service", f"control p99, {side}", "ms", how, Target("<=", 10.0)) for side in ("source", "target")
    }
    how = (
        f"highest of the daemon's own resident memory (RssAnon + RssFile), looked at every {SAMPLE_EVERY_S * 1000:g} ms"
    )
    memory = {
        side: Figure("service", f"memory beyond the RAM, {side}", "MiB", how, Target("<=", 80.0))
        for side in ("source", "target")
    }
    with random_file(bench.memory, SIZE_BYTES) as content:
        for number in range(bench.pairs):
            with (
                site(bench.directory, "source", SIZE_BYTES, ["--content", content]) as source,
                site(bench.directory, "target", SIZE_BYTES, incoming=True) as target,
            ):
                warm(SIZE_BYTES)
                pids = {"source": source.daemon.pid, "target": target.daemon.pid}
                with (
                    _asking(bench, source) as at_source,
                    _asking(bench, target) as at_target,
                    watching(own_memory_bytes, pids) as most,
                ):
                    migrate(source, target)
                for side, latencies in (("source", at_source), ("target", at_target)):
                    latency[side].ours.append(statistics.quantiles(latencies, n=100)[98])
                    latency[side].details.setdefault("p50_ms", []).append(statistics.median(latencies))
                    latency[side].details.setdefault("max_ms", []).append(max(latencies))
                    memory[side].ours.append(most[side] / MIB)
            worst = max(figure.ours[-1] for figure in latency.values())
            bench.say(f"service: migration {number + 1} of {bench.pairs}: control p99 {worst:.1f} ms")
    return [*latency.values(), *memory.values()]


@contextmanager
def _asking(bench: Bench, side: Site) -> Iterator[list[float]]:
    """Take latencies in the block; the list is filled when it ends."""
    latencies: list[float] = []
    with running(module("tests.bench.service", side.socket), log=bench.log) as client:
        expect(client, "asking", bench.log)
        yield latencies
        assert client.stdin is not None
        client.stdin.close()
        latencies += map(float, expect(client, "latencies", bench.log))


def _ask(socket: str) -> None:
    latencies: list[float] = []
    ended = threading.Event()

    def wait_for_end() -> None:
        sys.stdin.read()
        ended.set()

    threading.Thread(target=wait_for_end, daemon=True).start()
    with QmpClient(socket) as qmp:
        print("asking", flush=True)
        while not ended.wait(ASK_EVERY_S):
            asked = time.monotonic()
            qmp.execute("query-migrate")
            latencies.append((time.monotonic() - asked) * 1000)
    print("latencies", *latencies, flush=True)


if __name__ == "__main__":
    _ask(sys.argv[1])
