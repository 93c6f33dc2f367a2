"""What is kept of a migration that has ended: its report, the line of it in a list, and how often which end was seen.

The rule of the file: a report is a value that is replaced as a whole. Its members are names of the control protocol, so
that the file on the disk, the QMP answer and ``migratectl --json`` are one and the same text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from msgspec import Struct, structs

from migrated.errors import CommandError
from migrated.model.faults import FaultFigures
from migrated.model.handover import Hold
from migrated.model.stats import RamStats

#: The status of a migration that its daemon did not live to see the end of.
INTERRUPTED = "interrupted"
#: The status of one of which nobody can tell yet whether it goes on.
UNFINISHED = "unfinished"

UNKNOWN, SOURCE_OWNS, DESTINATION_OWNS = "unknown", "source-owns", "destination-owns"

#: A machine that does not converge makes passes for hours; the first ones and the last ones tell the story.
PASSES_FIRST, PASSES_LAST = 20, 80


class Direction(StrEnum):
    """Which way a machine went, as this host saw it."""

    OUTGOING = "outgoing"
    INCOMING = "incoming"


class Report(Struct, frozen=True, kw_only=True, rename="kebab", omit_defaults=True):
    """One migration. Times are UTC, in ISO 8601; ``migration`` is the last answer of query-migrate about it."""

    id: str
    direction: Direction
    machine: str
    started: str
    ended: str = ""
    """Empty while it runs, and where the daemon was not there any more."""
    status: str
    outcome: str
    uri: str = ""
    """Where it was sent; of an incoming one only its peer is known."""
    peer: str = ""
    error: str = ""
    error_id: str = ""
    migration: dict[str, Any] = {}
    passes_left_out: int = 0

    @property
    def key(self) -> tuple[str, str]:
        """What makes it this one, and reports of one host follow each other in time."""
        return self.started, self.id


class Unreadable(Struct, frozen=True, kw_only=True, rename="kebab"):
    """A report that is damaged: which file, and why."""

    path: str
    unreadable: str


def format_wall(wall_ms: int) -> str:
    """Return a wall clock's time, ms since the epoch, as reports have it: such texts sort as their times do."""
    moment = datetime.fromtimestamp(wall_ms / 1000, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def outcome_of(direction: Direction, hold: Hold) -> str:
    """Return who owns the machine behind a migration in that direction, when the record of this host says ``hold``."""
    if hold in (Hold.RELEASED, Hold.ACCEPTED):
        return UNKNOWN
    here = hold in (Hold.OWNER, Hold.INCOMPLETE)
    if direction is Direction.INCOMING:
        return DESTINATION_OWNS if here else SOURCE_OWNS
    return DESTINATION_OWNS if hold is Hold.MOVED else SOURCE_OWNS


def with_answer(report: Report, answer: Mapping[str, Any], *, outcome: str) -> Report:
    """Return a report with what query-migrate says of it now."""
    passes, left_out = _shortened(answer.get("x-migrated-passes", ()))
    migration = {**answer, **({"x-migrated-passes": passes} if passes else {})}
    return structs.replace(
        report,
        status=str(answer["status"]),
        outcome=outcome,
        peer=str(answer.get("x-migrated-peer", {}).get("address", "")),
        error=str(answer.get("error-desc", "")),
        error_id=str(answer.get("x-migrated-error", {}).get("id", "")),
        migration=migration,
        passes_left_out=left_out,
    )


def _shortened(passes: Sequence[Any]) -> tuple[list[Any], int]:
    if len(passes) <= PASSES_FIRST + PASSES_LAST:
        return list(passes), 0
    return [*passes[:PASSES_FIRST], *passes[-PASSES_LAST:]], len(passes) - PASSES_FIRST - PASSES_LAST


def interrupted(report: Report, *, outcome: str) -> Report:
    """Return the report of a migration whose daemon ended in its middle."""
    text = "the daemon ended in the middle of the migration"
    return structs.replace(report, status=INTERRUPTED, outcome=outcome, error=text, error_id="migration-interrupted")


def entry(report: Report) -> dict[str, object]:
    """Return the line of a list: everything but ``migration``, of which the main figures are picked. Times in ms."""
    ram: Mapping[str, Any] = report.migration.get("ram", {})
    figures = {
        "total-time": report.migration.get("total-time"),
        "downtime": report.migration.get("downtime"),
        "transferred": ram.get("transferred"),
        "ram": ram.get("total"),
    }
    shown = {
        "id": report.id,
        "direction": report.direction.value,
        "started": report.started,
        "ended": report.ended or None,
        "status": report.status,
        "outcome": report.outcome,
        "uri": report.uri or None,
        "peer": report.peer or None,
        "error": report.error or None,
        "error-id": report.error_id or None,
    }
    return {name: value for name, value in {**shown, **figures}.items() if value is not None}


def listed(reports: Sequence[Report | Unreadable]) -> list[dict[str, object]]:
    """Return the list that clients get: the reports in their order, behind them what cannot be read."""
    damaged: list[dict[str, object]] = [
        {"path": one.path, "unreadable": one.unreadable} for one in reports if isinstance(one, Unreadable)
    ]
    return [entry(one) for one in reports if isinstance(one, Report)] + damaged


def find(reports: Sequence[Report], wanted: str) -> Report:
    """Return the report with that id, or with the only id that begins so. Raises CommandError.

    ``reports`` are the newest first: of two with one id the later one is meant.
    """
    found = [report for report in reports if wanted and report.id.startswith(wanted)]
    if exact := [report for report in found if report.id == wanted]:
        return exact[0]
    ids = list(dict.fromkeys(report.id for report in found))
    if not ids:
        raise CommandError(f"there is no report of a migration '{wanted}'. Next: `migratectl history` lists them")
    if len(ids) > 1:
        raise CommandError(f"'{wanted}' is the beginning of {len(ids)} ids: {', '.join(ids[:8])}. Next: say more of it")
    return found[0]


@dataclass(frozen=True, slots=True)
class Moved:
    """The figures of an outgoing migration that completed. Times in s; ``ended_s`` since the epoch."""

    ended_s: float
    total_s: float
    downtime_s: float
    downtime_parts_s: Mapping[str, float]


class Tally:
    """What all migrations of one daemon came to, since it was started."""

    def __init__(self) -> None:
        self.last_moved: Moved | None = None
        self.results: dict[tuple[Direction, str], int] = {}
        """How many ended in that direction with that status."""
        self.sent_bytes = {"precopy": 0, "downtime": 0, "postcopy": 0}
        self.received_bytes = 0
        self.postcopy_requests = 0
        """Asked of this host, as a source."""
        self.faults = FaultFigures()
        """Of all postcopies that ended here, as a destination."""

    def ended(self, direction: Direction, status: str) -> None:
        """Count an end."""
        self.results[direction, status] = self.results.get((direction, status), 0) + 1

    def add(self, direction: Direction, stats: RamStats) -> None:
        """Add what one migration has sent, or received."""
        if direction is Direction.INCOMING:
            self.received_bytes += stats.transferred
            return
        self.sent_bytes["precopy"] += stats.precopy_bytes
        self.sent_bytes["downtime"] += stats.downtime_bytes
        self.sent_bytes["postcopy"] += stats.postcopy_bytes
        self.postcopy_requests += stats.postcopy_requests

    def add_faults(self, figures: FaultFigures) -> None:
        """Add what faults on missing pages have cost here in one postcopy."""
        self.faults.remote.merge(figures.remote)
        self.faults.in_flight.merge(figures.in_flight)
        self.faults.local.merge(figures.local)
        self.faults.requests += figures.requests
