"""Postcopy at the destination: every step in every state, QEMU's numbers in the refusals."""

from __future__ import annotations

from functools import reduce

import pytest

from migrated.errors import RemoteProtocolError
from migrated.model.postcopy import STEPS, PostcopyState, PostcopyStep, next_state

#: Which steps are allowed in which state; all others are refused.
ALLOWED = {
    ("NONE", "ADVISE"): "ADVISE",
    ("ADVISE", "DISCARD"): "DISCARD",
    ("ADVISE", "LISTEN"): "LISTENING",
    ("ADVISE", "END"): "END",
    ("DISCARD", "DISCARD"): "DISCARD",
    ("DISCARD", "LISTEN"): "LISTENING",
    ("LISTENING", "RUN"): "RUNNING",
    ("RUNNING", "END"): "END",
}


@pytest.mark.parametrize("state", PostcopyState)
@pytest.mark.parametrize("step", PostcopyStep)
def test_every_step_in_every_state(state: PostcopyState, step: PostcopyStep) -> None:
    to = ALLOWED.get((state.name, step.name))
    if to is not None:
        assert next_state(state, step) is PostcopyState[to]
        return
    with pytest.raises(RemoteProtocolError) as caught:
        next_state(state, step)
    assert caught.value.what == f"{step.value} in wrong postcopy state ({int(state)})"
    assert caught.value.found == state.name


@pytest.mark.parametrize("life", ["ADVISE DISCARD DISCARD LISTEN RUN END", "ADVISE LISTEN RUN END", "ADVISE END"])
def test_lives(life: str) -> None:
    steps = [PostcopyStep[name] for name in life.split()]
    assert reduce(next_state, steps, PostcopyState.NONE) is PostcopyState.END


def test_texts_and_numbers_are_qemus() -> None:
    assert [(state.name, state.value) for state in PostcopyState] == [
        ("NONE", 0), ("ADVISE", 1), ("DISCARD", 2), ("LISTENING", 3), ("RUNNING", 4), ("END", 5),
    ]  # fmt: skip
    with pytest.raises(RemoteProtocolError, match=r"^CMD_POSTCOPY_LISTEN in wrong postcopy state \(0\)"):
        next_state(PostcopyState.NONE, PostcopyStep.LISTEN)
    with pytest.raises(RemoteProtocolError, match="expected ADVISE or DISCARD, found RUNNING"):
        next_state(PostcopyState.RUNNING, PostcopyStep.DISCARD)


def test_when_pages_are_placed() -> None:
    assert {state.name for state in PostcopyState if state.listening} == {"LISTENING", "RUNNING"}
    assert set(STEPS) == set(PostcopyStep)
