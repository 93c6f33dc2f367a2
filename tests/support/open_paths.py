"""Directories of a test that other users may pass through: pytest keeps its own to the user who runs it."""

from __future__ import annotations

from pathlib import Path

PASS = 0o001


def let_others_in(directory: Path) -> None:
    """Let every user reach ``directory``."""
    for one in (directory, *directory.parents):
        if not one.stat().st_mode & PASS:
            one.chmod(0o755)
