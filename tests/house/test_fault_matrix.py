"""The fault matrix in the documents is the one that is tested."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path

from tests.house.repository import ROOT

PAGE = ROOT / "docs" / "fault-matrix.md"
ROWS = range(1, 51)
_ROW = re.compile(r"^\| (\d+) \|(?:[^|\n]*\|)*([^|\n]*)\|$", re.MULTILINE)


def documented(title: str) -> dict[int, str]:
    """Return row and last column of the table under a title."""
    text = PAGE.read_text(encoding="utf-8").partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    return {int(number): last.strip() for number, last in _ROW.findall(text)}


def rows_of(path: Path) -> set[int]:
    """Return the rows that the tests of a file name."""
    found: set[int] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("row", "pytest.mark.row"):
            found |= {int(ast.unparse(argument)) for argument in node.args}
    return found


def files_of_rows() -> dict[int, str]:
    """Return for each row the files with a test that names it, as the page has them."""
    files = defaultdict(list)
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for row in rows_of(path):
            files[row].append(f"`{path.parent.name}/{path.stem}`")
    return {row: ", ".join(found) for row, found in files.items()}


def test_every_row_is_produced_or_there_is_a_reason() -> None:
    produced, not_produced = documented("Rows").keys(), documented("Not produced").keys()
    assert sorted([*produced, *not_produced]) == list(ROWS)


def test_the_page_names_the_tests_of_each_row() -> None:
    assert documented("Rows") == files_of_rows()
