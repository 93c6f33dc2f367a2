"""A real QEMU 7.2 and this daemon's control socket, asked the same: what they refuse, how, and what they describe."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from migrated.control.server import ControlServer
from migrated.error_ids import ERROR_IDS
from migrated.model.parameters import CAPABILITIES, PARAMETERS
from tests.support.fake_services import FakeDaemon
from tests.support.qmp_peer import QmpPeer
from tests.support.qmp_refusals import REFUSED_ARGUMENTS
from tests.support.qmp_schema import QmpSchema

QEMU = shutil.which("qemu-system-x86_64")
pytestmark = pytest.mark.skipif(QEMU is None, reason="qemu-system-x86_64 is not installed")


@pytest_asyncio.fixture
async def qemu(tmp_path: Path) -> AsyncIterator[QmpPeer]:
    """A QEMU without a machine, its monitor not negotiated yet."""
    assert QEMU is not None
    path = str(tmp_path / "qemu.sock")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as listener:
        listener.bind(path)
        listener.listen()
        process = await asyncio.create_subprocess_exec(
            QEMU, "-M", "none", "-display", "none", "-S", "-nodefaults", "-qmp", f"unix:{path}",
            stdin=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        try:
            sock, _ = await asyncio.wait_for(asyncio.get_running_loop().sock_accept(listener), 30)
            peer = QmpPeer(sock)
            assert "QMP" in await peer.receive()
            yield peer
            peer.close()
        finally:
            process.kill()
            await process.wait()


@pytest_asyncio.fixture
async def ours(tmp_path: Path) -> AsyncIterator[QmpPeer]:
    """Our control socket, not negotiated yet."""
    path = str(tmp_path / "ours.sock")
    server = ControlServer(FakeDaemon().services, path)
    await server.start()
    peer = await QmpPeer.connect(path, negotiate=False)
    yield peer
    peer.close()
    await server.close()


async def negotiate(*peers: QmpPeer) -> None:
    for peer in peers:
        assert await peer.ask('{"execute": "qmp_capabilities"}') == {"return": {}}


def as_qemu_says(answer: dict[str, Any]) -> dict[str, Any]:
    """Return a refusal without what it says besides: that it has an id, for one."""
    assert answer["error"].pop("x-migrated-error")["id"] in ERROR_IDS
    return answer


async def test_arguments_are_refused_alike(qemu: QmpPeer, ours: QmpPeer) -> None:
    await negotiate(qemu, ours)
    for command, arguments, desc in REFUSED_ARGUMENTS:
        expected = {"error": {"class": "GenericError", "desc": desc}}
        assert await qemu.execute(command, arguments) == expected
        assert as_qemu_says(await ours.execute(command, arguments)) == expected


async def test_envelopes_are_refused_alike(qemu: QmpPeer, ours: QmpPeer) -> None:
    before = ['{"execute": "query-name"}', '{"execute": "no-such", "id": 1}', "{}", "[]", '{"execute": 1, "id": "a"}']
    for text in before:
        assert await qemu.ask(text) == as_qemu_says(await ours.ask(text))
    await negotiate(qemu, ours)
    after = [
        '{"execute": "qmp_capabilities"}',
        '{"execute": "no-such", "id": {"a": [1, null]}}',
        '{"execute": "query-status", "arguments": [], "id": 1.5}',
        '{"execute": "query-status", "arguments": {"x": 1}}',
        '{"execute": "query-status", "extra": 1}',
        '{"exec-oob": "query-status", "id": 1}',
        '{"arguments": {}}',
        "'a string' ",
        "null ",
        "12 ",
        "{'execute': 'no such \\' command', 'id': 'it\\'s \"mine\"'}",
    ]
    for text in after:
        assert await qemu.ask(text) == as_qemu_says(await ours.ask(text)), text


async def test_garbage_is_answered_alike_and_survived(qemu: QmpPeer, ours: QmpPeer) -> None:
    await negotiate(qemu, ours)
    for text in ('{"a": 1,}\n', '{"a" 1}\n', '{"a": 1, "a": 2}\n', "hello\n", "}\n", "\x04", '{"a": [1 2]}\n'):
        for peer in (qemu, ours):
            error = (await peer.ask(text))["error"]
            assert error["class"] == "GenericError"
            assert error["desc"].startswith("JSON parse error, "), text
            name = (await peer.ask('{"execute": "query-name", "id": 7}'))["id"]
            assert name == 7, text


#: Names of disks: a QEMU insists on them, and there are none here.
NO_DISKS: dict[str, dict[str, Any]] = {
    "snapshot-save": {"vmstate": (True, "string"), "devices": (True, ["string"])},
    "snapshot-load": {"vmstate": (True, "string"), "devices": (True, ["string"])},
    "snapshot-delete": {"devices": (True, ["string"])},
}


async def test_shared_commands_take_the_same_arguments(qemu: QmpPeer, ours: QmpPeer) -> None:
    await negotiate(qemu, ours)
    theirs, mine = [QmpSchema((await peer.execute("query-qmp-schema"))["return"]) for peer in (qemu, ours)]
    commands = [name for name, entry in mine.entries.items() if entry["meta-type"] in ("command", "event")]
    own = {name for name in commands if name.startswith(("x-migrated-", "X_MIGRATED_"))}
    for name in sorted(set(commands) - own):
        assert name in theirs.entries, f"{name} is not a command or event of QEMU"
        assert members(mine, name) == {**members(theirs, name), **NO_DISKS.get(name, {})}, name


def members(schema: QmpSchema, name: str) -> dict[str, Any]:
    """The arguments of a command or event: name -> (optional, what it is down to the JSON), our own left out."""
    listed = schema.members(schema.entries[name]["arg-type"])
    return {
        member: ("default" in entry, kind(schema, entry["type"]))
        for member, entry in listed.items()
        if not member.startswith("x-migrated-") and member != "block-bitmap-mapping"  # a list of anything, and refused
    }


def kind(schema: QmpSchema, name: str) -> Any:
    entry = schema.entries[name]
    match entry["meta-type"]:
        case "builtin":
            return entry["json-type"]
        case "enum":
            return "enum"  # whose values are compared where they matter, below
        case "array":
            return [kind(schema, entry["element-type"])]
        case "alternate":
            return sorted(kind(schema, member["type"]) for member in entry["members"])
        case _:
            return {member: kind(schema, item["type"]) for member, item in schema.members(name).items()}


async def test_settings_are_those_of_qemu_in_its_order(qemu: QmpPeer, ours: QmpPeer) -> None:
    await negotiate(qemu, ours)
    theirs, mine = [(await peer.execute("query-migrate-capabilities"))["return"] for peer in (qemu, ours)]
    assert [row["capability"] for row in mine] == [row["capability"] for row in theirs] == list(CAPABILITIES)
    assert {row["capability"] for row in mine if row["state"]} == {"return-path"}  # the deviation on purpose
    theirs, mine = [(await peer.execute("query-migrate-parameters"))["return"] for peer in (qemu, ours)]
    shared = {name: value for name, value in mine.items() if not name.startswith("x-migrated-")}
    assert shared == {**theirs, "max-bandwidth": 0}
    assert set(theirs) == {n for n in PARAMETERS if not n.startswith("x-migrated-")} - {"block-bitmap-mapping"}


async def test_answers_have_the_shape_of_qemus(qemu: QmpPeer, ours: QmpPeer) -> None:
    await negotiate(qemu, ours)
    schema = QmpSchema((await qemu.execute("query-qmp-schema"))["return"])
    for name in (
        "query-version",
        "query-status",
        "query-name",
        "query-uuid",
        "query-commands",
        "query-migrate",
        "query-jobs",
    ):
        answer = (await ours.execute(name))["return"]
        schema.check(schema.entries[name]["ret-type"], json.loads(json.dumps(answer)), name)
