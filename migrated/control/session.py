"""One QMP client: greeting, negotiation, commands in their order, events, and a bounded way out.

The rule of the file: nothing that a client does, and nothing that a command does, ends anything but this session, and
most of it not even that. A session is two tasks: one reads, runs and answers commands one after the other, the other
writes. A client that goes away lets a running command finish.

Source: QEMU's "QMP protocol specification"; the error texts are those of QEMU 7.2.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

import structlog

from migrated.control.arguments import convert_arguments
from migrated.control.commands import COMMANDS, NOT_IMPLEMENTED, VERSION, Call
from migrated.control.outbox import Outbox
from migrated.control.ports import Services
from migrated.errors import CommandError, MigratedError
from migrated.transport.fd_socket import FdSocket
from migrated.transport.local_peer import Access
from migrated.wire import qmp

log = structlog.get_logger(__name__)

RECEIVE_BYTES = 64 << 10
"""Bytes taken in, or sent, at once: more than any sensible command."""

PARSE_BYTES = 4 << 10
"""Bytes parsed before others get their turn: at the parser's slowest (nothing but brackets) about 2 ms."""


@dataclass(frozen=True, slots=True)
class SessionLimits:
    """What one client may cost."""

    unread_bytes: int = 1 << 20
    """Output a client may leave unread; events are about 150 bytes, so this is some 7000 of them."""
    unread_deadline_s: float = 30.0
    """How long a client that reached `unread_bytes` may take to make room for the answer it asked for."""


@dataclass(frozen=True, slots=True)
class Request:
    """A command as it stood in the input, its envelope checked."""

    name: str
    arguments: Mapping[str, object]


class Session:
    """One connection to the control socket."""

    def __init__(
        self, connection: FdSocket, services: Services, limits: SessionLimits, number: int, access: Access
    ) -> None:
        self.negotiated = False
        self._access = access
        self._connection = connection
        self._services = services
        self._limits = limits
        self._outbox = Outbox(limits.unread_bytes)
        self._fds: deque[int] = deque()
        self._closing = False
        self._log = log.bind(session=number)

    async def run(self) -> None:
        """Serve the client until it goes away, is too slow, or `close` is called. Raises nothing but cancellation."""
        self._log.debug("qmp_session_started")
        try:
            async with asyncio.TaskGroup() as tasks:
                writer = tasks.create_task(self._write(), name="qmp-write")
                self._outbox.offer(qmp.encode_greeting(VERSION))
                await self._read()
                self._outbox.finish()
                await asyncio.wait([writer], timeout=self._limits.unread_deadline_s)
                self._disconnect()
        finally:
            self._drop_fds()
            self._connection.close()
        self._log.debug("qmp_session_ended")

    def emit(self, line: bytes) -> None:
        """Send an event, if the client has negotiated; a client with too much unread is disconnected."""
        if self.negotiated and not self._outbox.offer(line):
            self._log.warning("qmp_client_too_slow", unread_bytes=self._limits.unread_bytes)
            self._disconnect()

    def close(self) -> None:
        """Take no more commands; what is queued, and the answer of a command under way, still goes out."""
        self._closing = True
        self._shut(socket.SHUT_RD)

    def take_fd(self) -> int | None:
        return self._fds.popleft() if self._fds else None

    # Reading: the session's own task.

    async def _read(self) -> None:
        stream = qmp.JsonStream()
        while data := await self._receive():
            for start in range(0, len(data), PARSE_BYTES):
                for event in stream.feed(data[start : start + PARSE_BYTES]):
                    await self._react(event)
                    await asyncio.sleep(0)  # many commands in one packet must not keep the loop from a migration
                await asyncio.sleep(0)

    async def _react(self, event: qmp.Message | qmp.Malformed) -> None:
        if self._closing:
            return
        match event:
            case qmp.Malformed(desc):
                await self._send(encode_refusal(CommandError(desc, error_id="argument-invalid")))
            case qmp.Message(value):
                await self._send(await self._answer(value))

    async def _receive(self) -> bytes:
        """Return the next bytes; empty when there shall be no more. Descriptors replace those nobody took."""
        if self._closing:
            return b""
        try:
            data, fds = await self._connection.receive(RECEIVE_BYTES)
        except (MigratedError, OSError) as error:
            self._log.info("qmp_client_lost", error=str(error))
            return b""
        if fds:
            self._drop_fds()
            self._fds.extend(fds)
        return data

    async def _answer(self, value: object) -> bytes:
        """Run one command and return the line that answers it."""
        ident = value.get("id", qmp.ABSENT) if isinstance(value, dict) else qmp.ABSENT
        try:
            return qmp.encode_return(await self._execute(check_request(value)), ident)
        except MigratedError as error:
            self._log.info("qmp_command_refused", error=str(error), error_id=error.error_id)
            return encode_refusal(error, ident)
        except Exception as error:  # noqa: BLE001 - the top of a session: a bug in a command must not end the socket
            self._log.exception("qmp_command_crashed", error_id="internal")
            return encode_refusal(MigratedError(f"Internal error: {type(error).__name__}: {error}"), ident)

    async def _execute(self, request: Request) -> object:
        if not self.negotiated and request.name != "qmp_capabilities":
            raise CommandError(
                "Expecting capabilities negotiation with 'qmp_capabilities'",
                "CommandNotFound",
                error_id="command-unknown",
            )
        if self.negotiated and request.name == "qmp_capabilities":
            raise CommandError(
                "Capabilities negotiation is already complete, command ignored",
                "CommandNotFound",
                error_id="command-unknown",
            )
        command = COMMANDS.get(request.name)
        if command is None:
            if request.name in NOT_IMPLEMENTED:
                text = f"{request.name} is not implemented by this version of migrated"
                raise CommandError(text, error_id="command-unknown")
            text = f"The command {request.name} has not been found"
            raise CommandError(text, "CommandNotFound", error_id="command-unknown")
        if self._access is Access.READ_ONLY and not command.asks:
            text = f"{request.name} is for those with full access to this socket; you may ask (query-...)"
            raise CommandError(text, error_id="access-denied")
        arguments = convert_arguments(command.arguments, request.arguments)
        return await command.run(Call(self._services, self), arguments)

    def _drop_fds(self) -> None:
        while (fd := self.take_fd()) is not None:
            os.close(fd)

    # Writing.

    async def _send(self, line: bytes) -> None:
        try:
            async with asyncio.timeout(self._limits.unread_deadline_s):
                await self._outbox.put(line)
        except TimeoutError:
            self._log.warning("qmp_client_does_not_read", deadline_s=self._limits.unread_deadline_s)
            self._disconnect()

    async def _write(self) -> None:
        try:
            while batch := await self._outbox.take(RECEIVE_BYTES):
                await self._connection.send(batch)
        except (MigratedError, OSError) as error:
            self._log.info("qmp_client_lost", error=str(error))
            self._disconnect()

    def _disconnect(self) -> None:
        """End the session from wherever it stands: the reading task sees an end of input, the writing one an error."""
        self._outbox.discard()
        self._shut(socket.SHUT_RDWR)

    def _shut(self, how: int) -> None:
        with contextlib.suppress(OSError):  # the client went away first
            self._connection.sock.shutdown(how)


def encode_refusal(error: MigratedError, ident: object = qmp.ABSENT) -> bytes:
    """Return the line that says why a command, or a client, is refused."""
    refused = isinstance(error, CommandError)
    known = "nothing was changed" if refused else "what the command had begun may be half done"
    qmp_class = error.qmp_class if isinstance(error, CommandError) else "GenericError"
    return qmp.encode_error(qmp_class, str(error), ident, {"x-migrated-error": error.explain("command", known)})


def check_request(value: object) -> Request:
    """Check a command's envelope. Raises CommandError with QEMU's texts."""
    if not isinstance(value, dict):
        raise CommandError("QMP input must be a JSON object")
    for member, content in value.items():
        if member == "execute" and not isinstance(content, str):
            raise CommandError("QMP input member 'execute' must be a string")
        if member == "arguments" and not isinstance(content, dict):
            raise CommandError("QMP input member 'arguments' must be an object")
        if member not in ("execute", "arguments", "id"):
            raise CommandError(f"QMP input member '{member}' is unexpected")
    if "execute" not in value:
        raise CommandError("QMP input lacks member 'execute'")
    return Request(value["execute"], value.get("arguments", {}))
