"""Introspection: complete, closed, and true (what commands return is what it says)."""

from __future__ import annotations

from typing import Any

import pytest
import pytest_asyncio

from migrated.control.commands import COMMANDS, EVENTS
from migrated.control.schema import build_schema
from migrated.model.history import Direction, Report, Unreadable, with_answer
from migrated.model.stats import DowntimeLedger
from migrated.savevm.ports import TrackedMapping
from tests.support.fake_services import FakeBlock, FakeDevice
from tests.support.qmp_peer import QmpPeer
from tests.support.qmp_schema import QmpSchema
from tests.unit.control.conftest import Control

RAM = {
    "transferred": 1, "remaining": 2, "total": 3, "duplicate": 4, "skipped": 0, "normal": 5, "normal-bytes": 6,
    "dirty-pages-rate": 7, "mbps": 8.5, "dirty-sync-count": 9, "postcopy-requests": 0, "page-size": 4096,
    "multifd-bytes": 0, "pages-per-second": 1, "precopy-bytes": 1, "downtime-bytes": 0, "postcopy-bytes": 0,
    "dirty-sync-missed-zero-copy": 0,
}  # fmt: skip

FULL_INFO: dict[str, Any] = {
    "status": "completed", "ram": RAM, "total-time": 1, "expected-downtime": 2, "downtime": 3, "setup-time": 4,
    "cpu-throttle-percentage": 20, "error-desc": "x", "blocked-reasons": ["y"],
    "socket-address": [
        {"type": "inet", "host": "127.0.0.1", "port": "1", "ipv4": True},
        {"type": "unix", "path": "/x"},
        {"type": "fd", "str": "7"},
    ],
    "x-migrated-dirty-rate-bps": 1, "x-migrated-bandwidth-bps": 2, "x-migrated-eta-ms": 3,
    "x-migrated-passes": [{"pass": 1, "sent-bytes": 2, "dirtied-bytes": 3, "ms": 4.5}],
    "x-migrated-convergence": {"converging": False, "text": "a", "suggestions": ["b"]},
    "x-migrated-downtime": {
        "stop": 1.0, "operator": 5.5, "sync": 2, "ram": 3.5, "devices": 0, "record": 1, "answer": 2,
    },
    "x-migrated-outcome": "source-owns", "x-migrated-peer": {"address": "a", "kind": "qemu"},
    "x-migrated-migration-id": "1f",
}  # fmt: skip

SNAPSHOTS: list[dict[str, object]] = [
    {"tag": "bad", "path": "/s/bad", "error": "the manifest cannot be read"},
    {
        "tag": "good", "path": "/s/good", "created": "2026-01-01T00:00:00+00:00", "size": 1, "machine": "kv",
        "status": "running", "blocks": [{"name": "heap", "size": 4096}],
    },
]  # fmt: skip

JOBS: list[dict[str, object]] = [
    {"type": "snapshot-save", "status": "running", "current-progress": 1, "total-progress": 2},
    {"type": "snapshot-load", "status": "concluded", "current-progress": 2, "total-progress": 2, "error": "x"},
]

BEGUN = Report(
    id="move-1", direction=Direction.OUTGOING, machine="kv", started="2026-01-01T00:00:00.000Z", status="unfinished",
    outcome="unknown", uri="tcp:h:1", peer="h:1",
)  # fmt: skip


@pytest_asyncio.fixture
async def schema(peer: QmpPeer) -> QmpSchema:
    return QmpSchema((await peer.execute("query-qmp-schema"))["return"])


def test_every_command_and_event_is_described(schema: QmpSchema) -> None:
    by_kind: dict[str, list[str]] = {}
    for name, entry in schema.entries.items():
        by_kind.setdefault(entry["meta-type"], []).append(name)
    assert by_kind["command"] == list(COMMANDS)
    assert by_kind["event"] == list(EVENTS)
    assert set(by_kind) == {"command", "event", "builtin", "enum", "array", "object", "alternate"}


def test_every_reference_leads_somewhere_and_every_type_is_used(schema: QmpSchema) -> None:
    types = {name for name, entry in schema.entries.items() if entry["meta-type"] not in ("command", "event")}
    assert schema.references() == types
    for entry in schema.entries.values():
        for key in ("arg-type", "ret-type"):
            assert key not in entry or schema.entries[entry[key]]["meta-type"] in ("object", "array")


def test_the_schema_describes_itself(schema: QmpSchema) -> None:
    schema.check(schema.entries["query-qmp-schema"]["ret-type"], list(schema.entries.values()))


def test_arguments_are_described_as_qemu_describes_them(schema: QmpSchema) -> None:
    migrate = schema.members(schema.entries["migrate"]["arg-type"])
    assert list(migrate) == ["uri", "blk", "inc", "detach", "resume", "x-migrated-request-id"]
    assert migrate["uri"] == {"name": "uri", "type": "str"}
    assert migrate["resume"] == {"name": "resume", "type": "bool", "default": None}
    parameters = schema.members(schema.entries["migrate-set-parameters"]["arg-type"])
    assert parameters["tls-creds"]["type"] == "StrOrNull"
    assert schema.entries["StrOrNull"]["members"] == [{"type": "str"}, {"type": "null"}]
    assert parameters["x-checkpoint-delay"]["features"] == ["unstable"]
    assert "features" not in parameters["x-migrated-stop-timeout"]


@pytest.mark.parametrize("name", [name for name in COMMANDS if name.startswith(("query-", "x-migrated-query-"))])
async def test_results_are_what_the_schema_says(control: Control, peer: QmpPeer, schema: QmpSchema, name: str) -> None:
    control.machine.blocks = [FakeBlock("heap", 8192, mappings=[TrackedMapping("worker", 0, 8192, 5, 6)])]
    control.machine.attached = [FakeDevice("cpu", "worker")]
    control.snapshots.found = SNAPSHOTS
    control.snapshots.script = JOBS
    arguments = {"id": "move"} if name == "x-migrated-query-report" else {}
    infos: list[dict[str, Any]] = [{}, {"status": "setup"}, FULL_INFO]
    for info in infos:
        control.migrator.info = info
        report = with_answer(BEGUN, info, outcome="unknown") if info else BEGUN
        control.history.reports = [report, Unreadable(path="/x", unreadable="cut short")]
        schema.check(schema.entries[name]["ret-type"], (await peer.execute(name, arguments))["return"], name)


def test_every_part_of_the_downtime_is_described(schema: QmpSchema) -> None:
    assert tuple(schema.members("DowntimeInfo")) == DowntimeLedger.PARTS


def test_event_data_is_what_the_schema_says(schema: QmpSchema) -> None:
    samples: dict[str, dict[str, Any]] = {
        "STOP": {},
        "RESUME": {},
        "SHUTDOWN": {"guest": False, "reason": "host-qmp-quit"},
        "MIGRATION": {"status": "pre-switchover"},
        "MIGRATION_PASS": {"pass": 3},
        "JOB_STATUS_CHANGE": {"id": "a", "status": "running"},
        "X_MIGRATED_WORKLOAD_ATTACHED": {"workload": "kv", "pid": 1},
        "X_MIGRATED_WORKLOAD_LEFT": {"workload": "kv", "reason": "it exited"},
    }
    assert set(samples) == set(EVENTS)
    for name, data in samples.items():
        schema.check(schema.entries[name]["arg-type"], data, name)


def test_what_qmp_cannot_say_is_an_error_at_once() -> None:
    class Odd:
        name = "odd"
        arguments = bytes
        result = bytes

    with pytest.raises(NotImplementedError):
        build_schema([Odd()], {})
