"""One SVG per curve, drawn from the committed figures.

The rule of the file: the same figures, the same bytes: no date, no random ids, letters as letters. Ours is drawn
through, theirs is dashed; a plot without figures is not drawn.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")  # before pyplot, which would look for a screen

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from tests.bench.board import Board, Entry
from tests.bench.documents import FIGURES, named
from tests.bench.figures import number

DIRECTORY = FIGURES.parent
#: Any: matplotlib's own type names every key there is, and not in all versions.
_STYLE: Any = {
    "svg.hashsalt": "migrated", "svg.fonttype": "none", "figure.figsize": (7, 4.2), "font.size": 10,
    "axes.grid": True, "grid.color": "#dddddd", "axes.axisbelow": True, "axes.spines.top": False,
    "axes.spines.right": False, "legend.frameon": False, "figure.facecolor": "white",
}  # fmt: skip
_COLOURS = ("#1f4e79", "#2e8b57", "#c46210", "#8b1a4a", "#666666")
_OURS, _THEIRS = "#1f4e79", "#b0b0b0"


@dataclass(frozen=True, slots=True)
class Curves:
    """Lines over a quantity."""

    title: str
    x: str
    y: str
    log_x: bool = False


@dataclass(frozen=True, slots=True)
class Bars:
    """Everybody who is in one of a case's figures, side by side."""

    title: str
    case: str
    unit: str
    """Figures of another unit stay away."""
    x: str
    name: str = ""
    """What the figures' names have in them, where they tell our bars apart."""
    not_shown: str = ""
    """Who is one of ours, under another name."""


PLOTS: dict[str, Curves | Bars] = {
    "bulk": Bars("Bulk into cold memory", "bulk", "MiB/s", "MiB/s, more is better"),
    "populated": Bars("Bulk into populated memory", "populated", "MiB/s", "MiB/s, more is better"),
    "processor": Bars("Processor time of both ends", "bulk", "s/GiB", "seconds per GiB of RAM, less is better"),
    "faults": Bars("Touch of a missing page, median", "faults", "us", "us, less is better", "p50", "quiet"),
    "sweep-total": Curves("A machine that goes on writing: total time", "written, MiB/s", "total time, ms", log_x=True),
    "sweep-downtime": Curves("A machine that goes on writing: downtime", "written, MiB/s", "downtime, ms", log_x=True),
    "sizes": Curves("Moving an idle machine, by size", "RAM, GiB", "total time, ms"),
    "pass": Curves("A pass with the same pages dirty, by size", "RAM, GiB", "pass, ms"),
    "machines": Curves("Machines of 64 MiB at once", "machines", "all of them moved, ms", log_x=True),
}


def draw(board: Board, directory: Path = DIRECTORY) -> list[Path]:
    """Draw every plot that has figures; return the files."""
    drawn = []
    for name, plot in PLOTS.items():
        with mpl.rc_context(_STYLE):
            canvas, axes = plt.subplots(layout="constrained")
            there = _bars(axes, plot, board) if isinstance(plot, Bars) else _curves(axes, name, plot, board)
            if there:
                axes.set_title(plot.title, loc="left", fontsize=11)
                drawn.append(directory / f"{name}.svg")
                canvas.savefig(drawn[-1], metadata={"Date": None, "Creator": None})
            plt.close(canvas)
    return drawn


def _curves(axes: Axes, name: str, plot: Curves, board: Board) -> bool:
    lines: dict[tuple[str, str], dict[float, float]] = {}
    for figure in _figures(board):
        if figure.point is not None and figure.point.plot == name:
            x, line = figure.point.x, figure.point.line
            lines.setdefault((line, figure.who), {})[x] = figure.median
            if figure.against is not None and figure.against_median is not None:
                lines.setdefault((line, figure.against), {})[x] = figure.against_median
    names = list(dict.fromkeys(line for line, _ in lines))
    whom = list(dict.fromkeys(who for _, who in lines))
    for (line, who), points in lines.items():
        colour = _COLOURS[(names.index(line) if len(names) > 1 else whom.index(who)) % len(_COLOURS)]
        style = "-" if who == whom[0] else "--"
        xs = sorted(points)
        axes.plot(
            xs, [points[x] for x in xs], style, marker="o", ms=4, color=colour, label=f"{line} {named(who)}".strip()
        )
    if lines:
        _scale(axes, plot, sorted({x for points in lines.values() for x in points}))
    return bool(lines)


def _scale(axes: Axes, plot: Curves, xs: list[float]) -> None:
    axes.set_xlabel(plot.x)
    axes.set_ylabel(plot.y)
    if plot.log_x:
        axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.set_xticks(xs, [f"{x:g}" for x in xs])
    axes.minorticks_off()
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0))


def _bars(axes: Axes, plot: Bars, board: Board) -> bool:
    medians: dict[str, tuple[float, bool]] = {}
    case = board.cases.get(plot.case)
    for figure in case.figures if case else ():
        if figure.unit == plot.unit and plot.name in figure.name:
            medians.setdefault(_label(figure, plot), (figure.median, True))
            if figure.against_median is not None and figure.against not in (None, plot.not_shown):
                medians.setdefault(figure.against, (figure.against_median, False))
    if medians:
        ordered = sorted(medians.items(), key=lambda item: item[1][0])
        colours = [_OURS if ours else _THEIRS for _, (_, ours) in ordered]
        bars = axes.barh([named(name) for name, _ in ordered], [value for _, (value, _) in ordered], color=colours)
        axes.bar_label(bars, fmt=number, padding=3)
        axes.set_xlabel(plot.x)
        axes.grid(visible=False, axis="y")
        axes.margins(x=0.12)
    return bool(medians)


def _label(figure: Entry, plot: Bars) -> str:
    return f"migrated, {figure.name}" if plot.name and figure.who == "migrated" else figure.who


def _figures(board: Board) -> Iterator[Entry]:
    for case in board.cases.values():
        yield from case.figures


def unused(board: Board, plots: Mapping[str, Curves | Bars] = PLOTS) -> set[str]:
    """Return plots that figures name and nobody draws."""
    return {figure.point.plot for figure in _figures(board) if figure.point is not None} - plots.keys()
