"""Whether a migration may switch over, will ever be able to, and what would help.

The rule of the file: pure functions of facts. `fits` is QEMU's rule (7.2, migration_iteration_run), `next_throttle`
its auto-converge; `decide` and `assess` are ours: a machine that writes faster than the network carries must not go
round for ever without a word.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from migrated.model.parameters import PARAMETERS, Parameters

#: A pass has to be at least this much smaller than the one before it to count as progress.
PROGRESS = 0.9
#: While a step dirties less than this share of what it sends, another step shortens the downtime.
SHRINKS = 0.7
#: A downtime part shorter than this is not worth another step: stopping and answering take about as long.
WORTH_S = 0.003
#: What is recommended is this much more than what was just short.
MARGIN = 1.25
_MIB = 1 << 20


class Decision(StrEnum):
    """What the iteration loop does next."""

    ITERATE = "iterate"
    COMPLETE = "complete"


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known about a migration that iterates."""

    pending_bytes: int
    threshold_bytes: int
    """What passes within the downtime limit."""
    bandwidth_bps: float
    dirty_bps: float
    passes: int
    ram_bytes: int
    downtime_limit_ms: int
    pass_history: tuple[tuple[int, int], ...] = ()
    """Of each pass: bytes sent in it, bytes dirtied in it."""
    throttle_percent: int = 0
    throttle_limit_percent: int | None = None
    """How far auto-converge may go; None where it is off."""


@dataclass(frozen=True, slots=True)
class Assessment:
    """Whether it converges, in words for an operator."""

    converging: bool
    text: str
    needed_downtime_ms: int = 0
    """The downtime a switchover would take as things are; 0 while that is unknown."""
    suggestions: tuple[str, ...] = ()


def fits(facts: Facts) -> bool:
    """Say whether a switchover right now would keep the downtime limit: nothing pending, or less than the threshold."""
    return not facts.pending_bytes or facts.pending_bytes < facts.threshold_bytes


def decide(facts: Facts) -> Decision:
    """Return COMPLETE once a switchover fits and going on would hardly shorten it.

    A QEMU stops the machine as soon as it fits the limit. Here the limit is a limit and no target: while the network
    still outpaces the writer, what is left shrinks with each step and is sent while the machine runs. Each step takes
    away at least (1 - SHRINKS) of what it sends, so this costs at most a few downtime limits of time.
    """
    if not fits(facts):
        return Decision.ITERATE
    sent, dirtied = facts.pass_history[-1] if facts.pass_history else (0, 0)
    shrinks = dirtied < sent * SHRINKS
    worth_it = facts.pending_bytes > facts.bandwidth_bps * WORTH_S
    return Decision.ITERATE if shrinks and worth_it else Decision.COMPLETE


def assess(facts: Facts) -> Assessment:
    """Judge the passes so far."""
    if not facts.pass_history or facts.bandwidth_bps < 1:
        return Assessment(converging=True, text="the first pass over memory is under way")
    sent, dirtied = facts.pass_history[-1]
    left = max(facts.pending_bytes, dirtied)
    needed_ms = math.ceil(left / facts.bandwidth_bps * 1000)
    if fits(facts) or needed_ms <= facts.downtime_limit_ms:
        text = f"what is left needs {needed_ms} ms, the downtime limit is {facts.downtime_limit_ms} ms"
        return Assessment(converging=True, text=text, needed_downtime_ms=needed_ms)
    if dirtied < sent * PROGRESS:
        text = f"converging: the last pass sent {_mib(sent)} while {_mib(dirtied)} were written"
        return Assessment(converging=True, text=text, needed_downtime_ms=needed_ms)
    last = f"the last of {facts.passes} passes" if facts.passes > 1 else "the first pass"
    text = (
        f"not converging: {last} sent {_mib(sent)} while {_mib(dirtied)} were written;"
        f" at {_mib(facts.bandwidth_bps)}/s a switchover takes {needed_ms} ms,"
        f" the downtime limit is {facts.downtime_limit_ms} ms"
    )
    return Assessment(converging=False, text=text, needed_downtime_ms=needed_ms, suggestions=_suggest(facts, left))


def _suggest(facts: Facts, left_bytes: int) -> tuple[str, ...]:
    limit_ms = math.ceil(left_bytes / facts.bandwidth_bps * 1000 * MARGIN / 10) * 10
    # Either a pass becomes shorter than the time in which the machine writes it anew, or it fits the limit as it is.
    bandwidth_bps = facts.dirty_bps
    if facts.downtime_limit_ms:
        bandwidth_bps = min(bandwidth_bps, left_bytes * 1000 / facts.downtime_limit_ms)
    wanted = _mib(max(bandwidth_bps, facts.bandwidth_bps) * MARGIN)
    suggestions = (*_suggest_throttle(facts), f"give it {wanted}/s of bandwidth or more (max-bandwidth, a faster link)")
    if limit_ms > PARAMETERS["downtime-limit"].high:
        return suggestions
    return (f"set downtime-limit to {limit_ms} ms or more", *suggestions)


def _suggest_throttle(facts: Facts) -> tuple[str, ...]:
    limit = facts.throttle_limit_percent
    if limit is None:
        return ("turn auto-converge on for another attempt (it slows a cooperative workload down)",)
    if facts.throttle_percent < limit or limit >= PARAMETERS["max-cpu-throttle"].high:
        return ()  # auto-converge is at work, or can do no more
    return (f"raise max-cpu-throttle (auto-converge has slowed the workload down by all of its {limit} %)",)


def _mib(count: float) -> str:
    return f"{count / _MIB:.1f} MiB"


# -- auto-converge ---------------------------------------------------------------------------------------------


def is_outpaced(dirtied_bytes: int, transferred_bytes: int, params: Parameters) -> bool:
    """Say whether the machine wrote more than the trigger's share of what was sent in the same period."""
    return dirtied_bytes > transferred_bytes * params.integer("throttle-trigger-threshold") / 100


def next_throttle(
    current_percent: int, dirtied_bytes: int, transferred_bytes: int, params: Parameters, fired_before: bool
) -> int:
    """Return the throttle for the next period, in percent.

    It is raised when the machine outpaced the network for the second time; ``fired_before`` says whether it already did
    so once since the last raise. The caller looks at most once a second.
    """
    if not fired_before or not is_outpaced(dirtied_bytes, transferred_bytes, params):
        return current_percent
    highest = params.integer("max-cpu-throttle")
    if not current_percent:
        return min(params.integer("cpu-throttle-initial"), highest)
    increment = params.integer("cpu-throttle-increment")
    if params.get("cpu-throttle-tailslow"):
        # Only as much as brings the written bytes down to the trigger's share, if that is less.
        allowed = transferred_bytes * params.integer("throttle-trigger-threshold") / 100
        speed = 100 - current_percent
        increment = min(increment, speed - int(speed * allowed / dirtied_bytes))
    return min(current_percent + increment, highest)
