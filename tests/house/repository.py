"""What the tests of this directory look at: the repository, and the tools that check it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "migrated"


def tracked_files() -> list[Path]:
    """Return what belongs to the project: what git tracks, or everything in a tree without history."""
    if (ROOT / ".git").exists() and (git := shutil.which("git")):
        listed = subprocess.run([git, "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
        paths = [ROOT / name for name in listed.decode().split("\0") if name]
        return [path for path in paths if path.is_file()]
    return [
        path
        for path in ROOT.rglob("*")
        if path.is_file() and not any(part.startswith(".") or part == "__pycache__" for part in path.parts[1:-1])
    ]


def modules(*parts: str) -> list[Path]:
    """Return the Python files of the package, or of a part of it."""
    return sorted(PACKAGE.joinpath(*parts).rglob("*.py"))


def tool(name: str) -> str:
    """Return the path of a program that comes with the interpreter's environment."""
    return str(Path(sys.executable).with_name(name))


def run(*command: str) -> None:
    """Run a checker; fail with its words."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.fail(f"{' '.join(command)}\n{done.stdout}{done.stderr}", pytrace=False)
