"""What Prometheus is told about one daemon.

The rule of the file: one table, a row for each metric, and everything is read when it is asked for: nothing on the way
of a page counts for the sake of a metric. Units are base units and stand in the names, labels have few values. There is
no label for the machine: one daemon is one machine, so it would be the same everywhere; ``migrated_machine_info`` has
the name, to be joined by ``instance``. Every daemon has a registry of its own.

``docs/operator-guide.md`` repeats the table; a test compares the two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from migrated.migration.history import History
from migrated.migration.ownership import Ownership
from migrated.migration.progress import Progress
from migrated.model.handover import Hold
from migrated.model.history import Direction, Moved
from migrated.model.latency import DISTRIBUTION_BUCKETS, LatencyHistogram
from migrated.model.runstate import RunState
from migrated.model.status import ENDED, MigrationStatus
from migrated.savevm.iothread_lock import HOLD_BUCKETS_MS, IothreadLock
from migrated.savevm.ports import MachinePort
from migrated.transport.trust import Trust

#: Every second power of two: 4 us, 16 us, ... 4.2 s.
_LATENCY_STEP = 2


class Kind(StrEnum):
    """Prometheus' types of metrics."""

    GAUGE = "gauge"
    COUNTER = "counter"
    HISTOGRAM = "histogram"
    INFO = "info"


@dataclass(frozen=True, slots=True)
class Sources:
    """What is looked at when somebody asks."""

    tool: str
    """Name and version of this program."""
    machine: MachinePort
    workloads: Callable[[], int]
    ownership: Ownership
    lock: IothreadLock
    history: History
    outgoing: Progress
    downtime_limit_ms: Callable[[], int]
    trust: Callable[[], Trust]


@dataclass(frozen=True, slots=True)
class Distribution:
    """Of a histogram: (upper bound in s, how many are not above it), the last bound is +Inf; the sum in s."""

    buckets: Sequence[tuple[str, float]]
    sum_s: float


#: Values of the labels, in their order; a value. An info's labels are the value.
Sample = tuple[tuple[str, ...], float | Distribution]


@dataclass(frozen=True, slots=True)
class Row:
    """One metric."""

    name: str
    kind: Kind
    labels: tuple[str, ...]
    meaning: str
    read: Callable[[Sources], Iterable[Sample]]


class MachineCollector(Collector):
    """Reads everything at once, whenever it is asked."""

    def __init__(self, sources: Sources) -> None:
        self._sources = sources

    def describe(self) -> Iterable[Metric]:
        """Return what there is, without looking."""
        return [_family(row) for row in ROWS]

    def collect(self) -> Iterable[Metric]:
        """Return what there is now."""
        for row in ROWS:
            family = _family(row)
            for labels, value in row.read(self._sources):
                _add(family, row, labels, value)
            yield family


def build_registry(sources: Sources) -> CollectorRegistry:
    """Return the registry of one daemon: its machine, and its process under the names that all programs use."""
    registry = CollectorRegistry()
    registry.register(MachineCollector(sources))
    ProcessCollector(registry=registry)
    return registry


def _family(row: Row) -> Metric:
    match row.kind:
        case Kind.GAUGE:
            return GaugeMetricFamily(row.name, row.meaning, labels=row.labels)
        case Kind.COUNTER:
            return CounterMetricFamily(row.name, row.meaning, labels=row.labels)
        case Kind.HISTOGRAM:
            return HistogramMetricFamily(row.name, row.meaning, labels=row.labels)
        case Kind.INFO:
            return InfoMetricFamily(row.name.removesuffix("_info"), row.meaning, labels=())


def _add(family: Metric, row: Row, labels: tuple[str, ...], value: float | Distribution) -> None:
    if isinstance(family, InfoMetricFamily):
        family.add_metric((), dict(zip(row.labels, labels, strict=True)))
    elif isinstance(family, HistogramMetricFamily):
        assert isinstance(value, Distribution)
        family.add_metric(labels, value.buckets, value.sum_s)
    elif isinstance(family, GaugeMetricFamily | CounterMetricFamily):
        assert not isinstance(value, Distribution)
        family.add_metric(labels, value)


# -- reading -------------------------------------------------------------------------------------------------------


def _one(read: Callable[[Sources], float]) -> Callable[[Sources], Iterable[Sample]]:
    """Return a reader of a metric without labels."""
    return lambda sources: [((), read(sources))]


def _while_running(read: Callable[[Sources], float]) -> Callable[[Sources], Iterable[Sample]]:
    """The same of one that is 0 while no machine is on its way out."""
    return _one(lambda sources: read(sources) if sources.history.is_running(Direction.OUTGOING) else 0.0)


def _machine(sources: Sources) -> Iterable[Sample]:
    machine = sources.machine
    return [((machine.name, machine.uuid or "", machine.machine_type), 1)]


def _run_state(sources: Sources) -> Iterable[Sample]:
    return [((state.value,), float(state is sources.machine.run_state)) for state in RunState]


def _record(sources: Sources) -> Iterable[Sample]:
    return [((hold.value,), float(hold is sources.ownership.record.hold)) for hold in Hold]


def _status(sources: Sources) -> Iterable[Sample]:
    return [
        ((direction.value, status.value), float(status is sources.history.status(direction)))
        for direction in Direction
        for status in MigrationStatus
    ]


def _results(sources: Sources) -> Iterable[Sample]:
    found = sources.history.tally.results
    return [
        ((direction.value, status.value), found.get((direction, status.value), 0))
        for direction in Direction
        for status in sorted(ENDED)
    ]


def _sent(sources: Sources) -> Iterable[Sample]:
    sent, stats = dict(sources.history.tally.sent_bytes), sources.outgoing.stats
    if sources.history.is_running(Direction.OUTGOING):
        sent["precopy"] += stats.precopy_bytes
        sent["downtime"] += stats.downtime_bytes
        sent["postcopy"] += stats.postcopy_bytes
    return [((phase,), count) for phase, count in sent.items()]


def _received(sources: Sources) -> float:
    history = sources.history
    return history.tally.received_bytes + history.live_received_bytes()


def _requests(sources: Sources) -> float:
    running = sources.history.is_running(Direction.OUTGOING)
    return sources.history.tally.postcopy_requests + (sources.outgoing.stats.postcopy_requests if running else 0)


def _last_moved(read: Callable[[Moved], float]) -> Callable[[Sources], Iterable[Sample]]:
    """Return a reader that has nothing to tell before a machine has left."""
    return lambda sources: [((), read(last))] if (last := sources.history.tally.last_moved) is not None else []


def _downtime_parts(sources: Sources) -> Iterable[Sample]:
    last = sources.history.tally.last_moved
    return [] if last is None else [((part,), seconds) for part, seconds in last.downtime_parts_s.items()]


def _faults(sources: Sources) -> Iterable[Sample]:
    ended, live = sources.history.tally.faults, sources.history.live_faults()
    for name in ("remote", "in_flight", "local"):
        histogram = LatencyHistogram()
        for figures in (ended, live):
            if figures is not None:
                histogram.merge(getattr(figures, name))
        yield (name,), _latencies(histogram)


def _latencies(histogram: LatencyHistogram) -> Distribution:
    counts = histogram.distribution()
    buckets = [
        (repr(2 ** (power + 1) / 1e6), float(sum(counts[: power + 1])))
        for power in range(1, DISTRIBUTION_BUCKETS - 1, _LATENCY_STEP)
    ]
    return Distribution([*buckets, ("+Inf", histogram.count)], histogram.mean_us * histogram.count / 1e6)


def _holds(sources: Sources) -> Iterable[Sample]:
    counts = sources.lock.holds_by_ms
    buckets = [(repr(bound_ms / 1000), float(sum(counts[: at + 1]))) for at, bound_ms in enumerate(HOLD_BUCKETS_MS)]
    return [((), Distribution([*buckets, ("+Inf", float(sum(counts)))], sources.lock.held_ms / 1000))]


def _certificates(sources: Sources) -> Iterable[Sample]:
    if (credentials := sources.trust().credentials) is None:
        return []
    return [((file,), certificate.not_after.timestamp()) for file, certificate in credentials.certificates.items()]


# -- the table -----------------------------------------------------------------------------------------------------

_G, _C, _H, _I = Kind.GAUGE, Kind.COUNTER, Kind.HISTOGRAM, Kind.INFO

ROWS: tuple[Row, ...] = (
    Row(
        "migrated_build_info", _I, ("version",), "the version of this program",
        lambda sources: [((sources.tool.rpartition(" ")[2],), 1)],
    ),
    Row("migrated_machine_info", _I, ("machine", "uuid", "type"), "the machine of this daemon", _machine),
    Row("migrated_machine_run_state", _G, ("state",), "1 for the present run state, 0 for the others", _run_state),
    Row(
        "migrated_ram_bytes", _G, (), "size of all RAM blocks that are declared here",
        _one(lambda sources: sum(block.size_bytes for block in sources.machine.ram_blocks())),
    ),
    Row("migrated_workloads", _G, (), "workloads that are attached", _one(lambda sources: sources.workloads())),
    Row("migrated_ownership_record", _G, ("record",), "1 for what the record says, 0 for the others", _record),
    Row(
        "migrated_ownership_epoch", _G, (), "grows by one with each hand-over; the same at both ends of one",
        _one(lambda sources: sources.ownership.record.epoch),
    ),
    Row(
        "migrated_migration_status", _G, ("direction", "status"),
        "1 for the status of the present or last migration, 0 for the others", _status,
    ),
    Row(
        "migrated_migrations_total", _C, ("direction", "result"), "migrations that ended since the daemon started",
        _results,
    ),
    Row(
        "migrated_migration_sent_bytes_total", _C, ("phase",), "sent by all migrations since the daemon started", _sent
    ),
    Row(
        "migrated_migration_received_bytes_total", _C, (), "pages received since the daemon started",
        _one(_received),
    ),
    Row(
        "migrated_migration_remaining_bytes", _G, (), "not sent yet; 0 while nothing moves",
        _while_running(lambda sources: sources.outgoing.stats.remaining),
    ),
    Row(
        "migrated_migration_passes", _G, (), "looks at the dirty log in this migration; 0 while nothing moves",
        _while_running(lambda sources: sources.outgoing.stats.dirty_sync_count),
    ),
    Row(
        "migrated_migration_dirty_bytes_per_second", _G, (), "how fast the machine writes; 0 while nothing moves",
        _while_running(lambda sources: sources.outgoing.dirty_bps),
    ),
    Row(
        "migrated_migration_bandwidth_bytes_per_second", _G, (), "how fast it is sent; 0 while nothing moves",
        _while_running(lambda sources: sources.outgoing.meter.bandwidth_bps),
    ),
    Row(
        "migrated_migration_expected_downtime_seconds", _G, (), "of a switchover right now; 0 while nothing moves",
        _while_running(lambda sources: sources.outgoing.expected_downtime_ms(sources.downtime_limit_ms()) / 1000),
    ),
    Row(
        "migrated_workload_throttle_ratio", _G, (), "part of its time that auto-converge takes from the machine",
        _one(lambda sources: sources.outgoing.throttle_percent / 100),
    ),
    Row(
        "migrated_last_migration_timestamp_seconds", _G, (), "when the last machine had left, since the epoch",
        _last_moved(lambda last: last.ended_s),
    ),
    Row(
        "migrated_last_migration_duration_seconds", _G, (), "how long that took", _last_moved(lambda last: last.total_s)
    ),
    Row(
        "migrated_last_migration_downtime_seconds", _G, (), "how long it stood still for that",
        _last_moved(lambda last: last.downtime_s),
    ),
    Row(
        "migrated_last_migration_downtime_part_seconds", _G, ("part",), "where that time went", _downtime_parts
    ),
    Row(
        "migrated_postcopy_requests_total", _C, (), "pages that destinations asked this host for", _one(_requests)
    ),
    Row(
        "migrated_postcopy_fault_seconds", _H, ("answered",),
        "how long a thread of a machine that came here waited for a page", _faults,
    ),
    Row("migrated_iothread_lock_hold_seconds", _H, (), "how long the iothread lock was held", _holds),
    Row(
        "migrated_certificate_expiry_timestamp_seconds", _G, ("file",), "the end of a certificate, since the epoch",
        _certificates,
    ),
)  # fmt: skip
