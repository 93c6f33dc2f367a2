"""The nemesis: faults at random phases of migrations there and back, and a checker behind each.

One seed is one campaign: it says for each round which fault, at which point, at whom, in which mode. What has to be
true afterwards is `Stage.check`. Environment variables:

    MIGRATED_NEMESIS_ROUNDS    how many rounds (8; some seconds)
    MIGRATED_NEMESIS_SEED      another campaign (1)
    MIGRATED_NEMESIS_ROUND     only this round, as its campaign would play it

A failure names seed and round. ``make nemesis ROUNDS=300 SEED=7`` plays a long campaign.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.nemesis import Plan, plan, play
from tests.support.stage import Stage

ROUNDS = int(os.environ.get("MIGRATED_NEMESIS_ROUNDS", "8"))
SEED = os.environ.get("MIGRATED_NEMESIS_SEED", "1")
ONLY = os.environ.get("MIGRATED_NEMESIS_ROUND")


@pytest.fixture
def stages(tmp_path: Path) -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def new_stage(stages: ExitStack, directory: Path) -> Stage:
    stages.close()
    directory.mkdir()
    return stages.enter_context(Stage(directory))


@pytest.mark.limit(120 + 20 * ROUNDS)
@pytest.mark.row(1, 2, 3, 4, 5, 6, 13, 14, 15, 16, 17, 19, 31, 32, 40, 42)
def test_nemesis(stages: ExitStack, tmp_path: Path) -> None:
    """MIGRATED_NEMESIS_ROUNDS rounds of the campaign MIGRATED_NEMESIS_SEED."""
    stage = new_stage(stages, tmp_path / "0")
    ends: Counter[str] = Counter()
    for number in [int(ONLY)] if ONLY else range(ROUNDS):
        what = plan(f"{SEED}/{number}")
        try:
            ends[played(stage, what)] += 1
        except BaseException as error:
            error.add_note(f"MIGRATED_NEMESIS_SEED={SEED} MIGRATED_NEMESIS_ROUND={number}: {what}")
            raise
    print(f"seed {SEED}: {sum(ends.values())} rounds, the machine {dict(ends)}")


def played(stage: Stage, what: Plan) -> str:
    """Play one round; return what became of the machine."""
    source = stage.source
    play(stage, what)
    return "stayed" if stage.check(what.owner) is source else "moved"


def test_a_seed_is_a_plan() -> None:
    assert plan("7/1") == plan("7/1")
    assert len({plan(f"7/{number}") for number in range(100)}) > 50
