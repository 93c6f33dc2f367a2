"""Binding the sockets an incoming migration may arrive on.

The rule of the file: a name with several addresses gets one port on all of them, or nothing is left bound.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Sequence

from migrated.errors import ChannelError
from migrated.transport.address import TcpAddress
from migrated.transport.dial import AddressInfo
from migrated.transport.unix_path import claim_path, finish_path

#: One migration at a time, but the others are to be refused, not kept waiting: where the backlog is full, the kernel
#: drops a source's first packet, and it tries again only after a second.
BACKLOG = 128
#: A migration stream may overwrite memory: only the daemon's own user may connect to its Unix socket.
UNIX_MODE = 0o600

#: Errors of an address that this host cannot have; a name may well have one of those besides a good one.
_NOT_HERE = {errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL}


def bind_unix(path: str) -> tuple[socket.socket, os.stat_result]:
    """Listen on ``path``; return the socket and what identifies its file. Raises ChannelError."""
    sock = _socket(socket.AF_UNIX)
    try:
        claim_path(sock, path)
        finish_path(path, UNIX_MODE, None)
        sock.listen(BACKLOG)
        return sock, os.lstat(path)
    except BaseException:
        sock.close()
        raise


def bind_tcp(address: TcpAddress, candidates: Sequence[AddressInfo]) -> list[socket.socket]:
    """Listen on the first free port of the address's range. Raises ChannelError."""
    last = address.to or address.port
    for port in range(address.port, last + 1):
        try:
            return _bind_port(port, candidates)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or port == last:
                raise ChannelError(f"Failed to listen on '{address}': {error.strerror or error}") from error
    raise AssertionError("the range has at least one port")


def _bind_port(port: int, candidates: Sequence[AddressInfo]) -> list[socket.socket]:
    bound: list[socket.socket] = []
    failure = OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))
    try:
        for family, _, _, _, (host, _, *rest) in candidates:
            try:
                sock = _bind_one(family, (host, port, *rest))
            except OSError as error:
                if error.errno not in _NOT_HERE:
                    raise
                failure = error
            else:
                bound.append(sock)
                port = sock.getsockname()[1]  # where it was 0, the first one decides for all
        if not bound:
            raise failure
    except BaseException:
        for sock in bound:
            sock.close()
        raise
    return bound


def _bind_one(family: int, target: tuple[object, ...]) -> socket.socket:
    sock = _socket(family)
    try:
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(target)
        sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def _socket(family: int) -> socket.socket:
    return socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
