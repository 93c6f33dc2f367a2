"""Sessions of the control socket: negotiation, order, events, garbage, descriptors, and clients that misbehave."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import select
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from migrated.control import server as server_module
from migrated.control.server import ControlServer
from migrated.control.session import SessionLimits
from migrated.errors import ChannelError, CommandError, WorkloadError
from tests.support.fake_services import FakeDaemon
from tests.support.qmp_peer import QmpPeer
from tests.unit.control.conftest import Control

NEGOTIATE = b'{"execute": "qmp_capabilities"}'


# Negotiation


async def test_greeting_comes_first_and_alone(control: Control) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as sock:
        sock.connect(control.path)
        greeting = await QmpPeer(sock).receive()
    version = {"qemu": {"micro": 0, "minor": 2, "major": 7}, "package": "migrated 0.1.0"}
    assert greeting == {"QMP": {"version": version, "capabilities": []}}


async def test_before_negotiation_nothing_else_works(control: Control) -> None:
    peer = await control.connect(negotiate=False)
    expected = ("CommandNotFound", "Expecting capabilities negotiation with 'qmp_capabilities'")
    assert await peer.refusal('{"execute": "query-status"}') == expected
    assert await peer.refusal('{"execute": "no-such"}') == expected
    assert await peer.refusal('{"execute": "migrate-pause"}') == expected
    control.migrator.emit("STOP")  # must not be seen
    assert await peer.ask('{"execute": "qmp_capabilities", "id": 1}') == {"return": {}, "id": 1}
    assert await peer.refusal('{"execute": "qmp_capabilities"}') == (
        "CommandNotFound",
        "Capabilities negotiation is already complete, command ignored",
    )
    peer.close()


async def test_unavailable_qmp_capabilities_are_refused(control: Control) -> None:
    peer = await control.connect(negotiate=False)
    ask = '{"execute": "qmp_capabilities", "arguments": {"enable": [%s]}}'
    assert await peer.refusal(ask % '"oob"') == ("GenericError", "Capability oob not available")
    assert await peer.refusal(ask % '"x"') == ("GenericError", "Parameter 'enable[0]' does not accept value 'x'")
    assert await peer.ask(ask % "") == {"return": {}}
    peer.close()


# Commands


@pytest.mark.parametrize("ident", ["7", '"a"', "null", '{"a": [1, {}]}', "[]", "0", "-1.5", '"\\u00e9\\n"'])
async def test_ids_are_echoed_with_results_and_with_errors(peer: QmpPeer, ident: str) -> None:
    answer = await peer.ask(f'{{"execute": "query-name", "id": {ident}}}')
    assert answer == {"return": {"name": "kv"}, "id": json.loads(ident)}
    for wrong in ('"execute": "no-such"', '"execute": 1', '"oops": 1', '"execute": "stop", "arguments": {"x": 1}'):
        answer = await peer.ask(f'{{{wrong}, "id": {ident}}}')
        assert list(answer) == ["error", "id"]
        assert answer["id"] == json.loads(ident)


@pytest.mark.parametrize(
    ("text", "desc"),
    [
        ("[1, 2]", "QMP input must be a JSON object"),
        ("3\n", "QMP input must be a JSON object"),
        ('"stop"', "QMP input must be a JSON object"),
        ("null\n", "QMP input must be a JSON object"),
        ("{}", "QMP input lacks member 'execute'"),
        ('{"arguments": {}}', "QMP input lacks member 'execute'"),
        ('{"execute": 1}', "QMP input member 'execute' must be a string"),
        ('{"execute": "stop", "arguments": []}', "QMP input member 'arguments' must be an object"),
        ('{"execute": "stop", "extra": 1}', "QMP input member 'extra' is unexpected"),
        ('{"exec-oob": "stop"}', "QMP input member 'exec-oob' is unexpected"),
        ("oops\n", "JSON parse error, expecting value"),
        ('{"execute": "stop",}', "JSON parse error, expecting property name enclosed in double quotes"),
        ("\x03", "JSON parse error, stray byte 0x03"),
        ("[" * 600 + "\n", "JSON nesting depth limit exceeded"),
    ],
)
async def test_malformed_input_is_answered_and_the_session_goes_on(peer: QmpPeer, text: str, desc: str) -> None:
    assert await peer.refusal(text) == ("GenericError", desc)
    assert await peer.execute("query-name") == {"return": {"name": "kv"}}


async def test_oversized_command_is_refused_once(peer: QmpPeer) -> None:
    await peer.send(b'{"execute": "' + b"x" * (3 << 20) + b'"}\n')
    assert (await peer.receive())["error"]["desc"] == "JSON token size limit exceeded"
    assert await peer.execute("query-name") == {"return": {"name": "kv"}}


async def test_unknown_commands_and_those_of_later_versions(peer: QmpPeer) -> None:
    assert await peer.refusal('{"execute": "balloon"}') == (
        "CommandNotFound",
        "The command balloon has not been found",
    )
    assert await peer.refusal('{"execute": "calc-dirty-rate", "arguments": {}}') == (
        "GenericError",
        "calc-dirty-rate is not implemented by this version of migrated",
    )


async def test_commands_split_and_joined_anywhere(control: Control) -> None:
    text = NEGOTIATE + b'{\'execute\':\'query-name\'}\r\n \t{"execute":\n"query-name","id":2}'
    peer = await control.connect(negotiate=False)
    for i in range(len(text)):
        await peer.send(text[i : i + 1])
    assert [await peer.receive() for _ in range(3)] == [
        {"return": {}},
        {"return": {"name": "kv"}},
        {"return": {"name": "kv"}, "id": 2},
    ]
    peer.close()


async def test_commands_of_one_session_run_in_their_order(control: Control, peer: QmpPeer) -> None:
    control.migrator.gate = asyncio.Event()
    await peer.send(b'{"execute": "stop", "id": 1} {"execute": "query-name", "id": 2} {"execute": "cont", "id": 3}')
    await control.migrator.entered.wait()
    other = await control.connect()
    assert await other.execute("query-status")  # another session is not held up
    assert control.migrator.calls == [("stop",)]
    control.migrator.gate.set()
    answers = [await peer.receive() for _ in range(5)]
    assert [answer.get("id") or answer["event"] for answer in answers] == ["STOP", 1, 2, "RESUME", 3]
    other.close()


async def test_pipelined_commands_are_all_answered(peer: QmpPeer) -> None:
    async def flood() -> None:
        for start in range(0, 5000, 100):
            await peer.send(b"".join(b'{"execute": "query-name", "id": %d}' % i for i in range(start, start + 100)))

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(flood())
        assert [(await peer.receive())["id"] for _ in range(5000)] == list(range(5000))


async def test_errors_of_commands_reach_the_client(control: Control, peer: QmpPeer) -> None:
    control.migrator.refusal = CommandError("no", "DeviceNotActive")
    assert await peer.refusal('{"execute": "stop"}') == ("DeviceNotActive", "no")
    control.migrator.refusal = WorkloadError("w", "did not stop")
    assert await peer.refusal('{"execute": "stop"}') == ("GenericError", "workload w: did not stop")
    control.migrator.refusal = TimeoutError()
    assert await peer.refusal('{"execute": "stop", "id": 1}') == ("GenericError", "Internal error: TimeoutError: ")
    control.migrator.refusal = RuntimeError("a bug")
    assert await peer.refusal('{"execute": "stop"}') == ("GenericError", "Internal error: RuntimeError: a bug")
    control.migrator.info = {"expected-downtime": float("inf")}
    assert (await peer.refusal('{"execute": "query-migrate"}'))[1].startswith("Internal error: ValueError")
    assert await peer.execute("query-name") == {"return": {"name": "kv"}}


# Events


async def test_events_go_to_every_negotiated_client(control: Control) -> None:
    peers = [await control.connect() for _ in range(3)]
    silent = await control.connect(negotiate=False)
    control.migrator.emit("MIGRATION", {"status": "setup"})
    control.migrator.emit("STOP")
    for peer in peers:
        first, second = await peer.receive(), await peer.receive()
        assert (first["event"], first["data"]) == ("MIGRATION", {"status": "setup"})
        assert set(first["timestamp"]) == {"seconds", "microseconds"}
        assert second["event"] == "STOP"
        assert "data" not in second
    assert await silent.ask(NEGOTIATE.decode()) == {"return": {}}
    for peer in [*peers, silent]:
        peer.close()


# Clients that go away


async def test_client_that_leaves_lets_its_command_finish(control: Control, peer: QmpPeer) -> None:
    control.migrator.gate = asyncio.Event()
    await peer.send(b'{"execute": "stop"}{"execute": "query-name"}')
    await control.migrator.entered.wait()
    peer.close()
    other = await control.connect()
    control.migrator.gate.set()
    assert (await other.receive())["event"] == "STOP"  # emitted at the end of the command
    assert await other.execute("query-name") == {"return": {"name": "kv"}}
    other.close()


async def test_half_closed_client_gets_its_answers(control: Control) -> None:
    peer = await control.connect(negotiate=False)
    await peer.send(NEGOTIATE + b'{"execute": "query-name"}')
    peer.sock.shutdown(socket.SHUT_WR)
    assert [await peer.receive(), await peer.receive()] == [{"return": {}}, {"return": {"name": "kv"}}]
    assert await peer.line() == b""
    peer.close()


async def test_half_a_command_at_the_end_is_forgotten(control: Control) -> None:
    peer = await control.connect()
    await peer.send(b'{"execute": "quit"')
    peer.close()
    other = await control.connect()
    assert await other.execute("query-name") == {"return": {"name": "kv"}}
    assert not control.daemon.quit_asked.is_set()
    other.close()


# Clients that do not read


@contextlib.asynccontextmanager
async def serving(tmp_path: Path, limits: SessionLimits, max_sessions: int = 16) -> AsyncIterator[Control]:
    daemon = FakeDaemon()
    path = str(tmp_path / "limited.sock")
    server = ControlServer(daemon.services, path, limits=limits, max_sessions=max_sessions)
    await server.start()
    try:
        yield Control(server, daemon, path)
    finally:
        await server.close()


async def test_client_that_does_not_read_events_is_disconnected(tmp_path: Path) -> None:
    async with serving(tmp_path, SessionLimits(unread_bytes=1 << 16)) as control:
        lazy, other = await control.connect(), await control.connect()
        text = "x" * 1000
        for i in range(1000):  # far more than the socket and the queue hold
            control.migrator.emit("MIGRATION", {"status": text})
            assert (await other.receive())["data"] == {"status": text}, i
        await lazy.at_end()
        assert (await other.execute("query-name"))["return"] == {"name": "kv"}
        lazy.close()
        other.close()


async def test_client_that_does_not_read_answers_is_disconnected(tmp_path: Path) -> None:
    async with serving(tmp_path, SessionLimits(unread_bytes=1 << 16, unread_deadline_s=0.2)) as control:
        lazy = await control.connect()
        schema = b'{"execute": "query-qmp-schema"}' * 1000
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            while True:  # until the server hangs up
                await lazy.send(schema)
        await lazy.at_end()
        lazy.close()
        other = await control.connect()
        assert (await other.execute("query-name"))["return"] == {"name": "kv"}
        other.close()


async def test_half_closed_client_that_does_not_read_is_disconnected(tmp_path: Path) -> None:
    async with serving(tmp_path, SessionLimits(unread_deadline_s=0.2)) as control:
        lazy = await control.connect()
        await lazy.send(b'{"execute": "query-qmp-schema"}' * 40)  # more than the socket holds
        lazy.sock.shutdown(socket.SHUT_WR)
        hangup = select.poll()
        hangup.register(lazy.sock, 0)  # reading would be a cure
        assert await asyncio.to_thread(hangup.poll, 20_000) == [(lazy.sock.fileno(), select.POLLHUP)]
        lazy.close()


async def test_one_client_too_many_is_told_so(tmp_path: Path) -> None:
    async with serving(tmp_path, SessionLimits(), max_sessions=2) as control:
        first, second = await control.connect(), await control.connect(negotiate=False)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as sock:
            sock.connect(control.path)
            refused = QmpPeer(sock)
            assert (await refused.receive())["error"]["desc"] == "Too many clients (2)"
            assert await refused.line() == b""
        second.sock.shutdown(socket.SHUT_WR)
        assert await second.line() == b""
        second.close()
        assert await first.execute("query-name")
        third = await control.connect()
        assert await third.execute("query-name")
        first.close()
        third.close()


# Descriptors


def send_with_fds(peer: QmpPeer, data: bytes, fds: list[int]) -> None:
    socket.send_fds(peer.sock, [data], fds)


async def test_getfd_takes_the_descriptor_that_came_along(control: Control, peer: QmpPeer) -> None:
    read_end, write_end = os.pipe()
    send_with_fds(peer, b'{"execute": "getfd", "arguments": {"fdname": "m"}}', [write_end])
    assert await peer.receive() == {"return": {}}
    os.close(write_end)
    fd = control.migrator.descriptors.take("m")
    os.write(fd, b"hello")
    assert not os.get_inheritable(fd)
    control.migrator.descriptors.add("m", fd)
    assert await peer.execute("closefd", {"fdname": "m"}) == {"return": {}}
    assert os.read(read_end, 10) == b"hello"
    assert os.read(read_end, 10) == b""  # nobody else holds the other end
    os.close(read_end)
    assert await peer.refusal('{"execute": "closefd", "arguments": {"fdname": "m"}}') == (
        "GenericError",
        "File descriptor named 'm' not found",
    )


async def test_getfd_without_descriptor(peer: QmpPeer) -> None:
    assert await peer.refusal('{"execute": "getfd", "arguments": {"fdname": "m"}}') == (
        "GenericError",
        "No file descriptor supplied via SCM_RIGHTS",
    )


async def test_a_descriptor_waits_for_the_rest_of_its_command(control: Control, peer: QmpPeer) -> None:
    read_end, write_end = os.pipe()
    send_with_fds(peer, b'{"execute": "getfd", "argu', [write_end])
    assert await peer.ask('ments": {"fdname": "m"}}') == {"return": {}}
    assert await peer.execute("closefd", {"fdname": "m"}) == {"return": {}}
    os.close(write_end)
    assert os.read(read_end, 1) == b""
    os.close(read_end)


async def test_descriptors_nobody_takes_are_closed(control: Control, peer: QmpPeer) -> None:
    read_end, write_end = os.pipe()
    send_with_fds(peer, b'{"execute": "query-name"}', [write_end, write_end])
    await peer.receive()
    send_with_fds(peer, b'{"execute": "getfd", "arguments": {"fdname": "1"}}', [write_end])
    assert (await peer.receive())["error"]["desc"] == "Parameter 'fdname' expects a name not starting with a digit"
    send_with_fds(peer, b'{"execute": "query-name"}', [write_end])
    await peer.receive()
    os.close(write_end)
    peer.sock.shutdown(socket.SHUT_WR)
    await peer.at_end()
    assert os.read(read_end, 1) == b""
    os.close(read_end)


# The end


async def test_quit_is_answered_and_the_clients_hear_why(control: Control, peer: QmpPeer) -> None:
    other = await control.connect()
    assert await peer.execute("quit") == {"return": {}}
    await control.daemon.quit_asked.wait()
    await control.server.close("host-qmp-quit")
    for client in (peer, other):
        event = await client.receive()
        assert (event["event"], event["data"]) == ("SHUTDOWN", {"guest": False, "reason": "host-qmp-quit"})
        assert await client.line() == b""
    assert not os.path.exists(control.path)
    assert control.migrator.subscribers == []
    await control.server.close("host-qmp-quit")  # twice without harm
    other.close()


async def test_closing_lets_a_command_under_way_answer(control: Control, peer: QmpPeer) -> None:
    control.migrator.gate = asyncio.Event()
    await peer.send(b'{"execute": "stop"} {"execute": "query-name"}')
    await control.migrator.entered.wait()
    closing = asyncio.create_task(control.server.close())
    await asyncio.sleep(0)
    control.migrator.gate.set()
    await closing
    assert await peer.receive() == {"return": {}}
    assert await peer.line() == b""  # the second command was not begun


async def test_closing_does_not_wait_for_ever(control: Control, peer: QmpPeer) -> None:
    control.migrator.gate = asyncio.Event()
    await peer.send(b'{"execute": "stop"}')
    await control.migrator.entered.wait()
    async with asyncio.timeout(10 * server_module.FLUSH_DEADLINE_S):
        await control.server.close()
    assert await peer.line() == b""


async def test_a_path_in_use_is_refused(control: Control) -> None:
    second = ControlServer(control.daemon.services, control.path)
    with pytest.raises(ChannelError, match="another process listens there"):
        await second.start()
    await second.close()
