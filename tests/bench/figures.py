"""A figure: what was measured of us and of whom we are compared with, pair by pair.

The rule of the file: a ratio is the median of the pairs' ratios, never a ratio of numbers from different minutes; a
target is reported as reached or not, never asserted.
"""

from __future__ import annotations

import operator
import statistics
from dataclasses import dataclass, field
from typing import Any

_COMPARISONS = {"<=": operator.le, ">=": operator.ge}
HIGHER, LOWER = "higher", "lower"
#: What is better, of a figure that has no target to tell: of these units more, of all others (times, sizes) less.
_MORE_IS_BETTER = frozenset({"MiB/s"})


@dataclass(frozen=True, slots=True)
class Point:
    """Where a figure stands in a plot of `tests.bench.plots`."""

    plot: str
    x: float
    line: str = ""
    """Which of the plot's lines it is on; ours and theirs are drawn apart."""


@dataclass(frozen=True, slots=True)
class Target:
    """What has to hold: of the ratio ours / theirs, or, without a competitor, of our own median."""

    comparison: str
    value: float

    def holds(self, found: float) -> bool:
        """Say whether it does."""
        return bool(_COMPARISONS[self.comparison](found, self.value))

    def __str__(self) -> str:
        return f"{self.comparison} {self.value:g}"


@dataclass(slots=True)
class Figure:
    """One line of the table. ``theirs`` is parallel to ``ours``, or empty where nobody is compared."""

    case: str
    name: str
    unit: str
    how: str
    """What exactly was measured, in a sentence."""
    target: Target | None = None
    against: str = ""
    who: str = ""
    """Whose figure it is where that has to be said: which of ours, or one yardstick held against another."""
    point: Point | None = None
    ours: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)

    def pair(self, ours: float, theirs: float) -> None:
        """Add one pair."""
        self.ours.append(ours)
        self.theirs.append(theirs)

    @property
    def ratio(self) -> float | None:
        """The median of ours / theirs."""
        if not self.theirs:
            return None
        return statistics.median(a / b for a, b in zip(self.ours, self.theirs, strict=True))

    @property
    def better(self) -> str:
        """Which way the figure gets better."""
        if self.target is not None:
            return HIGHER if self.target.comparison == ">=" else LOWER
        return HIGHER if self.unit in _MORE_IS_BETTER else LOWER

    @property
    def judged(self) -> float:
        """The number that the target is about."""
        return statistics.median(self.ours) if self.ratio is None else self.ratio

    @property
    def reached(self) -> bool | None:
        """Whether the target holds; None without one."""
        return None if self.target is None else self.target.holds(self.judged)

    def as_dict(self) -> dict[str, Any]:
        """Return everything, for the JSON file."""
        return {
            "case": self.case,
            "name": self.name,
            "unit": self.unit,
            "how": self.how,
            "better": self.better,
            "who": self.who or "migrated",
            "median": statistics.median(self.ours),
            "ours": self.ours,
            "against": self.against or None,
            "against_median": statistics.median(self.theirs) if self.theirs else None,
            "theirs": self.theirs,
            "ratio": self.ratio,
            "target": None if self.target is None else str(self.target),
            "reached": self.reached,
            "details": self.details,
        }


def number(value: float) -> str:
    """Write a figure with the digits that mean something."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
