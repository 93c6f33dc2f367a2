"""Committed figures: from what was measured, into a file and back, case by case."""

from __future__ import annotations

import msgspec
import pytest

from tests.bench.board import Board, CaseRecord, decode, encode, entry, machine_class, merge, record
from tests.bench.figures import HIGHER, LOWER, Figure, Point, Target


def figure(name: str = "1 GiB", *, target: Target | None = None, unit: str = "MiB/s") -> Figure:
    made = Figure("bulk", name, unit, "by a clock", target, "raw")
    made.pair(90.0, 100.0)
    made.pair(50.0, 200.0)
    made.pair(80.0, 100.0)
    return made


def case(date: str, *figures: Figure) -> CaseRecord:
    return record(figures or [figure()], date=date, machine="m", pairs=3, seconds=1.25, load=0.5)


def test_a_ratio_is_the_median_of_the_pairs_ratios() -> None:
    kept = entry(figure(target=Target(">=", 0.9)))
    assert (kept.median, kept.against_median, kept.ratio, kept.reached) == (80.0, 100.0, 0.8, False)
    assert kept.who == "migrated"


def test_a_figure_without_a_competitor_keeps_its_median() -> None:
    alone = Figure("dirty", "sync", "ms", "by a clock", Target("<=", 10.0), "qemu", ours=[3.0, 123.456789])
    kept = entry(alone)
    assert (kept.against, kept.against_median, kept.ratio, kept.theirs) == (None, None, None, ())
    assert kept.ours == (3.0, 123.5)


@pytest.mark.parametrize(
    ("target", "unit", "better"),
    [
        (Target(">=", 1.0), "ms", HIGHER),
        (Target("<=", 1.0), "MiB/s", LOWER),
        (None, "MiB/s", HIGHER),
        (None, "ms", LOWER),
        (None, "s/GiB", LOWER),
    ],
)
def test_which_way_is_better_is_told_by_the_target_and_else_by_the_unit(
    target: Target | None, unit: str, better: str
) -> None:
    assert entry(figure(target=target, unit=unit)).better == better


def test_what_has_no_value_is_not_kept() -> None:
    assert [kept.name for kept in case("today", figure("a"), Figure("bulk", "b", "ms", "not measured")).figures] == [
        "a"
    ]


def test_only_cases_that_were_run_are_replaced_and_each_keeps_its_date() -> None:
    board = Board({"bulk": case("monday"), "tls": case("monday"), "gone": case("monday")})
    merged = merge(board, {"tls": case("friday"), "zeros": case("friday")}, ["zeros", "bulk", "tls"])
    assert {name: kept.date for name, kept in merged.cases.items()} == {
        "zeros": "friday", "bulk": "monday", "tls": "friday",
    }  # fmt: skip
    assert list(merged.cases) == ["zeros", "bulk", "tls"]


def test_a_board_comes_back_from_its_file_and_is_the_same_file_again() -> None:
    curve = figure()
    curve.point = Point("sizes", 8.0, "cold")
    board = Board({"bulk": case("monday", curve)})
    assert decode(encode(board)) == board
    assert encode(decode(encode(board))) == encode(board)


def test_a_file_that_is_no_board_is_refused() -> None:
    with pytest.raises(msgspec.ValidationError):
        decode(b'{"cases": {"bulk": {"date": 7}}}')


def test_the_class_of_a_machine_says_what_figures_depend_on() -> None:
    host = {"cpus": 2, "cpu": ["Fast One"], "memory_bytes": 23 << 30, "kernel": "6.18", "python": "3.11.7"}
    assert machine_class(host, "QEMU emulator version 7.2.22 (Debian)") == (
        "2 x Fast One, 23 GiB, Linux 6.18, Python 3.11.7, QEMU 7.2.22"
    )
    assert machine_class({**host, "cpu": []}, None).endswith("no QEMU")
