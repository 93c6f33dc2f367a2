"""Figures of a migration: counters, bandwidth, where the downtime went.

The rule of the file: no clock. ``now`` is an argument, in seconds of any monotonic clock; what comes out is in
milliseconds or per second, and says so in its name.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

#: QEMU's BUFFER_DELAY: rate and bandwidth are settled ten times a second.
WINDOW_MS = 100.0
PAGE_BYTES = 4096


@dataclass(slots=True)
class _Counters:
    """What counts from the beginning of a migration."""

    def reset(self) -> None:
        """Begin again."""
        for one in fields(self):
            setattr(self, one.name, one.default)


@dataclass(slots=True)
class RamStats(_Counters):
    """The members of QEMU's MigrationStats that count something; sizes in bytes."""

    transferred: int = 0
    remaining: int = 0
    total: int = 0
    duplicate: int = 0
    """Zero pages."""
    normal: int = 0
    """Pages sent with their bytes."""
    dirty_pages_rate: int = 0
    mbps: float = 0.0
    dirty_sync_count: int = 0
    postcopy_requests: int = 0
    page_size: int = PAGE_BYTES
    multifd_bytes: int = 0
    pages_per_second: int = 0
    precopy_bytes: int = 0
    downtime_bytes: int = 0
    postcopy_bytes: int = 0
    dirty_sync_missed_zero_copy: int = 0

    def become(self, other: RamStats) -> None:
        """Take over what another one has counted."""
        for one in fields(self):
            setattr(self, one.name, getattr(other, one.name))

    def as_dict(self) -> dict[str, int | float]:
        """Return all members of MigrationStats under QEMU's names."""
        counted = {one.name.replace("_", "-"): getattr(self, one.name) for one in fields(self)}
        # skipped has been 0 in every QEMU for a decade, and 7.2 still has it.
        return {**counted, "skipped": 0, "normal-bytes": self.normal * self.page_size}


@dataclass(slots=True)
class DeltaStats(_Counters):
    """QEMU's XBZRLECacheStats: pages sent again as deltas. Sizes in bytes; the rates are those since the beginning."""

    cache_size: int = 0
    bytes: int = 0
    """Of deltas."""
    pages: int = 0
    """Sent as deltas, or not at all, for nothing had changed."""
    cache_miss: int = 0
    overflow: int = 0
    """Pages whose delta would have been longer."""
    looked_up: int = 0

    def count(self, *, looked_up: int, known: int, overflow: int) -> None:
        """Add pages that were looked up: how many of them were known, and how many of those changed too much."""
        self.looked_up += looked_up
        self.cache_miss += looked_up - known
        self.pages += known - overflow
        self.overflow += overflow

    def as_dict(self) -> dict[str, int | float]:
        """Return all members of XBZRLECacheStats under QEMU's names."""
        return {
            "cache-size": self.cache_size,
            "bytes": self.bytes,
            "pages": self.pages,
            "cache-miss": self.cache_miss,
            "cache-miss-rate": self.cache_miss / self.looked_up if self.looked_up else 0.0,
            "encoding-rate": self.pages * PAGE_BYTES / self.bytes if self.bytes else 0.0,
            "overflow": self.overflow,
        }


class BandwidthMeter:
    """Budget and bandwidth in windows of 100 ms (QEMU's rate limiting)."""

    def __init__(self, window_ms: float = WINDOW_MS) -> None:
        self._window_s = window_ms / 1000
        self._limit_bps = 0
        self._since: float | None = None
        self._sent = 0
        self._debt = 0.0
        self.bandwidth_bps = 0.0
        """Bytes per second over the last window in which anything was sent; 0 before the first has ended."""

    def set_limit(self, limit_bps: int) -> None:
        """Limit the rate to ``limit_bps`` bytes per second from now on; 0 = unlimited."""
        if limit_bps != self._limit_bps:
            self._limit_bps = limit_bps
            self._debt = 0.0
            if limit_bps:
                # What was sent in this window was within the old limit, and is no debt under a lower one.
                self._sent = min(self._sent, int(limit_bps * self._window_s))

    def account(self, count: int) -> None:
        """Count bytes that were handed to the network."""
        self._sent += count

    @property
    def limit_bps(self) -> int | None:
        """The limit, in bytes per second; None without one."""
        return self._limit_bps or None

    def exceeded(self, now: float) -> bool:
        """Say whether the present window's budget is used up."""
        self._begin(now)
        return bool(self._limit_bps) and self._debt + self._sent > self._limit_bps * self._window_s

    def time_left_s(self, now: float) -> float:
        """Return the time until the present window may be closed."""
        return max(0.0, self._begin(now) + self._window_s - now)

    def roll(self, now: float) -> bool:
        """Close the window when its time is over; then the bandwidth is new. Returns whether it was closed."""
        elapsed_s = now - self._begin(now)
        if elapsed_s < self._window_s:
            return False
        if self._sent:
            # A window in which nothing was sent tells nothing about the network.
            self.bandwidth_bps = self._sent / elapsed_s
        if self._limit_bps:
            # A budget is overshot by what was sent last; the next windows pay for it, so the mean rate holds.
            self._debt = max(0.0, self._debt + self._sent - self._limit_bps * elapsed_s)
        self._since = now
        self._sent = 0
        return True

    def threshold_bytes(self, downtime_limit_ms: int) -> int:
        """Return how many bytes pass within the downtime limit; 0 until a bandwidth is known."""
        return int(self.bandwidth_bps * downtime_limit_ms / 1000)

    def _begin(self, now: float) -> float:
        if self._since is None:
            self._since = now
        return self._since


class DowntimeLedger:
    """Where the time between stop and answer went."""

    #: The parts in the order in which they happen. Those that not every hand-over has only show where they happened.
    PARTS = ("stop", "operator", "sync", "ram", "devices", "ready", "record", "answer")
    _OPTIONAL = frozenset({"operator", "ready"})

    def __init__(self) -> None:
        self._begun: float | None = None
        self._marked = 0.0
        self._ended: float | None = None
        self._parts_ms: dict[str, float] = {}

    def begin(self, now: float) -> None:
        """Start: the machine is about to be stopped. What an earlier attempt wrote is forgotten."""
        self._begun = self._marked = now
        self._ended = None
        self._parts_ms = {}

    @property
    def running(self) -> bool:
        """True between `begin` and `end`."""
        return self._begun is not None and self._ended is None

    @property
    def over(self) -> bool:
        """True from `end` on."""
        return self._ended is not None

    def mark(self, part: str, now: float) -> None:
        """Book the time since the last mark on ``part``; booking a part twice adds up."""
        if part not in self.PARTS:
            raise ValueError(f"the downtime has no part '{part}'")
        self._parts_ms[part] = self._parts_ms.get(part, 0.0) + (now - self._marked) * 1000
        self._marked = now

    def end(self, now: float) -> None:
        """Stop: the answer is here."""
        self._ended = now

    def parts_ms(self) -> dict[str, float]:
        """Return the parts in order."""
        return {
            part: self._parts_ms.get(part, 0.0)
            for part in self.PARTS
            if part in self._parts_ms or part not in self._OPTIONAL
        }

    @property
    def total_ms(self) -> float:
        """The downtime: until the end, or until the last mark while there is none."""
        if self._begun is None:
            return 0.0
        return ((self._marked if self._ended is None else self._ended) - self._begun) * 1000
