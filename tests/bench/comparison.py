"""What got worse since the committed figures: ratios, and only ratios.

The rule of the file: pure. A figure without a competitor says something about the machine as well, so it is shown and
never judged, as is one yardstick beside another; which way is worse is the figure's own word.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from tests.bench.board import Board, CaseRecord, Entry
from tests.bench.figures import HIGHER

#: Medians of a few pairs wander by this much without a reason.
TOLERANCE = 0.15


class Verdict(StrEnum):
    """What became of a figure."""

    SAME = "same"
    BETTER = "better"
    WORSE = "WORSE"
    NEW = "new"
    SHOWN = "not judged"
    MISSING = "not measured"


@dataclass(frozen=True, slots=True)
class Change:
    """A figure then and now: the ratio, or the median where nobody is compared."""

    case: str
    name: str
    who: str
    against: str
    better: str
    then: float | None
    now: float | None
    verdict: Verdict

    @property
    def percent(self) -> float | None:
        """Return by how much it changed, in percent of what it was; None where one of the two is missing."""
        if self.then is None or self.now is None or self.then == 0:
            return None
        return (self.now / self.then - 1) * 100

    def __str__(self) -> str:
        beside = f" against {self.against}" if self.against else ""
        change = "" if self.percent is None else f": {self.then:.3g} -> {self.now:.3g} ({self.percent:+.0f} %)"
        return f"{self.case}: {self.name}, {self.who}{beside}{change} ({self.better} is better)"


def compare(committed: Board, run: Mapping[str, CaseRecord], tolerance: float = TOLERANCE) -> list[Change]:
    """Hold every figure of the cases that were run against the committed one, in the order of the run."""
    changes: list[Change] = []
    for case, found in run.items():
        before = {old.key: old for old in committed.cases[case].figures} if case in committed.cases else {}
        changes += [_change(case, before.pop(now.key, None), now, tolerance) for now in found.figures]
        changes += [_missing(case, old) for old in before.values()]
    return changes


def worse(changes: list[Change]) -> list[Change]:
    """Return the regressions."""
    return [change for change in changes if change.verdict is Verdict.WORSE]


def _change(case: str, then: Entry | None, now: Entry, tolerance: float) -> Change:
    value = now.median if now.ratio is None else now.ratio
    old = None if then is None else then.median if now.ratio is None else then.ratio
    return Change(case, now.name, now.who, now.against or "", now.better, old, value, _verdict(then, now, tolerance))


def _verdict(then: Entry | None, now: Entry, tolerance: float) -> Verdict:
    if then is None:
        return Verdict.NEW
    if now.ratio is None or not then.ratio or not now.is_ours:
        return Verdict.SHOWN
    gain = now.ratio / then.ratio - 1
    if now.better != HIGHER:
        gain = -gain
    if gain < -tolerance:
        return Verdict.WORSE
    return Verdict.BETTER if gain > tolerance else Verdict.SAME


def _missing(case: str, old: Entry) -> Change:
    then = old.median if old.ratio is None else old.ratio
    return Change(case, old.name, old.who, old.against or "", old.better, then, None, Verdict.MISSING)
