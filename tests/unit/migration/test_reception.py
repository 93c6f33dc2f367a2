"""Connections that are sorted beside a machine's: what becomes of those that nobody wants any more."""

from __future__ import annotations

import asyncio
import socket
from types import SimpleNamespace
from typing import Any, cast

import structlog

from migrated.migration.host import Host
from migrated.migration.reception import MAX_UNSORTED, Reception
from migrated.transport.channel import SocketChannel


def reception(group: asyncio.TaskGroup) -> Reception:
    settings = SimpleNamespace(silence_timeout_s=lambda: 10.0, enabled=lambda name: False)
    host = cast(Host, SimpleNamespace(settings=settings, log=structlog.get_logger()))
    return Reception(host, group.create_task, cast(Any, None), lambda: None)


def connection() -> tuple[SocketChannel, socket.socket]:
    near, far = socket.socketpair()
    far.settimeout(10)
    return SocketChannel(near, "far"), far


async def test_those_that_were_not_sorted_yet_are_closed() -> None:
    """One that came just now, and one that is looked at."""
    async with asyncio.TaskGroup() as group:
        sorting = reception(group)
        looked_at, first = connection()
        assert sorting.take(looked_at)
        await asyncio.sleep(0)
        fresh, second = connection()
        assert sorting.take(fresh)
        sorting.close()
    for far in (first, second):
        with far:
            assert far.recv(1) == b""


async def test_there_are_not_more_than_so_many() -> None:
    async with asyncio.TaskGroup() as group:
        sorting = reception(group)
        pairs = [connection() for _ in range(MAX_UNSORTED + 1)]
        assert [sorting.take(channel) for channel, _ in pairs] == [True] * MAX_UNSORTED + [False]
        sorting.close()
        pairs[-1][0].abort()
    for _, far in pairs:
        with far:
            assert far.recv(1) == b""
