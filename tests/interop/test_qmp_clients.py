"""The field's own client library and its shell drive a real daemon: a whole migration, its events, its refusals."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from qemu.qmp import ExecuteError, QMPClient

from tests.interop.conftest import SIZE, qmp_shell
from tests.support.dissect import dissect
from tests.support.holding_site import HoldingSite, MakeSite
from tests.support.qemu import BLOCK


@pytest.fixture
def site(make_site: MakeSite) -> HoldingSite:
    return make_site("site", incoming=None)


@pytest_asyncio.fixture
async def client(site: HoldingSite) -> AsyncIterator[QMPClient]:
    client = QMPClient("interop")
    await client.connect(site.socket)
    yield client
    await client.disconnect()


async def statuses(client: QMPClient, until: str) -> list[str]:
    """Collect what MIGRATION events say, up to a status."""
    seen: list[str] = []
    with client.listener("MIGRATION") as events:
        while until not in seen:
            event = await events.get()
            timestamp: Any = event["timestamp"]
            what: Any = event["data"]
            assert set(timestamp) == {"seconds", "microseconds"}
            seen.append(what["status"])
    return seen


async def test_a_migration_with_its_events(client: QMPClient, tmp_path: Path) -> None:
    assert client.greeting is not None
    version: Any = client.greeting.QMP.version["qemu"]
    assert version["major"] == 7
    await client.execute("migrate-set-capabilities", {"capabilities": [{"capability": "events", "state": True}]})
    listed = await client.execute("query-migrate-capabilities")
    assert isinstance(listed, list)
    assert {"capability": "events", "state": True} in listed
    follow = asyncio.create_task(statuses(client, "completed"))
    with client.listener(("STOP", "MIGRATION_PASS")) as events:
        await client.execute("migrate", {"uri": f"file:{tmp_path}/capture"})
        assert await follow == ["setup", "active", "completed"]
        others = [(await events.get())["event"]]
        while others[-2:] != ["STOP", "MIGRATION_PASS"]:
            others.append((await events.get())["event"])
    assert others.count("STOP") == 1
    assert others[0] == "MIGRATION_PASS"
    figures = await client.execute("query-migrate")
    assert isinstance(figures, dict)
    assert figures["status"] == "completed"
    assert figures["ram"]["total"] == SIZE
    assert await client.execute("query-status") == {"status": "postmigrate", "running": False, "singlestep": False}
    assert dissect((tmp_path / "capture").read_bytes()).missing() == {}


async def test_without_the_capability_there_are_no_migration_events(client: QMPClient, tmp_path: Path) -> None:
    with client.listener() as events:
        await client.execute("migrate", {"uri": f"file:{tmp_path}/capture"})
        assert (await events.get())["event"] == "STOP"


@pytest.mark.parametrize(
    ("command", "arguments", "error_class", "desc"),
    [
        ("migrate", {"uri": "carrier-pigeon:1"}, "GenericError", "unknown migration protocol: carrier-pigeon"),
        ("migrate", {"uri": "tcp:nowhere"}, "GenericError", "error parsing address 'nowhere'"),
        ("migrate", {}, "GenericError", "Parameter 'uri' is missing"),
        ("migrate-incoming", {"uri": "tcp:127.0.0.1:0"}, "GenericError", "'-incoming' was not specified"),
        ("migrate-continue", {"state": "pre-switchover"}, "GenericError", "Migration not in expected state: none"),
        ("migrate-set-parameters", {"downtime-limit": 2000001}, "GenericError", r"0 to \(2000 \* 1000\) ms"),
        ("no-such-command", {}, "CommandNotFound", "The command no-such-command has not been found"),
    ],
)
async def test_refusals(
    client: QMPClient, command: str, arguments: dict[str, object], error_class: str, desc: str
) -> None:
    with pytest.raises(ExecuteError, match=desc) as refusal:
        await client.execute(command, arguments)
    assert refusal.value.error_class == error_class
    assert await client.execute("query-status") == {"status": "running", "running": True, "singlestep": False}


async def test_a_descriptor_by_scm_rights(client: QMPClient, site: HoldingSite, tmp_path: Path) -> None:
    read_end, write_end = os.pipe()
    client.send_fd_scm(write_end)
    await client.execute("getfd", {"fdname": "out"})
    os.close(write_end)
    await client.execute("migrate", {"uri": "fd:out"})
    with os.fdopen(read_end, "rb") as pipe:
        stream = await asyncio.to_thread(pipe.read)
    assert dissect(stream).blocks == {BLOCK: SIZE}
    site.wait_status("completed")


async def test_qmp_shell(site: HoldingSite, tmp_path: Path) -> None:
    shell = await asyncio.create_subprocess_exec(
        *qmp_shell(site.socket), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE, env={**os.environ, "HOME": str(tmp_path)},
    )  # fmt: skip
    typed = (
        "query-status\n"
        "migrate-set-parameters downtime-limit=123\n"
        "migrate uri=carrier-pigeon:1\n"
        f"migrate uri=file:{tmp_path}/capture\n"
    )
    output, errors = await shell.communicate(typed.encode())
    assert shell.returncode == 0, errors.decode()
    text = output.decode().replace("'", '"')
    assert "Connected to QEMU 7.2" in text
    assert '"status": "running"' in text
    assert "unknown migration protocol: carrier-pigeon" in text
    assert site.qmp.execute("query-migrate-parameters")["downtime-limit"] == 123
    site.wait_status("completed")
    assert dissect((tmp_path / "capture").read_bytes()).blocks == {BLOCK: SIZE}
