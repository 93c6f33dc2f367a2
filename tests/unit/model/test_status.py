"""Migration status: every move of the reference, the compare-and-swap, who wins a race."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrated.errors import LocalProtocolError
from migrated.model.status import INCOMING, OUTGOING, MigrationStatus, StatusCell, Table, is_running

S = MigrationStatus
RUNNING_TEXT = (
    "setup active postcopy-device postcopy-active postcopy-paused postcopy-recover-setup postcopy-recover"
    " pre-switchover device wait-unplug cancelling colo"
)
RUNNING = RUNNING_TEXT.split()


def cell_at(table: Table, status: MigrationStatus) -> tuple[StatusCell, list[MigrationStatus]]:
    """Return a cell that was led to ``status``, and the list its changes go to."""
    ways = {S.NONE: [S.NONE]}
    for found in list(S) * len(S):
        for to in table.get(found, ()) if found in ways else ():
            ways.setdefault(to, [*ways[found], to])
    seen: list[MigrationStatus] = []
    cell = StatusCell(table, seen.append)
    for step in ways[status][1:]:
        assert cell.advance(step)
    seen.clear()
    return cell, seen


def test_the_names_are_qemus() -> None:
    assert {status.value for status in S} == {*RUNNING, "none", "cancelled", "completed", "failed"}


def test_what_refuses_a_second_migration() -> None:
    assert [status.value for status in S if is_running(status)] == [s.value for s in S if s.value in RUNNING]


@pytest.mark.parametrize(
    ("table", "way"),
    [
        (OUTGOING, "none setup active completed"),
        (OUTGOING, "none setup active pre-switchover device completed setup"),
        (OUTGOING, "none setup active device completed none"),
        (OUTGOING, "none setup active cancelling cancelled setup active failed setup"),
        (OUTGOING, "none setup active pre-switchover cancelling cancelled"),
        (OUTGOING, "none setup wait-unplug active"),
        (OUTGOING, "none setup completed"),
        (OUTGOING, "none setup active postcopy-active postcopy-paused postcopy-recover postcopy-active completed"),
        (OUTGOING, "none setup active device postcopy-device postcopy-active failed"),
        (OUTGOING, "none setup active postcopy-active postcopy-paused postcopy-recover-setup postcopy-paused"),
        (INCOMING, "none active completed active"),
        (INCOMING, "none setup active failed setup active completed"),
        (INCOMING, "none active postcopy-active postcopy-paused postcopy-recover postcopy-paused"),
        (INCOMING, "none setup active postcopy-device postcopy-active completed"),
    ],
)
def test_ways(table: Table, way: str) -> None:
    seen: list[MigrationStatus] = []
    cell = StatusCell(table, seen.append)
    steps = [S(name) for name in way.split()]
    assert cell.value is steps[0]
    for before, step in pairwise(steps):
        assert cell.advance(step, expected={before})
        assert cell.value is step
    assert seen == steps[1:]


@pytest.mark.parametrize("status", [s for s in S if is_running(s) and s is not S.CANCELLING])
def test_everything_that_runs_can_be_cancelled_and_can_fail(status: MigrationStatus) -> None:
    for end in (S.CANCELLING, S.FAILED):
        cell, seen = cell_at(OUTGOING, status)
        assert cell.advance(end)
        assert seen == [end]


def test_a_swap_that_expects_another_status_is_not_done() -> None:
    cell, seen = cell_at(OUTGOING, S.ACTIVE)
    assert not cell.advance(S.DEVICE, expected={S.PRE_SWITCHOVER})
    assert not cell.advance(S.ACTIVE)
    assert (cell.value, seen) == (S.ACTIVE, [])


@pytest.mark.parametrize("status", [S.CANCELLING, S.CANCELLED, S.COMPLETED, S.FAILED])
def test_who_ends_a_migration_wins(status: MigrationStatus) -> None:
    cell, seen = cell_at(OUTGOING, status)
    for late in (S.ACTIVE, S.DEVICE, S.COMPLETED):
        assert not cell.advance(late)
    assert (cell.value, seen) == (status, [])


@pytest.mark.parametrize(
    ("table", "status", "to"),
    [
        (OUTGOING, S.NONE, S.ACTIVE),
        (OUTGOING, S.NONE, S.CANCELLING),
        (OUTGOING, S.ACTIVE, S.SETUP),
        (OUTGOING, S.DEVICE, S.ACTIVE),
        (INCOMING, S.NONE, S.COMPLETED),
        (INCOMING, S.ACTIVE, S.CANCELLING),
    ],
)
def test_moves_that_do_not_exist(table: Table, status: MigrationStatus, to: MigrationStatus) -> None:
    cell, seen = cell_at(table, status)
    with pytest.raises(LocalProtocolError) as caught:
        cell.advance(to, expected={status})
    assert str(caught.value) == f"invalid migration status transition: '{status}' -> '{to}'"
    assert (cell.value, seen) == (status, [])


@given(st.sampled_from([OUTGOING, INCOMING]), st.lists(st.sampled_from(list(S))))
def test_only_moves_of_the_table_happen(table: Table, steps: list[MigrationStatus]) -> None:
    seen: list[MigrationStatus] = []
    cell = StatusCell(table, seen.append)
    for step in steps:
        before, told = cell.value, len(seen)
        try:
            moved = cell.advance(step)
        except LocalProtocolError:
            moved = False
        assert (cell.value is not before) == moved == (len(seen) == told + 1)
        assert not moved or step in table[before]
