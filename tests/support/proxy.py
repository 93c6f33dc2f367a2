"""A TCP proxy between two daemons that breaks links on purpose (there is no netem in this kernel).

Runs in a thread of its own, on loopback. Forward is source to destination. Every fault is an explicit call, or a byte
count at which it happens; nothing here depends on time.

Channels with pages (multifd) are a part of the link that their stream goes over: they stall, swallow and break with it,
and their bytes are counted with its. Bytes that are looked for, and those that are kept, are the stream's.
"""

from __future__ import annotations

import select
import socket
import struct
import threading
from dataclasses import dataclass, field
from typing import Self

CHUNK = 1 << 16
#: The first byte of a channel with pages.
CHANNEL = b"\x11"


@dataclass
class Direction:
    """One direction of the link."""

    passed: int = 0
    limit: int | None = None
    """Pass this many bytes, then do what `at_limit` says."""
    at_limit: str = "cut"
    """cut (RST both ways) | stall (pass nothing more) | swallow (read on, deliver nothing, not even the end)"""
    flip_at: int | None = None
    """Flip a bit of the byte at this offset."""
    flip_behind: tuple[bytes, int] | None = None
    """Flip a bit so many bytes behind the end of these, once."""
    cut_before: bytes | None = None
    """Cut where these bytes would pass (in one piece), once."""
    hit: threading.Event = field(default_factory=threading.Event)
    kept: bytearray | None = None
    """Set to an empty one to keep a copy of what is read here."""

    @property
    def stalled(self) -> bool:
        return self.limit is not None and self.passed >= self.limit and self.at_limit == "stall"

    @property
    def swallows(self) -> bool:
        return self.limit is not None and self.passed >= self.limit and self.at_limit == "swallow"


class _Link:
    """A connection, the channels that belong to it, and where each socket's bytes go."""

    def __init__(
        self,
        client: socket.socket,
        server: socket.socket,
        ways: dict[socket.socket, tuple[socket.socket, Direction]],
    ) -> None:
        self.all = [client, server]
        self.ways = ways
        self.unheard = False
        """An end was swallowed: only a cut makes the other side notice."""
        self.unknown: list[socket.socket] = []
        """Connections that came meanwhile, and have said nothing yet."""

    def drop(self, *channel: socket.socket) -> None:
        """Reset a channel of which one end is gone; the rest of the link stays."""
        for sock in channel:
            self.ways.pop(sock, None)
            self.all.remove(sock)
            _reset(sock)

    def close(self, *, in_order: bool) -> None:
        for sock in self.all:
            sock.close() if in_order else _reset(sock)


class Proxy:
    """Accepts any number of connections, one at a time with its channels, and passes them on to ``target``."""

    def __init__(self, target: tuple[str, int] | str) -> None:
        self.target = target
        """Where the next connection goes: host and port, or the path of a Unix socket."""
        self.target_after_cut: tuple[str, int] | str | None = None
        """Where connections go once `Direction.cut_before` has struck."""
        self.forward = Direction()
        self.backward = Direction()
        self._waiting: list[socket.socket] = []
        """Connections that come behind the present one."""
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._wake_r, self._wake_w = socket.socketpair()
        self._cut = threading.Event()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def uri(self) -> str:
        return f"tcp:127.0.0.1:{self._listener.getsockname()[1]}"

    def cut(self) -> None:
        """Reset the present connection in both directions."""
        self._cut.set()
        self._wake_w.send(b"x")

    def take_forward(self) -> bytes:
        """Return what was kept of the forward direction, and keep from here on."""
        kept, self.forward.kept = self.forward.kept or bytearray(), bytearray()
        return bytes(kept)

    def resume(self) -> None:
        """Let go on what stalled at its limit."""
        self.forward.limit = self.backward.limit = None
        self._wake_w.send(b"x")

    def close(self) -> None:
        self._closing.set()
        self.cut()
        self._thread.join()
        for sock in (self._listener, self._wake_r, self._wake_w, *self._waiting):
            sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    def _run(self) -> None:
        while not self._closing.is_set():
            if not self._waiting:
                readable, _, _ = select.select([self._listener, self._wake_r], [], [])
                if self._wake_r in readable:
                    self._wake_r.recv(4096)
                    self._cut.clear()
                    continue
                self._waiting.append(self._listener.accept()[0])
            link = self._joined(self._waiting.pop(0))
            if link is not None:
                self._pump(link)

    def _joined(self, client: socket.socket) -> _Link | None:
        """Have a connection lead somewhere; reset it where that does not exist."""
        try:
            server = _connect(self.target)
        except OSError:
            _reset(client)
            return None
        return _Link(client, server, {client: (server, self.forward), server: (client, self.backward)})

    def _pump(self, link: _Link) -> None:
        whole = self._passes_all(link)
        self._waiting += link.unknown
        link.close(in_order=whole)

    def _passes_all(self, link: _Link) -> bool:
        """Pass bytes on until both ends have ended; False where the link broke before."""
        while link.ways or link.unheard:
            ready = [sock for sock, (_, way) in link.ways.items() if not way.stalled]
            readable, _, _ = select.select([*ready, self._wake_r, self._listener, *link.unknown], [], [])
            if self._wake_r in readable:
                self._wake_r.recv(4096)
            if self._cut.is_set():
                self._cut.clear()
                return False
            for sock in readable:
                if sock is self._listener:
                    link.unknown.append(self._listener.accept()[0])
                elif sock in link.unknown:
                    self._sort(link, sock)
                elif sock in link.ways and not self._passes(link, sock):
                    return False
        return True

    def _sort(self, link: _Link, sock: socket.socket) -> None:
        """Make a channel with pages a part of the link; everybody else has to wait."""
        link.unknown.remove(sock)
        try:
            begins = sock.recv(1, socket.MSG_PEEK)
        except OSError:
            begins = b""
        if begins != CHANNEL:
            self._waiting.append(sock)
        elif (channel := self._joined(sock)) is not None:
            link.ways |= channel.ways
            link.all += channel.all

    def _passes(self, link: _Link, sock: socket.socket) -> bool:
        """Pass something on; False where the link breaks."""
        to, way = link.ways[sock]
        main = sock in link.all[:2]
        verdict = self._pass(sock, to, way, main=main)
        if verdict == "gone" and not main:
            link.drop(sock, to)
            return True
        if verdict in ("end", "unheard"):
            link.unheard = link.unheard or verdict == "unheard"
            del link.ways[sock]
        return verdict not in ("cut", "gone")

    def _pass(self, sock: socket.socket, to: socket.socket, way: Direction, *, main: bool) -> str:
        room = CHUNK if way.limit is None or way.at_limit == "swallow" else min(CHUNK, way.limit - way.passed)
        try:
            data = sock.recv(room) if room else b""
        except OSError:
            return "unheard" if way.swallows else "gone"
        if room and not data:
            return _end(to, way)
        if way.kept is not None and main:
            way.kept += data
        data = _changed(data, way, main=main)
        if main and way.cut_before is not None and (at := data.find(way.cut_before)) >= 0:
            way.cut_before = None
            to.sendall(data[:at])
            if self.target_after_cut is not None:
                self.target = self.target_after_cut
            way.hit.set()
            return "cut"
        start, way.passed = way.passed, way.passed + len(data)
        if way.limit is not None and way.passed >= way.limit:
            way.hit.set()
            if way.at_limit == "swallow":
                data = data[: max(0, way.limit - start)]
        try:
            to.sendall(data)
        except OSError:
            return "gone"
        if way.limit is not None and way.passed >= way.limit and way.at_limit != "swallow":
            return way.at_limit
        return "go"


def _changed(data: bytes, way: Direction, *, main: bool) -> bytes:
    """Flip what is to be flipped."""
    at = -1
    if way.flip_at is not None and way.passed <= way.flip_at < way.passed + len(data):
        at = way.flip_at - way.passed
    if main and way.flip_behind is not None and (found := data.find(way.flip_behind[0])) >= 0:
        at = found + len(way.flip_behind[0]) + way.flip_behind[1]
        way.flip_behind = None
        way.hit.set()
    if at < 0:
        return data
    return data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]


def _end(to: socket.socket, way: Direction) -> str:
    if way.swallows:
        return "unheard"
    try:
        to.shutdown(socket.SHUT_WR)
    except OSError:
        return "gone"
    return "end"


def _connect(target: tuple[str, int] | str) -> socket.socket:
    if not isinstance(target, str):
        return socket.create_connection(target)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.connect(target)
    except OSError:
        sock.close()
        raise
    return sock


def _reset(sock: socket.socket) -> None:
    """Close with RST."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()
