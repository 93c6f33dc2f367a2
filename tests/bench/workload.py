"""The benchmark's workload: maps one block, may fill it, then sleeps or rewrites a part of it without pause.

The rule of the file: an idle one costs nothing at all while it is measured; a busy one does what the boot-sector guest
does (`tests.bench.boot_sector`): add one to the first byte of each page of the working set, round after round.

Says ``ready`` on stdout; answers a line on stdin with ``rounds N``; ends with stdin.
"""

from __future__ import annotations

import argparse
import sys
import threading

import numpy as np

from migrated.client import MachineMoved, attach
from migrated.kernel.memory import PAGE_SIZE
from tests.bench.host import MIB

#: Pages between two checkpoints; a stop waits for at most one such stretch, about a tenth of a millisecond.
STRETCH_PAGES = 512


class Writer:
    """Rewrites the pages [first, end) of a block."""

    def __init__(self, memory: memoryview, offset: int, size_bytes: int) -> None:
        self._first_bytes = np.frombuffer(memory, np.uint8).reshape(-1, PAGE_SIZE)[
            offset // PAGE_SIZE : (offset + size_bytes) // PAGE_SIZE, 0
        ]
        self.stretches = 0

    @property
    def rounds(self) -> float:
        """How often the whole working set was rewritten."""
        return self.stretches * STRETCH_PAGES / len(self._first_bytes)

    def stretch(self) -> None:
        """Rewrite the next pages."""
        start = self.stretches * STRETCH_PAGES % len(self._first_bytes)
        self._first_bytes[start : start + STRETCH_PAGES] += 1
        self.stretches += 1


def main() -> None:
    """Attach, fill, and do what was asked for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--attach", required=True)
    parser.add_argument("--ram", type=int, required=True)
    parser.add_argument("--content", help="file to fill the block with; absent: it is never touched")
    parser.add_argument("--rewrite", type=int, default=0, help="bytes of the working set; 0: sleep")
    parser.add_argument("--at", type=int, default=16 * MIB, help="offset of the working set")
    arguments = parser.parse_args()
    with attach(arguments.attach, name="bench") as machine:
        memory = machine.ram("mem0", arguments.ram)
        if arguments.content:
            with open(arguments.content, "rb", buffering=0) as file:
                filled = 0
                while filled < arguments.ram and (count := file.readinto(memory[filled : filled + 4 * MIB])):
                    filled += count
        writer = Writer(memory, arguments.at, arguments.rewrite) if arguments.rewrite else None
        machine.ready()
        print("ready", flush=True)
        if writer is not None:

            def write(busy: Writer = writer) -> None:
                try:
                    machine.wait_running()
                    while True:
                        machine.checkpoint()
                        busy.stretch()
                except MachineMoved:
                    return

            threading.Thread(target=write, daemon=True).start()
        for _ in sys.stdin:
            print("rounds", 0 if writer is None else writer.rounds, flush=True)


if __name__ == "__main__":
    main()
