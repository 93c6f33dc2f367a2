"""A daemon and a holder attached to it, both real processes, in a directory of their own.

The rule of the file: whatever it starts it ends, by pid, also when a test fails half-way. What can be read of a process
from outside (descriptors, memory) is read here.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from migrated.control.client import QmpClient
from migrated.errors import ChannelClosed
from tests.support.following import wait_until

ROOT = Path(__file__).resolve().parents[2]
STOP_DEADLINE_S = 10.0
EVENT_DEADLINE_S = 30.0

CONFIG = """
[machine]
name = "{name}"
type = "{machine_type}"
{uuid}
[paths]
runtime = "{directory}/run"
state = "{directory}/state"
[migration]
{incoming}
[migration.parameters]
{parameters}
[workload]
attach-timeout = {attach_timeout_s}
[log]
format = "json"
{config}
"""


class HoldingSite:
    """A daemon, a holder with ``blocks`` (name -> bytes) and ``devices``, and a QMP connection to the daemon."""

    def __init__(
        self,
        name: str,
        directory: Path,
        *,
        blocks: Mapping[str, int] | None = None,
        devices: Mapping[str, int] | None = None,
        incoming: str | None = "tcp:127.0.0.1:0",
        machine_type: str = "none",
        uuid: str = "",
        parameters: Mapping[str, object] | None = None,
        attach_timeout_s: float = 30,
        config: str = "",
        huge_pages: bool = False,
        launcher: Sequence[str] = (),
    ) -> None:
        self.name = name
        self.directory = directory / name
        self.directory.mkdir()
        self._blocks = blocks or {}
        self._devices = devices or {}
        self._huge_pages = huge_pages
        self._launcher = list(launcher)
        """What the holder is started through; it has to become the holder."""
        self._config = CONFIG.format(
            name=name,
            machine_type=machine_type,
            uuid=f'uuid = "{uuid}"' if uuid else "",
            directory=self.directory,
            incoming=f'incoming = "{incoming}"' if incoming else "",
            parameters="\n".join(f"{key} = {json.dumps(value)}" for key, value in (parameters or {}).items()),
            attach_timeout_s=attach_timeout_s,
            config=config,
        )
        self.log_path = self.directory / "daemon.log"
        self.socket = str(self.directory / "run" / "qmp.sock")
        self._stack = ExitStack()
        self._events: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._unread: list[dict[str, Any]] = []

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()

    def _start(self) -> None:
        self.config = self.directory / "machine.toml"
        self.config.write_text(self._config)
        with self.log_path.open("w") as log:
            self.daemon = self._own(
                [sys.executable, "-m", "migrated", "--config", str(self.config)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        self.qmp = self._stack.enter_context(wait_until(self._connect, f"daemon {self.name} answers"))
        if self._blocks or self._devices:
            self._start_holder()

    def _start_holder(self) -> None:
        command = [*self._launcher, sys.executable, "-m", "tests.support.holder", "--name", f"holder-{self.name}"]
        command += ["--attach", str(self.directory / "run" / "attach.sock")]
        command += ["--huge-pages"] if self._huge_pages else []
        for option, things in (("--block", self._blocks), ("--device", self._devices)):
            for name, size in things.items():
                command += [option, f"{name}:{size}"]
        self.holder = self._own(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        reader = threading.Thread(target=self._read_events, args=(self.holder,), daemon=True)
        reader.start()
        self._stack.callback(self._finish, reader)
        self.wait_event("ready")

    def _finish(self, reader: threading.Thread) -> None:
        _end(self.holder)
        reader.join()
        assert self.holder.stdout is not None
        self.holder.stdout.close()

    def _own(self, command: Sequence[str], **pipes: Any) -> subprocess.Popen[str]:
        process = subprocess.Popen(command, text=True, cwd=ROOT, **pipes)
        self._stack.callback(_end, process)
        return process

    def _read_events(self, holder: subprocess.Popen[str]) -> None:
        assert holder.stdout is not None
        for line in holder.stdout:
            self._events.put(json.loads(line))
        self._events.put({"event": "gone"})

    def _connect(self) -> QmpClient | None:
        assert self.daemon.poll() is None, f"daemon {self.name} ended: {self.log_tail()}"
        try:
            return QmpClient(self.socket)
        except ChannelClosed:
            return None

    # -- asking ------------------------------------------------------------------------------------------------

    @property
    def port(self) -> int:
        """Return the port at which this daemon waits for machines."""
        return int(self.query()["socket-address"][0]["port"])

    @property
    def address(self) -> str:
        """Return the URI at which this daemon waits for machines."""
        return f"tcp:127.0.0.1:{self.port}"

    def query(self) -> dict[str, Any]:
        return dict(self.qmp.execute("query-migrate"))

    def run_state(self) -> str:
        return str(self.qmp.execute("query-status")["status"])

    def parameter(self, name: str, value: object) -> None:
        self.qmp.execute("migrate-set-parameters", {name: value})

    def wait_status(self, *statuses: str) -> dict[str, Any]:
        """Wait until query-migrate shows one of ``statuses``; return that answer."""

        def probe() -> dict[str, Any] | None:
            answer = self.query()
            if answer.get("status") in statuses:
                return answer
            ended = answer.get("status") in ("completed", "failed", "cancelled")
            assert not ended, f"{self.name} ended otherwise: {answer}\n{self.log_tail()}"
            return None

        return dict(wait_until(probe, f"{self.name} in {statuses}"))

    def migrate(self, uri: str, *statuses: str) -> dict[str, Any]:
        """Migrate and wait for the end (completed, if nothing else is said)."""
        self.qmp.execute("migrate", {"uri": uri})
        return self.wait_status(*statuses or ("completed",))

    def wait_event(self, name: str) -> dict[str, Any]:
        """Return the holder's next event of that name; others wait until they are asked for."""
        for event in self._unread:
            if event["event"] == name:
                self._unread.remove(event)
                return event
        while True:
            try:
                event = self._events.get(timeout=EVENT_DEADLINE_S)
            except queue.Empty:
                raise AssertionError(f"holder {self.name}: no event {name!r}\n{self.log_tail()}") from None
            assert event["event"] != "gone", f"holder {self.name} ended\n{self.log_tail()}"
            if event["event"] == name:
                return event
            self._unread.append(event)

    def do(self, what: str, **arguments: Any) -> dict[str, Any]:
        """Let the holder do something."""
        self.begin(what, **arguments)
        return self.wait_event("did")

    def begin(self, what: str, **arguments: Any) -> None:
        """Let the holder do something that may take its time; it tells ``did`` then."""
        assert self.holder.stdin is not None
        self.holder.stdin.write(json.dumps({"do": what, **arguments}) + "\n")
        self.holder.stdin.flush()

    def capability(self, name: str, *, state: bool = True) -> None:
        self.qmp.execute("migrate-set-capabilities", {"capabilities": [{"capability": name, "state": state}]})

    def peek(self, block: str) -> bytes:
        """Return what the holder sees in a block."""
        return bytes.fromhex(self.do("peek", block=block)["hex"])

    def poke(self, block: str, offset: int, data: bytes) -> None:
        self.do("poke", block=block, offset=offset, hex=data.hex())

    def device(self, name: str) -> bytes:
        """Return the holder's state of a device."""
        return bytes.fromhex(self.do("state", device=name)["hex"])

    def log_tail(self) -> str:
        """Return the last lines of the daemon's log."""
        return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-15:])

    # -- from outside ------------------------------------------------------------------------------------------

    def descriptors(self) -> list[str]:
        """Return what the daemon has open, without numbers that differ each time, sorted."""
        found = []
        for entry in Path(f"/proc/{self.daemon.pid}/fd").iterdir():
            try:
                target = os.readlink(entry)
            except FileNotFoundError:
                continue
            if "/state/history" not in target:  # a report is written when the disk has time for it
                found.append("socket" if target.startswith("socket:") else target)
        return sorted(found)

    def private_bytes(self) -> int:
        """Return the daemon's resident memory that is its own (no mapped RAM blocks)."""
        status = Path(f"/proc/{self.daemon.pid}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("RssAnon:"))
        return int(line.split()[1]) << 10


def _end(process: subprocess.Popen[str]) -> None:
    """End one of our own processes: politely, then by force. Twice does no harm."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(STOP_DEADLINE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    if process.stdin is not None:
        process.stdin.close()


MakeSite = Callable[..., HoldingSite]
