"""Unix sockets that carry descriptors: one connection, and the server that accepts them.

The rule of the file: a received descriptor is close-on-exec and either handed to the caller or closed, never lost. On
``SOCK_SEQPACKET`` one send is one packet is one receive; on ``SOCK_STREAM`` descriptors travel with the first byte of
the send they were given to.

Source: unix(7), cmsg(3); the kernel passes at most 253 descriptors in one message (SCM_MAX_FD).
"""

from __future__ import annotations

import array
import asyncio
import errno
import os
import socket
from collections.abc import Awaitable, Callable, Sequence

import structlog
from structlog.typing import FilteringBoundLogger

from migrated.errors import ChannelClosed, ChannelError, LocalProtocolError, RemoteProtocolError
from migrated.transport.accept import accept
from migrated.transport.readiness import Readiness
from migrated.transport.unix_path import claim_path, finish_path, release_path

#: Descriptors taken from one message. The attach protocol's largest message carries three.
MAX_FDS = 16
#: Connections one server keeps at once; an operator's tools and a machine's workloads are far below.
MAX_CONNECTIONS = 64

_RIGHTS_BYTES = socket.CMSG_SPACE(MAX_FDS * array.array("i").itemsize)
_GONE = {errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN, errno.ECONNABORTED, errno.ESHUTDOWN, errno.EBADF}

Buffer = bytes | bytearray | memoryview


class FdSocket:
    """One connected Unix socket. Receive from one task; send from any number.

    Neither `receive` nor `send` has a deadline of its own: put ``asyncio.timeout`` around them. A cancelled receive
    loses nothing. A send that is cancelled half-way on a stream breaks it, and later sends say so.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock
        self._packets = sock.type == socket.SOCK_SEQPACKET
        self._readiness = Readiness(sock.fileno())
        self._sending = asyncio.Lock()
        self._broken = False
        self._waited = True

    async def receive(self, max_bytes: int) -> tuple[bytes, list[int]]:
        """Return the next bytes (one packet on SEQPACKET) and the descriptors with them; ``b""`` = closed.

        The caller owns the descriptors. Raises RemoteProtocolError for a packet longer than ``max_bytes`` or with
        too many descriptors (all of which are closed; the packet is gone), ChannelClosed after a reset.
        """
        if not self._waited:
            # A peer that always has more must not keep the loop to itself.
            await asyncio.sleep(0)
        self._waited = False
        while True:
            try:
                received = self._receive_now(max_bytes)
            except (BlockingIOError, InterruptedError):
                self._waited = True
                await self._ready(self._readiness.readable)
            except OSError as error:
                raise _converted("receiving", error) from error
            else:
                return received

    def _receive_now(self, max_bytes: int) -> tuple[bytes, list[int]]:
        if self._readiness.closed:
            raise ConnectionAbortedError(errno.ECONNABORTED, "closed at this end")
        # Not socket.recv_fds: Python 3.11's ignores its flags, so the descriptors would be inherited by children.
        data, ancillary, flags, _ = self.sock.recvmsg(max_bytes, _RIGHTS_BYTES, socket.MSG_CMSG_CLOEXEC)
        fds = _descriptors(ancillary)
        if flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC) or (fds and not data):
            for fd in fds:
                os.close(fd)
        if flags & socket.MSG_CTRUNC:
            raise RemoteProtocolError(
                "too many descriptors in one message",
                expected=f"at most {MAX_FDS}",
                found="more, or none can be opened",
            )
        if flags & socket.MSG_TRUNC:
            raise RemoteProtocolError("message too long", expected=f"at most {max_bytes} bytes", found="more")
        return (data, fds) if data else (b"", [])

    async def send(self, data: Buffer, fds: Sequence[int] = ()) -> None:
        """Send all of ``data``, with copies of ``fds``, which stay the caller's.

        Raises ChannelClosed when the peer is gone, LocalProtocolError for a packet the kernel can never take.
        """
        async with self._sending:
            if self._broken:
                raise ChannelClosed("a message was cut short on this socket before")
            rest = memoryview(data).cast("B")
            whole = len(rest)
            try:
                while True:
                    rest = rest[await self._send_some(rest, fds if len(rest) == whole else ()) :]
                    if not rest:
                        return
            finally:
                self._broken = 0 < len(rest) < whole

    async def _send_some(self, data: memoryview, fds: Sequence[int]) -> int:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        while True:
            try:
                if self._readiness.closed:
                    raise ConnectionAbortedError(errno.ECONNABORTED, "closed at this end")
                return self.sock.sendmsg([data], rights, socket.MSG_NOSIGNAL)
            except (BlockingIOError, InterruptedError):
                await self._ready(self._readiness.writable)
            except OSError as error:
                if error.errno == errno.EMSGSIZE and self._packets:
                    raise LocalProtocolError(f"a packet of {len(data)} bytes does not fit the socket") from error
                raise _converted("sending", error) from error

    async def _ready(self, wait: Callable[[], Awaitable[None]]) -> None:
        try:
            await wait()
        except ConnectionAbortedError as error:
            raise ChannelClosed("the socket was closed at this end") from error

    def close(self) -> None:
        """Close at once; waiting tasks get ChannelClosed. Idempotent."""
        self._readiness.close()
        self.sock.close()


def _descriptors(ancillary: Sequence[tuple[int, int, bytes]]) -> list[int]:
    fds = array.array("i")
    for level, kind, body in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(body[: len(body) - len(body) % fds.itemsize])
    return list(fds)


def _converted(doing: str, error: OSError) -> ChannelError:
    kind = ChannelClosed if error.errno in _GONE else ChannelError
    return kind(f"{doing} failed: {error.strerror or error}")


async def connect_unix(path: str, kind: socket.SocketKind = socket.SOCK_STREAM) -> FdSocket:
    """Connect to a Unix socket. Raises ChannelClosed with the reason; never waits for the peer to accept."""
    sock = socket.socket(socket.AF_UNIX, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        sock.connect(path)
        return FdSocket(sock)
    except OSError as error:
        sock.close()
        raise ChannelClosed(f"Failed to connect to '{path}': {error.strerror or error}", peer=path) from error


Handler = Callable[[FdSocket], Awaitable[None]]


class UnixServer:
    """A listening Unix socket whose connections run as tasks of its own task group. Made by `serve_unix`."""

    def __init__(self, sock: socket.socket, path: str, handler: Handler, log: FilteringBoundLogger) -> None:
        self.path = path
        self._identity = os.stat(path)
        self._sock = sock
        self._handler = handler
        self._log = log.bind(socket=path)
        self._connections = 0
        self._readiness = Readiness(sock.fileno())
        # The one task outside a group: it is the group, and `close` awaits it.
        self._task = asyncio.get_running_loop().create_task(self._run(), name=f"unix server {path}")

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as group:
            while True:
                sock = await accept(self._sock, self._readiness, self._log)
                if self._connections >= MAX_CONNECTIONS:
                    self._log.warning("connection_refused", reason=f"{MAX_CONNECTIONS} connections are open")
                    sock.close()
                    continue
                self._connections += 1
                group.create_task(self._serve(FdSocket(sock)))

    async def _serve(self, connection: FdSocket) -> None:
        try:
            await self._handler(connection)
        except ChannelError as error:
            self._log.debug("connection_lost", error=str(error))
        except Exception:  # noqa: BLE001 - the top of a session: a bug in one must not end the others
            self._log.exception("session_bug")
        finally:
            self._connections -= 1
            connection.close()

    async def close(self) -> None:
        """Stop accepting, cancel the handlers and wait for them, remove the path. Idempotent."""
        self._task.cancel()
        self._readiness.close()
        self._sock.close()
        release_path(self.path, self._identity)
        await asyncio.wait([self._task])


async def serve_unix(
    path: str,
    kind: socket.SocketKind,
    mode: int,
    group: str | None,
    handler: Handler,
    *,
    log: FilteringBoundLogger | None = None,
) -> UnixServer:
    """Listen on ``path`` with permissions ``mode`` and ``group``; each connection is closed when its handler returns.

    A socket left behind is removed if nobody answers on it. Raises ChannelError when somebody does, when something
    else is in the way, or when the path, the mode or the group cannot be had.
    """
    sock = socket.socket(socket.AF_UNIX, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        claim_path(sock, path)
        finish_path(path, mode, group)
        sock.listen(socket.SOMAXCONN)
        return UnixServer(sock, path, handler, log or structlog.get_logger())
    except BaseException:
        sock.close()
        raise
