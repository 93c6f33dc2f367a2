"""The ownership record: which state may follow which, what may run, and what an operator is told."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest

from migrated.errors import CommandError, ConfigError
from migrated.migration.ownership import ADVICE, Ownership
from migrated.model.handover import NEXT, OWNING, Hold
from migrated.model.runstate import RunState

MAY_RECEIVE = (Hold.NONE, Hold.PARTIAL, Hold.MOVED, Hold.PREPARED)


class MemoryStore:
    """A RecordStore that can be told to fail."""

    def __init__(self, record: dict[str, Any] | None = None) -> None:
        self.record = record
        self.fails = False

    def read(self) -> dict[str, Any] | None:
        return self.record

    async def write(self, record: dict[str, Any]) -> None:
        if self.fails:
            raise OSError(28, "No space left on device")
        self.record = record


def at(hold: Hold) -> Ownership:
    return Ownership(MemoryStore({"hold": hold.value, "epoch": 3, "peer": "b:1"}))


@pytest.mark.parametrize("before", Hold)
@pytest.mark.parametrize("after", Hold)
async def test_the_table_is_the_law(before: Hold, after: Hold) -> None:
    ownership = at(before)
    if after in NEXT[before] or before is after in OWNING:
        await ownership.become(after, peer="c:1")
        assert ownership.record.hold is after
    else:
        with pytest.raises(CommandError, match=f"the record says {before.value}"):
            await ownership.become(after)
        assert ownership.record.hold is before


async def test_a_round_trip_survives_restarts_and_the_epoch_grows_with_each_owner() -> None:
    store = MemoryStore()
    epochs = []
    for hold in (Hold.OWNER, Hold.RELEASED, Hold.MOVED, Hold.OWNER, Hold.RELEASED, Hold.OWNER):
        ownership = Ownership(store)
        await ownership.become(hold, peer="b:1", migration_id="m")
        assert Ownership(store).record == ownership.record
        epochs.append(ownership.record.epoch)
    assert epochs == [1, 1, 1, 2, 2, 2], "taking back what was never taken over is no new epoch"


@pytest.mark.parametrize("hold", Hold)
def test_who_may_start_and_who_may_receive(hold: Hold) -> None:
    ownership = at(hold)
    assert ownership.may_run is (hold in OWNING)
    refused = pytest.raises(CommandError)
    with contextlib.nullcontext() if hold in (Hold.NONE, Hold.OWNER) else refused:
        ownership.require_may_start()
    with contextlib.nullcontext() if hold in MAY_RECEIVE else refused:
        ownership.require_may_receive()


@pytest.mark.parametrize("hold", Hold)
def test_every_state_says_what_is_known_and_what_is_next(hold: Hold) -> None:
    answer = at(hold).as_dict()
    assert answer["record"] == hold.value
    assert answer["text"]
    assert answer["next-step"]
    assert "{" not in str(answer["text"])
    assert hold in ADVICE


async def test_what_an_owner_does_is_kept_until_somebody_changes_it() -> None:
    store = MemoryStore()
    await Ownership(store).become(Hold.OWNER)
    assert Ownership(store).record.run_state is RunState.RUNNING
    await Ownership(store).become(Hold.OWNER, run_state=RunState.PAUSED)
    for hold in (Hold.OWNER, Hold.RELEASED, Hold.OWNER):
        await Ownership(store).become(hold)
        assert Ownership(store).record.run_state is RunState.PAUSED


def test_a_record_from_before_run_states_were_kept_is_read() -> None:
    assert at(Hold.OWNER).record.run_state is RunState.RUNNING


@pytest.mark.parametrize("run_state", ["finish-migrate", "flying", ""])
def test_a_run_state_that_no_owner_has_is_refused(run_state: str) -> None:
    with pytest.raises(ConfigError, match="cannot be understood"):
        Ownership(MemoryStore({"hold": "owner", "epoch": 1, "run_state": run_state}))


@pytest.mark.parametrize(
    ("peer", "text"),
    [
        ("b:1", "the machine runs at b:1"),
        ("[::1]:7400", "the machine runs at [::1]:7400"),
        ("unix:/x", "the machine runs at unix:/x"),
        ("file:/m", "the machine was saved to file:/m"),
        ("exec:gzip > /m", "the machine was handed to exec:gzip > /m"),
        ("fd:7", "the machine was written to fd:7"),
        ("", "the machine runs at the other host"),
    ],
)
def test_a_machine_runs_at_no_file(peer: str, text: str) -> None:
    ownership = Ownership(MemoryStore({"hold": "moved", "epoch": 3, "peer": peer}))
    assert ownership.text() == text
    assert ("migrate it back" in ownership.next_step()) is text.startswith("the machine runs")
    released = Ownership(MemoryStore({"hold": "released", "epoch": 3, "peer": peer}))
    assert "the outcome is unknown" in released.text()


async def test_a_record_that_cannot_be_written_is_not_taken_as_written() -> None:
    store = MemoryStore({"hold": "owner", "epoch": 1})
    ownership = Ownership(store)
    store.fails = True
    with pytest.raises(OSError, match="No space left"):
        await ownership.become(Hold.RELEASED)
    assert ownership.may_run


async def test_a_known_move_stays_known_even_if_it_cannot_be_written() -> None:
    store = MemoryStore({"hold": "released", "epoch": 1})
    ownership = Ownership(store)
    store.fails = True
    with pytest.raises(OSError, match="No space left"):
        await ownership.become(Hold.MOVED)
    assert ownership.record.hold is Hold.MOVED
    assert Ownership(store).outcome_unknown


@pytest.mark.parametrize("raw", [{}, {"hold": "mine", "epoch": 1}, {"hold": "owner", "epoch": "x"}])
def test_a_record_nobody_understands_stops_the_daemon(raw: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="cannot be understood"):
        Ownership(MemoryStore(raw))


class WrittenAllTheSame(MemoryStore):
    """A store whose write is cancelled when it is done."""

    async def write(self, record: dict[str, Any]) -> None:
        await super().write(record)
        raise asyncio.CancelledError


async def test_after_a_cancelled_write_memory_says_what_the_disk_says() -> None:
    store = WrittenAllTheSame({"hold": "owner", "epoch": 1})
    ownership = Ownership(store)
    with pytest.raises(asyncio.CancelledError):
        await ownership.become(Hold.RELEASED)
    assert ownership.record == Ownership(store).record
