"""Strangers have a deadline for all of it, and the one who has waited longest goes first."""

from __future__ import annotations

import asyncio
import socket

import pytest
import structlog
from structlog.testing import capture_logs

from migrated.transport.door import MAX_STRANGERS, Door
from migrated.transport.tls_channel import TlsChannel
from migrated.transport.trust import Trust
from tests.support.keys import Keys
from tests.unit.transport.carriers import open_fds, tcp_pair

#: What a TLS client says first: a record head that promises more than ever comes.
HALF_A_HELLO = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"


@pytest.fixture(scope="module")
def trust(tmp_path_factory: pytest.TempPathFactory) -> Trust:
    return Keys(tmp_path_factory.mktemp("keys")).trust("host")


async def drip(sock: socket.socket) -> None:
    """Send a byte now and then, so that there is always progress, until the other end is gone."""
    loop = asyncio.get_running_loop()
    try:
        for byte in HALF_A_HELLO + bytes(500):
            await loop.sock_sendall(sock, bytes([byte]))
            try:
                async with asyncio.timeout(0.01):
                    if not await loop.sock_recv(sock, 1):
                        return
            except TimeoutError:
                continue
    except OSError:
        return
    raise AssertionError("all of it was taken")


async def test_progress_does_not_buy_time(trust: Trust) -> None:
    near, far = tcp_pair()
    before = open_fds() - 2
    near.setblocking(False)
    door = Door(structlog.get_logger(), timeout_s=0.3)
    with near, capture_logs() as logs:
        dripping = asyncio.create_task(drip(near))
        assert not await door.admit(TlsChannel(far, "near:1", trust, None))
        await dripping
    assert [line["event"] for line in logs] == ["connection_refused"]
    assert logs[0]["reason"] == "it had not proven who it is within 0.3 s"
    assert open_fds() == before


async def test_the_one_who_has_waited_longest_makes_room(trust: Trust) -> None:
    door = Door(structlog.get_logger(), timeout_s=30)
    pairs = [tcp_pair() for _ in range(MAX_STRANGERS)]
    waiting: list[asyncio.Task[bool]] = []
    for _, far in pairs:
        waiting.append(asyncio.create_task(door.admit(TlsChannel(far, "near:1", trust, None))))
        await asyncio.sleep(0)  # each takes its place
    near, far = tcp_pair()
    source = TlsChannel(near, "far:1", trust, "127.0.0.1")
    target = TlsChannel(far, "near:1", trust, None)
    admitted, _ = await asyncio.gather(door.admit(target), source.authenticate())
    assert admitted
    assert [task.done() for task in waiting] == [True] + [False] * (MAX_STRANGERS - 1)
    door.close()
    assert await asyncio.gather(*waiting) == [False] * MAX_STRANGERS
    for sock, _ in pairs:
        sock.close()
    await source.close()
    await target.close()
