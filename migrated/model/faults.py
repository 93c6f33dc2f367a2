"""What faults on missing pages have cost: how many, how long, who stood still.

The rule of the file: it only counts and sums up. A destination's sums travel to its source as numbers (`to_words`), so
that both ends can show them.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import astuple, dataclass, field

from migrated.model.latency import DISTRIBUTION_BUCKETS, LatencyHistogram

_WORD_MAX = 2**32 - 1
_LATENCY_WORDS = 4 + DISTRIBUTION_BUCKETS
CLASSES = 3
#: How many numbers `FaultSummary.to_words` returns.
WORDS = 1 + CLASSES * _LATENCY_WORDS


@dataclass(frozen=True, slots=True)
class LatencySummary:
    """Latencies of one class in microseconds; ``buckets[N]`` counts those in [2^N, 2^(N+1))."""

    count: int
    p50_us: int
    p99_us: int
    max_us: int
    buckets: tuple[int, ...]

    @classmethod
    def of(cls, histogram: LatencyHistogram) -> LatencySummary:
        """Sum up a histogram."""
        return cls(
            histogram.count,
            round(histogram.p50_us),
            round(histogram.p99_us),
            round(histogram.max_us),
            tuple(histogram.distribution()),
        )

    def as_dict(self) -> dict[str, object]:
        """Return what ``query-migrate`` shows."""
        return {
            "count": self.count,
            "p50-us": self.p50_us,
            "p99-us": self.p99_us,
            "max-us": self.max_us,
            "buckets": list(self.buckets),
        }


@dataclass(frozen=True, slots=True)
class FaultSummary:
    """Faults by class: asked for at the source, waiting for what another had asked for, answered on this host."""

    requests: int
    remote: LatencySummary
    in_flight: LatencySummary
    local: LatencySummary

    def as_dict(self) -> dict[str, object]:
        """Return what ``query-migrate`` shows."""
        return {
            "requests": self.requests,
            "remote": self.remote.as_dict(),
            "in-flight": self.in_flight.as_dict(),
            "local": self.local.as_dict(),
        }

    def to_words(self) -> list[int]:
        """Return everything as WORDS numbers of 32 bits."""
        words = [self.requests]
        for latency in (self.remote, self.in_flight, self.local):
            *figures, buckets = astuple(latency)
            words += [*figures, *buckets]
        return [min(word, _WORD_MAX) for word in words]

    @classmethod
    def from_words(cls, words: Sequence[int]) -> FaultSummary:
        """Make a summary of WORDS numbers."""
        parts = [words[at : at + _LATENCY_WORDS] for at in range(1, WORDS, _LATENCY_WORDS)]
        remote, in_flight, local = (LatencySummary(p[0], p[1], p[2], p[3], tuple(p[4:])) for p in parts)
        return cls(words[0], remote, in_flight, local)


class Blocktime:
    """How long threads stood still: each one, and all that ever did at once (QEMU's postcopy-blocktime).

    A thread is named by any key; ``now`` is in seconds.
    """

    def __init__(self) -> None:
        self.all_s = 0.0
        self._since: dict[Hashable, float] = {}
        self._sum: dict[Hashable, float] = {}
        self._all_since = 0.0

    def enter(self, key: Hashable, now: float) -> None:
        self._since[key] = now
        self._sum.setdefault(key, 0.0)
        if len(self._since) == len(self._sum):
            self._all_since = now

    def leave(self, key: Hashable, now: float) -> None:
        since = self._since.pop(key, None)
        if since is None:
            return
        if len(self._since) + 1 == len(self._sum):
            self.all_s += now - self._all_since
        self._sum[key] += now - since

    def by_thread(self) -> list[float]:
        return list(self._sum.values())


@dataclass(slots=True)
class FaultFigures:
    """What a destination counts while it serves faults."""

    remote: LatencyHistogram = field(default_factory=LatencyHistogram)
    in_flight: LatencyHistogram = field(default_factory=LatencyHistogram)
    local: LatencyHistogram = field(default_factory=LatencyHistogram)
    requests: int = 0
    blocked: Blocktime = field(default_factory=Blocktime)

    def summary(self) -> FaultSummary:
        """Sum up what has been counted so far."""
        latencies = (LatencySummary.of(one) for one in (self.remote, self.in_flight, self.local))
        return FaultSummary(self.requests, *latencies)
