"""Programs that have to be in C, compiled where they are needed.

The rule of the file: warnings are on, and what the compiler says is in the error.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

NEEDS = "needs gcc and libc6-dev"
_OPTIONS = ["-O2", "-pthread", "-Wall", "-Wextra", "-Wconversion"]


def has_compiler() -> bool:
    """Say whether a C program can be compiled here."""
    return shutil.which("gcc") is not None and Path("/usr/include/stdio.h").exists()


def compile_c(program: Path, sources: Sequence[Path], options: Sequence[str] = ()) -> Path:
    """Compile ``sources`` into ``program`` and return it."""
    command = ["gcc", *_OPTIONS, *options, "-o", str(program), *map(str, sources)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return program
