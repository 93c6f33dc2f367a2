"""README's table and that of docs/bench.md, written from the committed figures.

The rule of the file: between its two marks a document belongs to the benchmark, outside of them to people. README has
what has a goal and is no point of a curve; docs/bench.md has everything.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.bench.board import Board, CaseRecord, Entry
from tests.bench.figures import number

ROOT = Path(__file__).resolve().parents[2]
FIGURES = ROOT / "docs" / "bench" / "figures.json"
README, GUIDE = ROOT / "README.md", ROOT / "docs" / "bench.md"
BEGIN = '<!-- from docs/bench/figures.json; written by: make bench ARGS="--keep" -->'
END = "<!-- end of figures -->"

_HEAD = "| {first} | migrated | beside it | ratio | goal |\n|---|---|---|---|---|"


def readme_region(board: Board) -> str:
    """Return README's table: figures with a goal, one case after the other, with what they were measured on."""
    rows = [_HEAD.format(first="what")]
    for case, kept in board.cases.items():
        shown = [figure for figure in kept.figures if figure.target is not None and figure.point is None]
        rows += [_row(f"{case}: {figure.name}", figure) for figure in shown]
    return "\n".join([*rows, "", *_measured(board)])


def guide_region(board: Board) -> str:
    """Return the tables of docs/bench.md: every figure of every case."""
    parts = []
    for case, kept in board.cases.items():
        took = f"{kept.date}, {_pairs(kept)}, {kept.seconds:.0f} s; load average before: {kept.load:.1f}."
        parts += [f"### {case}", "", took, "", _HEAD.format(first="what")]
        parts += [_row(figure.name, figure) for figure in kept.figures]
        parts += ["", *_hows(kept), ""]
    return "\n".join([*parts, *_measured(board)])


REGIONS: dict[Path, Callable[[Board], str]] = {README: readme_region, GUIDE: guide_region}


def with_region(text: str, region: str) -> str:
    """Return the document with what is between the marks replaced. Raises ValueError without marks."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError("the document has no place for figures")
    return f"{before}{BEGIN}\n{region}\n{END}{after}"


def write(board: Board) -> None:
    """Write the tables into the documents."""
    for path, region in REGIONS.items():
        path.write_text(with_region(path.read_text(encoding="utf-8"), region(board)), encoding="utf-8")


def named(who: str) -> str:
    """Return a competitor's name as its makers write it."""
    return who.replace("qemu", "QEMU")


def _row(first: str, figure: Entry) -> str:
    who = "" if figure.who == "migrated" else f"{named(figure.who)} "
    ours = f"{who}{number(figure.median)} {figure.unit}"
    theirs = (
        f"{named(figure.against or '')} {number(figure.against_median)} {figure.unit}"
        if figure.against_median is not None
        else ""
    )
    ratio = "" if figure.ratio is None else f"{figure.ratio:.2f}"
    goal = (figure.target or "") + (", missed" if figure.reached is False else "")
    return f"| {first} | {ours} | {theirs} | {ratio} | {goal} |".replace("|  |", "| |").replace("|  |", "| |")


def _hows(kept: CaseRecord) -> list[str]:
    """Say how figures were taken: once where it was the same for all, else for each."""
    names: dict[str, list[str]] = {}
    for figure in kept.figures:
        named = names.setdefault(figure.how, [])
        if figure.name not in named:
            named.append(figure.name)
    if len(names) == 1:
        return [f"How: {how}." for how in names]
    return [f"* {'; '.join(named)}: {how}." for how, named in names.items()]


def _measured(board: Board) -> list[str]:
    """Say when and where, each machine once, and what has to be taken with care."""
    by_machine: dict[str, dict[str, list[str]]] = {}
    for case, kept in board.cases.items():
        by_machine.setdefault(kept.machine, {}).setdefault(f"{kept.date}, {_pairs(kept)}", []).append(case)
    lines = []
    for machine, taken in by_machine.items():
        when = " ".join(f"{moment}: {', '.join(cases)}." for moment, cases in taken.items())
        lines += [f"Machine: {machine}.", f"Taken: {when}"]
    looks = [case for case, kept in board.cases.items() if kept.pairs == 1 or kept.is_busy]
    if looks:
        why = "A look and no measurement, because there was 1 pair or the machine had other work"
        lines.append(f"{why}: {', '.join(looks)}.")
    return lines


def _pairs(kept: CaseRecord) -> str:
    return "1 pair" if kept.pairs == 1 else f"{kept.pairs} pairs"
