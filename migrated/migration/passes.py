"""The iteration loop: passes over what is dirty, until the rest fits the downtime limit or may follow the machine.

The rule of the file: no lock is held here; what goes on is a pure decision (`model.convergence`) on figures. Source of
the loop: QEMU's migration thread, 7.2.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from enum import Enum, auto

from migrated.migration.host import Host
from migrated.migration.progress import Progress
from migrated.model.convergence import Decision, decide, is_outpaced, next_throttle
from migrated.stream.outgoing import OutgoingStream

#: The throttle is reconsidered at most this often, as QEMU does.
THROTTLE_PERIOD_S = 1.0


class Switch(Enum):
    """How the machine changes over."""

    PRECOPY = auto()
    POSTCOPY = auto()


class Passes:
    """The passes of one outgoing migration."""

    def __init__(self, host: Host, progress: Progress, migration_id: str) -> None:
        self._host = host
        self._progress = progress
        self._migration_id = migration_id
        self._throttle_checked_at = 0.0
        self._outpaced_before = False

    async def run(self, f: OutgoingStream, postcopy_wanted: Callable[[], bool]) -> Switch:
        """Make passes until what is left fits the downtime limit, or may follow the machine. No lock held."""
        host, progress, clock = self._host, self._progress, self._host.clock
        while True:
            progress.meter.set_limit(host.settings.parameters.integer("max-bandwidth"))
            if (wait_s := progress.meter.time_left_s(clock())) > 0 and progress.meter.exceeded(clock()):
                await asyncio.sleep(wait_s)
            progress.meter.roll(clock())
            limit_ms = host.settings.parameters.integer("downtime-limit")
            threshold = progress.meter.threshold_bytes(limit_ms)
            passes = len(progress.passes)
            pending = await host.registry.save_live_pending(f, threshold)
            facts = progress.facts(pending.total, limit_ms)
            if decide(facts) is Decision.COMPLETE:
                return Switch.PRECOPY
            if postcopy_wanted() and pending.precopy_only <= threshold:
                return Switch.POSTCOPY
            if len(progress.passes) != passes:
                await self._after_pass()
            await host.fault_point("source.pass")
            await host.registry.save_live_iterate(f)

    async def _after_pass(self) -> None:
        progress, settings, now = self._progress, self._host.settings, self._host.clock()
        auto_converge, limit_ms = settings.enabled("auto-converge"), settings.parameters.integer("downtime-limit")
        highest = settings.parameters.integer("max-cpu-throttle") if auto_converge else None
        assessment = progress.judge(progress.facts(progress.stats.remaining, limit_ms, highest))
        if not assessment.converging:
            self._host.log.warning("migration_not_converging", text=assessment.text, migration_id=self._migration_id)
        if not auto_converge or now - self._throttle_checked_at < THROTTLE_PERIOD_S:
            return
        self._throttle_checked_at = now
        last = progress.passes[-1]
        written, parameters = (last.dirtied_bytes, last.sent_bytes), settings.parameters
        percent = next_throttle(progress.throttle_percent, *written, parameters, self._outpaced_before)
        raised = percent != progress.throttle_percent
        self._outpaced_before = not raised and (self._outpaced_before or is_outpaced(*written, parameters))
        if raised and await self._host.machine.throttle(percent):
            progress.throttle_percent = percent
            self._host.log.info("workload_throttled", percent=percent, migration_id=self._migration_id)
