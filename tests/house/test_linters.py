"""The tools that read the sources agree with them."""

from __future__ import annotations

import sys

import pytest

from tests.house.repository import run, tool


def test_ruff_check() -> None:
    run(sys.executable, "-m", "ruff", "check", ".")


def test_ruff_format() -> None:
    run(sys.executable, "-m", "ruff", "format", "--check", ".")


@pytest.mark.limit(300)
def test_mypy() -> None:
    run(sys.executable, "-m", "mypy")


def test_import_linter() -> None:
    run(tool("lint-imports"), "--no-cache")
