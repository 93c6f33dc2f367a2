"""Run states: QEMU's names, the moves of a machine's life, and what is no move."""

from __future__ import annotations

from itertools import pairwise

import pytest

from migrated.errors import LocalProtocolError
from migrated.model.runstate import RESTING, TRANSITIONS, RunState, check_transition

NAMES = (
    "debug inmigrate internal-error io-error paused postmigrate prelaunch finish-migrate restore-vm running save-vm"
    " shutdown suspended watchdog guest-panicked colo"
)


def test_the_names_are_qemus() -> None:
    assert {state.value for state in RunState} == set(NAMES.split())


@pytest.mark.parametrize(
    "life",
    [
        "prelaunch running paused running finish-migrate postmigrate",
        "running finish-migrate running",
        "paused finish-migrate paused",
        "prelaunch inmigrate running",
        "prelaunch inmigrate paused running",
        "inmigrate prelaunch inmigrate suspended",
        "postmigrate running",
        "postmigrate inmigrate running",
        "postmigrate finish-migrate postmigrate",
        "running save-vm running restore-vm running",
        "paused save-vm paused",
        "inmigrate restore-vm inmigrate restore-vm paused",
        "running shutdown finish-migrate shutdown",
    ],
)
def test_lives(life: str) -> None:
    for current, to in pairwise(map(RunState, life.split())):
        check_transition(current, to)


def test_staying_is_no_move() -> None:
    for state in RunState:
        check_transition(state, state)


@pytest.mark.parametrize(
    ("current", "to"),
    [("running", "postmigrate"), ("running", "inmigrate"), ("running", "prelaunch"), ("finish-migrate", "inmigrate")],
)
def test_what_is_no_move(current: str, to: str) -> None:
    with pytest.raises(LocalProtocolError) as caught:
        check_transition(RunState(current), RunState(to))
    assert str(caught.value) == f"invalid runstate transition: '{current}' -> '{to}'"


def test_the_table_covers_every_state_and_never_loops() -> None:
    assert set(TRANSITIONS) == set(RunState)
    for state, to in TRANSITIONS.items():
        assert to
        assert state not in to or state in RESTING


def test_a_failed_migration_gives_every_machine_its_state_back() -> None:
    for state in (*RESTING, RunState.RUNNING):
        check_transition(state, RunState.FINISH_MIGRATE)
        check_transition(RunState.FINISH_MIGRATE, state)
        check_transition(RunState.INMIGRATE, state)
