"""The point of no return: how much of the last message has left decides who may run the machine."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any, cast

import pytest
import structlog

from migrated.errors import ChannelClosed, OutcomeUnknown
from migrated.migration.faultpoint import no_fault
from migrated.migration.host import Host
from migrated.migration.operator_pause import OperatorPause
from migrated.migration.ownership import Ownership
from migrated.migration.progress import Progress
from migrated.migration.return_path import PeerKind
from migrated.migration.switchover import Switchover
from migrated.model.handover import Hold
from migrated.model.runstate import RunState
from migrated.model.stats import BandwidthMeter
from migrated.model.status import OUTGOING, StatusCell
from migrated.savevm.iothread_lock import IothreadLock
from migrated.savevm.registry import SaveVMRegistry
from migrated.stream.outgoing import OutgoingStream
from tests.unit.migration.test_ownership import MemoryStore


def no_pause(host: Host) -> OperatorPause:
    return OperatorPause(host, StatusCell(OUTGOING, lambda status: None))


class BreakingChannel:
    """Takes ``room`` bytes and breaks."""

    has_return_path = True
    peer = "b:1"
    silence_timeout_s = 1.0
    bytes_received = 0

    def __init__(self, room: int) -> None:
        self._room = room
        self.bytes_sent = 0

    async def send(self, data: bytes) -> None:
        self.bytes_sent += min(len(data), self._room)
        raise ChannelClosed("Unable to write to socket: Broken pipe", peer=self.peer)


class FakeMachine:
    """Its run state, and no workloads."""

    run_state = RunState.RUNNING
    peer = ""

    def check_alive(self) -> None:
        return

    def set_run_state(self, run_state: RunState) -> None:
        self.run_state = run_state

    async def stop(self, run_state: RunState) -> None:
        self.run_state = run_state

    async def cont(self) -> None:
        self.run_state = RunState.RUNNING

    async def moved(self, peer: str) -> None:
        self.peer = peer


def fake_host(store: MemoryStore) -> Host:
    lock = IothreadLock()
    return cast(
        Host,
        SimpleNamespace(
            machine=FakeMachine(),
            registry=SaveVMRegistry(lock),
            lock=lock,
            ownership=Ownership(store),
            global_state=SimpleNamespace(store=lambda run_state: None),
            settings=SimpleNamespace(enabled=lambda name: False, seconds=lambda name: 10.0),
            clock=time.monotonic,
            log=structlog.get_logger(),
            fault_point=no_fault,
        ),
    )


@pytest.mark.parametrize(
    ("room", "error", "hold", "state"),
    [
        (0, ChannelClosed, Hold.OWNER, RunState.RUNNING),
        (1, OutcomeUnknown, Hold.RELEASED, RunState.FINISH_MIGRATE),
    ],
)
async def test_only_a_byte_that_left_makes_the_outcome_unknown(
    room: int, error: type[Exception], hold: Hold, state: RunState
) -> None:
    host = fake_host(MemoryStore({"hold": "owner", "epoch": 1}))
    switchover = Switchover(host, Progress(time.monotonic), no_pause(host), "id")
    channel = cast(Any, BreakingChannel(room))
    f = OutgoingStream(channel, BandwidthMeter())
    with pytest.raises(error):
        await switchover.run(f, channel, None, PeerKind.MIGRATED, lambda: None)
    assert host.ownership.record.hold is hold
    assert host.machine.run_state is state
    assert switchover.handed_over is (hold is Hold.RELEASED)


class FullDisk(MemoryStore):
    """A store that has no room when the answer is there."""

    async def write(self, record: dict[str, Any]) -> None:
        self.fails = record["hold"] == "moved"
        await super().write(record)


class PatientChannel(BreakingChannel):
    """Takes everything."""

    async def send(self, data: bytes) -> None:
        self.bytes_sent += len(data)


async def test_a_machine_that_moved_has_moved_also_where_that_cannot_be_written() -> None:
    store = FullDisk({"hold": "owner", "epoch": 1})
    host = fake_host(store)
    switchover = Switchover(host, Progress(time.monotonic), no_pause(host), "id")
    channel = cast(Any, PatientChannel(0))
    answer = asyncio.get_running_loop().create_future()
    answer.set_result(0)
    return_path = cast(Any, SimpleNamespace(answer=answer))
    f = OutgoingStream(channel, BandwidthMeter())
    await switchover.run(f, channel, return_path, PeerKind.MIGRATED, lambda: None)
    assert host.ownership.record.hold is Hold.MOVED
    assert store.record is not None
    assert store.record["hold"] == "released", "a restart asks"
    assert cast(Any, host.machine).peer == "b:1", "its workloads were told"
