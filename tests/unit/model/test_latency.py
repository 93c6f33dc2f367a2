"""The latency histogram against the sorted list of what went in."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrated.model.latency import DISTRIBUTION_BUCKETS, LatencyHistogram

#: 0, some nanoseconds, microseconds, and up to 20 s.
TIMES = st.lists(st.floats(0, 20) | st.floats(0, 1e-3) | st.floats(0, 2e-6), max_size=60)


def filled(times: list[float]) -> LatencyHistogram:
    histogram = LatencyHistogram()
    for seconds in times:
        histogram.add(seconds)
    return histogram


@given(TIMES.filter(len), st.sampled_from([1, 10, 50, 90, 99, 100]))
def test_a_percentile_is_within_a_sixteenth_of_the_real_one(times: list[float], percent: int) -> None:
    real = sorted(times)[max(1, math.ceil(len(times) * percent / 100)) - 1] * 1e6
    found = filled(times).percentile_us(percent)
    if real < 16e6:
        assert abs(found - real) <= max(real, 1) / 16 * 1.001
    else:
        assert found >= 15e6


@given(TIMES)
def test_count_mean_and_maximum_are_exact(times: list[float]) -> None:
    histogram = filled(times)
    assert histogram.count == len(times)
    assert histogram.max_us == pytest.approx(max(times, default=0.0) * 1e6)
    assert histogram.mean_us == pytest.approx(sum(times) / max(1, len(times)) * 1e6)
    if times:
        assert min(times) * 1e6 <= histogram.p50_us <= histogram.p99_us <= histogram.max_us


@given(TIMES, TIMES)
def test_merging_is_adding_everything(some: list[float], more: list[float]) -> None:
    merged, together = filled(some), filled(some + more)
    merged.merge(filled(more))
    assert merged.distribution() == together.distribution()
    assert merged.count == together.count
    assert (merged.p50_us, merged.p99_us, merged.max_us) == (together.p50_us, together.p99_us, together.max_us)
    assert merged.mean_us == pytest.approx(together.mean_us)


@given(st.integers(0, 2**26))
def test_the_distribution_is_in_powers_of_two(microseconds: int) -> None:
    # In the middle of a microsecond, because 2^N / 10^6 is no binary fraction.
    distribution = filled([(microseconds + 0.5) / 1e6]).distribution()
    assert len(distribution) == DISTRIBUTION_BUCKETS
    power = max(0, microseconds.bit_length() - 1)
    assert distribution.index(1) == min(power, DISTRIBUTION_BUCKETS - 1)
    assert sum(distribution) == 1


def test_nothing_was_added() -> None:
    empty = LatencyHistogram()
    assert (empty.count, empty.p50_us, empty.p99_us, empty.max_us, empty.mean_us) == (0, 0, 0, 0, 0)
    assert empty.distribution() == [0] * DISTRIBUTION_BUCKETS


def test_times_nobody_expects() -> None:
    odd = filled([-1.0, 1e9, math.inf])
    assert odd.distribution() == [1, *[0] * (DISTRIBUTION_BUCKETS - 2), 2]
    assert odd.percentile_us(1) < 1
    assert odd.p99_us == odd.max_us == math.inf


def test_equal_times() -> None:
    equal = filled([7e-6] * 1000)
    assert equal.p50_us == equal.p99_us == pytest.approx(7)
    assert equal.distribution()[2] == 1000
