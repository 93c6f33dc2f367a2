"""Opening the channel of an outgoing migration.

The rule of the file: one deadline for all of it, until it is known who is there, and errors in QEMU's words, naming
the address that was tried.
"""

from __future__ import annotations

import asyncio
import os
import socket
import stat
from collections.abc import Callable
from typing import Any, assert_never

from migrated.errors import ChannelClosed, ChannelTimeout, TlsError
from migrated.transport.address import (
    Address,
    ExecAddress,
    FdAddress,
    FileAddress,
    TcpAddress,
    UnixAddress,
    join_host_port,
)
from migrated.transport.channel import Channel, SocketChannel
from migrated.transport.file import open_file, wrap_file
from migrated.transport.pipe import PipeChannel, run_to_write
from migrated.transport.readiness import Readiness
from migrated.transport.tls_channel import TlsChannel
from migrated.transport.tls_problem import TlsProblem
from migrated.transport.trust import Trust

#: Where nobody says whom to trust: the caller has seen to it, or the socket does not leave this host.
CLEARTEXT = Trust(cleartext=True)

#: Finds the descriptor of an ``fd:`` address and gives it away; raises CommandError for an unknown name.
TakeFd = Callable[[str], int]

#: family, type, protocol, canonical name, socket address: what getaddrinfo returns.
AddressInfo = tuple[int, int, int, str, tuple[Any, ...]]


async def dial(
    address: Address, *, timeout_s: float, fds: TakeFd, trust: Trust | None = None, name: str = ""
) -> Channel:
    """Connect to ``address``, and know who is there: the certificate has to be for ``name``, or else for the host.

    Raises ChannelClosed, ChannelTimeout, TlsError, and what ``fds`` raises. Without ``trust`` nobody is asked.
    """
    channel: Channel | None = None
    try:
        async with asyncio.timeout(timeout_s):
            channel = await _dial(address, timeout_s, fds, trust or CLEARTEXT, name)
            if isinstance(channel, TlsChannel):
                await channel.authenticate()
            return channel
    except BaseException as error:
        if channel is not None:
            channel.abort()
        if isinstance(error, TimeoutError):
            what = "connect to" if channel is None else "agree on TLS with"
            raise ChannelTimeout(f"Failed to {what} '{address}': no answer within {timeout_s:g} s") from error
        raise


async def _dial(address: Address, timeout_s: float, fds: TakeFd, trust: Trust, name: str) -> Channel:
    match address:
        case TcpAddress():
            sock = await _dial_tcp(address, timeout_s)
            return secured(sock, peer_name(sock), trust, name or address.host or "localhost")
        case UnixAddress(path=path):
            sock = await _connect(socket.AF_UNIX, path, path)
            return SocketChannel(sock, str(address))
        case FdAddress(name=fd_name):
            return await channel_of_fd(fds(fd_name), str(address), writes=True, trust=trust, name=name)
        case ExecAddress(command=command):
            return run_to_write(command, str(address))
        case FileAddress(path=path, offset=offset):
            return await open_file(path, offset, writes=True)
        case _:
            assert_never(address)


def secured(sock: socket.socket, peer: str, trust: Trust, name: str | None) -> SocketChannel:
    """Return the channel of a connected socket; a TlsChannel is yet to be authenticated. Raises TlsError.

    A Unix socket is this host's own affair and stays cleartext. ``name`` as of `TlsChannel`.
    """
    try:
        if trust.credentials is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
            return TlsChannel(sock, peer, trust, name)
        trust.require_cleartext(sock, peer)
        return SocketChannel(sock, peer)
    except BaseException as error:
        sock.close()
        if isinstance(error, ValueError):
            raise TlsError(TlsProblem.NAME, f"'{name}' can be no certificate's name: {error}", peer=peer) from error
        raise


async def channel_of_fd(fd: int, peer: str, *, writes: bool, trust: Trust, name: str = "") -> Channel:
    """Return the channel of a descriptor of any kind, which belongs to it from here on. Raises ChannelClosed.

    Sockets are `secured`; without a ``name``, the accepting end has to be the host of the other address.
    """
    try:
        mode = os.fstat(fd).st_mode
    except OSError as error:
        raise ChannelClosed(f"descriptor {fd} cannot be used: {error.strerror}") from error
    if stat.S_ISSOCK(mode):
        sock = _connected_socket(fd, peer)
        if not writes:
            return secured(sock, peer, trust, None)
        return secured(sock, peer, trust, name or _peer_host(sock))
    if stat.S_ISFIFO(mode):
        return PipeChannel(peer, write_fd=fd) if writes else PipeChannel(peer, read_fd=fd)
    return await wrap_file(fd, peer, writes=writes)


def _connected_socket(fd: int, peer: str) -> socket.socket:
    sock = socket.socket(fileno=fd)
    if sock.type != socket.SOCK_STREAM or sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        sock.close()
        raise ChannelClosed(f"{peer} is not a connected stream socket")
    return sock


def _peer_host(sock: socket.socket) -> str:
    """Return the address a TCP socket is connected to; of no interest for others."""
    return plain_host(str(sock.getpeername()[0])) if sock.family in (socket.AF_INET, socket.AF_INET6) else ""


async def resolve(address: TcpAddress, *, passive: bool) -> list[AddressInfo]:
    """Return the socket addresses of ``address``, in order of preference. Raises ChannelClosed."""
    family = socket.AF_UNSPEC
    if address.ipv6 is False or (address.ipv4 and not address.ipv6):
        family = socket.AF_INET
    elif address.ipv4 is False or (address.ipv6 and not address.ipv4):
        family = socket.AF_INET6
    flags = socket.AI_PASSIVE if passive else 0
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(
            address.host or None, address.port, family=family, type=socket.SOCK_STREAM, flags=flags
        )
    except OSError as error:
        raise ChannelClosed(f"address resolution failed for {address}: {error.strerror or error}") from error
    return list(found)


async def _dial_tcp(address: TcpAddress, timeout_s: float) -> socket.socket:
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout_s
    candidates = await resolve(address, passive=False)
    while True:
        family, _, _, _, target = candidates.pop(0)
        # A black hole among several addresses may not use up the time of those after it.
        share_s = (deadline - loop.time()) / (len(candidates) + 1)
        try:
            async with asyncio.timeout(share_s if candidates else None):
                sock = await _connect(family, target, str(address))
        except (ChannelClosed, TimeoutError):
            if not candidates:
                raise
        else:
            return sock


async def _connect(family: int, target: Any, shown: str) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    readiness = Readiness(sock.fileno())
    try:
        try:
            sock.connect(target)
        except BlockingIOError as error:
            if family == socket.AF_UNIX:  # not "in progress", as it would be for TCP
                raise OSError(error.errno, "the listener's backlog is full") from error
            await readiness.writable()
            if code := sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                raise OSError(code, os.strerror(code)) from None
    except BaseException as error:
        readiness.close()
        sock.close()
        if isinstance(error, OSError):
            raise ChannelClosed(f"Failed to connect to '{shown}': {error.strerror or error}") from error
        raise
    readiness.close()
    return sock


def peer_name(sock: socket.socket) -> str:
    """Return the other end of a connected TCP socket as ``host:port``."""
    host, port = sock.getpeername()[:2]
    return join_host_port(plain_host(host), port)


def plain_host(host: str) -> str:
    """Return an IPv4-mapped IPv6 address as the IPv4 address it is."""
    return host.removeprefix("::ffff:") if host.startswith("::ffff:") and "." in host else host
