"""What every case of the benchmark is given, and what it is.

The rule of the file: competitors take turns within a pair, and whose turn is first alternates, so that slow drifts of
a shared machine fall on both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from tests.bench.figures import Figure
from tests.bench.host import MIB

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Bench:
    """One run of the benchmark."""

    directory: Path
    """For sockets and logs."""
    memory: Path
    """A directory whose files are memory."""
    pairs: int
    qemu: str | None
    """QEMU's version; None: not installed, what compares with it is left out."""
    say: Callable[[str], None]
    shrink: int = 1
    """What sizes are divided by, for a look at whether a case runs at all."""

    @property
    def log(self) -> Path:
        """Where programs without a log of their own write."""
        return self.directory / "log"

    def size(self, size_bytes: int) -> int:
        """Return how big it is in this run: at least a MiB."""
        return max(size_bytes // self.shrink // MIB, 1) * MIB

    def rounds(self, case: str, competitors: Mapping[str, Callable[[], T]]) -> Iterator[dict[str, T]]:
        """Let every competitor run once per pair; yield what each returned."""
        names = list(competitors)
        for number in range(self.pairs):
            order = names if number % 2 == 0 else names[::-1]
            results = {name: competitors[name]() for name in order}
            self.say(f"{case}: pair {number + 1} of {self.pairs}: {results}")
            yield results


Case = Callable[[Bench], list[Figure]]
