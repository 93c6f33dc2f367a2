"""Shapes of what a migration has measured about itself.

The rule of the file: as in `control.shapes`, whose results have these as members.
"""

from __future__ import annotations

from migrated.control.shape import Shape


class LatencyInfo(Shape, frozen=True):
    """Latencies of one class of faults; bucket N counts those in [2^N, 2^(N+1)) microseconds."""

    count: int
    p50_us: int
    p99_us: int
    max_us: int
    buckets: list[int]


class FaultInfo(Shape, frozen=True):
    """What faults on missing pages have cost."""

    requests: int
    remote: LatencyInfo
    in_flight: LatencyInfo
    local: LatencyInfo


class PackingInfo(Shape, frozen=True):
    """What `multifd-compression` auto has chosen, and why."""

    chosen: str
    why: str
    packed_bytes: int
