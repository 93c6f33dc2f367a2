"""How long things took, in a few hundred counters.

The rule of the file: memory and cost of an `add` do not depend on how many there were. Times are counted in units of
1/16 us, in 16 equal buckets per power of two; a percentile is interpolated within its bucket, which is at most 1/16 of
the value wide (or 1/16 us), and no further off than that. Count, mean and maximum are exact. What is longer than 16 s
is counted in the last bucket, whose percentiles are the maximum.

`distribution` is QEMU 10.1's postcopy-latency-dist: bucket N holds the times in [2^N, 2^(N+1)) us, the first also
what is shorter, the last also what is longer.
"""

from __future__ import annotations

#: 2^23 us are 8 s.
DISTRIBUTION_BUCKETS = 24

_PARTS_BITS = 4
_PARTS = 1 << _PARTS_BITS
_UNITS_PER_SECOND = 1_000_000 * _PARTS
_UNITS_MAX = (_PARTS << DISTRIBUTION_BUCKETS) - 1
# Below 16 units (1 us) a bucket for each; then 16 for each power of two.
_BUCKETS = _PARTS * (DISTRIBUTION_BUCKETS + 1)


class LatencyHistogram:
    """A distribution of times; fed with seconds, answers in microseconds."""

    __slots__ = ("_buckets", "_count", "_max_s", "_min_s", "_sum_s")

    def __init__(self) -> None:
        self._buckets = [0] * _BUCKETS
        self._count = 0
        self._sum_s = 0.0
        self._min_s = 0.0
        self._max_s = 0.0

    def add(self, seconds: float) -> None:
        """Count one time; a negative one counts as 0."""
        seconds = max(0.0, seconds)
        self._min_s = min(self._min_s, seconds) if self._count else seconds
        self._max_s = max(self._max_s, seconds)
        self._count += 1
        self._sum_s += seconds
        self._buckets[_bucket(seconds)] += 1

    def merge(self, other: LatencyHistogram) -> None:
        """Count everything that was counted in ``other``, too."""
        if not other._count:
            return
        self._min_s = min(self._min_s, other._min_s) if self._count else other._min_s
        self._max_s = max(self._max_s, other._max_s)
        self._count += other._count
        self._sum_s += other._sum_s
        self._buckets = [ours + theirs for ours, theirs in zip(self._buckets, other._buckets, strict=True)]

    @property
    def count(self) -> int:
        """How many times were added."""
        return self._count

    @property
    def mean_us(self) -> float:
        """The mean, exactly; 0 where nothing was added."""
        return self._sum_s * 1e6 / self._count if self._count else 0.0

    @property
    def max_us(self) -> float:
        """The longest, exactly; 0 where nothing was added."""
        return self._max_s * 1e6

    @property
    def p50_us(self) -> float:
        """The median, interpolated within its bucket."""
        return self.percentile_us(50)

    @property
    def p99_us(self) -> float:
        """What one in a hundred exceeds, interpolated within its bucket."""
        return self.percentile_us(99)

    def percentile_us(self, percent: float) -> float:
        """Return what ``percent`` of all times do not exceed; 0 where nothing was added."""
        rank = max(1.0, self._count * percent / 100)
        below = 0
        for index, count in enumerate(self._buckets):
            if count and below + count >= rank:
                return self._within(index, (rank - below) / count)
            below += count
        return self.max_us

    def _within(self, index: int, share: float) -> float:
        """Return the time at a share of a bucket; never outside of what was added."""
        if index == _BUCKETS - 1:
            return self.max_us
        low, high = _edge(index), _edge(index + 1)
        return min(max((low + (high - low) * share) / _PARTS, self._min_s * 1e6), self.max_us)

    def distribution(self) -> list[int]:
        """Return how many times are in [2^N, 2^(N+1)) us, for N from 0 on."""
        sums = [sum(self._buckets[at : at + _PARTS]) for at in range(0, _BUCKETS, _PARTS)]
        return [sums[0] + sums[1], *sums[2:]]


def _bucket(seconds: float) -> int:
    """Return the bucket of a time."""
    units = min(int(min(seconds, 3600.0) * _UNITS_PER_SECOND), _UNITS_MAX)
    power = units.bit_length() - 1 - _PARTS_BITS
    return units if power < 0 else (power << _PARTS_BITS) + (units >> power)


def _edge(index: int) -> int:
    """Return the shortest time of a bucket, in units."""
    if index < _PARTS:
        return index
    power = (index >> _PARTS_BITS) - 1
    return (index - (power << _PARTS_BITS)) << power
