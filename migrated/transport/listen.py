"""Waiting for the channel of an incoming migration.

The rule of the file: one migration at a time. A further connection, or one from an address that is not allowed, is
closed at once with a log line; it never waits in a queue. Where there are keys, nobody counts who has not proven who he
is.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import socket
import struct
from collections.abc import Awaitable, Callable, Sequence
from typing import assert_never

import structlog
from structlog.typing import FilteringBoundLogger

from migrated.errors import ChannelError, CommandError
from migrated.transport.accept import accept
from migrated.transport.address import Address, ExecAddress, FdAddress, FileAddress, TcpAddress, UnixAddress
from migrated.transport.bind import bind_tcp, bind_unix
from migrated.transport.channel import Channel, SocketChannel
from migrated.transport.dial import CLEARTEXT, TakeFd, channel_of_fd, peer_name, plain_host, resolve, secured
from migrated.transport.door import Door
from migrated.transport.file import open_file
from migrated.transport.pipe import run_to_read
from migrated.transport.readiness import Readiness
from migrated.transport.tls_channel import TlsChannel, names_of
from migrated.transport.trust import Trust
from migrated.transport.unix_path import release_path

BUSY = "another migration is under way"
OnChannel = Callable[[Channel], Awaitable[None]]
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class Listener:
    """Hands channels to ``on_channel``, one at a time, and drops each when that returns. Made by `listen`."""

    def __init__(
        self,
        address: Address,
        on_channel: OnChannel,
        allow: Sequence[Network],
        second: Callable[[Channel], bool],
        trust: Callable[[], Trust],
        cleartext_answer: bytes,
        log: FilteringBoundLogger,
    ) -> None:
        self.address = address
        self.busy = False
        """True while a channel is being handled."""
        self._on_channel = on_channel
        self._allow = allow
        self._second = second
        self._trust = trust
        self._log = log.bind(listener=str(address))
        self._door = Door(self._log, cleartext_answer)
        self._names: tuple[str, ...] = ()
        """What the peer that is being handled is called; () where nobody has proven anything."""
        self._sockets: list[tuple[socket.socket, Readiness]] = []
        self._path: tuple[str, os.stat_result] | None = None
        self._single: Channel | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def addresses(self) -> list[dict[str, object]]:
        """Where connections are accepted, as QMP SocketAddress objects with the real ports."""
        if isinstance(self.address, FdAddress):
            return [{"type": "fd", "str": self.address.name}]
        return [_qmp_address(sock) for sock, _ in self._sockets]

    @property
    def over(self) -> bool:
        """True when the one channel there was has been handled: nothing can come here any more."""
        return self._single is not None and self._task is not None and self._task.done()

    @property
    def takes_one(self) -> bool:
        """True when the one channel there is was named by whoever asked: no stranger can connect."""
        return self._single is not None

    async def open(self, fds: TakeFd) -> None:
        """Bind, or open the one channel there is, and start. `listen` calls this. Raises as `listen` does."""
        match self.address:
            case TcpAddress() as address:
                self._watch(*bind_tcp(address, await resolve(address, passive=True)))
            case UnixAddress(path=path):
                sock, identity = bind_unix(path)
                self._watch(sock)
                self._path = path, identity
            case FdAddress(name=name):
                self._single = await channel_of_fd(fds(name), str(self.address), writes=False, trust=self._trust())
            case ExecAddress(command=command):
                self._single = run_to_read(command, str(self.address))
            case FileAddress(path=path, offset=offset):
                self._single = await open_file(path, offset, writes=False)
            case _:
                assert_never(self.address)
        # The one task outside a group: it is the group, and `stop` awaits it.
        self._task = asyncio.get_running_loop().create_task(self._run(), name=f"listener {self.address}")

    def _watch(self, *sockets: socket.socket) -> None:
        self._sockets = [(sock, Readiness(sock.fileno())) for sock in sockets]

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as group:
            if self._single is not None:
                group.create_task(self._handle(self._single))
            for sock, readiness in self._sockets:
                group.create_task(self._accept(sock, readiness, group))

    async def _accept(self, listener: socket.socket, readiness: Readiness, group: asyncio.TaskGroup) -> None:
        while True:
            try:
                sock = await accept(listener, readiness, self._log)
            except ConnectionAbortedError:
                return  # `close` was called
            try:
                peer = _name_of(sock)
                refusal = self._refusal(sock)
            except OSError:
                sock.close()  # gone before it was looked at
                continue
            if refusal:
                self._log.warning("connection_refused", peer=peer, reason=refusal)
                sock.close()
                continue
            try:
                channel = secured(sock, peer, self._trust(), None)
            except (ChannelError, OSError) as error:
                self._log.warning("connection_refused", peer=peer, reason=str(error))
                continue
            if isinstance(channel, TlsChannel):
                group.create_task(self._admit(channel, group))
            else:
                await self._take(channel, group)

    async def _admit(self, channel: TlsChannel, group: asyncio.TaskGroup) -> None:
        try:
            if await self._door.admit(channel):
                await self._take(channel, group)
        except Exception:  # noqa: BLE001 - the top of a job: a bug here must not end the listener
            self._log.exception("incoming_channel_bug", peer=channel.peer)
            channel.abort()

    async def _take(self, channel: SocketChannel, group: asyncio.TaskGroup) -> None:
        """Hand over a channel whose peer may come, now or as the second of the one that is here."""
        if not self.busy:
            self.busy, self._names = True, names_of(channel)
            group.create_task(self._handle(channel))
        elif names_of(channel) != self._names or not self._second(channel):
            self._log.warning("connection_refused", peer=channel.peer, reason=BUSY)
            with contextlib.suppress(ChannelError):
                await channel.close()

    def _refusal(self, sock: socket.socket) -> str | None:
        if self._allow and sock.family in (socket.AF_INET, socket.AF_INET6):
            host = ipaddress.ip_address(plain_host(sock.getpeername()[0].partition("%")[0]))
            if not any(host in network for network in self._allow):
                return "the address is not in the list of allowed peers"
        return None

    async def _handle(self, channel: Channel) -> None:
        self.busy = True
        try:
            if channel is self._single and isinstance(channel, TlsChannel) and not await self._door.admit(channel):
                return
            self._names = names_of(channel)
            self._log.info("incoming_channel", peer=channel.peer, certificate=", ".join(self._names) or None)
            await self._on_channel(channel)
        except Exception:  # noqa: BLE001 - the top of a job: a bug in one must not end the listener
            self._log.exception("incoming_channel_bug", peer=channel.peer)
        finally:
            channel.abort()  # nothing, where it was closed in order
            self.busy = False

    async def close(self) -> None:
        """Stop listening; a channel that is being handled goes on to its own end. Idempotent."""
        for sock, readiness in self._sockets:
            readiness.close()
            sock.close()
        self._sockets = []
        self._door.close()
        if self._path is not None:
            release_path(*self._path)
            self._path = None

    async def stop(self) -> None:
        """Stop listening, cancel the handling of a channel, and wait for its end. Idempotent."""
        await self.close()
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        if self._single is not None:
            self._single.abort()


async def listen(
    address: Address,
    on_channel: OnChannel,
    *,
    allow: Sequence[str] = (),
    fds: TakeFd,
    second: Callable[[Channel], bool] = lambda channel: False,
    trust: Callable[[], Trust] = lambda: CLEARTEXT,
    cleartext_answer: bytes = b"",
    log: FilteringBoundLogger | None = None,
) -> Listener:
    """Listen on ``address``; ``exec:``, ``fd:`` and ``file:`` produce exactly one channel.

    ``second`` is asked to take a connection of the same peer that comes while one is handled, and has it from then on;
    it is refused where that returns False. ``trust`` is asked for each connection; ``cleartext_answer`` is what a
    source is told that sends a stream where TLS is spoken.
    ``allow`` lists the IP addresses or networks that may connect by TCP; empty allows all. Raises ChannelError when
    the address cannot be had, CommandError for an impossible ``allow``, and what ``fds`` raises.
    """
    log = log or structlog.get_logger()
    listener = Listener(address, on_channel, parse_allow(allow), second, trust, cleartext_answer, log)
    await listener.open(fds)
    return listener


def parse_allow(allow: Sequence[str]) -> list[Network]:
    """Return the networks in ``allow``. Raises CommandError."""
    networks = []
    for entry in allow:
        try:
            networks.append(ipaddress.ip_network(entry, strict=False))
        except ValueError as error:
            raise CommandError(f"'{entry}' is not an IP address or network") from error
    return networks


def _name_of(sock: socket.socket) -> str:
    if sock.family != socket.AF_UNIX:
        return peer_name(sock)
    pid, _, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return f"unix:{sock.getsockname()} (pid {pid})"


def _qmp_address(sock: socket.socket) -> dict[str, object]:
    if sock.family == socket.AF_UNIX:
        return {"type": "unix", "path": sock.getsockname()}
    host, port = sock.getsockname()[:2]
    family = "ipv6" if sock.family == socket.AF_INET6 else "ipv4"
    return {"type": "inet", "host": host, "port": str(port), family: True}
