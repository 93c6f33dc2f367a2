"""The demo's workload: it walks its memory for ever, adding one to the first byte of each page.

The rule of the file: it is an ordinary client of `migrated.client`, with an oracle. After any stop, pages before the
cursor are exactly one ahead of those behind it (the neighbour-page invariant of QEMU's own migration tests), and the
rest of each page is random content that never changes. So the whole memory follows from the number of steps, and the
hash of the memory *as it was when the machine stopped* can be computed later, by walking back: the check costs no
downtime. Each step also compares the byte it reads with what it must be, so that a page that arrives late, twice or not
at all in postcopy is seen by the reader that it arrives for.

Talks JSON lines: events on stdout, the one command ``check`` on stdin. Run: ``python -m migrated.demo.walker``.
"""

from __future__ import annotations

import argparse
import json
import queue
import sys
import threading
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_128_hexdigest

from migrated.client import Machine, MachineMoved, attach

PAGE = 4096
#: Pages between two checkpoints; a stop waits for at most one such stretch.
STRETCH_PAGES = 64


class Walker:
    """One walk over one block, and what it takes to prove that nothing was lost."""

    def __init__(self, machine: Machine, ram_bytes: int, seed: int, *, huge_pages: bool = False) -> None:
        self._machine = machine
        self._memory = machine.ram("heap", ram_bytes, huge_pages=huge_pages)
        self._pages = ram_bytes // PAGE
        self._seed = seed
        self.steps = 0
        self._wrong = 0
        self._fresh = True
        self._arrived_at: int | None = None
        self._commands: queue.SimpleQueue[str] = queue.SimpleQueue()
        machine.device("counter", save=self._save, load=self._load, version_id=1)

    def _fill(self) -> None:
        """Write the random content; its first bytes are all zero."""
        self._fresh = False
        generator = np.random.default_rng(self._seed)
        pages = self._as_pages()
        for start in range(0, self._pages, 4096):
            part = pages[start : start + 4096]
            part[:] = generator.integers(0, 256, size=part.shape, dtype=np.uint8)
            part[:, 0] = 0

    def run(self) -> None:
        """Walk until the end of stdin."""
        threading.Thread(target=self._listen, daemon=True).start()
        while True:
            try:
                self._machine.wait_running()
                if self._fresh:
                    self._fill()
                tell("running", steps=self.steps)
                self._walk()
            except MachineMoved as moved:
                tell("moved", to=str(moved), steps=self.steps, **self._verdict(self.steps))
                self._machine.standby()
            else:
                return

    def _walk(self) -> None:
        memory, pages = self._memory, self._pages
        while True:
            self._machine.checkpoint()
            if not self._commands.empty():
                if self._commands.get() == "quit":
                    return
                at = self.steps if self._arrived_at is None else self._arrived_at
                tell("checked", steps=self.steps, at=at, **self._verdict(at))
            # After a checkpoint the counter may be another one: the machine may have moved here meanwhile.
            start = self.steps % pages
            end = min(start + STRETCH_PAGES, pages)
            before = (self.steps // pages) & 0xFF
            for offset in range(start * PAGE, end * PAGE, PAGE):
                found = memory[offset]
                self._wrong += found != before
                memory[offset] = (found + 1) & 0xFF  # a wrong one stays wrong
            self.steps += end - start

    def _verdict(self, at: int) -> dict[str, object]:
        """Check the invariant now, and hash the memory as it was after ``at`` steps."""
        pages = self._as_pages()
        first = self._expected(self.steps)
        content = pages.copy()
        content[:, 0] -= first - self._expected(at)
        digest = xxh3_128_hexdigest(content.data)
        return {"invariant": not self._wrong and bool((pages[:, 0] == first).all()), "hash": digest}

    def _expected(self, steps: int) -> NDArray[np.uint8]:
        rounds, cursor = divmod(steps, self._pages)
        expected = np.full(self._pages, rounds & 0xFF, np.uint8)
        expected[:cursor] += np.uint8(1)
        return expected

    def _as_pages(self) -> NDArray[np.uint8]:
        return np.frombuffer(self._memory, np.uint8).reshape(-1, PAGE)

    def _save(self) -> bytes:
        return self.steps.to_bytes(8, "big")

    def _load(self, state: bytes, version_id: int) -> None:
        self.steps = self._arrived_at = int.from_bytes(state, "big")
        self._fresh = False

    def _listen(self) -> None:
        for line in sys.stdin:
            self._commands.put(line.strip())
        self._commands.put("quit")


def tell(event: str, **fields: Any) -> None:
    """Write one event."""
    print(json.dumps({"event": event, "time": time.time(), **fields}), flush=True)


def main() -> None:
    """Attach, fill the memory, walk."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--attach", required=True, help="path of the daemon's attach socket")
    parser.add_argument("--ram", type=int, required=True, help="bytes of memory")
    parser.add_argument("--huge-pages", action="store_true", help="in pages of 2 MiB (vm.nr_hugepages)")
    parser.add_argument("--seed", type=int, default=1, help="seed of the random content")
    parser.add_argument("--pause", choices=("cooperative", "signal"), default="cooperative")
    parser.add_argument("--name", default="walker")
    arguments = parser.parse_args()
    with attach(arguments.attach, name=arguments.name) as machine:
        walker = Walker(machine, arguments.ram, arguments.seed, huge_pages=arguments.huge_pages)
        machine.ready()
        tell("ready", tracked=machine.tracked)
        walker.run()


if __name__ == "__main__":
    main()
