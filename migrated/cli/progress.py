"""A running migration, as one line of text: query-migrate's answer in, words out.

The rule of the file: pure functions. Members of this daemon are preferred; where they are missing (the socket may be a
QEMU's) QEMU's own figures stand in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from migrated.cli.exit_code import exit_code_of
from migrated.cli.postcopy import faults_in_short, is_postcopy
from migrated.cli.units import format_bytes, format_ms, format_rate


@dataclass(frozen=True, slots=True)
class Progress:
    """What there is to show of a migration under way; None where it is not known (yet)."""

    status: str
    passes: int
    transferred_bytes: int
    remaining_bytes: int
    total_bytes: int
    dirty_bps: float
    bandwidth_bps: float
    expected_downtime_ms: float | None
    eta_ms: float | None
    throttle_percent: int
    faults: str
    warning: str

    @property
    def fraction(self) -> float:
        """How much of RAM is at the destination and has not been written since, from 0 to 1."""
        if not self.total_bytes:
            return 0.0
        return min(max((self.total_bytes - self.remaining_bytes) / self.total_bytes, 0.0), 1.0)


def read_progress(info: Mapping[str, Any]) -> Progress:
    """Pick the figures out of query-migrate's answer."""
    ram: Mapping[str, Any] = info.get("ram", {})
    convergence: Mapping[str, Any] = info.get("x-migrated-convergence", {})
    page_size = ram.get("page-size", 4096)
    follows = is_postcopy(info)  # passes, the writer's speed and the downtime are history then
    return Progress(
        status=info.get("status", "none"),
        passes=0 if follows else _passes(info),
        transferred_bytes=ram.get("transferred", 0),
        remaining_bytes=ram.get("remaining", 0),
        total_bytes=ram.get("total", 0),
        dirty_bps=0 if follows else info.get("x-migrated-dirty-rate-bps", ram.get("dirty-pages-rate", 0) * page_size),
        bandwidth_bps=info.get("x-migrated-bandwidth-bps", ram.get("mbps", 0) * 1e6 / 8),
        expected_downtime_ms=None if follows else info.get("expected-downtime"),
        eta_ms=info.get("x-migrated-eta-ms"),
        throttle_percent=info.get("cpu-throttle-percentage", 0),
        faults=faults_in_short(info),
        warning=""
        if follows or info.get("status") == "completed" or convergence.get("converging", True)
        else describe_convergence(convergence),
    )


def _passes(info: Mapping[str, Any]) -> int:
    """The number of the pass under way, from 1 on; at the end, how many there were. A QEMU counts its looks."""
    if "x-migrated-passes" not in info:
        return int(info.get("ram", {}).get("dirty-sync-count", 0))
    return len(info["x-migrated-passes"]) + (exit_code_of(info) is None)


def describe_convergence(convergence: Mapping[str, Any]) -> str:
    """Say why a migration does not come to an end, and what would help."""
    text = str(convergence.get("text", "the migration does not converge"))
    suggestions = "; ".join(str(one) for one in convergence.get("suggestions", ()))
    return f"{text}. What would help: {suggestions}" if suggestions else text


def figures(progress: Progress) -> str:
    """The figures beside a progress bar."""
    parts = [f"pass {progress.passes}"] if progress.passes else []
    parts.append(f"{format_bytes(progress.transferred_bytes)} sent")
    parts.append(f"{format_bytes(progress.remaining_bytes)} left")
    if progress.bandwidth_bps:
        parts.append(format_rate(progress.bandwidth_bps))
    if progress.dirty_bps:
        parts.append(f"dirtied {format_rate(progress.dirty_bps)}")
    if progress.throttle_percent:
        parts.append(f"throttled {progress.throttle_percent} %")
    if progress.expected_downtime_ms is not None:
        parts.append(f"expected downtime {format_ms(progress.expected_downtime_ms)}")
    if progress.faults:
        parts.append(progress.faults)
    if progress.eta_ms is not None:
        parts.append(f"ETA {format_ms(progress.eta_ms)}")
    return ", ".join(parts)


def progress_line(progress: Progress) -> str:
    """The whole state as one line for a log or a pipe."""
    if not progress.total_bytes:
        return progress.status
    share = f"{progress.fraction:.0%} of {format_bytes(progress.total_bytes)}"
    return f"{progress.status}: {share}, {figures(progress)}"
