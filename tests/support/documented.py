"""Daemons and programs as the documents show them: started by their commands, followed by what they print.

The rule of the file: whatever it starts it ends, by process id, also when a test fails half-way.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from migrated.control.client import QmpClient
from migrated.demo.site import wait_for
from migrated.errors import ChannelClosed
from tests.house.repository import ROOT

EXAMPLES = ROOT / "docs" / "examples"


class Host:
    """One daemon in a directory of its own; programs run beside it."""

    def __init__(self, directory: Path, *, config: str = "", environment: Mapping[str, str] | None = None) -> None:
        self.directory = directory
        self._config = config
        paths = os.pathsep.join([str(ROOT), str(EXAMPLES)])
        self._environment = os.environ | {"PYTHONPATH": paths} | dict(environment or {})
        self._stack = ExitStack()
        self._errors = directory / "errors.log"

    def __enter__(self) -> Self:
        self.directory.mkdir()
        file = self.directory / "machine.toml"
        file.write_text(
            f'[paths]\nruntime = "{self.directory}/run"\nstate = "{self.directory}/state"\n'
            f'[migration]\nincoming = "tcp:127.0.0.1:0"\n{self._config}'
        )
        try:
            self.daemon = self._start(["-m", "migrated", "--config", str(file)], subprocess.DEVNULL)
            self.qmp = self._stack.enter_context(wait_for(self._connect, "the daemon", self.errors))
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()

    @property
    def attach_socket(self) -> str:
        """Where workloads attach."""
        return f"{self.directory}/run/attach.sock"

    @property
    def address(self) -> str:
        """The URI at which this daemon waits for machines."""
        answer = self.qmp.execute("query-migrate")["socket-address"][0]
        return f"tcp:{answer['host']}:{answer['port']}"

    def run_example(self, name: str, *arguments: str) -> Lines:
        """Start a program of the documents."""
        return Lines(self._start([str(EXAMPLES / name), *arguments], subprocess.PIPE), self.errors)

    def errors(self) -> str:
        """Return what was written to standard error so far."""
        return self._errors.read_text(errors="replace")

    def _start(self, arguments: Sequence[str], output: int) -> subprocess.Popen[str]:
        with self._errors.open("a") as errors:
            process = subprocess.Popen(
                [sys.executable, *arguments],
                stdin=subprocess.DEVNULL, stdout=output, stderr=errors, text=True, env=self._environment,
            )  # fmt: skip
        self._stack.callback(_end, process)
        return process

    def _connect(self) -> QmpClient | None:
        assert self.daemon.poll() is None, self.errors()
        try:
            return QmpClient(f"{self.directory}/run/qmp.sock")
        except ChannelClosed:
            return None


class Lines:
    """A program that prints JSON lines."""

    def __init__(self, process: subprocess.Popen[str], errors: Callable[[], str]) -> None:
        self._process = process
        self._errors = errors

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_for(self, member: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Read up to the first line that has ``member``; return the lines before it, and that line."""
        before: list[dict[str, Any]] = []
        assert self._process.stdout is not None
        for text in self._process.stdout:
            line: dict[str, Any] = json.loads(text)
            if member in line:
                return before, line
            before.append(line)
        raise AssertionError(f"the program ended before it printed {member!r}\n{self._errors()}")


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    if process.stdout is not None:
        process.stdout.close()
