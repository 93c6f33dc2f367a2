"""A real control server on a Unix socket, in front of ports that only remember; on plain asyncio and on uvloop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio
import uvloop

from migrated.control.server import ControlServer
from tests.support.fake_services import FakeDaemon, FakeHistory, FakeMachine, FakeMigrator, FakeSnapshots
from tests.support.qmp_peer import QmpPeer


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    factories: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {"asyncio": asyncio.SelectorEventLoop}
    if not item.name.startswith("test_getfd_with_the_library"):  # which reaches into asyncio's own socket objects
        factories["uvloop"] = uvloop.new_event_loop
    return factories


@dataclass
class Control:
    """The server under test and what it acts on."""

    server: ControlServer
    daemon: FakeDaemon
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

    async def connect(self, *, negotiate: bool = True) -> QmpPeer:
        return await QmpPeer.connect(self.path, negotiate=negotiate)


@pytest_asyncio.fixture
async def control(tmp_path: Path) -> AsyncIterator[Control]:
    daemon = FakeDaemon()
    path = str(tmp_path / "qmp.sock")
    server = ControlServer(daemon.services, path)
    await server.start()
    yield Control(server, daemon, path)
    await server.close()


@pytest_asyncio.fixture
async def peer(control: Control) -> AsyncIterator[QmpPeer]:
    connected = await control.connect()
    yield connected
    connected.close()
