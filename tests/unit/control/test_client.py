"""The synchronous client, against the real server and against servers that misbehave."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from migrated.control.client import QmpClient
from migrated.errors import ChannelClosed, ChannelTimeout, CommandError
from tests.unit.control.conftest import Control

GREETING = b'{"QMP": {"version": {}, "capabilities": []}}\r\n'
NEGOTIATED = b'{"return": {}, "id": 1}\r\n'


async def in_thread(control: Control, use: Callable[[QmpClient], Any]) -> Any:
    def run() -> Any:
        with QmpClient(control.path) as client:
            return use(client)

    return await asyncio.to_thread(run)


async def test_commands_and_refusals(control: Control) -> None:
    assert await in_thread(control, lambda client: client.execute("query-name")) == {"name": "kv"}
    with pytest.raises(CommandError, match="Parameter 'uri' is missing"):
        await in_thread(control, lambda client: client.execute("migrate"))
    with pytest.raises(CommandError) as unknown:
        await in_thread(control, lambda client: client.execute("balloon", {"value": 1}))
    assert unknown.value.qmp_class == "CommandNotFound"


async def test_events_wait_until_they_are_asked_for(control: Control) -> None:
    def use(client: QmpClient) -> list[Any]:
        client.execute("stop")  # the event comes before the answer
        client.execute("cont")
        return [client.next_event(10), client.next_event(10), client.next_event(0)]

    stop, resume, none = await in_thread(control, use)
    assert (stop["event"], resume["event"], none) == ("STOP", "RESUME", None)


@pytest.fixture
def scripted(tmp_path: Path) -> Iterator[Callable[[Callable[[socket.socket], None]], str]]:
    """Start a server that does with its one connection what a test says; returns its path."""
    threads: list[threading.Thread] = []

    def start(behave: Callable[[socket.socket], None]) -> str:
        path = str(tmp_path / "scripted.sock")
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(path)
        listener.listen()

        def serve() -> None:
            with listener:
                connection, _ = listener.accept()
                with connection:
                    behave(connection)

        threads.append(threading.Thread(target=serve))
        threads[-1].start()
        return path

    yield start
    for thread in threads:
        thread.join()


def read_line(connection: socket.socket) -> bytes:
    return connection.makefile("rb", buffering=0).readline()


def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(ChannelClosed, match=r"Failed to connect to '.*none': No such file or directory"):
        QmpClient(str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("said", "error", "text"),
    [
        (b"", ChannelClosed, "The daemon closed the connection"),
        (b"SSH-2.0-OpenSSH\n", ChannelClosed, "Not a QMP server: it sent no JSON object"),
        (b"[1]\n", ChannelClosed, "Not a QMP server: it sent no JSON object"),
        (b'{"hello": 1}\n', ChannelClosed, "Not a QMP server"),
        (b'{"error": {"class": "GenericError", "desc": "Too many"}}\n', CommandError, "Too many"),
    ],
)
def test_strange_greetings(
    scripted: Callable[[Callable[[socket.socket], None]], str], said: bytes, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        QmpClient(scripted(lambda connection: connection.sendall(said)))


def test_silence_has_an_end(scripted: Callable[[Callable[[socket.socket], None]], str]) -> None:
    def wait_for_the_client_to_leave(connection: socket.socket) -> None:
        connection.recv(1)

    with pytest.raises(ChannelTimeout, match="No QMP greeting"):
        QmpClient(scripted(wait_for_the_client_to_leave), deadline_s=0.05)


def test_a_late_answer_is_not_taken_for_the_next(
    scripted: Callable[[Callable[[socket.socket], None]], str],
) -> None:
    asked_again = threading.Event()

    def behave(connection: socket.socket) -> None:
        connection.sendall(GREETING)
        read_line(connection)
        connection.sendall(NEGOTIATED)
        read_line(connection)
        assert asked_again.wait(20)
        connection.sendall(b'{"return": "late", "id": 2}{"return": "right", "id": 3}')
        connection.recv(100)

    with QmpClient(scripted(behave)) as client:
        client._deadline_s = 0.05
        with pytest.raises(ChannelTimeout, match=r"No answer to slow within 0\.05 s"):
            client.execute("slow")
        client._deadline_s = 20
        asked_again.set()
        assert client.execute("fast") == "right"
        assert client.next_event(0.0) is None


def test_lost_connections(scripted: Callable[[Callable[[socket.socket], None]], str]) -> None:
    closed = threading.Event()

    def behave(connection: socket.socket) -> None:
        connection.sendall(GREETING)
        read_line(connection)
        connection.sendall(NEGOTIATED + b'{"event": "STOP", "timestamp": {"seconds": 0, "microseconds": 0}}')
        connection.close()
        closed.set()

    with QmpClient(scripted(behave)) as client:
        assert closed.wait(20)
        event = client.next_event()
        assert event is not None
        assert event["event"] == "STOP"
        with pytest.raises(ChannelClosed, match="The daemon closed the connection"):
            client.next_event()
        with pytest.raises(ChannelClosed, match="Connection lost"):
            client.execute("query-name")
