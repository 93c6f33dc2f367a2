"""Counters, the bandwidth meter's windows, and the downtime ledger. The clock is a number."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrated.model.stats import BandwidthMeter, DowntimeLedger, RamStats

# -- counters --------------------------------------------------------------------------------------------------

MEMBERS = (
    "transferred remaining total duplicate skipped normal normal-bytes dirty-pages-rate mbps dirty-sync-count"
    " postcopy-requests page-size multifd-bytes pages-per-second precopy-bytes downtime-bytes postcopy-bytes"
    " dirty-sync-missed-zero-copy"
)


def test_members_are_those_of_qemu_7_2() -> None:
    stats = RamStats(normal=3, dirty_sync_count=2, mbps=1.5)
    shown = stats.as_dict()
    assert set(shown) == set(MEMBERS.split())
    assert shown["normal-bytes"] == 3 * 4096
    assert (shown["dirty-sync-count"], shown["mbps"], shown["skipped"]) == (2, 1.5, 0)


def test_reset() -> None:
    stats = RamStats(total=1, transferred=2, page_size=8192)
    other = RamStats(normal=7)
    other.become(stats)
    assert other == stats
    stats.reset()
    assert stats == RamStats()


# -- bandwidth -------------------------------------------------------------------------------------------------


def test_a_window_closes_after_100_ms() -> None:
    meter = BandwidthMeter()
    assert not meter.roll(10.0)
    assert meter.time_left_s(10.04) == pytest.approx(0.06)
    assert not meter.roll(10.09)
    assert meter.time_left_s(10.2) == 0
    assert meter.roll(10.1001)
    assert not meter.roll(10.15)


def test_bandwidth_and_threshold() -> None:
    meter = BandwidthMeter()
    assert meter.threshold_bytes(300) == 0
    meter.roll(0.0)
    meter.account(30_000_000)
    meter.account(10_000_000)
    assert meter.threshold_bytes(300) == 0
    assert meter.roll(0.2)
    assert meter.bandwidth_bps == 200_000_000
    assert meter.threshold_bytes(300) == 60_000_000
    # Nothing was sent: nothing is known that was not known before.
    assert meter.roll(0.4)
    assert meter.bandwidth_bps == 200_000_000


def test_unlimited_is_never_exceeded() -> None:
    meter = BandwidthMeter()
    meter.account(1 << 60)
    assert not meter.exceeded(0.0)


def test_budget_of_a_window() -> None:
    meter = BandwidthMeter()
    meter.set_limit(1000)
    meter.account(100)
    assert not meter.exceeded(0.0)
    meter.account(1)
    assert meter.exceeded(0.0)
    # A higher limit takes effect at once, and so does none.
    meter.set_limit(2000)
    assert not meter.exceeded(0.0)
    meter.account(100)
    assert meter.exceeded(0.05)
    meter.set_limit(0)
    assert not meter.exceeded(0.05)


def test_what_was_sent_under_a_higher_limit_is_no_debt() -> None:
    meter = BandwidthMeter()
    meter.set_limit(4000)
    meter.roll(0.0)
    meter.account(390)
    meter.set_limit(1000)
    meter.account(1)
    assert meter.exceeded(0.05)
    assert meter.roll(0.1)
    assert not meter.exceeded(0.1)


def test_what_was_overshot_is_paid_for() -> None:
    meter = BandwidthMeter()
    meter.set_limit(1000)
    meter.roll(0.0)
    meter.account(400)
    assert meter.roll(0.125)
    assert meter.exceeded(0.125)
    meter.set_limit(1000)
    assert meter.roll(0.25)
    assert meter.exceeded(0.25)
    assert meter.roll(0.375)
    assert not meter.exceeded(0.375)
    # A change of the limit is a new start.
    meter.account(1000)
    assert meter.roll(0.5)
    meter.set_limit(1001)
    assert not meter.exceeded(0.5)


@given(st.lists(st.integers(1, 5000), min_size=30, max_size=60))
def test_the_mean_rate_holds(chunks: list[int]) -> None:
    meter = BandwidthMeter()
    meter.set_limit(10_000)
    now = 0.0
    meter.roll(now)
    for chunk in chunks:
        while meter.exceeded(now):
            now += 0.1001
            meter.roll(now)
        meter.account(chunk)
    # One window's budget and the last chunk may be ahead of the clock.
    assert sum(chunks) <= 10_000 * now + 1000 + 5000 + 1


# -- downtime --------------------------------------------------------------------------------------------------


def test_ledger() -> None:
    ledger = DowntimeLedger()
    assert ledger.total_ms == 0
    running = [ledger.running]
    ledger.begin(5.0)
    running.append(ledger.running)
    for part, now in [("stop", 5.001), ("ram", 5.004), ("devices", 5.0045), ("ram", 5.0055)]:
        ledger.mark(part, now)
    assert ledger.total_ms == pytest.approx(5.5)
    ledger.end(5.010)
    assert [*running, ledger.running] == [False, True, False]
    assert ledger.total_ms == pytest.approx(10)
    parts = ledger.parts_ms()
    assert list(parts) == ["stop", "sync", "ram", "devices", "record", "answer"]
    assert parts == pytest.approx({"stop": 1, "sync": 0, "ram": 4, "devices": 0.5, "record": 0, "answer": 0})


def test_ledger_of_a_pause_and_of_a_second_attempt() -> None:
    ledger = DowntimeLedger()
    ledger.begin(0.0)
    ledger.mark("stop", 0.001)
    ledger.mark("operator", 2.0)
    ledger.end(2.0)
    assert list(ledger.parts_ms()) == ["stop", "operator", "sync", "ram", "devices", "record", "answer"]
    ledger.begin(10.0)
    assert ledger.total_ms == 0
    assert not any(ledger.parts_ms().values())


def test_ledger_knows_its_parts() -> None:
    ledger = DowntimeLedger()
    ledger.begin(0.0)
    with pytest.raises(ValueError, match="no part 'lunch'"):
        ledger.mark("lunch", 1.0)
