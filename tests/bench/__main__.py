"""``make bench``: side-by-side figures, as a table on the terminal and as JSON in a file, beside the committed ones.

The rule of the file: everything runs on this machine, in processes that end with it. The figures are of this machine in
this hour: ratios travel, absolute numbers do not.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from tests.bench import (
    bulk,
    dirty,
    documents,
    downtime,
    faults,
    handover,
    link,
    machines,
    plots,
    populated,
    postcopy,
    rate,
    service,
    sizes,
    snapshot,
    sweep,
    tls,
    zeros,
)
from tests.bench.board import Board, CaseRecord, decode, encode, machine_class, merge, record
from tests.bench.case import Bench, Case
from tests.bench.comparison import compare, worse
from tests.bench.figures import Figure
from tests.bench.host import describe
from tests.bench.qemu import version
from tests.bench.table import show

CASES: dict[str, Case] = {
    "bulk": bulk.run,
    "populated": populated.run,
    "zeros": zeros.run,
    "link": link.run,
    "tls": tls.run,
    "rate": rate.run,
    "sweep": sweep.run,
    "downtime": downtime.run,
    "handover": handover.run,
    "dirty": dirty.run,
    "sizes": sizes.run,
    "machines": machines.run,
    "service": service.run,
    "postcopy": postcopy.run,
    "faults": faults.run,
    "snapshot": snapshot.run,
}
PAIRS, QUICK_PAIRS = 7, 3
#: A pair of these takes a minute or more, so they are given a third of the pairs.
LONG = frozenset({"sweep", "sizes", "machines", "snapshot", "postcopy"})
LONG_SHARE = 3
#: Of a table in a file.
WIDTH = 200


def main() -> int:
    """Run the cases and report; the exit status says only whether they ran, unless regressions are to count."""
    arguments = _arguments()
    # Whoever ends the benchmark ends what it has started, too.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    committed = _board(arguments.against)
    with (
        tempfile.TemporaryDirectory(prefix="migrated-bench-") as name,
        tempfile.TemporaryDirectory(prefix="migrated-bench-", dir="/dev/shm") as memory,
    ):
        bench = Bench(Path(name), Path(memory), arguments.pairs, version(), _say, arguments.shrink)
        if bench.qemu is None:
            console.print("no qemu-system-x86_64 here: comparisons with QEMU are left out")
        run = _measure(bench, arguments)
    changes = compare(committed, run)
    show(run, changes, console)
    console.print(f"written: {arguments.out}")
    if arguments.keep:
        console.print(
            f"kept: {', '.join(run)}, in docs/bench, its plots, and the tables of README.md and docs/bench.md"
        )
    return 1 if arguments.strict and worse(changes) else 0


def _board(path: Path) -> Board:
    return decode(path.read_bytes()) if path.exists() else Board()


def _measure(bench: Bench, arguments: argparse.Namespace) -> dict[str, CaseRecord]:
    """Run the cases. What one has found is written before the next begins, because that one may fail."""
    run: dict[str, CaseRecord] = {}
    reports = []
    host = describe()
    machine = machine_class(host, bench.qemu)
    for case in arguments.cases or CASES:
        load = os.getloadavg()[0]
        pairs, figures, seconds = _run(bench, case)
        date = time.strftime("%Y-%m-%d", time.gmtime())
        reports += [figure.as_dict() for figure in figures if figure.ours]
        report = {"host": host, "qemu": bench.qemu, "pairs": bench.pairs, "figures": reports}
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")
        if figures:
            run[case] = record(figures, date=date, machine=machine, pairs=pairs, seconds=seconds, load=load)
            if arguments.keep:
                _keep(merge(_board(documents.FIGURES), run, list(CASES)))
    return run


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description="figures of migrated, side by side")
    parser.add_argument("--pairs", type=int, default=PAIRS, help="interleaved pairs per case (default %(default)s)")
    parser.add_argument(
        "--quick",
        dest="pairs",
        action="store_const",
        const=QUICK_PAIRS,
        help=f"--pairs {QUICK_PAIRS}: under half an hour",
    )
    parser.add_argument("--out", type=Path, default=Path("bench-results.json"), help="default %(default)s")
    parser.add_argument(
        "--keep", action="store_true", help="put the cases just run into docs/bench, its plots and README's table"
    )
    parser.add_argument(
        "--strict", action="store_true", help="end with 1 where a ratio is worse than the committed one"
    )
    parser.add_argument("--against", type=Path, default=documents.FIGURES, help="figures to compare with")
    parser.add_argument("--shrink", type=int, default=1, metavar="N", help="divide sizes: to see whether a case runs")
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; default: all")
    arguments = parser.parse_args()
    if unknown := set(arguments.cases) - set(CASES):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    if arguments.keep and arguments.shrink != 1:
        parser.error("--keep is for figures, and with --shrink there are none")
    if arguments.keep and version() is None:
        parser.error("--keep is for whole cases, and without a QEMU half of them is missing")
    return arguments


def _run(bench: Bench, case: str) -> tuple[int, Sequence[Figure], float]:
    """Return how many pairs a case was given, what it found, and how long it took."""
    pairs = -(-bench.pairs // LONG_SHARE) if case in LONG else bench.pairs
    began = time.monotonic()
    figures = CASES[case](dataclasses.replace(bench, pairs=pairs))
    return pairs, figures, time.monotonic() - began


def _keep(board: Board) -> None:
    documents.FIGURES.parent.mkdir(exist_ok=True)
    documents.FIGURES.write_bytes(encode(board))
    documents.write(board)
    plots.draw(board)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
