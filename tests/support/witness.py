"""A walker that keeps a log of the steps it took, outside of its memory, and what two such logs prove.

The rule of the file: a machine's steps are numbered, and its number travels with it. So each step is taken once, by one
host, or something is wrong: a step that is in two logs was taken by two copies, or was taken back after it had been
acknowledged; one that is in none was lost.

    count u64, then for each stretch without a step of anybody else's: first step, end, first and last time (ns) u64

Run: ``python -m tests.support.witness --log FILE``, the rest as `migrated.demo.walker`.
"""

from __future__ import annotations

import argparse
import os
import struct
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from migrated.client import Machine, attach
from migrated.demo.walker import Walker, tell

_COUNT = struct.Struct("=Q")
_STRETCH = struct.Struct("=QQQQ")
STRETCHES_MAX = 1 << 14


class Stretch(NamedTuple):
    """Steps that one host took, and when (CLOCK_MONOTONIC)."""

    begin: int
    end: int
    first_ns: int
    last_ns: int


class StepLog:
    """Writes a log; what is written is in the page cache, whatever becomes of the process."""

    def __init__(self, path: Path) -> None:
        # Not a mapping: one was once read as it had been seconds before.
        self._file = path.open("w+b", buffering=0)
        self._file.truncate(_COUNT.size + STRETCHES_MAX * _STRETCH.size)
        self._count = 0
        self._last = Stretch(0, 0, 0, 0)

    def add(self, begin: int, end: int, first_ns: int) -> None:
        """Take down that the steps from ``begin`` to ``end`` were taken since ``first_ns``."""
        if begin == end:
            return
        if self._count and self._last.end == begin:
            self._last = self._last._replace(end=end, last_ns=time.monotonic_ns())
        else:
            self._last = Stretch(begin, end, first_ns, time.monotonic_ns())
            self._count += 1
        at = _COUNT.size + (self._count - 1) * _STRETCH.size
        os.pwrite(self._file.fileno(), _STRETCH.pack(*self._last), at)
        os.pwrite(self._file.fileno(), _COUNT.pack(self._count), 0)


def read_log(path: Path) -> list[Stretch]:
    """Return what was taken down."""
    raw = path.read_bytes()
    (count,) = _COUNT.unpack_from(raw)
    return [Stretch(*_STRETCH.unpack_from(raw, _COUNT.size + i * _STRETCH.size)) for i in range(count)]


def assert_each_step_once(logs: Iterable[list[Stretch]]) -> int:
    """Hold that every step from the first on was taken once, one after the other; return how many."""
    taken = 0
    until_ns = 0
    for stretch in sorted(stretch for log in logs for stretch in log):
        assert stretch.begin >= taken, f"steps {stretch.begin} to {min(taken, stretch.end)} were taken twice: {stretch}"
        assert stretch.begin <= taken, f"steps {taken} to {stretch.begin} were lost: {stretch}"
        assert stretch.first_ns >= until_ns, f"two copies ran at the same time: {stretch}"
        taken, until_ns = stretch.end, stretch.last_ns
    return taken


class _Witnessed:
    """A Machine whose checkpoints take down what was done between them."""

    def __init__(self, machine: Machine, log: StepLog) -> None:
        self._machine = machine
        self._log = log
        self.walker: Walker | None = None
        self._begin = 0
        self._since_ns: int | None = None

    def checkpoint(self) -> None:
        assert self.walker is not None
        if self._since_ns is not None:
            self._log.add(self._begin, self.walker.steps, self._since_ns)
            self._since_ns = None
        self._machine.checkpoint()
        # Now, and not before: the machine may have been away meanwhile.
        self._begin, self._since_ns = self.walker.steps, time.monotonic_ns()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._machine, name)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--attach", required=True)
    parser.add_argument("--ram", type=int, required=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--name", default="walker")
    parser.add_argument("--log", type=Path, required=True)
    arguments = parser.parse_args()
    with attach(arguments.attach, name=arguments.name) as machine:
        witnessed: Any = _Witnessed(machine, StepLog(arguments.log))
        witnessed.walker = Walker(witnessed, arguments.ram, arguments.seed)
        machine.ready()
        tell("ready")
        witnessed.walker.run()


if __name__ == "__main__":
    main()
