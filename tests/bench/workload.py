"""The benchmark's workload: maps one block, may fill it, then sleeps or rewrites a part of it, at a rate or flat out.

The rule of the file: an idle one costs nothing at all while it is measured; a busy one does what the boot-sector guest
does (`tests.bench.boot_sector`): add one to the first byte of each page of the working set, round after round.

Says ``ready`` on stdout; answers a line on stdin with ``rounds N``; ends with stdin.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time

import numpy as np

from migrated.client import MachineMoved, attach
from migrated.kernel.memory import PAGE_SIZE
from tests.bench.host import MIB

#: Pages between two checkpoints; a stop waits for at most one such stretch, about a tenth of a millisecond.
STRETCH_PAGES = 512
TICK_S, CATCH_UP_S = 0.001, 0.1


class Writer:
    """Rewrites the pages [first, end) of a block."""

    def __init__(self, memory: memoryview, offset: int, size_bytes: int, pages: int = STRETCH_PAGES) -> None:
        self._first_bytes = np.frombuffer(memory, np.uint8).reshape(-1, PAGE_SIZE)[
            offset // PAGE_SIZE : (offset + size_bytes) // PAGE_SIZE, 0
        ]
        self._pages = pages
        self.stretches = 0

    @property
    def rounds(self) -> float:
        """How often the whole working set was rewritten."""
        return self.stretches * self._pages / len(self._first_bytes)

    def stretch(self) -> None:
        """Rewrite the next pages."""
        start = self.stretches * self._pages % len(self._first_bytes)
        self._first_bytes[start : start + self._pages] += 1
        self.stretches += 1


class Pace:
    """Lets a writer go on once a millisecond; what it was kept from is made up for, up to a tenth of a second."""

    def __init__(self) -> None:
        self._due_s = time.monotonic()

    def wait(self) -> None:
        """Wait for the next millisecond."""
        self._due_s = max(self._due_s + TICK_S, time.monotonic() - CATCH_UP_S)
        if (left_s := self._due_s - time.monotonic()) > 0:
            time.sleep(left_s)


def main() -> None:
    """Attach, fill, and do what was asked for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--attach", required=True)
    parser.add_argument("--ram", type=int, required=True)
    parser.add_argument("--content", help="file to fill the block with, over and over; absent: it is never touched")
    parser.add_argument("--populate", action="store_true", help="have all pages there, as zeros")
    parser.add_argument("--rewrite", type=int, default=0, help="bytes of the working set; 0: sleep")
    parser.add_argument("--pace", type=int, default=0, help="pages rewritten each millisecond; 0: without pause")
    parser.add_argument("--at", type=int, default=16 * MIB, help="offset of the working set")
    arguments = parser.parse_args()
    with attach(arguments.attach, name="bench") as machine:
        memory = machine.ram("mem0", arguments.ram)
        if arguments.content:
            with open(arguments.content, "rb", buffering=0) as file:
                filled = 0
                while filled < arguments.ram:
                    if not (count := file.readinto(memory[filled : filled + 4 * MIB])):
                        file.seek(0)
                    filled += count
        elif arguments.populate:
            for start in range(0, arguments.ram, 4 * MIB):
                memory[start : start + 4 * MIB] = bytes(min(4 * MIB, arguments.ram - start))
        pages = arguments.pace or STRETCH_PAGES
        writer = Writer(memory, arguments.at, arguments.rewrite, pages) if arguments.rewrite else None
        pace = Pace() if arguments.pace else None
        machine.ready()
        print("ready", flush=True)
        if writer is not None:

            def write(busy: Writer = writer) -> None:
                try:
                    machine.wait_running()
                    while True:
                        machine.checkpoint()
                        busy.stretch()
                        if pace is not None:
                            pace.wait()
                except MachineMoved:
                    return

            threading.Thread(target=write, daemon=True).start()
        for _ in sys.stdin:
            print("rounds", 0 if writer is None else writer.rounds, flush=True)


if __name__ == "__main__":
    main()
