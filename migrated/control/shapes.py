"""Arguments, results and event data of the control protocol, as structs.

The rule of the file: a struct here is at once the validation of a command's arguments and its description in
query-qmp-schema; results are described, not built, with them (commands return plain dictionaries, tests hold the two
together). Member names are written with underscores and appear with hyphens. Source: QEMU 7.2's QAPI schema, minus
what this daemon cannot know, plus members with the prefix ``x-migrated-``.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from migrated.control.figure_shapes import FaultInfo, PackingInfo
from migrated.control.problem_shapes import BlockerInfo, ErrorInfo, PeerInfo
from migrated.control.shape import Shape
from migrated.model.job import JobStatus, JobType
from migrated.model.runstate import RunState
from migrated.model.status import MigrationStatus

# Arguments


class NoArguments(Shape, frozen=True):
    """Commands and events without any."""


class QMPCapability(StrEnum):
    """QMP's own capabilities: "oob" is a word of the protocol, though this server does not offer it."""

    OOB = "oob"


class QmpCapabilitiesArguments(Shape, frozen=True):
    enable: list[QMPCapability] = msgspec.field(default_factory=list)


class MigrateArguments(Shape, frozen=True):
    uri: str
    blk: bool = False
    inc: bool = False
    detach: bool = False
    resume: bool = False
    x_migrated_request_id: str = ""
    """The same id twice is one migration."""


class UriArguments(Shape, frozen=True):
    uri: str


class MigrateContinueArguments(Shape, frozen=True):
    state: MigrationStatus


class FdNameArguments(Shape, frozen=True):
    fdname: str


class ResolveArguments(Shape, frozen=True):
    peer_is_fenced: bool = False
    peer_is_running: bool = False


class SnapshotArguments(Shape, frozen=True):
    """Of snapshot-save and snapshot-load. QEMU wants names of disks; there are none here, so none need be given."""

    job_id: str
    tag: str
    vmstate: str = ""
    devices: list[str] = msgspec.field(default_factory=list)


class SnapshotDeleteArguments(Shape, frozen=True):
    job_id: str
    tag: str
    devices: list[str] = msgspec.field(default_factory=list)


class JobArguments(Shape, frozen=True):
    id: str


# Results


class VersionTriple(Shape, frozen=True):
    major: int
    minor: int
    micro: int


class VersionInfo(Shape, frozen=True):
    qemu: VersionTriple
    package: str


class CommandInfo(Shape, frozen=True):
    name: str


class StatusInfo(Shape, frozen=True):
    status: RunState
    running: bool
    singlestep: bool


class NameInfo(Shape, frozen=True):
    name: str | UnsetType = UNSET


class UuidInfo(msgspec.Struct, frozen=True):
    UUID: str


class SchemaMetaType(StrEnum):
    BUILTIN = "builtin"
    ENUM = "enum"
    ARRAY = "array"
    OBJECT = "object"
    ALTERNATE = "alternate"
    COMMAND = "command"
    EVENT = "event"


class SchemaInfoMember(Shape, frozen=True):
    type: str
    name: str | UnsetType = UNSET
    default: Any = UNSET
    features: list[str] | UnsetType = UNSET


class SchemaInfo(Shape, frozen=True):
    """QEMU describes this as a union by meta-type; here it is one object with every branch's members optional."""

    name: str
    meta_type: SchemaMetaType
    json_type: str | UnsetType = UNSET
    values: list[str] | UnsetType = UNSET
    element_type: str | UnsetType = UNSET
    members: list[SchemaInfoMember] | UnsetType = UNSET
    arg_type: str | UnsetType = UNSET
    ret_type: str | UnsetType = UNSET
    features: list[str] | UnsetType = UNSET


class MigrationStats(Shape, frozen=True):
    transferred: int
    remaining: int
    total: int
    duplicate: int
    skipped: int
    normal: int
    normal_bytes: int
    dirty_pages_rate: int
    mbps: float
    dirty_sync_count: int
    postcopy_requests: int
    page_size: int
    multifd_bytes: int
    pages_per_second: int
    precopy_bytes: int
    downtime_bytes: int
    postcopy_bytes: int
    dirty_sync_missed_zero_copy: int


class XBZRLECacheStats(Shape, frozen=True):
    cache_size: int
    bytes: int
    pages: int
    cache_miss: int
    cache_miss_rate: float
    encoding_rate: float
    overflow: int


class SocketAddress(Shape, frozen=True):
    """Where an incoming migration is awaited; QEMU describes this as a union by type."""

    type: str
    host: str | UnsetType = UNSET
    port: str | UnsetType = UNSET
    ipv4: bool | UnsetType = UNSET
    ipv6: bool | UnsetType = UNSET
    path: str | UnsetType = UNSET
    fd: str | UnsetType = msgspec.field(name="str", default=UNSET)


class PassInfo(Shape, frozen=True):
    """One pass over the dirty pages."""

    pass_: int = msgspec.field(name="pass")
    sent_bytes: int
    dirtied_bytes: int
    ms: float


class ConvergenceInfo(Shape, frozen=True):
    converging: bool
    text: str
    suggestions: list[str]


class DowntimeInfo(Shape, frozen=True):
    """Where the downtime went, in milliseconds."""

    stop: float | UnsetType = UNSET
    operator: float | UnsetType = UNSET
    sync: float | UnsetType = UNSET
    ram: float | UnsetType = UNSET
    devices: float | UnsetType = UNSET
    ready: float | UnsetType = UNSET
    record: float | UnsetType = UNSET
    answer: float | UnsetType = UNSET


class MigrationOutcome(StrEnum):
    """Who owns the machine, as far as this host knows; final once the migration has ended."""

    SOURCE_OWNS = "source-owns"
    DESTINATION_OWNS = "destination-owns"
    UNKNOWN = "unknown"


class KeptSectionInfo(Shape, frozen=True):
    """A section that nothing here takes, kept as it came (x-migrated-keep-unknown-sections)."""

    id: str
    instance_id: int
    version_id: int
    size: int


class MigrationInfo(Shape, frozen=True):
    status: MigrationStatus | UnsetType = UNSET
    ram: MigrationStats | UnsetType = UNSET
    xbzrle_cache: XBZRLECacheStats | UnsetType = UNSET
    total_time: int | UnsetType = UNSET
    expected_downtime: int | UnsetType = UNSET
    downtime: int | UnsetType = UNSET
    setup_time: int | UnsetType = UNSET
    cpu_throttle_percentage: int | UnsetType = UNSET
    error_desc: str | UnsetType = UNSET
    blocked_reasons: list[str] | UnsetType = UNSET
    postcopy_blocktime: int | UnsetType = UNSET
    postcopy_vcpu_blocktime: list[int] | UnsetType = UNSET
    socket_address: list[SocketAddress] | UnsetType = UNSET
    x_migrated_dirty_rate_bps: int | UnsetType = UNSET
    x_migrated_bandwidth_bps: int | UnsetType = UNSET
    x_migrated_eta_ms: int | UnsetType = UNSET
    x_migrated_passes: list[PassInfo] | UnsetType = UNSET
    x_migrated_convergence: ConvergenceInfo | UnsetType = UNSET
    x_migrated_downtime: DowntimeInfo | UnsetType = UNSET
    x_migrated_faults: FaultInfo | UnsetType = UNSET
    x_migrated_packing: PackingInfo | UnsetType = UNSET
    x_migrated_outcome: MigrationOutcome | UnsetType = UNSET
    x_migrated_migration_id: str | UnsetType = UNSET
    x_migrated_peer: PeerInfo | UnsetType = UNSET
    x_migrated_kept_sections: list[KeptSectionInfo] | UnsetType = UNSET
    x_migrated_error: ErrorInfo | UnsetType = UNSET
    x_migrated_blockers: list[BlockerInfo] | UnsetType = UNSET


class OwnershipInfo(Shape, frozen=True):
    """What the ownership record says, in words, and what an operator may safely do next."""

    record: str
    text: str
    next_step: str
    epoch: int | UnsetType = UNSET
    peer: str | UnsetType = UNSET
    migration_id: str | UnsetType = UNSET


class BlockInfo(Shape, frozen=True):
    name: str
    size: int
    page_size: int
    workloads: list[str]


class DeviceInfo(Shape, frozen=True):
    id: str
    instance_id: int
    version_id: int
    workload: str


class WorkloadInfo(Shape, frozen=True):
    name: str
    blocks: list[str]
    devices: list[str]


class MachineInfo(Shape, frozen=True):
    name: str
    uuid: str
    type: str
    status: RunState
    blocks: list[BlockInfo]
    devices: list[DeviceInfo]
    workloads: list[WorkloadInfo]


class JobInfo(Shape, frozen=True):
    id: str
    type: JobType
    status: JobStatus
    current_progress: int
    total_progress: int
    error: str | UnsetType = UNSET
    x_migrated_error: ErrorInfo | UnsetType = UNSET


class SnapshotBlockInfo(Shape, frozen=True):
    name: str
    size: int


class SnapshotInfo(Shape, frozen=True):
    """A snapshot, or why it cannot be read."""

    tag: str
    path: str
    error: str | UnsetType = UNSET
    created: str | UnsetType = UNSET
    size: int | UnsetType = UNSET
    machine: str | UnsetType = UNSET
    status: str | UnsetType = UNSET
    blocks: list[SnapshotBlockInfo] | UnsetType = UNSET


# Event data


class JobStatusChangeEvent(Shape, frozen=True):
    id: str
    status: JobStatus


class MigrationEvent(Shape, frozen=True):
    status: MigrationStatus


class MigrationPassEvent(Shape, frozen=True):
    pass_: int = msgspec.field(name="pass")


class WorkloadAttachedEvent(Shape, frozen=True):
    workload: str
    pid: int


class WorkloadLeftEvent(Shape, frozen=True):
    workload: str
    reason: str


class ShutdownCause(StrEnum):
    """QEMU's causes, as far as they can happen to a daemon."""

    HOST_ERROR = "host-error"
    HOST_QMP_QUIT = "host-qmp-quit"
    HOST_SIGNAL = "host-signal"


class ShutdownEvent(Shape, frozen=True):
    guest: bool
    reason: ShutdownCause
