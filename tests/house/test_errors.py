"""Error ids: every error has one of the table, and the document says what the table says."""

from __future__ import annotations

import re

import pytest

from migrated import errors
from migrated.error_ids import ERROR_IDS, ErrorId
from migrated.errors import MigratedError
from tests.house.repository import ROOT, modules

DOCUMENT = ROOT / "docs" / "errors.md"


def subclasses(of: type[MigratedError]) -> list[type[MigratedError]]:
    return [of, *(one for child in of.__subclasses__() for one in subclasses(child))]


def used_ids() -> set[str]:
    """Return the ids that stand in the code, besides the table."""
    texts = [path.read_text() for path in modules() if path.name != "error_ids.py"]
    said = {found for text in texts for found in re.findall(r"(?:error_id=|default_id = )\"([a-z-]+)\"", text)}
    return said | {found for text in texts for found in re.findall(r"_blocker\(\s*\"([a-z-]+)\"", text)}


def row_of(entry: ErrorId) -> str:
    return f"| `{entry.id}` | {entry.fault.value}{' (warning)' * entry.warning} | {entry.meaning} | {entry.next_step} |"


def test_ids_are_words_with_hyphens() -> None:
    assert [entry for entry in ERROR_IDS if not re.fullmatch(r"[a-z]+(-[a-z]+)*", entry)] == []


def test_the_code_uses_the_ids_of_the_table_and_all_of_them() -> None:
    assert used_ids() == set(ERROR_IDS)


@pytest.mark.parametrize("kind", subclasses(MigratedError), ids=lambda kind: kind.__name__)
def test_every_class_has_an_id(kind: type[MigratedError]) -> None:
    assert kind.default_id in ERROR_IDS


def test_every_class_of_the_tree_is_drawn() -> None:
    drawn = set(re.findall(r"\+-- (\w+)", errors.__doc__ or "")) | {"MigratedError"}
    assert {kind.__name__ for kind in subclasses(MigratedError) if kind.__module__ == errors.__name__} == drawn


def test_the_document_repeats_the_table() -> None:
    rows = [line for line in DOCUMENT.read_text().splitlines() if line.startswith("| `")]
    assert rows == [row_of(entry) for entry in ERROR_IDS.values()]
