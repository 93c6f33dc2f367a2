"""README and docs/bench.md say what docs/bench/figures.json says, and show the plots that are there."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench import plots
from tests.bench.__main__ import CASES
from tests.bench.board import decode, encode
from tests.bench.documents import FIGURES, GUIDE, REGIONS, with_region

BOARD = decode(FIGURES.read_bytes())


@pytest.mark.parametrize("path", REGIONS, ids=lambda path: path.name)
def test_a_document_has_the_committed_figures(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert with_region(text, REGIONS[path](BOARD)) == text


def test_the_figures_are_as_the_benchmark_writes_them() -> None:
    assert encode(BOARD) == FIGURES.read_bytes()
    assert list(BOARD.cases) == [case for case in CASES if case in BOARD.cases]


def test_every_curve_is_drawn_and_every_plot_is_shown() -> None:
    assert plots.unused(BOARD) == set()
    drawn = {path.name for path in FIGURES.parent.glob("*.svg")}
    assert {f"{name}.svg" for name in plots.PLOTS} >= drawn
    assert [name for name in sorted(drawn) if f"](bench/{name})" not in GUIDE.read_text(encoding="utf-8")] == []


def test_no_two_figures_of_a_case_are_the_same() -> None:
    keys = {case: [figure.key for figure in kept.figures] for case, kept in BOARD.cases.items()}
    assert {case: found for case, found in keys.items() if len(set(found)) < len(found)} == {}
