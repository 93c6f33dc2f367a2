"""Fault latency in postcopy: touch of a missing page until the thread goes on, quiet and while everything else comes.

The rule of the file: who touches measures, in C at our destination and in the guest at a QEMU's: as many random pages,
one after the other, from the moment the machine runs there. A touch that takes no time found its page and does not
count. Yardsticks are a question and a page over blocking loopback sockets (in Python and in C), the same with a fault
around it (fault_chain.c), and a QEMU 7.2 with postcopy-preempt.
"""

from __future__ import annotations

import socket
import statistics
import subprocess
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from migrated.kernel.memory import PAGE_SIZE
from tests.bench import qemu
from tests.bench.case import Bench
from tests.bench.downtime import LOW_MEMORY_BYTES
from tests.bench.figures import Figure, Target
from tests.bench.host import GIB, MIB, random_file, warm
from tests.bench.processes import expect, module, running
from tests.bench.touch_guest import SerialPort, write_touch_floppy
from tests.support.compiler import NEEDS, compile_c, has_compiler
from tests.support.pager import compile_pager, pager_site

PREEMPT = [{"capability": name, "state": True} for name in ("postcopy-ram", "events", "postcopy-preempt")]
#: Nothing comes by itself at this rate.
STANDSTILL_BPS = 1
TOUCHES = 500
#: A touch of a page that is here, page tables included.
HERE_US = 10
QUIET_BYTES, BUSY_BYTES = 64 * MIB, GIB
CHAIN = Path(__file__).with_name("fault_chain.c")


@dataclass(frozen=True, slots=True)
class Waits:
    """What those touches took that had to wait."""

    p50_us: float
    p99_us: float
    count: int
    ticks_per_us: float | None = None
    """Of the clock they were measured with, where that was a guest's."""

    @classmethod
    def of(cls, touches_us: Sequence[float], here_us: float = HERE_US, *, ticks_per_us: float | None = None) -> Waits:
        """Leave out what found its page."""
        waited = sorted(us for us in touches_us if us > here_us)
        return cls(statistics.median(waited), waited[-(len(waited) // 100 + 1)], len(waited), ticks_per_us)


def run(bench: Bench) -> list[Figure]:
    """Measure everybody in turn."""
    if not has_compiler():
        bench.say(f"faults: left out, {NEEDS}")
        return []
    pager = compile_pager(bench.directory)
    chain = compile_c(bench.directory / "fault_chain", [CHAIN])
    with random_file(bench.memory, BUSY_BYTES, zero_bytes=LOW_MEMORY_BYTES) as content:
        competitors = {
            "raw echo": lambda: _python_echo(bench.log),
            "C echo": lambda: _in_c(chain, "echo"),
            "C chain": lambda: _in_c(chain, "chain"),
            "quiet": lambda: _ours(bench, pager, QUIET_BYTES, STANDSTILL_BPS),
            "busy": lambda: _ours(bench, pager, BUSY_BYTES, 0),
        }
        if bench.qemu:
            floppy = write_touch_floppy(bench.directory, BUSY_BYTES, TOUCHES)
            competitors["qemu"] = lambda: _qemu(bench, content, floppy)
        results = list(bench.rounds("faults", competitors))
    return [*_quiet(results), *_busy(results, with_qemu=bench.qemu is not None)]


def _quiet(results: Sequence[dict[str, Waits]]) -> list[Figure]:
    name, how = "remote fault, quiet, p50", "touch until the thread goes on, in a C program; nothing comes by itself"
    chain = "the same chain of wake-ups, and nothing else, in C: what a fault costs at least"
    figures = [
        (Figure("faults", name, "us", how, Target("<=", 1.5), "raw echo"), "quiet"),
        (Figure("faults", name, "us", how, None, "C chain"), "quiet"),
        (Figure("faults", "fault in C, p50", "us", chain, None, "raw echo", who="C chain"), "C chain"),
        (Figure("faults", "fault in C, p50", "us", chain, None, "C echo", who="C chain"), "C chain"),
    ]
    for figure, ours in figures:
        for result in results:
            figure.pair(result[ours].p50_us, result[figure.against].p50_us)
        figure.details["p99_us"] = [result[ours].p99_us for result in results]
        figure.details["against_p99_us"] = [result[figure.against].p99_us for result in results]
    return [figure for figure, _ in figures]


def _busy(results: Sequence[dict[str, Waits]], *, with_qemu: bool) -> list[Figure]:
    how = "the same while everything comes by itself, on a connection of its own (postcopy-preempt)"
    p50 = Figure("faults", "remote fault, busy, p50", "us", how, Target("<=", 2.0), "quiet")
    for result in results:
        p50.pair(result["busy"].p50_us, result["quiet"].p50_us)
    if not with_qemu:
        p50.details["p99_us"] = [result["busy"].p99_us for result in results]
        return [p50]
    how += "; at a QEMU: by the clock of its guest"
    p99 = Figure("faults", "remote fault, busy, p99", "us", how, Target("<=", 1.0), "qemu")
    beside = Figure("faults", "remote fault, busy, p50", "us", how, None, "qemu")
    for result in results:
        p99.pair(result["busy"].p99_us, result["qemu"].p99_us)
        beside.pair(result["busy"].p50_us, result["qemu"].p50_us)
    p99.details["waits"] = [result["busy"].count for result in results]
    p99.details["qemu_waits"] = [result["qemu"].count for result in results]
    p99.details["qemu_ticks_per_us"] = [result["qemu"].ticks_per_us for result in results]
    return [p50, p99, beside]


# -- who touches ---------------------------------------------------------------------------------------------------


def _ours(bench: Bench, program: Path, size: int, background_bps: int) -> Waits:
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
        waits = Waits.of(b.touch(TOUCHES)["us"])
        a.qmp.execute("migrate-set-parameters", {"max-postcopy-bandwidth": 0})
        qemu.follow(a.qmp)
        return waits


def _qemu(bench: Bench, content: Path, floppy: Path) -> Waits:
    with (
        qemu.guests(bench.directory, content, BUSY_BYTES, floppy, serial=True) as (source, target),
        closing(SerialPort(qemu.serial_socket(bench.directory, qemu.SOURCE))) as at_source,
        closing(SerialPort(qemu.serial_socket(bench.directory, qemu.TARGET))) as at_target,
    ):
        source.execute("cont")
        ticks_per_us = at_source.calibration()
        warm(BUSY_BYTES)
        qemu.start_postcopy(source, target, PREEMPT)
        qemu.wait_event(target, "RESUME")
        touches = at_target.touch(TOUCHES)
        qemu.follow(source)
    return Waits.of([ticks / ticks_per_us for ticks in touches], ticks_per_us=ticks_per_us)


# -- yardsticks ----------------------------------------------------------------------------------------------------


def _in_c(program: Path, what: str) -> Waits:
    command = [str(program), what, str(TOUCHES), str(QUIET_BYTES // PAGE_SIZE)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return Waits.of([float(line) for line in done.stdout.split()], here_us=0)


def _python_echo(log: Path) -> Waits:
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
    return Waits.of(latencies, here_us=0)
