"""The control socket: accepts QMP clients, gives each a session, and tells all of them about events.

The rule of the file: it knows sessions, not commands. QEMU serves one client per monitor socket; here several are
served at once, each with its own order of commands.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable, Mapping

import structlog

from migrated.control.ports import Services
from migrated.control.session import Session, SessionLimits
from migrated.errors import MigratedError
from migrated.transport.fd_socket import FdSocket, UnixServer, serve_unix
from migrated.wire import qmp

log = structlog.get_logger(__name__)

MAX_SESSIONS = 16
"""Clients at once: an operator or two, management software, monitoring, with room to spare. Each may cost some MiB
(1 MiB of input, 1 MiB of unread output), and the daemon has 80 MiB."""

FLUSH_DEADLINE_S = 2.0
"""How long a closing server waits for clients to read their last answers and events."""


class ControlServer:
    """The QMP server of one daemon."""

    def __init__(
        self,
        services: Services,
        path: str,
        *,
        mode: int = 0o660,
        group: str | None = None,
        limits: SessionLimits | None = None,
        max_sessions: int = MAX_SESSIONS,
    ) -> None:
        self._services = services
        self._path = path
        self._mode = mode
        self._group = group
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
        if self._closing or len(self._sessions) >= self._max_sessions:
            await self._refuse(connection)
            return
        self._count += 1
        session = Session(connection, self._services, self._limits, self._count)
        self._sessions.add(session)
        self._idle.clear()
        try:
            await session.run()
        finally:
            self._sessions.discard(session)
            if not self._sessions:
                self._idle.set()

    async def _refuse(self, connection: FdSocket) -> None:
        """Say why instead of the greeting; the line is short enough never to wait for the client."""
        why = "The daemon is shutting down" if self._closing else f"Too many clients ({self._max_sessions})"
        log.warning("qmp_client_refused", why=why)
        try:
            await connection.send(qmp.encode_error("GenericError", why))
        except (MigratedError, OSError) as error:
            log.debug("qmp_client_lost", error=str(error))
        finally:
            connection.close()
