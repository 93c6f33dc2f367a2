"""Every command: what it asks of its port, what it returns, and how it refuses arguments (texts of QEMU 7.2)."""

from __future__ import annotations

import json
from typing import Any

import pytest

from migrated.control.commands import COMMANDS, NOT_IMPLEMENTED
from migrated.model.parameters import CAPABILITIES, PARAMETERS
from migrated.model.runstate import RunState
from migrated.savevm.ports import TrackedMapping
from tests.support.fake_services import FakeBlock, FakeDevice
from tests.support.qmp_peer import QmpPeer
from tests.support.qmp_refusals import REFUSED_ARGUMENTS
from tests.unit.control.conftest import Control


@pytest.mark.parametrize(
    ("command", "arguments", "call"),
    [
        ("stop", {}, ("stop",)),
        ("cont", {}, ("cont",)),
        ("migrate", {"uri": "tcp:h:1"}, ("migrate", "tcp:h:1", False)),
        ("migrate", {"uri": "tcp:h:1", "resume": True, "detach": True}, ("migrate", "tcp:h:1", True)),
        ("migrate", {"uri": "tcp:h:1", "blk": False, "inc": False}, ("migrate", "tcp:h:1", False)),
        ("migrate_cancel", {}, ("cancel",)),
        ("migrate-incoming", {"uri": "unix:/x"}, ("incoming", "unix:/x")),
        ("migrate-continue", {"state": "pre-switchover"}, ("proceed", "pre-switchover")),
        ("x-migrated-release", {}, ("release",)),
        ("x-migrated-resolve", {"peer-is-fenced": True}, ("resolve", True, False)),
        ("x-migrated-resolve", {"peer-is-running": True, "peer-is-fenced": False}, ("resolve", False, True)),
    ],
)
async def test_commands_are_passed_on(
    control: Control, peer: QmpPeer, command: str, arguments: dict[str, Any], call: tuple[Any, ...]
) -> None:
    await peer.send(json.dumps({"execute": command, "arguments": arguments}).encode())
    answer = await peer.receive()
    while "event" in answer:
        answer = await peer.receive()
    assert answer == {"return": {}}
    assert control.migrator.calls == [call]


@pytest.mark.parametrize(
    ("command", "arguments", "call"),
    [
        ("snapshot-save", {"job-id": "j", "tag": "t"}, ("save", "j", "t", "", [])),
        (
            "snapshot-save",
            {"job-id": "j", "tag": "t", "vmstate": "d", "devices": ["d"]},
            ("save", "j", "t", "d", ["d"]),
        ),
        ("snapshot-load", {"job-id": "j", "tag": "t"}, ("load", "j", "t", "", [])),
        ("snapshot-delete", {"job-id": "j", "tag": "t", "devices": []}, ("delete", "j", "t", [])),
        ("job-cancel", {"id": "j"}, ("cancel", "j")),
        ("job-dismiss", {"id": "j"}, ("dismiss", "j")),
    ],
)
async def test_snapshots_and_jobs_are_passed_on(
    control: Control, peer: QmpPeer, command: str, arguments: dict[str, Any], call: tuple[Any, ...]
) -> None:
    assert await peer.execute(command, arguments) == {"return": {}}
    assert control.snapshots.calls == [call]


async def test_queries(control: Control, peer: QmpPeer) -> None:
    version = {"qemu": {"micro": 0, "minor": 2, "major": 7}, "package": "migrated 0.1.0"}
    assert await peer.execute("query-version") == {"return": version}
    assert await peer.execute("query-name") == {"return": {"name": "kv"}}
    nil = "00000000-0000-0000-0000-000000000000"
    assert await peer.execute("query-uuid") == {"return": {"UUID": nil}}
    control.machine.uuid = "550e8400-e29b-41d4-a716-446655440000"
    assert await peer.execute("query-uuid") == {"return": {"UUID": control.machine.uuid}}
    running = {"status": "running", "singlestep": False, "running": True}
    assert await peer.execute("query-status") == {"return": running}
    control.machine.run_state = RunState.FINISH_MIGRATE
    assert await peer.execute("query-status") == {
        "return": {"status": "finish-migrate", "singlestep": False, "running": False}
    }
    assert await peer.execute("query-migrate") == {"return": {}}
    control.migrator.info = {"status": "active", "x-migrated-outcome": "source-owns"}
    assert await peer.execute("query-migrate") == {"return": control.migrator.info}
    assert await peer.execute("x-migrated-query-ownership") == {"return": control.migrator.record}
    control.migrator.record = {**control.migrator.record, "epoch": 3, "migration_id": "1f", "internal": 1}
    answer = (await peer.execute("x-migrated-query-ownership"))["return"]
    assert (answer["epoch"], answer["migration-id"], "internal" in answer) == (3, "1f", False)


async def test_query_machine(control: Control, peer: QmpPeer) -> None:
    mapping = TrackedMapping("worker", 0x1000, 8192, 5, 6)
    control.machine.blocks = [FakeBlock("heap", 8192, mappings=[mapping]), FakeBlock("spare", 4096)]
    control.machine.attached = [FakeDevice("cpu", "worker"), FakeDevice("nic", "helper", 1, 3)]
    answer = await peer.execute("x-migrated-query-machine")
    assert answer["return"] == {
        "name": "kv",
        "uuid": "",
        "type": "none",
        "status": "running",
        "blocks": [
            {"name": "heap", "size": 8192, "page-size": 4096, "workloads": ["worker"]},
            {"name": "spare", "size": 4096, "page-size": 4096, "workloads": []},
        ],
        "devices": [
            {"id": "cpu", "instance-id": 0, "version-id": 1, "workload": "worker"},
            {"id": "nic", "instance-id": 1, "version-id": 3, "workload": "helper"},
        ],
        "workloads": [
            {"name": "helper", "blocks": [], "devices": ["nic"]},
            {"name": "worker", "blocks": ["heap"], "devices": ["cpu"]},
        ],
    }


async def test_query_commands_lists_what_there_is(peer: QmpPeer) -> None:
    names = [row["name"] for row in (await peer.execute("query-commands"))["return"]]
    assert names == list(COMMANDS)
    assert not NOT_IMPLEMENTED & set(names)
    for name in NOT_IMPLEMENTED:
        assert await peer.refusal(json.dumps({"execute": name, "arguments": {"any": 1}})) == (
            "GenericError",
            f"{name} is not implemented by this version of migrated",
        )


async def test_capabilities(control: Control, peer: QmpPeer) -> None:
    rows = (await peer.execute("query-migrate-capabilities"))["return"]
    assert [row["capability"] for row in rows] == list(CAPABILITIES)
    assert {"capability": "return-path", "state": True} in rows

    def change(**states: bool) -> dict[str, Any]:
        return {"capabilities": [{"capability": n.replace("_", "-"), "state": on} for n, on in states.items()]}

    assert await peer.execute("migrate-set-capabilities", change(events=True, auto_converge=True)) == {"return": {}}
    assert control.migrator.capabilities.get("auto-converge")
    refused = await peer.execute("migrate-set-capabilities", change(events=False, compress=True))
    assert refused["error"]["desc"] == "Capability 'compress' is not implemented by this version of migrated"
    assert control.migrator.capabilities.get("events")  # all or none


async def test_parameters(control: Control, peer: QmpPeer) -> None:
    shown = (await peer.execute("query-migrate-parameters"))["return"]
    assert list(shown) == [row.name for row in PARAMETERS.values() if row.default is not None]
    assert (shown["downtime-limit"], shown["max-bandwidth"], shown["tls-creds"]) == (300, 0, "")
    change = {"downtime-limit": 500, "x-migrated-stop-timeout": 10, "tls-creds": None, "multifd-compression": "none"}
    assert await peer.execute("migrate-set-parameters", change) == {"return": {}}
    assert control.migrator.parameters.integer("x-migrated-stop-timeout") == 10
    refused = await peer.execute("migrate-set-parameters", {"downtime-limit": 1, "max-cpu-throttle": 100})
    expected = "Parameter 'max_cpu_throttle' expects an integer in the range of cpu_throttle_initial to 99"
    assert refused["error"]["desc"] == expected
    assert control.migrator.parameters.integer("downtime-limit") == 500  # all or none
    assert await peer.execute("migrate-set-parameters", {}) == {"return": {}}


@pytest.mark.parametrize(("command", "arguments", "desc"), REFUSED_ARGUMENTS)
async def test_arguments_are_refused_with_qemus_words(
    control: Control, peer: QmpPeer, command: str, arguments: dict[str, Any], desc: str
) -> None:
    assert await peer.refusal(json.dumps({"execute": command, "arguments": arguments})) == ("GenericError", desc)
    assert control.migrator.calls == []


@pytest.mark.parametrize("arguments", [{}, {"peer-is-fenced": True, "peer-is-running": True}])
async def test_resolve_wants_exactly_one_statement(control: Control, peer: QmpPeer, arguments: dict[str, Any]) -> None:
    answer = await peer.execute("x-migrated-resolve", arguments)
    assert answer["error"]["desc"] == "State exactly one of 'peer-is-fenced' and 'peer-is-running' as true"
    assert control.migrator.calls == []


@pytest.mark.parametrize("member", ["blk", "inc"])
async def test_block_migration_is_refused_in_clear_words(control: Control, peer: QmpPeer, member: str) -> None:
    answer = await peer.execute("migrate", {"uri": "tcp:h:1", member: True})
    expected = "Block migration ('blk', 'inc') is not implemented by this version of migrated"
    assert (answer["error"]["class"], answer["error"]["desc"]) == ("GenericError", expected)
    assert control.migrator.calls == []


async def test_block_bitmap_mapping_of_any_content_is_left_to_the_table(peer: QmpPeer) -> None:
    answer = await peer.execute("migrate-set-parameters", {"block-bitmap-mapping": [{"node-name": "a"}]})
    assert "not implemented" in answer["error"]["desc"]
