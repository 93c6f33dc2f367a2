"""What is told to the service manager, and when nothing is."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrated.daemon.notify import Notifier


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[socket.socket, str]]:
    """Return a service manager's socket and its name as NOTIFY_SOCKET has it."""
    name = str(tmp_path / "notify") if request.param == "path" else f"@migrated-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
        sock.bind(name.replace("@", "\0"))
        yield sock, name


def told(sock: socket.socket) -> list[str]:
    messages = []
    while True:
        try:
            messages.append(sock.recv(4096).decode())
        except BlockingIOError:
            return messages


def test_the_life_of_a_service(manager: tuple[socket.socket, str]) -> None:
    sock, name = manager
    environment = {"NOTIFY_SOCKET": name, "PATH": "/bin"}
    notifier = Notifier.from_environment(environment)
    notifier.ready("waiting")
    notifier.status("migration: active")
    notifier.status("migration: active")
    notifier.status("two\nlines" + "x" * 500)
    notifier.extend_timeout(1.5)
    notifier.stopping()
    messages = told(sock)
    assert messages[:2] == ["READY=1\nSTATUS=waiting", "STATUS=migration: active"]
    assert messages[2].startswith("STATUS=two linesxxx")
    assert len(messages[2]) < 300
    assert messages[3:] == ["EXTEND_TIMEOUT_USEC=1500000", "STOPPING=1"]
    assert environment == {"PATH": "/bin"}  # workloads must not talk in the daemon's name


async def test_the_watchdog_hears_from_the_event_loop(manager: tuple[socket.socket, str]) -> None:
    sock, name = manager
    notifier = Notifier.from_environment(
        {"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "20000", "WATCHDOG_PID": str(os.getpid())}
    )
    barking = asyncio.ensure_future(notifier.keep_watchdog())
    sock.setblocking(True)
    sock.settimeout(30)
    for _ in range(3):
        assert await asyncio.to_thread(sock.recv, 100) == b"WATCHDOG=1"
    barking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await barking


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"WATCHDOG_USEC": "1000000"},
        {"NOTIFY_SOCKET": "/nowhere"},
        {"NOTIFY_SOCKET": "/nowhere", "WATCHDOG_USEC": "0"},
        {"NOTIFY_SOCKET": "/nowhere", "WATCHDOG_USEC": "soon"},
        {"NOTIFY_SOCKET": "/nowhere", "WATCHDOG_USEC": "1000000", "WATCHDOG_PID": "1"},
    ],
)
async def test_no_wake_ups_where_nobody_watches(environment: dict[str, str]) -> None:
    await asyncio.wait_for(Notifier.from_environment(environment).keep_watchdog(), 30)


@pytest.mark.parametrize("name", ["", "/nowhere", "vsock:2:1", "relative"])
def test_a_manager_that_cannot_be_reached_does_no_harm(name: str) -> None:
    notifier = Notifier.from_environment({"NOTIFY_SOCKET": name})
    notifier.ready()
    notifier.status("x")
    notifier.stopping()
