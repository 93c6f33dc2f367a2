"""Every command of the control socket, in one table.

The rule of the file: translation only. A coroutine here turns a typed argument struct into one call of a port and the
port's answer into what QMP returns; whatever it decides beyond that belongs into a port. A command that is not in the
table does not exist; one that QEMU has and this version lacks is named in `NOT_IMPLEMENTED` and says so.
"""

from __future__ import annotations

import os
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import msgspec

from migrated.control import shapes
from migrated.control.history_shapes import HistoryEntry, ReportArguments, ReportInfo
from migrated.control.machine_info import describe_machine
from migrated.control.ports import Services, SessionPort
from migrated.control.problem_shapes import PreflightInfo
from migrated.control.schema import build_schema
from migrated.control.settings import (
    MigrateSetCapabilitiesArguments,
    MigrateSetParametersArguments,
    MigrationCapabilityStatus,
    MigrationParameters,
)
from migrated.control.shape import Shape
from migrated.errors import ArgumentError, CommandError
from migrated.model.runstate import RunState

VERSION: Final[dict[str, object]] = {"qemu": {"micro": 0, "minor": 2, "major": 7}, "package": "migrated 0.1.0"}
"""The QEMU version is the dialect spoken, on this socket and on the wire; the package is what really runs."""

REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
"""It becomes the migration's id, and stands in records and logs."""

NIL_UUID: Final = "00000000-0000-0000-0000-000000000000"


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a command: what it may act on, and where it came from."""

    services: Services
    session: SessionPort


@dataclass(frozen=True, slots=True)
class Command:
    """One row of the table."""

    name: str
    run: Callable[[Call, Any], Awaitable[object]]
    arguments: type[Shape] = shapes.NoArguments
    result: object = shapes.NoArguments

    @property
    def asks(self) -> bool:
        """Say whether it changes nothing; by its name, so that a new command is not open by oversight."""
        return self.name == "qmp_capabilities" or self.name.removeprefix("x-migrated-").startswith("query-")


async def _qmp_capabilities(call: Call, arguments: shapes.QmpCapabilitiesArguments) -> object:
    for capability in arguments.enable:
        raise CommandError(f"Capability {capability} not available")
    call.session.negotiated = True
    return {}


async def _query_version(call: Call, _: shapes.NoArguments) -> object:
    return VERSION


async def _query_commands(call: Call, _: shapes.NoArguments) -> object:
    return [{"name": name} for name in COMMANDS]


async def _query_qmp_schema(call: Call, _: shapes.NoArguments) -> object:
    return _schema()


@cache
def _schema() -> list[dict[str, object]]:
    return build_schema(COMMANDS.values(), EVENTS)


async def _query_status(call: Call, _: shapes.NoArguments) -> object:
    run_state = call.services.machine.run_state
    return {"status": run_state.value, "singlestep": False, "running": run_state is RunState.RUNNING}


async def _query_name(call: Call, _: shapes.NoArguments) -> object:
    return {"name": call.services.machine.name}


async def _query_uuid(call: Call, _: shapes.NoArguments) -> object:
    return {"UUID": call.services.machine.uuid or NIL_UUID}


async def _stop(call: Call, _: shapes.NoArguments) -> object:
    await call.services.migrator.stop()
    return {}


async def _cont(call: Call, _: shapes.NoArguments) -> object:
    await call.services.migrator.cont()
    return {}


async def _quit(call: Call, _: shapes.NoArguments) -> object:
    call.services.quit()
    return {}


async def _migrate(call: Call, arguments: shapes.MigrateArguments) -> object:
    if arguments.blk or arguments.inc:
        raise CommandError("Block migration ('blk', 'inc') is not implemented by this version of migrated")
    request_id = arguments.x_migrated_request_id
    if request_id and not REQUEST_ID.fullmatch(request_id):
        raise ArgumentError("Parameter 'x-migrated-request-id' expects 1 to 64 letters, digits, '.', '_' or '-'")
    await call.services.migrator.migrate(arguments.uri, resume=arguments.resume, request_id=request_id)
    return {}


async def _preflight(call: Call, arguments: shapes.UriArguments) -> object:
    return await call.services.migrator.preflight(arguments.uri)


async def _migrate_cancel(call: Call, _: shapes.NoArguments) -> object:
    await call.services.migrator.cancel()
    return {}


async def _migrate_incoming(call: Call, arguments: shapes.UriArguments) -> object:
    await call.services.migrator.incoming(arguments.uri)
    return {}


async def _migrate_continue(call: Call, arguments: shapes.MigrateContinueArguments) -> object:
    await call.services.migrator.proceed(arguments.state.value)
    return {}


async def _start_postcopy(call: Call, _: shapes.NoArguments) -> object:
    call.services.migrator.start_postcopy()
    return {}


async def _pause(call: Call, _: shapes.NoArguments) -> object:
    call.services.migrator.pause()
    return {}


async def _recover(call: Call, arguments: shapes.UriArguments) -> object:
    await call.services.migrator.recover(arguments.uri)
    return {}


async def _query_migrate(call: Call, _: shapes.NoArguments) -> object:
    return call.services.migrator.query()


async def _migrate_set_capabilities(call: Call, arguments: Any) -> object:
    call.services.migrator.set_capabilities({item.capability.value: item.state for item in arguments.capabilities})
    return {}


async def _query_migrate_capabilities(call: Call, _: shapes.NoArguments) -> object:
    current = call.services.migrator.capabilities
    return [{"capability": name, "state": state} for name, state in current.all().items()]


async def _migrate_set_parameters(call: Call, arguments: Shape) -> object:
    call.services.migrator.set_parameters(msgspec.to_builtins(arguments))
    return {}


async def _query_migrate_parameters(call: Call, _: shapes.NoArguments) -> object:
    return call.services.migrator.parameters.all()


async def _getfd(call: Call, arguments: shapes.FdNameArguments) -> object:
    fd = call.session.take_fd()
    if fd is None:
        raise CommandError("No file descriptor supplied via SCM_RIGHTS")
    if arguments.fdname[:1].isdigit():  # `fd:7` names a descriptor by number
        os.close(fd)
        raise CommandError("Parameter 'fdname' expects a name not starting with a digit")
    call.services.migrator.descriptors.add(arguments.fdname, fd)
    return {}


async def _closefd(call: Call, arguments: shapes.FdNameArguments) -> object:
    call.services.migrator.descriptors.close(arguments.fdname)
    return {}


async def _release(call: Call, _: shapes.NoArguments) -> object:
    await call.services.migrator.release()
    return {}


async def _resolve(call: Call, arguments: shapes.ResolveArguments) -> object:
    if arguments.peer_is_fenced == arguments.peer_is_running:
        raise CommandError("State exactly one of 'peer-is-fenced' and 'peer-is-running' as true")
    await call.services.migrator.resolve(arguments.peer_is_fenced, arguments.peer_is_running)
    return {}


async def _query_ownership(call: Call, _: shapes.NoArguments) -> object:
    record = {name.replace("_", "-"): value for name, value in call.services.migrator.ownership().items()}
    described = [field.encode_name for field in msgspec.structs.fields(shapes.OwnershipInfo)]
    return {name: record[name] for name in described if name in record}


async def _query_machine(call: Call, _: shapes.NoArguments) -> object:
    return describe_machine(call.services.machine)


async def _snapshot_save(call: Call, arguments: shapes.SnapshotArguments) -> object:
    await call.services.snapshots.save(arguments.job_id, arguments.tag, arguments.vmstate, arguments.devices)
    return {}


async def _snapshot_load(call: Call, arguments: shapes.SnapshotArguments) -> object:
    await call.services.snapshots.load(arguments.job_id, arguments.tag, arguments.vmstate, arguments.devices)
    return {}


async def _snapshot_delete(call: Call, arguments: shapes.SnapshotDeleteArguments) -> object:
    await call.services.snapshots.delete(arguments.job_id, arguments.tag, arguments.devices)
    return {}


async def _query_jobs(call: Call, _: shapes.NoArguments) -> object:
    return call.services.snapshots.jobs()


async def _job_cancel(call: Call, arguments: shapes.JobArguments) -> object:
    call.services.snapshots.cancel_job(arguments.id)
    return {}


async def _job_dismiss(call: Call, arguments: shapes.JobArguments) -> object:
    call.services.snapshots.dismiss_job(arguments.id)
    return {}


async def _query_snapshots(call: Call, _: shapes.NoArguments) -> object:
    return await call.services.snapshots.query()


async def _query_history(call: Call, _: shapes.NoArguments) -> object:
    return await call.services.history.query()


async def _query_report(call: Call, arguments: ReportArguments) -> object:
    return await call.services.history.report(arguments.id)


_ROWS = (
    Command("qmp_capabilities", _qmp_capabilities, shapes.QmpCapabilitiesArguments),
    Command("query-version", _query_version, result=shapes.VersionInfo),
    Command("query-commands", _query_commands, result=list[shapes.CommandInfo]),
    Command("query-qmp-schema", _query_qmp_schema, result=list[shapes.SchemaInfo]),
    Command("query-status", _query_status, result=shapes.StatusInfo),
    Command("query-name", _query_name, result=shapes.NameInfo),
    Command("query-uuid", _query_uuid, result=shapes.UuidInfo),
    Command("stop", _stop),
    Command("cont", _cont),
    Command("quit", _quit),
    Command("migrate", _migrate, shapes.MigrateArguments),
    Command("migrate_cancel", _migrate_cancel),
    Command("migrate-incoming", _migrate_incoming, shapes.UriArguments),
    Command("migrate-continue", _migrate_continue, shapes.MigrateContinueArguments),
    Command("migrate-start-postcopy", _start_postcopy),
    Command("migrate-pause", _pause),
    Command("migrate-recover", _recover, shapes.UriArguments),
    Command("query-migrate", _query_migrate, result=shapes.MigrationInfo),
    Command("migrate-set-capabilities", _migrate_set_capabilities, MigrateSetCapabilitiesArguments),
    Command("query-migrate-capabilities", _query_migrate_capabilities, result=list[MigrationCapabilityStatus]),
    Command("migrate-set-parameters", _migrate_set_parameters, MigrateSetParametersArguments),
    Command("query-migrate-parameters", _query_migrate_parameters, result=MigrationParameters),
    Command("snapshot-save", _snapshot_save, shapes.SnapshotArguments),
    Command("snapshot-load", _snapshot_load, shapes.SnapshotArguments),
    Command("snapshot-delete", _snapshot_delete, shapes.SnapshotDeleteArguments),
    Command("query-jobs", _query_jobs, result=list[shapes.JobInfo]),
    Command("job-cancel", _job_cancel, shapes.JobArguments),
    Command("job-dismiss", _job_dismiss, shapes.JobArguments),
    Command("getfd", _getfd, shapes.FdNameArguments),
    Command("closefd", _closefd, shapes.FdNameArguments),
    Command("x-migrated-preflight", _preflight, shapes.UriArguments, result=PreflightInfo),
    Command("x-migrated-release", _release),
    Command("x-migrated-resolve", _resolve, shapes.ResolveArguments),
    Command("x-migrated-query-ownership", _query_ownership, result=shapes.OwnershipInfo),
    Command("x-migrated-query-snapshots", _query_snapshots, result=list[shapes.SnapshotInfo]),
    Command("x-migrated-query-machine", _query_machine, result=shapes.MachineInfo),
    Command("x-migrated-query-history", _query_history, result=list[HistoryEntry]),
    Command("x-migrated-query-report", _query_report, ReportArguments, result=ReportInfo),
)

COMMANDS: Final[Mapping[str, Command]] = {command.name: command for command in _ROWS}

NOT_IMPLEMENTED: Final = frozenset({"calc-dirty-rate", "query-dirty-rate"})
"""Commands of the interface that a later version brings: refused by name, and not in query-commands."""

EVENTS: Final[Mapping[str, type[Shape]]] = {
    "STOP": shapes.NoArguments,
    "RESUME": shapes.NoArguments,
    "SHUTDOWN": shapes.ShutdownEvent,
    "MIGRATION": shapes.MigrationEvent,
    "MIGRATION_PASS": shapes.MigrationPassEvent,
    "JOB_STATUS_CHANGE": shapes.JobStatusChangeEvent,
    "X_MIGRATED_WORKLOAD_ATTACHED": shapes.WorkloadAttachedEvent,
    "X_MIGRATED_WORKLOAD_LEFT": shapes.WorkloadLeftEvent,
}
"""Events and the shape of their data, for introspection; whoever raises an event sends it, listed or not."""
