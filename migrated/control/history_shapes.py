"""Reports of migrations, as structs.

The rule of the file: that of `shapes`.
"""

from __future__ import annotations

from msgspec import UNSET, UnsetType

from migrated.control.shape import Shape
from migrated.control.shapes import MigrationInfo, MigrationOutcome
from migrated.model.history import Direction


class ReportArguments(Shape, frozen=True):
    """The id of a migration, or as much of it as makes it the only one."""

    id: str


class HistoryEntry(Shape, frozen=True):
    """One migration in a list; or, with ``path`` and ``unreadable`` only, a report that is damaged."""

    id: str | UnsetType = UNSET
    direction: Direction | UnsetType = UNSET
    started: str | UnsetType = UNSET
    ended: str | UnsetType = UNSET
    status: str | UnsetType = UNSET
    outcome: MigrationOutcome | UnsetType = UNSET
    uri: str | UnsetType = UNSET
    peer: str | UnsetType = UNSET
    error: str | UnsetType = UNSET
    error_id: str | UnsetType = UNSET
    total_time: int | UnsetType = UNSET
    downtime: int | UnsetType = UNSET
    transferred: int | UnsetType = UNSET
    ram: int | UnsetType = UNSET
    path: str | UnsetType = UNSET
    unreadable: str | UnsetType = UNSET


class ReportInfo(Shape, frozen=True):
    """One migration. ``status`` is a MigrationStatus, "interrupted" or "unfinished"; times of day are ISO 8601, UTC."""

    id: str
    direction: Direction
    machine: str
    started: str
    status: str
    outcome: MigrationOutcome
    ended: str | UnsetType = UNSET
    uri: str | UnsetType = UNSET
    peer: str | UnsetType = UNSET
    error: str | UnsetType = UNSET
    error_id: str | UnsetType = UNSET
    migration: MigrationInfo | UnsetType = UNSET
    """What query-migrate said at the end, with the figures also of one that failed."""
    passes_left_out: int | UnsetType = UNSET
    """How many are missing in the middle of x-migrated-passes."""
