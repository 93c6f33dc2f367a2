"""``make bench``: side-by-side figures, as a table on the terminal and as JSON in a file.

The rule of the file: everything runs on this machine, over loopback, in processes that end with it. The figures are of
this machine in this hour: ratios travel, absolute numbers do not.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from tests.bench import (
    dirty,
    downtime,
    faults,
    handover,
    multifd,
    postcopy,
    service,
    snapshot,
    throughput,
    tls,
    untouched,
)
from tests.bench.case import Bench, Case
from tests.bench.figures import Figure, show
from tests.bench.host import describe
from tests.bench.qemu import version

CASES: dict[str, Case] = {
    "bulk": throughput.run,
    "multifd": multifd.run,
    "untouched": untouched.run,
    "downtime": downtime.run,
    "handover": handover.run,
    "dirty": dirty.run,
    "service": service.run,
    "postcopy": postcopy.run,
    "faults": faults.run,
    "snapshot": snapshot.run,
    "tls": tls.run,
}
PAIRS = 7


def main() -> int:
    """Run the cases and report; the exit status says only whether they ran."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description="figures of migrated, side by side")
    parser.add_argument("--pairs", type=int, default=PAIRS, help="interleaved pairs per case (default %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("bench-results.json"), help="default %(default)s")
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; default: all")
    arguments = parser.parse_args()
    if unknown := set(arguments.cases) - set(CASES):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    console = Console()
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory(prefix="migrated-bench-") as name:
        memory = Path("/dev/shm")
        bench = Bench(
            Path(name), memory, arguments.pairs, version(), lambda text: print(text, file=sys.stderr, flush=True)
        )
        if bench.qemu is None:
            console.print("no qemu-system-x86_64 here: comparisons with QEMU are left out")
        for case in arguments.cases or CASES:
            figures += CASES[case](bench)
            _write(arguments.out, bench, figures)
    show(figures, console)
    console.print(f"written: {arguments.out}")
    return 0


def _write(out: Path, bench: Bench, figures: list[Figure]) -> None:
    report = {
        "host": describe(),
        "qemu": bench.qemu,
        "pairs": bench.pairs,
        "figures": [figure.as_dict() for figure in figures],
    }
    out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
