"""Policy: when to switch over, when to say that it will never happen, how hard to throttle."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrated.model.convergence import Decision, Facts, assess, decide, is_outpaced, next_throttle
from migrated.model.parameters import Parameters

MIB = 1 << 20
#: 64 MiB rewritten without pause over 500 MiB/s, 100 ms allowed: it goes round for ever.
STUCK = Facts(
    pending_bytes=64 * MIB,
    threshold_bytes=50 * MIB,
    bandwidth_bps=500.0 * MIB,
    dirty_bps=520.0 * MIB,
    passes=7,
    ram_bytes=1024 * MIB,
    downtime_limit_ms=100,
    pass_history=((1024 * MIB, 64 * MIB), (64 * MIB, 64 * MIB)),
)


# -- decide ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pending", "threshold", "decision"),
    [
        (0, 0, Decision.COMPLETE),
        (1, 0, Decision.ITERATE),
        (1, 1, Decision.ITERATE),
        (1, 2, Decision.COMPLETE),
        (0, 5, Decision.COMPLETE),
    ],
)
def test_decide(pending: int, threshold: int, decision: Decision) -> None:
    assert decide(replace(STUCK, pending_bytes=pending, threshold_bytes=threshold)) is decision


@pytest.mark.parametrize(
    ("pending", "last_step", "decision"),
    [
        (40 * MIB, (25 * MIB, 0), Decision.ITERATE),  # nobody writes: send it while the machine runs
        (40 * MIB, (25 * MIB, 17 * MIB), Decision.ITERATE),  # it still shrinks
        (40 * MIB, (25 * MIB, 18 * MIB), Decision.COMPLETE),  # hardly any more
        (1 * MIB, (25 * MIB, 0), Decision.COMPLETE),  # 2 ms at 500 MiB/s
        (40 * MIB, (0, 0), Decision.COMPLETE),  # nothing was sent: nothing is known to shrink
    ],
)
def test_the_limit_is_no_target(pending: int, last_step: tuple[int, int], decision: Decision) -> None:
    facts = replace(STUCK, pending_bytes=pending, threshold_bytes=50 * MIB, pass_history=(last_step,))
    assert decide(facts) is decision


@given(st.integers(1, 50 * MIB), st.floats(0, 0.69))
def test_going_on_below_the_limit_ends_soon(pending: int, share: float) -> None:
    step = 25 * MIB
    for _ in range(20):
        sent = min(pending, step)
        pending += round(sent * share) - sent
        facts = replace(STUCK, pending_bytes=pending, pass_history=((sent, round(sent * share)),))
        if decide(facts) is Decision.COMPLETE:
            return
    raise AssertionError(f"still going with {pending} bytes pending")


# -- assess ----------------------------------------------------------------------------------------------------


def test_the_first_pass_tells_nothing_yet() -> None:
    for facts in (replace(STUCK, pass_history=()), replace(STUCK, bandwidth_bps=0.0)):
        assessment = assess(facts)
        assert assessment.converging
        assert assessment.text == "the first pass over memory is under way"
        assert assessment.needed_downtime_ms == 0


def test_it_says_that_it_does_not_converge_and_what_would_help() -> None:
    assessment = assess(STUCK)
    assert not assessment.converging
    assert assessment.text == (
        "not converging: the last of 7 passes sent 64.0 MiB while 64.0 MiB were written;"
        " at 500.0 MiB/s a switchover takes 128 ms, the downtime limit is 100 ms"
    )
    assert assessment.needed_downtime_ms == 128
    assert assessment.suggestions == (
        "set downtime-limit to 160 ms or more",
        "turn auto-converge on for another attempt (it slows a cooperative workload down)",
        "give it 650.0 MiB/s of bandwidth or more (max-bandwidth, a faster link)",
    )


def test_one_pass_is_the_first() -> None:
    assert assess(replace(STUCK, passes=1)).text.startswith("not converging: the first pass sent 64.0 MiB while")


@pytest.mark.parametrize(
    ("throttle", "limit", "advice"),
    [
        (0, None, "turn auto-converge on for another attempt"),
        (0, 99, ""),
        (50, 80, ""),
        (80, 80, "raise max-cpu-throttle (auto-converge has slowed the workload down by all of its 80 %)"),
        (99, 99, ""),
    ],
)
def test_auto_converge_that_is_on_is_not_suggested(throttle: int, limit: int | None, advice: str) -> None:
    facts = replace(STUCK, throttle_percent=throttle, throttle_limit_percent=limit)
    found = [one for one in assess(facts).suggestions if "converge" in one]
    assert [one.startswith(advice) for one in found] == ([True] if advice else [])


def test_following_the_first_advice_ends_it() -> None:
    downtime_limit_ms = 160
    threshold = round(STUCK.bandwidth_bps * downtime_limit_ms / 1000)
    advised = replace(STUCK, downtime_limit_ms=downtime_limit_ms, threshold_bytes=threshold)
    assert decide(advised) is Decision.COMPLETE
    assert assess(advised).converging


def test_no_advice_that_cannot_be_followed() -> None:
    slow = replace(STUCK, bandwidth_bps=1000.0, threshold_bytes=100)
    assert not any("downtime-limit" in one for one in assess(slow).suggestions)
    # Without any downtime the only way is to be faster than the machine writes.
    never = replace(STUCK, downtime_limit_ms=0, threshold_bytes=0)
    assert assess(never).suggestions[-1].startswith("give it 650.0 MiB/s")


def test_smaller_passes_are_progress() -> None:
    assessment = assess(replace(STUCK, pass_history=((100 * MIB, 64 * MIB),)))
    assert assessment.converging
    assert assessment.text == "converging: the last pass sent 100.0 MiB while 64.0 MiB were written"
    assert assessment.needed_downtime_ms == 128


def test_what_fits_is_no_problem() -> None:
    assessment = assess(replace(STUCK, pending_bytes=MIB, pass_history=((MIB, MIB),)))
    assert assessment.converging
    assert assessment.text == "what is left needs 2 ms, the downtime limit is 100 ms"


@given(
    st.builds(
        Facts,
        pending_bytes=st.integers(0, 1 << 46),
        threshold_bytes=st.integers(0, 1 << 46),
        bandwidth_bps=st.floats(0, 1e12),
        dirty_bps=st.floats(0, 1e12),
        passes=st.integers(0, 1000),
        ram_bytes=st.integers(0, 1 << 46),
        downtime_limit_ms=st.integers(0, 2_000_000),
        pass_history=st.lists(st.tuples(st.integers(0, 1 << 46), st.integers(0, 1 << 46)), max_size=3).map(tuple),
    )
)
def test_every_judgement_is_whole(facts: Facts) -> None:
    assessment = assess(facts)
    assert assessment.text
    assert bool(assessment.suggestions) == (not assessment.converging)
    if decide(facts) is Decision.COMPLETE:
        assert assessment.converging


# -- auto-converge ---------------------------------------------------------------------------------------------

DEFAULTS = Parameters()
TAILSLOW = Parameters().replace({"cpu-throttle-tailslow": True})


def test_outpaced() -> None:
    assert not is_outpaced(50, 100, DEFAULTS)
    assert is_outpaced(51, 100, DEFAULTS)
    assert not is_outpaced(0, 0, DEFAULTS)


def test_throttle_waits_for_the_second_time() -> None:
    assert next_throttle(0, 100, 100, DEFAULTS, fired_before=False) == 0
    assert next_throttle(0, 100, 100, DEFAULTS, fired_before=True) == 20
    assert next_throttle(20, 50, 100, DEFAULTS, fired_before=True) == 20


def test_throttle_rises_to_its_limit() -> None:
    percent, seen = 0, []
    for _ in range(10):
        percent = next_throttle(percent, 100, 100, DEFAULTS, fired_before=True)
        seen.append(percent)
    assert seen == [20, 30, 40, 50, 60, 70, 80, 90, 99, 99]
    lower = DEFAULTS.replace({"max-cpu-throttle": 25})
    assert next_throttle(20, 100, 100, lower, fired_before=True) == 25


def test_tailslow_takes_no_more_than_is_needed() -> None:
    # 50 of 52 bytes may stay: 80 % speed x 50/52 = 76.9 %, so 4 % less.
    assert next_throttle(20, 52, 100, TAILSLOW, fired_before=True) == 24
    assert next_throttle(20, 500, 100, TAILSLOW, fired_before=True) == 30


@given(st.integers(0, 99), st.integers(0, 1 << 40), st.integers(0, 1 << 40), st.booleans())
def test_throttle_never_falls_and_stays_in_range(percent: int, dirtied: int, sent: int, tailslow: bool) -> None:
    params = TAILSLOW if tailslow else DEFAULTS
    following = next_throttle(percent, dirtied, sent, params, fired_before=True)
    assert percent <= following <= 99
    assert (following > percent) == (is_outpaced(dirtied, sent, params) and percent < 99)
