"""Figures beside the committed ones: what is a regression, and what is not."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from tests.bench.board import Board, CaseRecord, record
from tests.bench.comparison import Verdict, compare, worse
from tests.bench.figures import Figure, Target
from tests.bench.table import show

HIGHER_IS_BETTER, LOWER_IS_BETTER = Target(">=", 0.9), Target("<=", 1.0)


def case(ratio: float, target: Target = HIGHER_IS_BETTER, name: str = "1 GiB", against: str = "raw") -> CaseRecord:
    figure = Figure("bulk", name, "MiB/s", "by a clock", target, against)
    if against:
        figure.pair(1000.0 * ratio, 1000.0)
    else:
        figure.ours.append(1000.0 * ratio)
    return record([figure], date="today", machine="m", pairs=1, seconds=1.0, load=0.5)


@pytest.mark.parametrize(
    ("target", "then", "now", "verdict"),
    [
        (HIGHER_IS_BETTER, 1.0, 0.84, Verdict.WORSE),
        (HIGHER_IS_BETTER, 1.0, 0.86, Verdict.SAME),
        (HIGHER_IS_BETTER, 1.0, 1.14, Verdict.SAME),
        (HIGHER_IS_BETTER, 1.0, 1.16, Verdict.BETTER),
        (LOWER_IS_BETTER, 1.0, 1.16, Verdict.WORSE),
        (LOWER_IS_BETTER, 1.0, 1.14, Verdict.SAME),
        (LOWER_IS_BETTER, 1.0, 0.86, Verdict.SAME),
        (LOWER_IS_BETTER, 1.0, 0.84, Verdict.BETTER),
        (LOWER_IS_BETTER, 0.04, 0.05, Verdict.WORSE),
    ],
)
def test_a_ratio_is_held_against_the_committed_one(target: Target, then: float, now: float, verdict: Verdict) -> None:
    (change,) = compare(Board({"bulk": case(then, target)}), {"bulk": case(now, target)})
    assert change.verdict is verdict
    assert worse([change]) == ([change] if verdict is Verdict.WORSE else [])


def test_a_figure_without_a_competitor_is_shown_and_not_judged() -> None:
    (change,) = compare(Board({"bulk": case(1.0, against="")}), {"bulk": case(0.1, against="")})
    assert change.verdict is Verdict.SHOWN
    assert (change.then, change.now, change.percent) == (1000.0, 100.0, pytest.approx(-90.0))


def test_a_yardstick_beside_another_is_shown_and_not_judged() -> None:
    def chain(ratio: float) -> CaseRecord:
        figure = Figure("faults", "p50", "us", "by a clock", None, "raw echo", who="C chain")
        figure.pair(ratio, 1.0)
        return record([figure], date="today", machine="m", pairs=1, seconds=1.0, load=0.5)

    (change,) = compare(Board({"faults": chain(1.0)}), {"faults": chain(9.0)})
    assert change.verdict is Verdict.SHOWN


def test_what_was_never_committed_is_new() -> None:
    (change,) = compare(Board(), {"bulk": case(0.1)})
    assert (change.verdict, change.percent) == (Verdict.NEW, None)


def test_what_is_measured_no_more_is_named() -> None:
    changes = compare(Board({"bulk": case(1.0, name="old")}), {"bulk": case(1.0, name="new")})
    assert [(change.name, change.verdict) for change in changes] == [("new", Verdict.NEW), ("old", Verdict.MISSING)]


def test_another_competitor_is_another_figure() -> None:
    changes = compare(Board({"bulk": case(1.0, against="qemu")}), {"bulk": case(0.1, against="raw")})
    assert worse(changes) == []


def test_a_figure_that_loses_its_competitor_is_another_one() -> None:
    changes = compare(Board({"bulk": case(1.0)}), {"bulk": case(1.0, against="")})
    assert [change.verdict for change in changes] == [Verdict.NEW, Verdict.MISSING]


def test_cases_that_were_not_run_are_left_alone() -> None:
    assert [change.case for change in compare(Board({"bulk": case(1.0), "tls": case(1.0)}), {"tls": case(1.0)})] == [
        "tls"
    ]


def test_a_planted_regression_is_in_its_line_and_at_the_end() -> None:
    run = {"bulk": case(0.6), "zeros": case(1.0)}
    changes = compare(Board({"bulk": case(0.9), "zeros": case(1.0)}), run)
    said = io.StringIO()
    show(run, changes, Console(file=said, width=200))
    table, _, end = said.getvalue().partition("WORSE than the committed figures by more than 15 %:")
    assert "WORSE -33 %" in table
    assert "bulk: 1 GiB, migrated against raw: 0.9 -> 0.6 (-33 %) (higher is better)" in end
    assert "zeros" not in end


def test_a_run_without_regressions_says_so() -> None:
    said = io.StringIO()
    run = {"bulk": case(0.9)}
    show(run, compare(Board({"bulk": case(0.9)}), run), Console(file=said, width=200))
    assert "No ratio is worse" in said.getvalue()
    assert "WORSE" not in said.getvalue()
