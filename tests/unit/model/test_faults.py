"""Figures of faults: summed up at one end, the same at the other."""

from __future__ import annotations

from migrated.model.faults import WORDS, FaultFigures, FaultSummary
from migrated.wire.return_path import FAULT_WORDS


def test_a_summary_travels_as_numbers() -> None:
    figures = FaultFigures(requests=3)
    for us in (80, 120, 5000):
        figures.remote.add(us / 1e6)
    figures.local.add(3e-6)
    summary = figures.summary()
    words = summary.to_words()
    assert len(words) == WORDS == FAULT_WORDS
    assert FaultSummary.from_words(words) == summary
    assert summary.as_dict()["requests"] == 3
    assert summary.remote.count == sum(summary.remote.buckets) == 3
    assert summary.remote.p50_us <= summary.remote.p99_us <= summary.remote.max_us == 5000
    assert summary.in_flight.count == 0
    assert summary.as_dict()["local"] == summary.local.as_dict()


def test_what_does_not_fit_into_a_number_is_the_largest_one() -> None:
    figures = FaultFigures(requests=2**40)
    assert figures.summary().to_words()[0] == 2**32 - 1
