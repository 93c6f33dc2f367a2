"""Pairs of raw sockets, and channels on them, for the tests of this directory."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
from collections.abc import Callable

from migrated.transport.channel import SocketChannel
from migrated.transport.dial import TakeFd


def tcp_pair(host: str = "127.0.0.1") -> tuple[socket.socket, socket.socket]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as server:
        near = socket.create_connection(server.getsockname()[:2])
        far, _ = server.accept()
    return near, far


def unix_pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)


def channels(pair: tuple[socket.socket, socket.socket]) -> tuple[SocketChannel, SocketChannel]:
    return SocketChannel(pair[0], "far"), SocketChannel(pair[1], "near")


def no_fds(name: str) -> int:
    raise AssertionError(f"nobody asked for descriptor {name}")


def only(fd: int) -> TakeFd:
    return lambda name: fd


def open_fds() -> int:
    gc.collect()  # what another test left to the collector is not to be closed in between
    return len(os.listdir("/proc/self/fd"))


async def until(condition: Callable[[], object]) -> None:
    """Let everything else run until ``condition`` holds: for what only the kernel or another task knows."""
    while not condition():
        await asyncio.sleep(0)
