"""Tables and plots that are made of the committed figures."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench import plots
from tests.bench.board import Board, record
from tests.bench.documents import BEGIN, END, guide_region, readme_region, with_region
from tests.bench.figures import Figure, Point, Target


def board() -> Board:
    bulk = Figure("bulk", "1 GiB", "MiB/s", "by a clock", Target(">=", 0.9), "raw", ours=[500.0], theirs=[1000.0])
    alone = Figure("bulk", "memory", "MiB", "by the kernel", None, "qemu", ours=[50.0])
    sizes = [
        Figure("sizes", f"{gib} GiB", "ms", "by a clock", Target("<=", 1.0), "qemu", point=Point("sizes", gib))
        for gib in (1, 2)
    ]
    for figure in sizes:
        figure.pair(100.0, 200.0)
    return Board(
        {
            "bulk": record([bulk, alone], date="2026-01-02", machine="this one", pairs=1, seconds=9.0, load=4.0),
            "sizes": record(sizes, date="2026-01-03", machine="this one", pairs=3, seconds=9.0, load=0.5),
        }
    )


def test_readme_has_what_has_a_goal_and_is_no_point_of_a_curve() -> None:
    table = readme_region(board())
    assert "| bulk: 1 GiB | 500 MiB/s | raw 1000 MiB/s | 0.50 | >= 0.9, missed |" in table
    assert "memory" not in table
    assert "2 GiB" not in table
    assert "Machine: this one.\nTaken: 2026-01-02, 1 pair: bulk. 2026-01-03, 3 pairs: sizes.\n" in table
    assert table.endswith("A look and no measurement, because there was 1 pair or the machine had other work: bulk.")


def test_the_guide_has_everything_and_says_how() -> None:
    tables = guide_region(board())
    assert "| memory | 50 MiB | | | |" in tables
    assert "* memory: by the kernel." in tables
    assert "How: by a clock." in tables


def test_a_region_is_replaced_and_the_rest_stays() -> None:
    text = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    assert with_region(text, "new") == f"before\n{BEGIN}\nnew\n{END}\nafter\n"
    assert with_region(with_region(text, "new"), "new") == with_region(text, "new")


def test_a_document_without_a_place_is_refused() -> None:
    with pytest.raises(ValueError, match="no place for figures"):
        with_region(f"{BEGIN} and no end", "new")


def test_a_plot_is_drawn_for_every_curve_that_has_figures_and_no_other(tmp_path: Path) -> None:
    assert {path.name for path in plots.draw(board(), tmp_path)} == {"bulk.svg", "sizes.svg"}
    drawn = (tmp_path / "sizes.svg").read_text()
    assert "total time, ms" in drawn
    assert "RAM, GiB" in drawn


def test_drawing_the_same_figures_again_changes_nothing(tmp_path: Path) -> None:
    first = [path.read_bytes() for path in plots.draw(board(), tmp_path)]
    assert [path.read_bytes() for path in plots.draw(board(), tmp_path)] == first


def test_a_curve_that_nobody_draws_is_found() -> None:
    assert plots.unused(board(), {}) == {"sizes"}
    assert plots.unused(board()) == set()
