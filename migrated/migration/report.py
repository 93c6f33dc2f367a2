"""What ``query-migrate`` answers, made from the progress of both directions.

The rule of the file: QEMU's members under QEMU's conditions (which member is there in which status), own members with
the prefix ``x-migrated-``. Nothing here changes anything.
"""

from __future__ import annotations

from migrated.errors import PreflightBlocked
from migrated.migration.incoming import IncomingMigration
from migrated.migration.outgoing import OutgoingMigration
from migrated.migration.ownership import Ownership
from migrated.migration.preflight_source import describe_blockers
from migrated.migration.progress import Progress
from migrated.migration.return_path import PeerKind
from migrated.model.handover import Hold
from migrated.model.status import MigrationStatus

#: Statuses that carry times and the ram object.
_WITH_FIGURES = frozenset(
    {
        MigrationStatus.ACTIVE,
        MigrationStatus.PRE_SWITCHOVER,
        MigrationStatus.DEVICE,
        MigrationStatus.POSTCOPY_ACTIVE,
        MigrationStatus.POSTCOPY_PAUSED,
        MigrationStatus.POSTCOPY_RECOVER,
        MigrationStatus.CANCELLING,
        MigrationStatus.COMPLETED,
    }
)
_OUTCOME = {
    Hold.NONE: "source-owns",
    Hold.PARTIAL: "source-owns",
    Hold.PREPARED: "source-owns",
    Hold.INCOMPLETE: "source-owns",
    Hold.OWNER: "source-owns",
    Hold.RELEASED: "unknown",
    Hold.ACCEPTED: "unknown",
    Hold.MOVED: "destination-owns",
}


_KNOWN = {
    "source-owns": "the machine is at the source, as before",
    "destination-owns": "the machine is at the destination",
    "unknown": "nobody knows which host has the machine",
}


def describe_outgoing(
    migration: OutgoingMigration, progress: Progress, ownership: Ownership, downtime_limit_ms: int
) -> dict[str, object]:
    """Return the members of an outgoing migration."""
    status = migration.status.value
    answer: dict[str, object] = {"status": status.value, "x-migrated-outcome": outcome(ownership)}
    if (error := migration.error) is not None:
        answer["error-desc"] = str(error)
        known = _KNOWN[outcome(ownership)]
        answer["x-migrated-error"] = error.explain(migration.failed_in.value, known)
        if isinstance(error, PreflightBlocked):
            answer["x-migrated-blockers"] = describe_blockers(error.blockers)
    if status in _WITH_FIGURES:
        answer |= figures(progress, status)
        if status is MigrationStatus.COMPLETED:
            answer["downtime"] = round(progress.ledger.total_ms)
        else:
            answer["expected-downtime"] = progress.expected_downtime_ms(downtime_limit_ms)
    if progress.throttle_percent:
        answer["cpu-throttle-percentage"] = progress.throttle_percent
    answer |= _own_members(progress)
    answer["x-migrated-migration-id"] = migration.migration_id
    answer["x-migrated-peer"] = {"address": migration.peer, "kind": migration.kind.value}
    if progress.deltas.cache_size:
        answer["xbzrle-cache"] = progress.deltas.as_dict()
    if progress.packing.active:
        answer["x-migrated-packing"] = progress.packing.as_dict()
    if progress.faults is not None:
        answer["x-migrated-faults"] = progress.faults.as_dict()
    if (eta_ms := progress.eta_ms()) is not None:
        answer["x-migrated-eta-ms"] = eta_ms
    return answer


def describe_incoming(migration: IncomingMigration, progress: Progress, *, blocktime: bool) -> dict[str, object]:
    """Return the members of an incoming migration; ``blocktime``: the capability postcopy-blocktime is on."""
    status = migration.status.value
    if status is MigrationStatus.NONE:
        return {}
    answer: dict[str, object] = {"status": status.value}
    if (error := migration.error or migration.postcopy.why_paused) is not None:
        answer["error-desc"] = str(error)
        known = "the machine was not taken over" if not migration.postcopy.running else "the machine is here"
        answer["x-migrated-error"] = error.explain(migration.failed_in.value, known)
    if status in _WITH_FIGURES:
        answer |= figures(progress, status)
    if (faults := migration.postcopy.faults) is not None:
        answer["x-migrated-faults"] = faults.summary().as_dict()
        if blocktime and status is MigrationStatus.COMPLETED:
            answer["postcopy-blocktime"] = round(faults.blocked.all_s * 1000)
            answer["postcopy-vcpu-blocktime"] = [round(seconds * 1000) for seconds in faults.blocked.by_thread()]
    answer["x-migrated-migration-id"] = migration.migration_id
    answer["x-migrated-peer"] = {"address": migration.peer, "kind": migration.kind.value}
    return answer


def outcome(ownership: Ownership) -> str:
    """Return who owns the machine after an outgoing migration, as far as this host knows."""
    return _OUTCOME[ownership.record.hold]


def describe_record(ownership: Ownership) -> dict[str, object]:
    """Return what the record remembers of an outgoing migration that another life of this daemon has made."""
    how = outcome(ownership)
    return {
        "status": (MigrationStatus.COMPLETED if how == "destination-owns" else MigrationStatus.FAILED).value,
        "error-desc": ownership.text(),
        "x-migrated-outcome": how,
        "x-migrated-migration-id": ownership.record.migration_id,
        "x-migrated-peer": {"address": ownership.record.peer, "kind": PeerKind.UNKNOWN.value},
    }


def figures(progress: Progress, status: MigrationStatus) -> dict[str, object]:
    """Return the times and the ram object."""
    ram = progress.stats.as_dict()
    if status is MigrationStatus.COMPLETED:
        ram |= {"remaining": 0, "dirty-pages-rate": 0}
    ram["mbps"] = progress.meter.bandwidth_bps * 8 / 1e6
    return {
        "total-time": round(progress.elapsed_ms()),
        "setup-time": round(progress.setup_ms or 0),
        "ram": ram,
    }


def _own_members(progress: Progress) -> dict[str, object]:
    answer: dict[str, object] = {
        "x-migrated-dirty-rate-bps": round(progress.dirty_bps),
        "x-migrated-bandwidth-bps": round(progress.meter.bandwidth_bps),
        "x-migrated-passes": [
            {"pass": p.number, "sent-bytes": p.sent_bytes, "dirtied-bytes": p.dirtied_bytes, "ms": round(p.ms, 3)}
            for p in progress.passes
        ],
        "x-migrated-downtime": {name: round(ms, 3) for name, ms in progress.ledger.parts_ms().items()},
    }
    if progress.assessment is not None:
        answer["x-migrated-convergence"] = {
            "converging": progress.assessment.converging,
            "text": progress.assessment.text,
            "suggestions": list(progress.assessment.suggestions),
        }
    return answer
