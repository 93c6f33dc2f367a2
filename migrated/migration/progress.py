"""What one migration has done so far: counters, passes, bandwidth, downtime.

The rule of the file: it only remembers and derives; the engine and the "ram" handler tell it what happened. `report`
turns it into ``query-migrate``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from migrated.model.convergence import Assessment, Facts, assess
from migrated.model.faults import FaultSummary
from migrated.model.packing_choice import PackingChoice
from migrated.model.stats import BandwidthMeter, DeltaStats, DowntimeLedger, RamStats

#: QEMU trusts a bandwidth figure only after this much has been sent.
TRUSTED_BYTES = 10_000


@dataclass(frozen=True, slots=True)
class Pass:
    """One look at the dirty log and what was sent since the look before it."""

    number: int
    sent_bytes: int
    dirtied_bytes: int
    ms: float


class Progress:
    """Figures of the present (or last) migration in one direction."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.stats = RamStats()
        self.deltas = DeltaStats()
        self.packing = PackingChoice()
        self.meter = BandwidthMeter()
        self.ledger = DowntimeLedger()
        self._kept = False
        self.begin()

    def begin(self, at: float | None = None) -> None:
        """Forget the last migration; this one began ``at``, or now."""
        self.stats.reset()
        self.deltas.reset()
        self.packing.reset()
        self.meter = BandwidthMeter()
        self.ledger = DowntimeLedger()
        self.passes: list[Pass] = []
        self.started_at = self._pass_started_at = self._clock() if at is None else at
        self._pass_sent = 0
        self.setup_ms: float | None = None
        self.total_ms: float | None = None
        self.dirty_bps = 0.0
        self.assessment: Assessment | None = None
        self.throttle_percent = 0
        self._throttle_wanted = False
        self.sent_bytes = 0
        self.faults: FaultSummary | None = None

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Let the handlers count for something that is no migration; what is known of the last one stays as it is."""
        counting = self.stats
        self.stats = replace(counting)
        self._kept = True
        counting.reset()
        try:
            yield
        finally:
            counting.become(self.stats)
            self.stats = counting
            self._kept = False

    def setup_done(self) -> None:
        """Setup sections are written."""
        self.setup_ms = (self._clock() - self.started_at) * 1000

    def finish(self) -> None:
        """The migration ended, one way or the other. Only the first time counts: tidying up takes no part in it."""
        if self.total_ms is None:
            self.total_ms = (self._clock() - self.started_at) * 1000

    def elapsed_ms(self) -> float:
        """Return milliseconds since `migrate`, until the end if it has ended."""
        return self.total_ms if self.total_ms is not None else (self._clock() - self.started_at) * 1000

    def synced(self, newly_dirty_pages: int) -> bool:
        """Record a pass: the dirty log was read and gave that many new pages. False: of something else (`kept`)."""
        if self._kept:
            return False
        now = self._clock()
        seconds = max(now - self._pass_started_at, 1e-6)
        dirtied = newly_dirty_pages * self.stats.page_size
        if self.stats.dirty_sync_count > 1:
            self.passes.append(Pass(len(self.passes) + 1, self.sent_bytes - self._pass_sent, dirtied, seconds * 1000))
            if self.ledger.running:
                self.ledger.mark("sync", now)  # the machine stands still: this look says nothing about its rate
            else:
                self.dirty_bps = dirtied / seconds
                self.stats.dirty_pages_rate = round(newly_dirty_pages / seconds)
        self._pass_started_at = now
        self._pass_sent = self.sent_bytes
        return True

    def faulted(self, figures: FaultSummary) -> None:
        """Remember what faults at the other end have cost so far."""
        self.faults = figures

    def sent(self, count: int) -> None:
        """Account bytes handed to the channel."""
        self.sent_bytes += count
        self.stats.transferred = self.sent_bytes
        if self.ledger.running:
            self.stats.downtime_bytes += count
        elif self.ledger.over:
            self.stats.postcopy_bytes += count
        else:
            self.stats.precopy_bytes += count

    def facts(self, pending_bytes: int, downtime_limit_ms: int, throttle_limit_percent: int | None = None) -> Facts:
        """Return what the convergence policy decides on; ``throttle_limit_percent`` None: auto-converge is off."""
        return Facts(
            pending_bytes=pending_bytes,
            threshold_bytes=self.meter.threshold_bytes(downtime_limit_ms),
            bandwidth_bps=self.meter.bandwidth_bps,
            dirty_bps=self.dirty_bps,
            passes=len(self.passes),
            ram_bytes=self.stats.total,
            downtime_limit_ms=downtime_limit_ms,
            pass_history=tuple((p.sent_bytes, p.dirtied_bytes) for p in self.passes),
            throttle_percent=self.throttle_percent,
            throttle_limit_percent=throttle_limit_percent,
        )

    def judge(self, facts: Facts) -> Assessment:
        """Keep and return what the policy says about convergence."""
        self.assessment = assess(facts)
        return self.assessment

    def expected_downtime_ms(self, downtime_limit_ms: int) -> int:
        """Return what a switchover right now would take, or the limit while nothing is known."""
        if self.sent_bytes < TRUSTED_BYTES or not self.meter.bandwidth_bps or not self.dirty_bps:
            return downtime_limit_ms
        return round(self.stats.remaining / self.meter.bandwidth_bps * 1000)

    def eta_ms(self) -> int | None:
        """Return the time until everything now pending is sent; None while it cannot be known."""
        surplus = self.meter.bandwidth_bps - self.dirty_bps
        return round(self.stats.remaining / surplus * 1000) if surplus > 0 and self.meter.bandwidth_bps else None
