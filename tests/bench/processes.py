"""Processes of a benchmark: started here, ended here by pid, whatever happens in between.

The rule of the file: nothing outlives its ``with`` block.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

STOP_DEADLINE_S = 10.0
#: A start takes well under a second, filling a few GiB a few; a busy machine may need more.
DEADLINE_S = 120.0


class BenchError(Exception):
    """A competitor or a daemon did not do what the benchmark needs."""


@contextmanager
def running(command: Sequence[str], *, log: Path) -> Iterator[subprocess.Popen[str]]:
    """Run a program with pipes for stdin and stdout inside the block."""
    with log.open("a") as errors:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, bufsize=1
        )
    try:
        yield process
    finally:
        _end(process)


def module(name: str, *arguments: object) -> list[str]:
    """Return the command that runs one of our own modules."""
    return [sys.executable, "-m", name, *map(str, arguments)]


def expect(process: subprocess.Popen[str], word: str, log: Path) -> list[str]:
    """Read one line of the program's stdout, which must begin with ``word``; return the rest of its words."""
    assert process.stdout is not None
    line = process.stdout.readline().split()
    if not line or line[0] != word:
        raise BenchError(f"{process.args!r}: expected {word!r}, found {line!r}\n{tail(log)}")
    return line[1:]


def tell(process: subprocess.Popen[str], line: str) -> None:
    """Write one line to the program."""
    assert process.stdin is not None
    process.stdin.write(line + "\n")
    process.stdin.flush()


def tail(log: Path) -> str:
    """Return the last lines of a log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-20:]) if log.exists() else ""


def _end(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(STOP_DEADLINE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
