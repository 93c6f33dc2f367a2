"""A machine with its attach server in the test process, and workloads in processes of their own.

The rule of the file: real sockets, real memfds, real userfaultfds. A workload is a few lines of Python that talk to the
test through `say` (one JSON value per line out) and `hear` (one line in); nobody sleeps to wait for anybody.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from migrated.machine.attach import AttachServer
from migrated.machine.machine import Machine
from migrated.model.runstate import RunState
from migrated.savevm.ports import DevicePort
from migrated.transport.fd_socket import FdSocket, connect_unix
from migrated.wire import attach

ROOT = Path(__file__).resolve().parents[2]

PRELUDE = """
import json, os, signal, sys, threading, time
from migrated.client import AttachError, AttachRefused, MachineMoved, attach
def say(value):
    sys.stdout.write(json.dumps(value) + "\\n")
    sys.stdout.flush()
def hear():
    return sys.stdin.readline().strip()
"""


class Site:
    """One machine, its attach server, and what they told the composition root."""

    def __init__(
        self, path: Path, run_state: RunState = RunState.RUNNING, stop_timeout_s: float = 10.0, name: str = "kv"
    ) -> None:
        self.path = str(path / "attach.sock")
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.devices: list[DevicePort] = []
        self.stop_timeout_s = stop_timeout_s
        self.machine = Machine(
            name,
            uuid=None,
            machine_type="none",
            initial_run_state=run_state,
            stop_timeout_s=lambda: self.stop_timeout_s,
            on_event=lambda event, content: self.events.append((event, content)),
            on_device_declared=self.devices.append,
            on_device_withdrawn=self.devices.remove,
        )
        self.server: AttachServer | None = None

    async def open(self, group: str | None = None, mode: int = 0o660) -> None:
        """Listen."""
        self.server = AttachServer(self.machine, self.path, mode=mode, group=group)
        await self.server.start()

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.server is not None:
            await self.server.close()
        self.machine.close()

    def event_names(self) -> list[str]:
        """What happened, in order."""
        return [name for name, _ in self.events]

    async def until(self, event: str, count: int = 1) -> None:
        """Wait until an event has happened ``count`` times."""
        while self.event_names().count(event) < count:
            changed = self.machine._changed
            await changed.wait()


class Process:
    """A workload of the test's in a process of its own."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.pid = process.pid

    async def said(self) -> Any:
        """Return the next thing it says; fail when it ended instead."""
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        assert line, f"the workload ended with code {await self._process.wait()}"
        return json.loads(line)

    def tell(self, text: str = "") -> None:
        """Say something to it."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{text}\n".encode())

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Send it a signal."""
        self._process.send_signal(number)

    async def ended(self) -> int:
        """Wait for its end, return its code."""
        return await self._process.wait()

    async def finish(self) -> None:
        """Kill it and take its pipes away."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            await self._process.communicate()


@contextlib.asynccontextmanager
async def workload(
    site: Site | None, source: str, *arguments: str, prelude: str = PRELUDE, **options: Any
) -> AsyncIterator[Process]:
    """Run a workload of ``source`` with $MIGRATED_ATTACH set; it is killed at the end, whatever state it is in."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if site is not None:
        environment["MIGRATED_ATTACH"] = site.path
    process = Process(
        await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            prelude + source,
            *arguments,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            cwd=ROOT,
            env=environment,
            **options,
        )
    )
    try:
        yield process
    finally:
        await process.finish()


class RawClient:
    """A client that says what the test wants, true or not. It lives in the test process."""

    def __init__(self, connection: FdSocket) -> None:
        self.connection = connection

    async def send(self, message: dict[str, Any] | bytes, fds: Sequence[int] = ()) -> None:
        """Send one packet."""
        await self.connection.send(message if isinstance(message, bytes) else json.dumps(message).encode(), fds)

    async def receive(self) -> dict[str, Any]:
        """Return the next packet; {} = closed. Descriptors are closed."""
        data, fds = await self.connection.receive(attach.MAX_MESSAGE_BYTES)
        for fd in fds:
            os.close(fd)
        found = json.loads(data) if data else {}
        assert isinstance(found, dict)
        return found

    async def ask(self, message: dict[str, Any], fds: Sequence[int] = ()) -> dict[str, Any]:
        """Send one packet and return the next."""
        await self.send(message, fds)
        return await self.receive()

    async def hello(self, carried: Sequence[int] = (), **fields: Any) -> dict[str, Any]:
        """Say hello, by default as a fresh cooperative workload without descriptors."""
        message = {"type": "hello", "version": 1, "name": "raw", "pause": "cooperative", "state": "fresh", "fds": []}
        return await self.ask({**message, **fields}, carried)


@contextlib.asynccontextmanager
async def raw_client(site: Site) -> AsyncIterator[RawClient]:
    """Connect without a word."""
    connection = await connect_unix(site.path, socket.SOCK_SEQPACKET)
    try:
        yield RawClient(connection)
    finally:
        connection.close()
