"""The door at which Prometheus asks: GET /metrics over HTTP/1.1, and nothing else.

The rule of the file: whoever connects is a stranger. A request is small, whole within a deadline, and one of a limited
number; it is answered once and the connection is closed. Nothing of it but the wanted format has any effect.

Source: RFC 9112 (HTTP/1.1), the Prometheus and OpenMetrics text formats of prometheus-client.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import re
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http import HTTPStatus

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.openmetrics import exposition as openmetrics
from structlog.typing import FilteringBoundLogger

from migrated.daemon.config import Config
from migrated.daemon.metrics import Sources, build_registry
from migrated.errors import ChannelError, ProtocolError
from migrated.machine.machine import Machine
from migrated.migration.history import History
from migrated.migration.host import Host
from migrated.migration.progress import Progress
from migrated.transport.accept import accept
from migrated.transport.address import TcpAddress, UnixAddress
from migrated.transport.bind import BACKLOG, bind_tcp
from migrated.transport.dial import peer_name, plain_host, resolve
from migrated.transport.fd_socket import FdSocket
from migrated.transport.listen import Network, parse_allow
from migrated.transport.readiness import Readiness
from migrated.transport.trust import Trust
from migrated.transport.unix_path import claim_path, finish_path, release_path

PATH = "/metrics"
#: Prometheus' own format; every version of it takes this.
PLAIN = "text/plain; version=0.0.4; charset=utf-8"
#: A request of Prometheus has some 400 bytes.
HEAD_MAX_BYTES = 8192
#: From the connection to the last byte of the answer, which has some 20 KiB.
DEADLINE_S = 10.0
#: Of a Unix socket for a group that may only read.
READERS_MODE = 0o660
#: A few Prometheus servers and somebody's curl.
MAX_CONNECTIONS = 16

# Not every version of the library says what it takes and gives.
_openmetrics: Callable[[CollectorRegistry], bytes] = openmetrics.generate_latest

_REQUEST = re.compile(rb"([A-Z]{1,16}) (\S{1,1024}) HTTP/1\.[01]")
_ACCEPT = re.compile(rb"accept:[ \t]*([ -~]{0,1024})", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Answer:
    """What goes back. ``more`` are further header lines."""

    status: HTTPStatus
    body: bytes
    content_type: str = "text/plain; charset=utf-8"
    more: str = ""

    def encode(self, *, with_body: bool) -> bytes:
        """Return the bytes; to HEAD, without the body that they speak of."""
        head = (
            f"HTTP/1.1 {self.status.value} {self.status.phrase}\r\nContent-Type: {self.content_type}\r\n"
            f"Content-Length: {len(self.body)}\r\nConnection: close\r\n{self.more}\r\n"
        )
        return head.encode() + (self.body if with_body else b"")


def answer(head: bytes, registry: CollectorRegistry) -> bytes:
    """Return the answer to a request, of which ``head`` is everything up to the empty line."""
    request, *headers = head.split(b"\r\n")
    match = _REQUEST.fullmatch(request)
    if match is None:
        return _refusal(HTTPStatus.BAD_REQUEST, "this is not an HTTP/1.1 request").encode(with_body=True)
    method, target = match[1].decode(), match[2].decode("latin-1")
    with_body = method != "HEAD"
    if target.partition("?")[0] != PATH:
        return _refusal(HTTPStatus.NOT_FOUND, f"there is nothing but {PATH} here").encode(with_body=with_body)
    if method not in ("GET", "HEAD"):
        refusal = _refusal(HTTPStatus.METHOD_NOT_ALLOWED, "GET and HEAD only", "Allow: GET, HEAD\r\n")
        return refusal.encode(with_body=with_body)
    accepts = [found[1].decode() for line in headers if (found := _ACCEPT.fullmatch(line))]
    return _metrics(",".join(accepts), registry).encode(with_body=with_body)


def _refusal(status: HTTPStatus, text: str, more: str = "") -> Answer:
    return Answer(status, f"{text}\n".encode(), more=more)


def _metrics(accept_header: str, registry: CollectorRegistry) -> Answer:
    if openmetrics.CONTENT_TYPE_LATEST.partition(";")[0] in accept_header.lower():
        return Answer(HTTPStatus.OK, _openmetrics(registry), openmetrics.CONTENT_TYPE_LATEST)
    return Answer(HTTPStatus.OK, generate_latest(registry), PLAIN)


class MetricsServer:
    """Answers on some listening sockets, each connection in a task of its own task group. Made by `serve_metrics`."""

    def __init__(
        self,
        sockets: Sequence[socket.socket],
        registry: CollectorRegistry,
        allow: Sequence[Network],
        log: FilteringBoundLogger,
        *,
        deadline_s: float = DEADLINE_S,
    ) -> None:
        self._registry = registry
        self._allow = allow
        self._log = log
        self._deadline_s = deadline_s
        self._connections = 0
        self._path: tuple[str, os.stat_result] | None = None
        self._sockets = [(sock, Readiness(sock.fileno())) for sock in sockets]
        # The one task outside a group: it is the group, and `close` awaits it.
        self._task = asyncio.get_running_loop().create_task(self._run(), name="metrics")

    @property
    def addresses(self) -> list[str]:
        """Where it listens, with the real ports."""
        return [_address_of(sock) for sock, _ in self._sockets]

    def owns(self, path: str) -> None:
        """Remove this path, which one of the sockets is bound to, in the end."""
        self._path = path, os.lstat(path)

    async def close(self) -> None:
        """Listen no more, and end what is being answered. Twice does no harm."""
        self._task.cancel()
        for sock, readiness in self._sockets:
            readiness.close()
            sock.close()
        await asyncio.wait([self._task])
        if self._path is not None:
            release_path(*self._path)

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for sock, readiness in self._sockets:
                group.create_task(self._accept(sock, readiness, group))

    async def _accept(self, listener: socket.socket, readiness: Readiness, group: asyncio.TaskGroup) -> None:
        while True:
            sock = await accept(listener, readiness, self._log)
            if refusal := self._refuses(sock):
                self._log.warning("metrics_refused", reason=refusal)
                sock.close()
                continue
            self._connections += 1
            group.create_task(self._serve(FdSocket(sock)))

    def _refuses(self, sock: socket.socket) -> str:
        """Say why a connection is closed unheard; empty: it is heard."""
        if self._connections >= MAX_CONNECTIONS:
            return f"{MAX_CONNECTIONS} connections are open"
        if sock.family == socket.AF_UNIX or not self._allow:
            return ""
        try:
            peer = peer_name(sock)
            host = ipaddress.ip_address(plain_host(sock.getpeername()[0].partition("%")[0]))
        except OSError:
            return "it is gone again"
        return "" if any(host in network for network in self._allow) else f"{peer} is not in [metrics] allow"

    async def _serve(self, connection: FdSocket) -> None:
        try:
            async with asyncio.timeout(self._deadline_s):
                await self._exchange(connection)
        except (TimeoutError, ChannelError, ProtocolError) as error:
            self._log.debug("metrics_connection_lost", error=str(error))
        except Exception:  # noqa: BLE001 - the top of a session: a bug in a figure must not end the others
            self._log.exception("metrics_bug")
        finally:
            self._connections -= 1
            connection.close()

    async def _exchange(self, connection: FdSocket) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            received, _ = await connection.receive(HEAD_MAX_BYTES)
            head += received
            if not received:
                return
            if len(head) > HEAD_MAX_BYTES:
                status = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
                too_large = _refusal(status, f"more than {HEAD_MAX_BYTES} bytes").encode(with_body=True)
                await self._last_word(connection, too_large)
                return
        await self._last_word(connection, answer(head.partition(b"\r\n\r\n")[0], self._registry))

    async def _last_word(self, connection: FdSocket, text: bytes) -> None:
        """Send, and let the peer close first: what it still sends would make our close a reset, and the text lost."""
        await connection.send(text)
        with contextlib.suppress(OSError):
            connection.sock.shutdown(socket.SHUT_WR)
        for _ in range(HEAD_MAX_BYTES):
            if not (await connection.receive(HEAD_MAX_BYTES))[0]:
                return


async def serve_metrics(
    address: TcpAddress | UnixAddress,
    registry: CollectorRegistry,
    allow: Sequence[Network],
    log: FilteringBoundLogger,
    *,
    mode: int,
    group: str | None,
    deadline_s: float = DEADLINE_S,
) -> MetricsServer:
    """Listen at ``address``; a Unix socket gets ``mode`` and ``group``. Raises ChannelError."""
    if isinstance(address, TcpAddress):
        sockets = bind_tcp(address, await resolve(address, passive=True))
        return MetricsServer(sockets, registry, allow, log, deadline_s=deadline_s)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        claim_path(sock, address.path)
        finish_path(address.path, mode, group)
        sock.listen(BACKLOG)
        server = MetricsServer([sock], registry, allow, log, deadline_s=deadline_s)
        server.owns(address.path)
    except BaseException:
        sock.close()
        raise
    return server


async def open_metrics(
    config: Config, host: Host, machine: Machine, history: History, outgoing: Progress, trust: Callable[[], Trust]
) -> MetricsServer:
    """Serve the figures of one daemon, as its configuration says. Raises ChannelError."""
    address = config.metrics.address
    assert address is not None
    sources = Sources(
        tool=host.site.tool,
        machine=machine,
        workloads=lambda: len(machine.workloads),
        ownership=host.ownership,
        lock=host.lock,
        history=history,
        outgoing=outgoing,
        downtime_limit_ms=lambda: host.settings.parameters.integer("downtime-limit"),
        trust=trust,
    )
    registry, allow = build_registry(sources), parse_allow(config.metrics.allow)
    mode, group = int(config.control.mode), config.control.group
    if (readers := config.control.read_only_group) is not None:
        # That socket is open for everybody, and asks who connects; this one does not ask.
        mode, group = READERS_MODE, readers
    server = await serve_metrics(address, registry, allow, host.log, mode=mode, group=group)
    host.log.info("metrics_listening", addresses=server.addresses)
    return server


def _address_of(sock: socket.socket) -> str:
    name = sock.getsockname()
    if sock.family == socket.AF_UNIX:
        return f"unix:{name}"
    return f"[{name[0]}]:{name[1]}" if sock.family == socket.AF_INET6 else f"{name[0]}:{name[1]}"
