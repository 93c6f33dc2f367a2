"""The field's own client library (and its shell) drives the control socket without knowing that this is no QEMU."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import pytest
import pytest_asyncio
from qemu.qmp import ExecuteError, Message, QMPClient
from qemu.qmp.protocol import ConnectError

from migrated.control.server import MAX_SESSIONS
from tests.unit.control.conftest import Control


@pytest_asyncio.fixture
async def qmp(control: Control) -> AsyncIterator[QMPClient]:
    client = QMPClient("under-test")
    await client.connect(control.path)
    yield client
    with contextlib.suppress(EOFError):  # where the server hung up first
        await client.disconnect()


async def test_negotiation(qmp: QMPClient) -> None:
    assert qmp.greeting is not None
    assert qmp.greeting.QMP.version["qemu"] == {"major": 7, "minor": 2, "micro": 0}
    assert qmp.greeting.QMP.capabilities == []


async def test_commands_and_errors(control: Control, qmp: QMPClient) -> None:
    assert await qmp.execute("query-name") == {"name": "kv"}
    await qmp.execute("migrate", {"uri": "tcp:h:1"})
    assert control.migrator.calls == [("migrate", "tcp:h:1", False)]
    with pytest.raises(ExecuteError, match="Parameter 'uri' is missing") as missing:
        await qmp.execute("migrate")
    assert missing.value.error_class == "GenericError"
    with pytest.raises(ExecuteError, match="The command balloon has not been found") as unknown:
        await qmp.execute("balloon", {"value": 1})
    assert unknown.value.error_class == "CommandNotFound"
    assert isinstance(await qmp.execute("query-qmp-schema"), list)


async def test_ids_route_answers_of_concurrent_commands(qmp: QMPClient) -> None:
    asked = [qmp.execute("query-name" if i % 2 else "query-version") for i in range(50)]
    answers = await asyncio.gather(*asked)
    name, version = await qmp.execute("query-name"), await qmp.execute("query-version")
    assert answers == [name if i % 2 else version for i in range(50)]


async def test_events(control: Control, qmp: QMPClient) -> None:
    with qmp.listener(("STOP", "MIGRATION")) as listener:
        control.migrator.emit("MIGRATION", {"status": "setup"})
        control.migrator.emit("MIGRATION_PASS", {"pass": 1})
        await qmp.execute("stop")
        first, second = await listener.get(), await listener.get()
    assert (first["event"], first["data"]) == ("MIGRATION", {"status": "setup"})
    assert second["event"] == "STOP"


async def test_getfd_with_the_library(control: Control, qmp: QMPClient) -> None:
    read_end, write_end = os.pipe()
    qmp.send_fd_scm(write_end)
    await qmp.execute("getfd", {"fdname": "m"})
    os.close(write_end)
    fd = control.migrator.descriptors.take("m")
    os.write(fd, b"x")
    control.migrator.descriptors.add("m", fd)
    assert os.read(read_end, 1) == b"x"
    await qmp.execute("closefd", {"fdname": "m"})
    os.close(read_end)


async def test_several_clients(control: Control, qmp: QMPClient) -> None:
    others = [QMPClient(f"other-{i}") for i in range(3)]
    for other in others:
        await other.connect(control.path)
    assert await asyncio.gather(*(other.execute("query-name") for other in [qmp, *others])) == [{"name": "kv"}] * 4
    for other in others:
        await other.disconnect()


async def test_a_refused_client_gets_a_greeting_error(control: Control, qmp: QMPClient) -> None:
    others = [QMPClient(f"other-{i}") for i in range(MAX_SESSIONS - 1)]
    for other in others:
        await other.connect(control.path)
    with pytest.raises(ConnectError, match="Failed to establish session"):
        await QMPClient("one-too-many").connect(control.path)
    assert await qmp.execute("query-name") == {"name": "kv"}
    for other in others:
        await other.disconnect()


async def test_raw_messages_and_malformed_ones(qmp: QMPClient) -> None:
    answer = await qmp.execute_msg(Message({"execute": "query-status", "id": "mine"}))
    assert answer == {"status": "running", "singlestep": False, "running": True}
    raw = await qmp._raw(b'{"execute": "stop", "bogus": 1, "id": "7"}')
    assert cast(dict[str, Any], raw["error"])["desc"] == "QMP input member 'bogus' is unexpected"


async def test_quit_and_disconnect(control: Control, qmp: QMPClient) -> None:
    await qmp.execute("quit")
    await control.daemon.quit_asked.wait()
    with qmp.listener("SHUTDOWN") as listener:
        await control.server.close("host-qmp-quit")
        assert (await listener.get())["data"] == {"guest": False, "reason": "host-qmp-quit"}


async def test_qmp_shell(control: Control, tmp_path: Path) -> None:
    shell = await asyncio.create_subprocess_exec(
        sys.executable, "-c", "from qemu.qmp.qmp_shell import main; main()", "-v", control.path,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "HOME": str(tmp_path)},
    )  # fmt: skip
    typed = (
        "query-name\n"
        "migrate uri=tcp:h:1\n"
        'migrate-set-capabilities capabilities=[{"capability":"events","state":true}]\n'
        "migrate-set-parameters downtime-limit=123\n"
        "balloon value=1\n"
        "quit\n"
    )
    output, errors = await asyncio.wait_for(shell.communicate(typed.encode()), 60)
    text = output.decode()
    assert shell.returncode == 0, errors.decode()
    assert "Connected to QEMU 7.2.0" in text
    assert '"name": "kv"' in text.replace("'", '"')
    assert "The command balloon has not been found" in text
    assert control.migrator.calls == [("migrate", "tcp:h:1", False)]
    assert control.migrator.capabilities.get("events")
    assert control.migrator.parameters.get("downtime-limit") == 123
    assert control.daemon.quit_asked.is_set()
