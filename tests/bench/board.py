"""The board: the committed figures of every case, each with its own date and machine.

The rule of the file: values only. A case is replaced whole, so that figures of two hours never stand in one; what was
not run stays as it is.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import msgspec

from tests.bench.figures import Figure

#: Committed numbers keep as many digits as they mean.
DIGITS = 4
#: What the names of all of ours begin with.
OURS = "migrated"
#: One case leaves less than this behind for the next.
BUSY_LOAD = 2.5


class Place(msgspec.Struct, frozen=True):
    """Where a figure stands in a plot."""

    plot: str
    x: float
    line: str = ""


class Entry(msgspec.Struct, frozen=True):
    """One figure as it is committed. ``theirs`` is parallel to ``ours``, or empty."""

    name: str
    unit: str
    how: str
    who: str
    better: str
    median: float
    ours: tuple[float, ...]
    against: str | None
    against_median: float | None
    theirs: tuple[float, ...]
    ratio: float | None
    target: str | None
    reached: bool | None
    point: Place | None = None

    @property
    def is_ours(self) -> bool:
        """Whether it says something about us, and not about one yardstick beside another."""
        return self.who.startswith(OURS)

    @property
    def key(self) -> tuple[str, str, str]:
        """Return what tells it from the others of its case."""
        return self.name, self.who, self.against or ""


class CaseRecord(msgspec.Struct, frozen=True):
    """The figures of one case, and when and where they were taken."""

    date: str
    machine: str
    pairs: int
    seconds: float
    """How long the case took."""
    load: float
    """The machine's load average of a minute right before: what else it had to do."""
    figures: tuple[Entry, ...]

    @property
    def is_busy(self) -> bool:
        """Whether the machine had other work."""
        return self.load > BUSY_LOAD


class Board(msgspec.Struct, frozen=True):
    """All cases, in the order of the benchmark."""

    cases: dict[str, CaseRecord] = {}


def entry(figure: Figure) -> Entry:
    """Return a figure as it is committed."""
    theirs, ratio = figure.theirs, figure.ratio
    return Entry(
        name=figure.name,
        unit=figure.unit,
        how=figure.how,
        who=figure.who or OURS,
        better=figure.better,
        median=_round(statistics.median(figure.ours)),
        ours=tuple(map(_round, figure.ours)),
        against=figure.against if theirs else None,
        against_median=_round(statistics.median(theirs)) if theirs else None,
        theirs=tuple(map(_round, theirs)),
        ratio=None if ratio is None else _round(ratio),
        target=None if figure.target is None else str(figure.target),
        reached=figure.reached,
        point=None if figure.point is None else Place(**asdict(figure.point)),
    )


def record(
    figures: Sequence[Figure], *, date: str, machine: str, pairs: int, seconds: float, load: float
) -> CaseRecord:
    """Return a case that has just been run. Figures without a value are left out."""
    entries = tuple(entry(figure) for figure in figures if figure.ours)
    return CaseRecord(date, machine, pairs, _round(seconds), _round(load), entries)


def merge(board: Board, cases: Mapping[str, CaseRecord], order: Sequence[str]) -> Board:
    """Replace the cases that were run; those of ``order`` stand in its order, and no others are kept."""
    together = {**board.cases, **cases}
    return Board({name: together[name] for name in order if name in together})


def machine_class(host: Mapping[str, Any], qemu: str | None) -> str:
    """Say in a line what numbers can be compared with each other: processors, memory, kernel, Python, QEMU."""
    cpu = " / ".join(host["cpu"]) or "unknown processor"
    memory_gib = round(host["memory_bytes"] / (1 << 30))
    parts = [f"{host['cpus']} x {cpu}", f"{memory_gib} GiB", f"Linux {host['kernel']}", f"Python {host['python']}"]
    return ", ".join([*parts, f"QEMU {qemu.split()[3]}" if qemu else "no QEMU"])


def encode(board: Board) -> bytes:
    """Return the file's bytes: the same board, the same bytes."""
    return msgspec.json.format(msgspec.json.encode(board), indent=1) + b"\n"


def decode(raw: bytes) -> Board:
    """Read the file's bytes. Raises msgspec.ValidationError where they are no board."""
    return msgspec.json.decode(raw, type=Board)


def _round(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
