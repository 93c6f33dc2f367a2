"""Packing is chosen where it pays, and what is said of it is what was measured."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrated.model.packing_choice import PROBE_EVERY, WARM_UP_JOBS, JobCost, PackingChoice

JOB = 1 << 20
#: Seconds per MiB of memory.
PACKS_S = 0.001


class Migration:
    """Jobs of one channel, over a network and with memory of a kind."""

    def __init__(self, *, sends_s: float, ratio: float = 0.4, packs_s: float = PACKS_S, lanes: int = 1) -> None:
        self.sends_s, self.ratio, self.packs_s = sends_s, ratio, packs_s
        self.limit_bps: float | None = None
        self.choice = PackingChoice()
        self.choice.begin(lanes)

    def send(self, jobs: int) -> list[bool]:
        """Return which of the jobs were packed."""
        return [self._job() for _ in range(jobs)]

    def _job(self) -> bool:
        packed = self.choice.next_packs(self.limit_bps)
        wire = int(JOB * self.ratio) if packed else JOB
        cost = JobCost(JOB, wire, self.packs_s if packed else 0.0, self.sends_s * wire / JOB)
        self.choice.took(cost)
        return packed


def test_a_slow_network_and_memory_that_can_be_packed() -> None:
    migration = Migration(sends_s=0.01)
    first = migration.send(WARM_UP_JOBS)
    later = migration.send(10 * PROBE_EVERY)
    assert not any(first)
    assert sum(later) == len(later) - len(later) // PROBE_EVERY
    said = migration.choice.as_dict()
    assert said["chosen"] == "zstd"
    assert said["packed-bytes"] == sum(later) * JOB
    assert said["why"] == ("a channel sends 100 MiB/s and packs 1000 MiB/s to 40%: packed, memory goes 2 times as fast")


@pytest.mark.parametrize(
    "migration",
    [
        Migration(sends_s=0.0005),
        Migration(sends_s=0.01, ratio=1.0),
        Migration(sends_s=0.0016),  # it would win, but by too little
    ],
    ids=["fast network", "nothing to gain", "hardly anything to gain"],
)
def test_it_is_tried_now_and_then_where_it_does_not_pay(migration: Migration) -> None:
    packed = migration.send(10 * PROBE_EVERY)
    assert 1 <= sum(packed) <= 11
    assert migration.choice.as_dict()["chosen"] == "none"


def test_a_rate_limit_is_a_slow_network() -> None:
    migration = Migration(sends_s=0.0001, lanes=2)
    migration.limit_bps = 20 * JOB
    assert sum(migration.send(100)) > 80


def test_a_network_that_becomes_slow_and_fast_again() -> None:
    migration = Migration(sends_s=0.0005)
    migration.send(2 * PROBE_EVERY)
    migration.sends_s = 0.02
    assert sum(migration.send(2 * PROBE_EVERY)) > PROBE_EVERY
    migration.sends_s = 0.0001
    migration.send(200 * PROBE_EVERY)
    assert sum(migration.send(PROBE_EVERY)) <= 1


def test_nothing_is_said_before_something_is_known() -> None:
    choice = PackingChoice()
    assert not choice.active
    choice.begin(2)
    choice.took(JobCost(0, 1344, 0.0, 0.0))  # zero pages only
    assert choice.active
    assert choice.as_dict() == {"chosen": "none", "why": "too little was sent to know", "packed-bytes": 0}


@given(
    st.lists(st.tuples(st.floats(1e-6, 1), st.floats(1e-6, 1), st.integers(1, 2 * JOB)), max_size=80),
    st.none() | st.floats(1, 1e12),
)
def test_whatever_is_measured_something_is_chosen(costs: list[tuple[float, float, int]], limit: float | None) -> None:
    choice = PackingChoice()
    choice.begin(2)
    for pack_s, send_s, wire in costs:
        packed = choice.next_packs(limit)
        choice.took(JobCost(JOB, wire, pack_s if packed else 0.0, send_s))
    assert choice.as_dict()["chosen"] in ("none", "zstd")
