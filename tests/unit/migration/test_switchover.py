"""The point of no return: how much of the last message has left decides who may run the machine."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any, cast

import pytest

from migrated.errors import ChannelClosed, OutcomeUnknown
from migrated.migration.host import Host
from migrated.migration.ownership import Hold, Ownership
from migrated.migration.progress import Progress
from migrated.migration.return_path import PeerKind
from migrated.migration.switchover import Switchover
from migrated.model.runstate import RunState
from migrated.model.stats import BandwidthMeter
from migrated.model.status import OUTGOING, StatusCell
from migrated.savevm.iothread_lock import IothreadLock
from migrated.savevm.registry import SaveVMRegistry
from migrated.stream.outgoing import OutgoingStream
from tests.unit.migration.test_ownership import MemoryStore


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

    def check_alive(self) -> None:
        return

    def set_run_state(self, run_state: RunState) -> None:
        self.run_state = run_state

    async def stop(self, run_state: RunState) -> None:
        self.run_state = run_state

    async def cont(self) -> None:
        self.run_state = RunState.RUNNING


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
    lock, machine = IothreadLock(), FakeMachine()
    ownership = Ownership(MemoryStore({"hold": "owner", "epoch": 1}))

    host = SimpleNamespace(
        machine=machine,
        registry=SaveVMRegistry(lock),
        lock=lock,
        ownership=ownership,
        global_state=SimpleNamespace(store=lambda run_state: None),
        settings=SimpleNamespace(enabled=lambda name: False),
        clock=time.monotonic,
    )
    switchover = Switchover(cast(Host, host), Progress(time.monotonic), StatusCell(OUTGOING, lambda status: None), "id")
    channel = cast(Any, BreakingChannel(room))
    f = OutgoingStream(channel, BandwidthMeter())
    with pytest.raises(error):
        await switchover.run(f, channel, None, PeerKind.MIGRATED, lambda: None)
    assert ownership.record.hold is hold
    assert machine.run_state is state
    assert switchover.handed_over is (hold is Hold.RELEASED)
