"""1, 2, 4, 8 and 16 machines of 64 MiB that move at once, a daemon for each at either end, beside as many QEMUs.

The rule of the file: all are ready before the first is told to go; the time is from the first order until the last one
is there, by its own word.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from migrated.control.client import QmpClient
from tests.bench import qemu
from tests.bench.case import Bench
from tests.bench.figures import Figure, Point, Target
from tests.bench.host import MIB, repeated_file, warm
from tests.bench.site import Site, site

COUNTS = (1, 2, 4, 8, 16)
RAM_BYTES = 64 * MIB
#: Starting costs processors, and there are few.
STARTED_AT_ONCE = 4
EVENTS = [{"capability": "events", "state": True}]
HOW = "from the first `migrate` until the event of every source that says completed"


def run(bench: Bench) -> list[Figure]:
    """Measure each number of machines."""
    size = bench.size(RAM_BYTES)
    figures = []
    with repeated_file(bench.memory, size) as content:
        for count in COUNTS:
            target, against = (Target("<=", 1.0), "qemu") if bench.qemu else (None, "")
            name = f"{count} x {size // MIB} MiB at once"
            figure = Figure("machines", name, "ms", HOW, target, against, point=Point("machines", count))
            competitors = {"migrated": partial(_all, bench, partial(_ours, bench, content, size), count, size)}
            if bench.qemu:
                competitors["qemu"] = partial(_all, bench, partial(_theirs, bench, content, size), count, size)
            for result in bench.rounds(name, competitors):
                figure.ours.append(result["migrated"])
                figure.theirs += [result["qemu"]] if bench.qemu else []
            figures.append(figure)
    return figures


#: A source that is ready, and where to.
Ready = tuple[QmpClient, str]


def _all(bench: Bench, machine: Callable[[ExitStack, int], Ready], count: int, size: int) -> float:
    with _stacks(count) as stacks:
        with ThreadPoolExecutor(STARTED_AT_ONCE) as threads:
            ready = list(threads.map(machine, stacks, range(count)))
        for source, _ in ready:
            source.execute("migrate-set-capabilities", {"capabilities": EVENTS})
        warm(count * size)
        began = time.monotonic()
        for source, uri in ready:
            source.execute("migrate", {"uri": uri})
        for source, _ in ready:
            _wait(source)
        return (time.monotonic() - began) * 1000


@contextmanager
def _stacks(count: int) -> Iterator[Sequence[ExitStack]]:
    with ExitStack() as all_of_them:
        yield [all_of_them.enter_context(ExitStack()) for _ in range(count)]


def _wait(source: QmpClient) -> None:
    while (status := qemu.wait_event(source, "MIGRATION")["data"]["status"]) != "completed":
        if status == "failed":
            qemu.follow(source)


def _ours(bench: Bench, content: Path, size: int, stack: ExitStack, number: int) -> Ready:
    def enter(name: str, *options: object, incoming: bool) -> Site:
        return stack.enter_context(site(bench.directory, f"{name}{number}", size, options, incoming=incoming))

    source, target = enter("s", "--content", content, incoming=False), enter("t", incoming=True)
    return source.qmp, target.address


def _theirs(bench: Bench, content: Path, size: int, stack: ExitStack, number: int) -> Ready:
    common = [*qemu.EMPTY, "-m", str(size // MIB)]
    here = qemu.backend_file(content, size)
    there = [*qemu.backend_cold(size), "-incoming", "defer"]
    source = stack.enter_context(qemu.qemu(bench.directory, f"s{number}", [*common, *here, "-S"]))
    target = stack.enter_context(qemu.qemu(bench.directory, f"t{number}", [*common, *there]))
    return source, qemu.prepare(source, target)
