"""The control socket: accepts QMP clients, gives each a session, and tells all of them about events.

The rule of the file: it knows sessions, not commands. QEMU serves one client per monitor socket; here several are
served at once, each with its own order of commands. Who a client is decides what its session may do.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Callable, Mapping

import structlog

from migrated.control.ports import Services
from migrated.control.session import Session, SessionLimits, encode_refusal
from migrated.errors import CommandError, MigratedError
from migrated.transport.fd_socket import FdSocket, UnixServer, serve_unix
from migrated.transport.local_peer import Access, AccessRule, local_peer
from migrated.wire import qmp

log = structlog.get_logger(__name__)

MAX_SESSIONS = 16
"""Clients at once: an operator or two, management software, monitoring, with room to spare. Each may cost some MiB
(1 MiB of input, 1 MiB of unread output), and the daemon has 80 MiB."""

FLUSH_DEADLINE_S = 2.0
"""How long a closing server waits for clients to read their last answers and events."""


class ControlServer:
    """The QMP server of one daemon.

    Commands are for root, the daemon's user and members of ``group`` (the daemon's own, if None); members of
    ``read_only_group`` may ask, and see events.
    """

    def __init__(
        self,
        services: Services,
        path: str,
        *,
        mode: int = 0o660,
        group: str | None = None,
        read_only_group: str | None = None,
        limits: SessionLimits | None = None,
        max_sessions: int = MAX_SESSIONS,
    ) -> None:
        self._services = services
        self._path = path
        self._mode = mode
        self._group = group
        self._read_only_group = read_only_group
        self._rule = AccessRule(frozenset())
        self._limits = limits or SessionLimits()
        self._max_sessions = max_sessions
        self._sessions: set[Session] = set()
        self._count = 0
        self._listener: UnixServer | None = None
        self._unsubscribe: Callable[[], None] | None = None
        self._closing = False
        self._idle = asyncio.Event()
        self._idle.set()

    async def start(self) -> None:
        """Listen. Raises ChannelError when that is not possible."""
        own = os.getegid() if self._group is None else self._group
        self._rule = AccessRule.of(own, read_only_group=self._read_only_group)
        self._listener = await serve_unix(self._path, socket.SOCK_STREAM, self._mode, self._group, self._serve)
        self._unsubscribe = self._services.migrator.subscribe(self.broadcast)
        log.info("qmp_listening", path=self._path)

    def broadcast(self, name: str, data: Mapping[str, object]) -> None:
        """Send an event to every client that has negotiated."""
        line = qmp.encode_event(name, data, time.time_ns() // 1000)
        for session in tuple(self._sessions):
            session.emit(line)

    async def close(self, reason: str | None = None) -> None:
        """Stop serving: say why in a SHUTDOWN event, let answers go out, end all sessions. Idempotent.

        ``reason`` is QEMU's ShutdownCause, such as "host-qmp-quit" or "host-signal".
        """
        if reason and not self._closing:
            self.broadcast("SHUTDOWN", {"guest": False, "reason": reason})
        self._closing = True
        if self._unsubscribe:
            self._unsubscribe()
            self._unsubscribe = None
        for session in tuple(self._sessions):
            session.close()
        try:
            async with asyncio.timeout(FLUSH_DEADLINE_S):
                await self._idle.wait()
        except TimeoutError:
            log.warning("qmp_sessions_cut", sessions=len(self._sessions))
        if self._listener:
            await self._listener.close()
            self._listener = None

    async def _serve(self, connection: FdSocket) -> None:
        try:
            access = self._admit(connection)
        except MigratedError as error:
            await self._refuse(connection, error)
            return
        self._count += 1
        session = Session(connection, self._services, self._limits, self._count, access)
        self._sessions.add(session)
        self._idle.clear()
        try:
            await session.run()
        finally:
            self._sessions.discard(session)
            if not self._sessions:
                self._idle.set()

    def _admit(self, connection: FdSocket) -> Access:
        """Return what the client may do. Raises CommandError or KernelError when that is nothing."""
        if self._closing:
            raise CommandError("The daemon is shutting down")
        peer = local_peer(connection.sock)
        access = self._rule.access(peer)
        if access is None:
            raise CommandError(f"{peer} may not use this socket, only {self._rule}", error_id="access-denied")
        if len(self._sessions) >= self._max_sessions:
            raise CommandError(f"Too many clients ({self._max_sessions})")
        return access

    async def _refuse(self, connection: FdSocket, why: MigratedError) -> None:
        """Say why instead of the greeting; the line is short enough never to wait for the client."""
        log.warning("qmp_client_refused", why=str(why), error_id=why.error_id)
        try:
            await connection.send(encode_refusal(why))
        except (MigratedError, OSError) as error:
            log.debug("qmp_client_lost", error=str(error))
        finally:
            connection.close()
