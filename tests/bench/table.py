"""The table on the terminal: every figure, what it was compared with, and what became of it since it was committed.

The rule of the file: what got worse is said twice, in its line and at the end, where nobody has to look for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from tests.bench.board import CaseRecord, Entry
from tests.bench.comparison import TOLERANCE, Change, Verdict, worse
from tests.bench.figures import number

_REACHED = {True: "reached", False: "NOT reached", None: ""}


def show(run: Mapping[str, CaseRecord], changes: Sequence[Change], console: Console) -> None:
    """Print the table, and below it what got worse and what was not measured."""
    table = Table(title="medians; the ratio is the median of the pairs' ratios (ours / theirs)")
    for heading in ("case", "what", "unit", "migrated", "against", "ratio", "goal", "committed", "since"):
        table.add_column(heading, justify="right" if heading in ("migrated", "ratio", "committed") else "left")
    since = {(change.case, change.name, change.who, change.against): change for change in changes}
    for case, kept in run.items():
        for figure in kept.figures:
            table.add_row(*_row(case, figure, since[(case, *figure.key)]))
    console.print(table)
    for change in changes:
        if change.verdict is Verdict.MISSING:
            console.print(f"not measured this time: {change}")
    if regressions := worse(list(changes)):
        console.print(f"WORSE than the committed figures by more than {TOLERANCE * 100:.0f} %:")
        for change in regressions:
            console.print(f"  {change}")
    else:
        console.print(f"No ratio is worse than the committed one by more than {TOLERANCE * 100:.0f} %.")


def _row(case: str, figure: Entry, change: Change) -> list[str]:
    who = "" if figure.who == "migrated" else figure.who
    theirs = "-" if figure.against_median is None else f"{figure.against} {number(figure.against_median)}"
    percent = "" if change.percent is None else f" {change.percent:+.0f} %"
    return [
        case,
        figure.name,
        figure.unit,
        f"{who} {number(figure.median)}".strip(),
        theirs,
        "-" if figure.ratio is None else f"{figure.ratio:.2f}",
        f"{figure.target} {_REACHED[figure.reached]}" if figure.target else "-",
        "-" if change.then is None else number(change.then),
        f"{change.verdict}{percent}",
    ]
