"""Implementers of the ports that the control socket needs, which do nothing but remember what they were asked.

The rule of the file: settings are real value objects, so that refusals are the real ones; everything else is recorded
in `calls` or taken from an attribute that a test sets.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from msgspec import to_builtins
from numpy.typing import NDArray

from migrated.control.ports import EventCallback, Services
from migrated.migration.descriptors import Descriptors
from migrated.model.history import Report, Unreadable, find, listed
from migrated.model.parameters import Capabilities, Parameters
from migrated.model.runstate import RunState
from migrated.savevm.ports import DevicePort, DeviceState, RamBlockPort, TrackedMapping


class FakeMigrator:
    """MigratorPort: real capabilities and parameters, everything else recorded."""

    def __init__(self) -> None:
        self.capabilities = Capabilities()
        self.parameters = Parameters()
        self.calls: list[tuple[Any, ...]] = []
        self.info: dict[str, object] = {}
        self.script: list[dict[str, object]] = []
        self.refusal: Exception | None = None
        self.gate: asyncio.Event | None = None
        self.entered = asyncio.Event()
        self.descriptors = Descriptors()
        self.record: dict[str, object] = {"record": "owner", "text": "this host owns it", "next-step": "nothing to do"}
        self.verdict: dict[str, object] = {"ready": True, "checked": ["source", "destination"], "blockers": []}
        self.subscribers: list[EventCallback] = []

    def set_capabilities(self, changes: dict[str, bool]) -> None:
        self.capabilities = self.capabilities.replace(changes)

    def set_parameters(self, changes: dict[str, object]) -> None:
        self.parameters = self.parameters.replace(changes)

    async def migrate(self, uri: str, *, resume: bool = False, request_id: str = "") -> None:
        await self._called("migrate", uri, resume, *([request_id] if request_id else []))

    async def preflight(self, uri: str) -> dict[str, object]:
        await self._called("preflight", uri)
        return self.verdict

    async def cancel(self) -> None:
        await self._called("cancel")

    async def proceed(self, state: str) -> None:
        await self._called("proceed", state)

    async def incoming(self, uri: str) -> None:
        await self._called("incoming", uri)

    def start_postcopy(self) -> None:
        self.calls.append(("start_postcopy",))

    def pause(self) -> None:
        self.calls.append(("pause",))

    async def recover(self, uri: str) -> None:
        await self._called("recover", uri)

    def query(self) -> dict[str, object]:
        """The next answer of the script, then the last one for ever."""
        if self.script:
            self.info = self.script.pop(0)
        return self.info

    async def stop(self) -> None:
        await self._called("stop")
        self.emit("STOP")

    async def cont(self) -> None:
        await self._called("cont")
        self.emit("RESUME")

    async def release(self) -> None:
        await self._called("release")

    async def resolve(self, peer_is_fenced: bool, peer_is_running: bool) -> None:
        await self._called("resolve", peer_is_fenced, peer_is_running)

    def ownership(self) -> dict[str, object]:
        return self.record

    def subscribe(self, callback: EventCallback) -> Callable[[], None]:
        self.subscribers.append(callback)
        return lambda: self.subscribers.remove(callback)

    def emit(self, name: str, data: dict[str, object] | None = None) -> None:
        for callback in self.subscribers:
            callback(name, data or {})

    async def _called(self, *call: object) -> None:
        self.calls.append(call)
        self.entered.set()
        if self.gate:
            await self.gate.wait()
        if self.refusal:
            raise self.refusal


class FakeSnapshots:
    """SnapshotsPort: everything recorded; ``script`` is what query-jobs shows, one line after the other."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.found: list[dict[str, object]] = []
        self.script: list[dict[str, object]] = []
        self.refusal: Exception | None = None
        self._id = ""

    async def save(self, job_id: str, tag: str, vmstate: str, devices: Sequence[str]) -> None:
        self._called("save", job_id, tag, vmstate, list(devices))

    async def load(self, job_id: str, tag: str, vmstate: str, devices: Sequence[str]) -> None:
        self._called("load", job_id, tag, vmstate, list(devices))

    async def delete(self, job_id: str, tag: str, devices: Sequence[str]) -> None:
        self._called("delete", job_id, tag, list(devices))

    async def query(self) -> list[dict[str, object]]:
        return self.found

    def jobs(self) -> list[dict[str, object]]:
        """The next line of the script, then the last one for ever."""
        if len(self.script) > 1:
            return [{"id": self._id, **self.script.pop(0)}]
        return [{"id": self._id, **line} for line in self.script]

    def cancel_job(self, job_id: str) -> None:
        self._called("cancel", job_id)

    def dismiss_job(self, job_id: str) -> None:
        self._called("dismiss", job_id)

    def _called(self, verb: str, job_id: str, *rest: object) -> None:
        self._id = job_id
        self.calls.append((verb, job_id, *rest))
        if self.refusal:
            raise self.refusal


class FakeHistory:
    """HistoryPort with reports that a test puts into it."""

    def __init__(self) -> None:
        self.reports: list[Report | Unreadable] = []

    async def query(self) -> list[dict[str, object]]:
        return listed(self.reports)

    async def report(self, wanted: str) -> dict[str, object]:
        found: dict[str, object] = to_builtins(find([one for one in self.reports if isinstance(one, Report)], wanted))
        return found


@dataclass
class FakeBlock:
    """RamBlockPort without memory behind it."""

    name: str
    size_bytes: int
    page_size: int = 4096
    memfd: int = -1
    mappings: Sequence[TrackedMapping] = ()

    @property
    def pages(self) -> NDArray[np.uint8]:
        raise NotImplementedError


@dataclass
class FakeDevice:
    """DevicePort without state behind it."""

    idstr: str
    workload: str
    instance_id: int = 0
    version_id: int = 1
    priority: int = 0

    async def save(self) -> DeviceState:
        raise NotImplementedError

    async def load(self, state: bytes, version_id: int) -> None:
        raise NotImplementedError


@dataclass
class FakeMachine:
    """MachinePort as far as the control socket looks at it."""

    name: str = "kv"
    uuid: str | None = None
    machine_type: str = "none"
    run_state: RunState = RunState.RUNNING
    blocks: list[FakeBlock] = field(default_factory=list)
    attached: list[FakeDevice] = field(default_factory=list)

    def ram_blocks(self) -> Sequence[RamBlockPort]:
        return self.blocks

    def devices(self) -> Sequence[DevicePort]:
        return self.attached

    async def stop(self, run_state: RunState) -> None:
        raise NotImplementedError

    async def cont(self, *, confirm: bool = True) -> None:
        raise NotImplementedError

    def set_run_state(self, run_state: RunState) -> None:
        raise NotImplementedError

    async def throttle(self, percent: int) -> bool:
        raise NotImplementedError

    def check_alive(self) -> None:
        raise NotImplementedError

    def watch(self) -> None:
        raise NotImplementedError

    async def lost(self) -> None:
        raise NotImplementedError

    def bar(self, why: str) -> None:
        raise NotImplementedError

    async def arrival_lost(self) -> None:
        raise NotImplementedError

    async def wait_declared(self, blocks: Iterable[str], devices: Iterable[str], timeout_s: float) -> None:
        raise NotImplementedError

    async def moved(self, peer: str) -> None:
        raise NotImplementedError

    async def begin_incoming(self) -> None:
        raise NotImplementedError

    async def release(self) -> None:
        raise NotImplementedError


@dataclass
class FakeDaemon:
    """Everything a control server acts on, with handles for a test."""

    migrator: FakeMigrator = field(default_factory=FakeMigrator)
    snapshots: FakeSnapshots = field(default_factory=FakeSnapshots)
    history: FakeHistory = field(default_factory=FakeHistory)
    machine: FakeMachine = field(default_factory=FakeMachine)
    quit_asked: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def services(self) -> Services:
        return Services(self.migrator, self.snapshots, self.history, self.machine, self.quit_asked.set)
