"""`migratectl` as a process of its own, in front of a real control server on this event loop."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest_asyncio

from migrated.control.server import ControlServer
from tests.support.fake_services import FakeDaemon, FakeHistory, FakeMachine, FakeMigrator, FakeSnapshots

DEADLINE_S = 50.0


@dataclass(frozen=True)
class Ran:
    """How a call of the program ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        (line,) = self.out.splitlines()
        return json.loads(line)


@dataclass
class Ctl:
    """The program and the daemon it talks to."""

    daemon: FakeDaemon
    server: ControlServer
    path: str

    @property
    def migrator(self) -> FakeMigrator:
        return self.daemon.migrator

    @property
    def snapshots(self) -> FakeSnapshots:
        return self.daemon.snapshots

    @property
    def history(self) -> FakeHistory:
        return self.daemon.history

    @property
    def machine(self) -> FakeMachine:
        return self.daemon.machine

    async def start(self, *words: str, **options: Any) -> asyncio.subprocess.Process:
        environment = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
        options = {"stdout": asyncio.subprocess.PIPE, "stderr": asyncio.subprocess.PIPE, **options}
        return await asyncio.create_subprocess_exec(
            sys.executable, "-m", "migrated.cli.app", "--socket", self.path, *words,
            stdin=asyncio.subprocess.DEVNULL, env={**environment, **options.pop("env", {})}, **options,
        )  # fmt: skip

    async def run(self, *words: str) -> Ran:
        return await finish(await self.start(*words))


async def finish(process: asyncio.subprocess.Process) -> Ran:
    try:
        out, err = await asyncio.wait_for(process.communicate(), DEADLINE_S)
    except TimeoutError:
        process.kill()
        raise
    assert process.returncode is not None
    return Ran(process.returncode, (out or b"").decode(), (err or b"").decode())


@pytest_asyncio.fixture
async def ctl(tmp_path: Path) -> AsyncIterator[Ctl]:
    daemon = FakeDaemon()
    path = str(tmp_path / "qmp.sock")
    server = ControlServer(daemon.services, path)
    await server.start()
    yield Ctl(daemon, server, path)
    await server.close()
