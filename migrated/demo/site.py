"""One side of the demo: a daemon and a walker attached to it, both real processes, in a directory of their own.

The rule of the file: whatever it starts it ends, by pid, also when the demo fails half-way.
"""

from __future__ import annotations

import json
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from migrated.control.client import QmpClient
from migrated.errors import ChannelClosed, MigratedError

T = TypeVar("T")

#: A start takes well under a second; a machine that is busy may need some more.
START_DEADLINE_S = 30.0
STOP_DEADLINE_S = 10.0
POLL_S = 0.05


class Site:
    """A daemon, a walker, and a QMP connection to the daemon."""

    def __init__(
        self,
        name: str,
        directory: Path,
        *,
        ram_bytes: int,
        seed: int = 7,
        incoming: str = "tcp:127.0.0.1:0",
        config: str = "",
        module: str = "migrated.demo.walker",
        program: Sequence[str] = (),
        walker_arguments: Sequence[str] = (),
        allow: Sequence[str] = (),
        launcher: Sequence[str] = (),
    ) -> None:
        self.name = name
        self.directory = directory / name
        self.directory.mkdir()
        self._ram_bytes = ram_bytes
        self._seed = seed
        self._incoming = incoming
        self._extra_config = config
        self._program = tuple(program) or ((sys.executable, "-m", module) if module else ())
        self._walker_arguments = walker_arguments
        self._allow = list(allow)
        self._launcher = launcher
        """What the daemon is started through; it has to become the daemon."""
        self._stack = ExitStack()
        self._events: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self.config = self.directory / "machine.toml"
        self.log_path = self.directory / "daemon.log"

    def __enter__(self) -> Self:
        try:
            self._write_config()
            self.daemon = self._start_daemon()
            self.qmp = self._stack.enter_context(wait_for(self._connect, f"daemon {self.name}", self.log_tail))
            if self._program:
                self.start_walker()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()

    # -- asking ------------------------------------------------------------------------------------------------

    @property
    def address(self) -> str:
        """Return the URI at which this daemon waits for machines."""
        answer = self.qmp.execute("query-migrate")["socket-address"][0]
        return f"tcp:{answer['host']}:{answer['port']}"

    def wait_event(self, name: str, deadline_s: float = START_DEADLINE_S) -> dict[str, Any]:
        """Return the walker's next event of that name."""
        while True:
            try:
                event = self._events.get(timeout=deadline_s)
            except queue.Empty:
                raise MigratedError(f"walker {self.name}: no event {name!r}\n{self.log_tail()}") from None
            if event["event"] == "gone":
                raise MigratedError(f"walker {self.name} ended unexpectedly\n{self.log_tail()}")
            if event["event"] == name:
                return event

    def check(self) -> dict[str, Any]:
        """Let the walker check its memory."""
        assert self.walker.stdin is not None
        self.walker.stdin.write("check\n")
        self.walker.stdin.flush()
        return self.wait_event("checked")

    def restart_daemon(self, number: signal.Signals = signal.SIGKILL) -> None:
        """End the daemon, as a crash would, and start it again; the walker stays and re-attaches."""
        self.daemon.send_signal(number)
        self.daemon.wait()
        self.daemon = self._start_daemon()
        self.qmp = self._stack.enter_context(wait_for(self._connect, f"daemon {self.name}", self.log_tail))

    def start_walker(self) -> None:
        """Start the walker and wait until it is attached."""
        self.walker = self._spawn_walker()
        self.ready = self.wait_event("ready")

    def stop_walker(self) -> None:
        """Kill the walker; the daemon stays."""
        self.walker.kill()
        self.walker.wait()
        while self._events.get(timeout=START_DEADLINE_S)["event"] != "gone":
            continue

    def log_tail(self) -> str:
        """Return the last lines of the daemon's log."""
        return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-15:]) if self.log_path.exists() else ""

    # -- starting ----------------------------------------------------------------------------------------------

    def _write_config(self) -> None:
        self.config.write_text(
            f'[machine]\nname = "demo"\n'
            f'[paths]\nruntime = "{self.directory / "run"}"\nstate = "{self.directory / "state"}"\n'
            f'[migration]\nincoming = "{self._incoming}"\nallow = {json.dumps(self._allow)}\n'
            f'[log]\nformat = "json"\n{self._extra_config}\n'
        )

    def _start_daemon(self) -> subprocess.Popen[str]:
        with self.log_path.open("w") as log:
            return self._own(
                subprocess.Popen(
                    [*self._launcher, sys.executable, "-m", "migrated", "--config", str(self.config)],
                    stdin=subprocess.DEVNULL, stdout=log, stderr=log, text=True,
                )
            )  # fmt: skip

    def _spawn_walker(self) -> subprocess.Popen[str]:
        command = [*self._program, "--attach", str(self.directory / "run" / "attach.sock")]
        command += ["--ram", str(self._ram_bytes), "--seed", str(self._seed), "--name", f"walker-{self.name}"]
        command += self._walker_arguments
        walker = self._own(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        reader = threading.Thread(target=self._read_events, args=(walker,), daemon=True)
        reader.start()
        self._stack.callback(reader.join)  # before the pipe it reads is closed
        self._stack.callback(_stop, walker)
        return walker

    def _own(self, process: subprocess.Popen[str]) -> subprocess.Popen[str]:
        self._stack.callback(_end, process)
        return process

    def _read_events(self, walker: subprocess.Popen[str]) -> None:
        assert walker.stdout is not None
        for line in walker.stdout:
            self._events.put(json.loads(line))
        self._events.put({"event": "gone"})

    def _connect(self) -> QmpClient | None:
        if self.daemon.poll() is not None:
            raise MigratedError(f"daemon {self.name} ended with status {self.daemon.returncode}\n{self.log_tail()}")
        try:
            return QmpClient(str(self.directory / "run" / "qmp.sock"))
        except ChannelClosed:
            return None


def wait_for(probe: Callable[[], T | None], what: str, detail: Callable[[], str]) -> T:
    """Ask ``probe`` until it gives something."""
    deadline = time.monotonic() + START_DEADLINE_S
    while time.monotonic() < deadline:
        if (found := probe()) is not None:
            return found
        time.sleep(POLL_S)
    raise MigratedError(f"{what} did not come up within {START_DEADLINE_S:g} s\n{detail()}")


def _end(process: subprocess.Popen[str]) -> None:
    """End one of our own processes and take its pipes away."""
    _stop(process)
    for pipe in (process.stdin, process.stdout):
        if pipe is not None and pipe is not sys.stdout:
            pipe.close()


def _stop(process: subprocess.Popen[str]) -> None:
    """End one of our own processes: politely, then by force. A walker that stands still has to be killed."""
    if process.poll() is None:
        process.terminate()
        process.send_signal(signal.SIGCONT)  # a frozen one gets its SIGTERM only when it goes on
        try:
            process.wait(STOP_DEADLINE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
